"""Affine coupling: one program a row."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch_rows


@triton.jit
def _log_scale(raw, KIND: tl.constexpr):
    """The log-scale and its derivative; KIND counts as SCALES does."""
    if KIND == 0:
        e = tl.exp(-2.0 * tl.abs(raw))
        s = tl.where(raw < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        slope = 1.0 - s * s
    elif KIND == 1:
        s = raw
        slope = raw * 0.0 + 1.0
    else:
        a = raw + 2.0
        s = tl.where(a < 0, a, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a)))
        slope = 1.0 / (1.0 + tl.exp(a))
    return s, slope


@triton.jit
def forward_kernel(
    x, x_stride, params, params_stride, mask, y, logdet, cols, first, moved,
    KIND: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    x, y, params = x + row * x_stride, y + row * cols, params + row * params_stride
    for start in range(0, cols - moved, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < cols - moved
        j = tl.where(j < first, j, j + moved)
        tl.store(y + j, tl.load(x + j, there), there)
    total = tl.zeros((BLOCK,), wide)
    for start in range(0, moved, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < moved
        s, _ = _log_scale(tl.load(params + j, there, 0.0).to(wide), KIND)
        t = tl.load(params + moved + j, there, 0.0).to(wide)
        v = tl.load(x + first + j, there, 0.0).to(wide)
        if mask is not None:
            keep = tl.load(mask + j, there, 1) != 0
            s = tl.where(keep, 0.0, s)
            t = tl.where(keep, 0.0, t)
        out = (v - t) * tl.exp(-s) if INVERSE else v * tl.exp(s) + t
        tl.store(y + first + j, out.to(y.dtype.element_ty), there)
        total += tl.where(there, s, 0.0)
    sum = tl.sum(total, 0)
    tl.store(logdet + row, -sum if INVERSE else sum)


@triton.jit
def backward_kernel(
    x, x_stride, params, params_stride, mask, gy, glogdet, gx, gparams, cols, first, moved,
    KIND: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    x, params = x + row * x_stride, params + row * params_stride
    gy, gx, gparams = gy + row * cols, gx + row * cols, gparams + row * 2 * moved
    gl = tl.load(glogdet + row)
    for start in range(0, cols - moved, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < cols - moved
        j = tl.where(j < first, j, j + moved)
        tl.store(gx + j, tl.load(gy + j, there), there)
    for start in range(0, moved, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < moved
        s, slope = _log_scale(tl.load(params + j, there, 0.0).to(wide), KIND)
        v = tl.load(x + first + j, there, 0.0).to(wide)
        g = tl.load(gy + first + j, there, 0.0).to(wide)
        if INVERSE:
            scaled = g * tl.exp(-s)
            graw = -(scaled * (v - tl.load(params + moved + j, there, 0.0).to(wide)) + gl) * slope
            gshift = -scaled
        else:
            scaled = g * tl.exp(s)
            graw = (scaled * v + gl) * slope
            gshift = g
        if mask is not None:
            keep = tl.load(mask + j, there, 1) != 0
            scaled = tl.where(keep, g, scaled)
            graw = tl.where(keep, 0.0, graw)
            gshift = tl.where(keep, 0.0, gshift)
        tl.store(gx + first + j, scaled.to(gx.dtype.element_ty), there)
        tl.store(gparams + j, graw.to(gx.dtype.element_ty), there)
        tl.store(gparams + moved + j, gshift.to(gx.dtype.element_ty), there)


def forward(dtype: int, *problem: Any) -> None:
    _launch(forward_kernel, *problem)


def backward(dtype: int, *problem: Any) -> None:
    _launch(backward_kernel, *problem)


def _launch(
    kernel: Any, kind: int, inverse: bool, x: Tensor, x_stride: int, params: Tensor, params_stride: int,
    mask: Tensor | None, rows: int, cols: int, first: int, moved: int, *tensors: Tensor,
) -> None:  # fmt: skip
    mask = None if mask is None else mask.view(torch.uint8)
    given = (x, x_stride, params, params_stride, mask, *tensors, cols, first, moved)
    launch_rows(kernel, rows, max(moved, cols - moved), x, *given, KIND=kind, INVERSE=inverse)
