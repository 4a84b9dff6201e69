"""The Triton kernels compile for a GPU where there is none. What they compute, the interpreter shows elsewhere."""

import os
import subprocess
import sys

import pytest

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from genfuse.ops._triton import (
    actnorm, affine_coupling, bernoulli, diffuse, gradient_norm_penalty, interpolate, standard_normal_log_prob,
)
from genfuse.ops._triton import rational_quadratic_spline as spline
from genfuse.ops._triton import reparameterize_kl as module


def check(kernel, types, fixed):
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    binary = compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
    assert len(binary.asm["cubin"]) > 1000


for storage, wide in (("*fp32", False), ("*fp64", True), ("*bf16", False), ("*fp16", False)):
    types = {"p": storage, "seed": "*i64", "x": storage, "n": "i64"}
    check(bernoulli.draw_kernel, types, {"BLOCK": 1024, "WIDE": wide})
    sums = "*fp64" if wide else "*fp32"
    types = {"x": storage, "x_stride": "i32", "params": storage, "params_stride": "i64", "step": "i32",
             "shift": storage, "shift_stride": "i32", "factor": sums, "mask": "*u8", "y": storage, "logdet": sums,
             "gy": storage, "glogdet": sums, "gx": storage, "gparams": storage, "gshift": storage, "cols": "i32",
             "first": "i32", "moved": "i32"}
    for kind, inverse, given in (
        (0, False, ("mask",)), (1, True, ("shift",)), (2, False, ()), (2, True, ("mask",)), (3, False, ("shift",)),
        (4, True, ()), (5, False, ("factor", "mask")),
    ):
        fixed = {name: None for name in ("mask", "shift", "factor") if name not in given}
        fixed |= {"constant": 0.1, "KIND": kind, "BY_ELEMENT": kind > 2, "INVERSE": inverse, "BLOCK": 64, "WIDE": wide}
        check(affine_coupling.forward_kernel, types, fixed)
        check(affine_coupling.backward_kernel, types, fixed if "shift" in given else {**fixed, "gshift": None})
    types = {"x0": storage, "x0_stride": "i64", "seed": "*i64", "noise": storage, "alpha": sums, "sigma": sums,
             "x_t": storage, "target": storage, "gx_t": storage, "gv": storage, "galpha": sums, "gsigma": sums,
             "rows": "i64", "cols": "i64"}
    for target, given, aligned in (("x0", True, True), ("noise", False, False), ("v", False, True), ("v", True, False)):
        fixed = {"BLOCK": 1024, "WIDE": wide, "seed" if given else "noise": None}
        check(diffuse.forward_kernel, types, {**fixed, "TARGET": target})
        check(diffuse.backward_kernel, types, {**fixed, "ALIGNED": aligned, **({} if target == "v" else {"gv": None})})
    types = {"z": storage, "z_stride": "i64", "logdet": sums, "log_prob": sums, "g": sums, "gz": storage, "cols": "i32"}
    for missing in ({}, {"logdet": None}):
        check(standard_normal_log_prob.forward_kernel, types, {"BLOCK": 64, "WIDE": wide, **missing})
    check(standard_normal_log_prob.backward_kernel, types, {"BLOCK": 64, "WIDE": wide})
    types = {"gradient": storage, "stride": "i64", "penalty": sums, "norm": sums, "gpenalty": sums,
             "ggradient": storage, "v": storage, "v_stride": "i64", "of_gpenalty": sums, "of_gradient": storage,
             "cols": "i32"}
    for one_sided, reduction in ((False, "mean"), (True, "sum"), (True, "none")):
        fixed = {"TARGET": 1.0, "ONE_SIDED": one_sided, "BLOCK": 64, "WIDE": wide}
        check(gradient_norm_penalty.forward_kernel, types, fixed)
        fixed |= {"EPS": 1e-12, "REDUCTION": reduction}
        check(gradient_norm_penalty.backward_kernel, types, fixed)
        check(gradient_norm_penalty.double_backward_kernel, types, fixed)
    types = {"real": storage, "real_stride": "i64", "fake": storage, "fake_stride": "i64", "seed": "*i64",
             "epsilon": sums, "x": storage, "cols": "i32"}
    for missing in ({"epsilon": None}, {"seed": None, "real": None}, {"epsilon": None, "fake": None}):
        check(interpolate.between_kernel, types, {"BLOCK": 64, "WIDE": wide, **missing})
    types = {"x": storage, "x_stride": "i64", "log_scale": sums, "shift": sums, "y": storage, "logdet": sums,
             "gy": storage, "glogdet": sums, "gx": storage, "partial": sums, "rows": "i64", "channels": "i32",
             "cells": "i32"}
    for inverse, images in ((False, True), (True, False)):
        fixed = {"INVERSE": inverse, "IMAGES": images, "BLOCK": 64, "WIDE": wide}
        check(actnorm.forward_kernel, types, fixed)
        check(actnorm.backward_kernel, types, {**fixed, "ROWS": 4})
    for aligned in (True, False):
        for noise in (True, False):
            for kernel, tensors in (
                (module.forward_kernel, {"z": storage, "kl": sums}),
                (module.backward_kernel, {"gz": storage, "gkl": sums, "gmu": storage, "glogvar": storage}),
            ):
                fixed = {"BLOCK": 128, "ALIGNED": aligned, "WIDE": wide, "seed" if noise else "noise": None}
                types = {"mu": storage, "mu_stride": "i64", "logvar": storage, "logvar_stride": "i64", "seed": "*i64",
                         "noise": storage, **tensors, "rows": "i64", "cols": "i32", "samples": "i32"}
                check(kernel, types, fixed)
    settings = {"damping": 0.5, "left": -3.0, "right": 3.0, "bottom": -3.0, "top": 3.0, "min_w": 1e-3, "min_h": 1e-3,
                "min_d": 1e-3, "edge": 0.54, "BINS": 8, "TILE": 8}
    for tails, width in enumerate((23, 25, 24, 25)):
        for inverse in (False, True):
            fixed = {**settings, "WIDTH": width, "TAILS": tails, "INVERSE": inverse, "BLOCK": 32, "WIDE": wide,
                     "clip": 6.9 if inverse else 0.0, **({} if tails == 3 else {"table": None})}
            types = {"x": storage, "x_stride": "i32", "params": storage, "params_stride": "i32", "cols": "i32",
                     "table": sums, "boxes": "i32"}
            check(spline.forward_kernel, {**types, "y": storage, "logdet": sums}, fixed)
            types |= {"gy": storage, "glogdet": sums, "gx": storage, "gparams": storage}
            check(spline.backward_kernel, types, fixed)
print("compiled")
"""


def test_the_triton_kernels_compile_for_sm_90_without_a_gpu():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "compiled", run.stderr[-2000:]
