"""Affine coupling: one program a tile of rows."""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch_rows, rows_of


@triton.jit
def _log_scale(raw, c, KIND: tl.constexpr):
    """The log-scale and its derivative; KIND counts as math.h does, and takes what it says of c."""
    if KIND == 0 or KIND == 5:
        e = tl.exp(-2.0 * tl.abs(raw))
        s = tl.where(raw < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        slope = 1.0 - s * s
        if KIND == 5:
            s = c * s
            slope = c * slope
    elif KIND == 1:
        s = raw
        slope = raw * 0.0 + 1.0
    elif KIND == 3:
        share = 1.0 / (1.0 + tl.abs(raw) * c)
        s = raw * share
        slope = share * share
    elif KIND == 4:
        a = raw + 2.0
        e = tl.exp(-tl.abs(a))
        scale = tl.where(a < 0, e, 1.0) / (1.0 + e) + c
        s = tl.log(scale)
        slope = e / ((1.0 + e) * (1.0 + e) * scale)
    else:
        a = raw + 2.0
        s = tl.where(a < 0, a, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a)))
        slope = 1.0 / (1.0 + tl.exp(a))
    return s, slope


@triton.jit
def _raw(theta, shift, factor, step, moved, constant, j, inside, here, KIND: tl.constexpr, wide: tl.constexpr):
    """Log-scales, their derivatives, and shifts."""
    if shift is None:
        shift = theta + tl.where(step == 1, moved, 1)
    c = tl.full(j.shape, constant, wide) if factor is None else tl.load(factor + j, inside, 0.0).to(wide)
    s, slope = _log_scale(tl.load(theta + j.to(tl.int64) * step, inside & here, 0.0).to(wide), c, KIND)
    return s, slope, tl.load(shift + j.to(tl.int64) * step, inside & here, 0.0).to(wide)


@triton.jit
def forward_kernel(
    x, x_stride, theta, theta_stride, step, shift, shift_stride, factor, mask, y, logdet, rows, cols, first, moved,
    constant: tl.constexpr, KIND: tl.constexpr, BY_ELEMENT: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    x, y, theta = x + row * x_stride, y + row * cols, theta + row * theta_stride
    if shift is not None:
        shift += row * shift_stride
    for start in range(0, cols - moved, BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols - moved)
        j = tl.where(j < first, j, j + moved)
        tl.store(y + j, tl.load(x + j, there), there)
        if BY_ELEMENT:
            tl.store(logdet + row * cols + j, tl.zeros((ROWS, BLOCK), wide), there)
    total = tl.zeros((ROWS, BLOCK), wide)
    for start in range(0, moved, BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        inside = j < moved
        there = here & inside
        s, _, t = _raw(theta, shift, factor, step, moved, constant, j, inside, here, KIND, wide)
        v = tl.load(x + first + j, there, 0.0).to(wide)
        if mask is not None:
            keep = tl.load(mask + j, inside, 1) != 0
            s = tl.where(keep, 0.0, s)
            t = tl.where(keep, 0.0, t)
        out = (v - t) * tl.exp(-s) if INVERSE else v * tl.exp(s) + t
        tl.store(y + first + j, out.to(y.dtype.element_ty), there)
        if BY_ELEMENT:
            tl.store(logdet + row * cols + first + j, -s if INVERSE else s, there)
        total += tl.where(there, s, 0.0)
    if not BY_ELEMENT:
        sum = tl.sum(total, 1, keep_dims=True)
        tl.store(logdet + row, -sum if INVERSE else sum, here)


@triton.jit
def backward_kernel(
    x, x_stride, theta, theta_stride, step, shift, shift_stride, factor, mask, gy, glogdet, gx, gparams, gshift,
    rows, cols, first, moved,
    constant: tl.constexpr, KIND: tl.constexpr, BY_ELEMENT: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    x, theta = x + row * x_stride, theta + row * theta_stride
    gy, gx = gy + row * cols, gx + row * cols
    if shift is None:
        gstep = step
        gparams += row * 2 * moved
        gshift = gparams + tl.where(step == 1, moved, 1)
    else:
        gstep = 1
        shift += row * shift_stride
        gparams += row * moved
        gshift += row * moved
    for start in range(tl.program_id(1) * BLOCK, cols - moved, tl.num_programs(1) * BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols - moved)
        j = tl.where(j < first, j, j + moved)
        tl.store(gx + j, tl.load(gy + j, there), there)
    for start in range(tl.program_id(1) * BLOCK, moved, tl.num_programs(1) * BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        inside = j < moved
        there = here & inside
        s, slope, t = _raw(theta, shift, factor, step, moved, constant, j, inside, here, KIND, wide)
        v = tl.load(x + first + j, there, 0.0).to(wide)
        g = tl.load(gy + first + j, there, 0.0).to(wide)
        gl = tl.load(glogdet + row * cols + first + j, there, 0.0) if BY_ELEMENT else tl.load(glogdet + row, here, 0.0)
        if INVERSE:
            scaled = g * tl.exp(-s)
            graw = -(scaled * (v - t) + gl) * slope
            gt = -scaled
        else:
            scaled = g * tl.exp(s)
            graw = (scaled * v + gl) * slope
            gt = g
        if mask is not None:
            keep = tl.load(mask + j, inside, 1) != 0
            scaled = tl.where(keep, g, scaled)
            graw = tl.where(keep, 0.0, graw)
            gt = tl.where(keep, 0.0, gt)
        tl.store(gx + first + j, scaled.to(gx.dtype.element_ty), there)
        tl.store(gparams + j.to(tl.int64) * gstep, graw.to(gx.dtype.element_ty), there)
        tl.store(gshift + j.to(tl.int64) * gstep, gt.to(gx.dtype.element_ty), there)


def _launch(
    kernel: Any, split: bool, dtype: int, kind: int, constant: float, by_element: bool, inverse: bool, x: Tensor,
    x_stride: int, theta: Tensor, theta_stride: int, step: int, shift: Tensor | None, shift_stride: int,
    factor: Tensor | None, mask: Tensor | None, rows: int, cols: int, first: int, moved: int, *tensors: Tensor,
) -> None:  # fmt: skip
    mask = None if mask is None else mask.view(torch.uint8)
    missing = (None,) if split and shift is None else ()  # the shift's own gradient
    sizes = (*missing, rows, cols, first, moved)
    given = (x, x_stride, theta, theta_stride, step, shift, shift_stride, factor, mask, *tensors, *sizes)
    settings: dict[str, Any] = {"constant": constant, "KIND": kind, "BY_ELEMENT": by_element, "INVERSE": inverse}
    launch_rows(kernel, rows, max(moved, cols - moved), x, *given, split=split, **settings)


forward = partial(_launch, forward_kernel, False)
backward = partial(_launch, backward_kernel, True)
