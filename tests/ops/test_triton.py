"""The Triton kernels compile for a GPU where there is none. What they compute, the interpreter shows elsewhere."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature
from genfuse.ops._triton import (
    actnorm, affine_coupling, bernoulli, diffuse, gradient_norm_penalty, interpolate, standard_normal_log_prob,
)
from genfuse.ops._triton import rational_quadratic_spline as spline
from genfuse.ops._triton import reparameterize_kl as module


gpu = GPUTarget("cuda", 90, 32)
backend = make_backend(gpu)
wrapping = set()


def check(kernel, types, fixed):
    # A launch binds arguments by a function that Triton writes, with local variables of its own (`params`).
    given = dict.fromkeys(kernel.arg_names, 2)
    assert create_function_from_signature(kernel.signature, kernel.params, backend)(**given)[0] == given, kernel
    # Triton gives a kernel integers below 2^31 in 32 bits, all together or one by one.
    signature = {name: "constexpr" if name in fixed else types.get(name, integers) for name in kernel.arg_names}
    binary = compile(ASTSource(kernel, signature, fixed), target=gpu)
    assert len(binary.asm["cubin"]) > 1000
    # A product of two of them that is not widened first wraps from 2^31 on; that of an index and a block's size is less
    # than the number of elements on one axis.
    constants = set(re.findall(r"(%\\S+) = arith.constant", binary.asm["ttir"]))
    for a, b in re.findall(r"arith.muli (%\\S+), (%\\S+) : (?:tensor<[0-9x]*x)?i32", binary.asm["ttir"]):
        if a not in constants and b not in constants:
            wrapping.add(f"{kernel.__module__}.{kernel.__name__}: {a} * {b} in 32 bits")


# Programs of long rows, of short ones and of the shortest.
for storage, wide, integers, block in (
    ("*fp32", False, "i32", 1024), ("*fp32", False, "i64", 8), ("*fp64", True, "i32", 64), ("*bf16", False, "i32", 4),
    ("*fp16", False, "i32", 32),
):
    tile = {"ROWS": 1024 // block, "BLOCK": block}
    types = {"p": storage, "seed": "*i64", "x": storage}
    check(bernoulli.draw_kernel, types, {"BLOCK": 1024, "WIDE": wide})
    sums = "*fp64" if wide else "*fp32"
    types = {"x": storage, "theta": storage, "shift": storage, "factor": sums, "mask": "*u8", "y": storage,
             "logdet": sums,
             "gy": storage, "glogdet": sums, "gx": storage, "gparams": storage, "gshift": storage}
    for kind, inverse, given in (
        (0, False, ("mask",)), (1, True, ("shift",)), (2, False, ()), (2, True, ("mask",)), (3, False, ("shift",)),
        (4, True, ()), (5, False, ("factor", "mask")),
    ):
        fixed = {name: None for name in ("mask", "shift", "factor") if name not in given}
        fixed |= {"constant": 0.1, "KIND": kind, "BY_ELEMENT": kind > 2, "INVERSE": inverse, **tile, "WIDE": wide}
        check(affine_coupling.forward_kernel, types, fixed)
        check(affine_coupling.backward_kernel, types, fixed if "shift" in given else {**fixed, "gshift": None})
    types = {"x0": storage, "seed": "*i64", "noise": storage, "alpha": sums, "sigma": sums,
             "x_t": storage, "target": storage, "gx_t": storage, "gv": storage, "galpha": sums, "gsigma": sums,
             }
    for target, given, aligned in ((0, True, 4), (1, False, 1), (2, False, 4), (2, True, 2), (3, True, 4)):
        fixed = {"BLOCK": 1024, "WIDE": wide, "seed" if given else "noise": None}
        check(diffuse.forward_kernel, types, {**fixed, "TARGET": target})
        fixed |= {**tile, "ALIGNED": aligned, **({} if target == 2 else {"gv": None})}
        check(diffuse.backward_kernel, types, fixed)
    types = {"z": storage, "logdet": sums, "log_prob": sums, "g": sums, "gz": storage}
    for missing in ({}, {"logdet": None}):
        check(standard_normal_log_prob.forward_kernel, types, {**tile, "WIDE": wide, **missing})
    check(standard_normal_log_prob.backward_kernel, types, {**tile, "WIDE": wide})
    types = {"gradient": storage, "penalty": sums, "norm": sums, "gpenalty": sums,
             "ggradient": storage, "v": storage, "of_gpenalty": sums, "of_gradient": storage}
    for one_sided, mean, summed in ((False, True, True), (True, False, True), (True, False, False)):
        fixed = {"TARGET": 1.0, "ONE_SIDED": one_sided, **tile, "WIDE": wide}
        check(gradient_norm_penalty.forward_kernel, types, fixed)
        fixed |= {"EPS": 1e-12, "MEAN": mean, "SUMMED": summed}
        check(gradient_norm_penalty.backward_kernel, types, fixed)
        check(gradient_norm_penalty.double_backward_kernel, types, fixed)
    types = {"real": storage, "fake": storage, "seed": "*i64", "epsilon": sums, "x": storage,
             "g": storage, "greal": storage, "gfake": storage}
    for missing in ("epsilon", "seed"):
        check(interpolate.between_kernel, types, {**tile, "WIDE": wide, missing: None})
        check(interpolate.gradients_kernel, types, {**tile, "WIDE": wide, missing: None})
    types = {"x": storage, "log_scale": sums, "shift": sums, "y": storage, "logdet": sums,
             "gy": storage, "glogdet": sums, "gx": storage, "partial": "*fp64"}
    for inverse, images in ((False, True), (True, False)):
        fixed = {"INVERSE": inverse, "IMAGES": images, **tile, "WIDE": wide}
        check(actnorm.forward_kernel, types, fixed)
        check(actnorm.backward_kernel, types, fixed)
    for aligned, noise in ((4, False), (2, False), (1, False), (1, True)):
        for kernel, tensors in (
            (module.forward_kernel, {"z": storage, "kl": sums}),
            (module.backward_kernel, {"gz": storage, "gkl": sums, "gmu": storage, "glogvar": storage}),
        ):
            fixed = {**tile, "ALIGNED": aligned, "WIDE": wide, "seed" if noise else "noise": None}
            types = {"mu": storage, "logvar": storage, "seed": "*i64", "noise": storage, **tensors}
            check(kernel, types, fixed)
    settings = {"damping": 0.5, "left": -3.0, "right": 3.0, "bottom": -3.0, "top": 3.0, "min_w": 1e-3, "min_h": 1e-3,
                "min_d": 1e-3, "edge": 0.54, "BINS": 8, "TILE": 8}
    for tails, width in enumerate((23, 25, 24, 25)):
        for inverse in (False, True):
            fixed = {**settings, "WIDTH": width, "TAILS": tails, "INVERSE": inverse, "BLOCK": 32, "WIDE": wide,
                     "clip": 6.9 if inverse else 0.0, **({} if tails == 3 else {"table": None})}
            types = {"x": storage, "free": storage, "table": sums}
            check(spline.forward_kernel, {**types, "y": storage, "logdet": sums}, fixed)
            types |= {"gy": storage, "glogdet": sums, "gx": storage, "gparams": storage}
            check(spline.backward_kernel, types, fixed)
print("compiled", *sorted(wrapping))
"""


def test_the_triton_kernels_compile_for_sm_90_without_a_gpu_and_no_product_of_sizes_wraps():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "compiled", run.stdout + run.stderr[-2000:]
