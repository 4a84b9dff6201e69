"""The penalty on the norm of each example's gradient: one program a tile of rows."""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch_rows, rows_of


@triton.jit
def _dot(a, b, here, cols, BLOCK: tl.constexpr, wide: tl.constexpr):
    products = tl.zeros((here.shape[0], BLOCK), wide)
    for start in range(0, cols, BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols)
        products += tl.load(a + j, there, 0.0).to(wide) * tl.load(b + j, there, 0.0).to(wide)
    return tl.sum(products, 1, keep_dims=True)


@triton.jit
def _slope(norm, target, eps, ONE_SIDED: tl.constexpr):
    """The derivative of the penalty of g is slope g."""
    slope = 2.0 - 2.0 * target / tl.where(norm < eps, eps, norm)
    return tl.where(norm < target, 0.0, slope) if ONE_SIDED else slope


@triton.jit
def _scale(gpenalty, row, here, rows, MEAN: tl.constexpr, SUMMED: tl.constexpr, wide: tl.constexpr):
    """The weight of an example in the result, and the gradient of its penalty."""
    weight = tl.full((), 1.0, wide)
    if MEAN:
        weight /= rows
    return weight, weight * tl.load(gpenalty + (row * 0 if SUMMED else row), here, 0.0)


@triton.jit
def forward_kernel(
    gradient, stride, penalty, norm, rows, cols, TARGET: tl.constexpr,
    ONE_SIDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    length = tl.sqrt(_dot(gradient + row * stride, gradient + row * stride, here, cols, BLOCK, wide))
    excess = length - tl.full((), TARGET, wide)
    if ONE_SIDED:
        excess = tl.where(excess < 0, 0.0, excess)
    tl.store(norm + row, length, here)
    tl.store(penalty + row, excess * excess, here)


@triton.jit
def backward_kernel(
    gradient, stride, gpenalty, norm, ggradient, rows, cols,
    TARGET: tl.constexpr, EPS: tl.constexpr, ONE_SIDED: tl.constexpr, MEAN: tl.constexpr, SUMMED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    target, eps = tl.full((), TARGET, wide), tl.full((), EPS, wide)  # a bare constant would be of float32
    _weight, scale = _scale(gpenalty, row, here, rows, MEAN, SUMMED, wide)
    slope = scale * _slope(tl.load(norm + row, here, 0.0), target, eps, ONE_SIDED)
    for start in range(tl.program_id(1) * BLOCK, cols, tl.num_programs(1) * BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols)
        g = tl.load(gradient + row * stride + j, there, 0.0).to(wide)
        tl.store(ggradient + row * cols + j, (slope * g).to(ggradient.dtype.element_ty), there)


@triton.jit
def double_backward_kernel(
    gradient, stride, gpenalty, norm, v, v_stride, of_gpenalty, of_gradient, rows, cols,
    TARGET: tl.constexpr, EPS: tl.constexpr, ONE_SIDED: tl.constexpr, MEAN: tl.constexpr, SUMMED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    target, eps = tl.full((), TARGET, wide), tl.full((), EPS, wide)
    length = tl.load(norm + row, here, 0.0)
    dot = _dot(gradient + row * stride, v + row * v_stride, here, cols, BLOCK, wide)
    # The derivative of slope g along v is slope v + bend g. Divided one by one: the cube underflows.
    slope, floor = _slope(length, target, eps, ONE_SIDED), tl.where(length < eps, eps, length)
    bend = tl.where(length < eps, 0.0, 2.0 * target / floor * (dot / floor) / floor)
    if ONE_SIDED:
        bend = tl.where(length < target, 0.0, bend)
    weight, scale = _scale(gpenalty, row, here, rows, MEAN, SUMMED, wide)
    tl.store(of_gpenalty + row, weight * slope * dot, here)
    for start in range(0, cols, BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols)
        g = tl.load(gradient + row * stride + j, there, 0.0).to(wide)
        along = slope * tl.load(v + row * v_stride + j, there, 0.0).to(wide) + bend * g
        tl.store(of_gradient + row * cols + j, (scale * along).to(of_gradient.dtype.element_ty), there)


def forward(
    dtype: int, gradient: Tensor, stride: int, rows: int, cols: int, target: float, eps: float, weight: float,
    one_sided: bool, summed: bool, partial: None, penalty: Tensor, norm: Tensor,
) -> None:  # fmt: skip
    each = torch.empty_like(norm) if summed else penalty
    given = (gradient, stride, each, norm, rows, cols)
    launch_rows(forward_kernel, rows, cols, norm, *given, TARGET=target, ONE_SIDED=one_sided)
    if summed:
        torch.sum(each, 0, out=penalty).mul_(weight)


def _launch(
    kernel: Any, split: bool, dtype: int, gradient: Tensor, stride: int, rows: int, cols: int, target: float,
    eps: float, weight: float, one_sided: bool, summed: bool, pieces: None, gpenalty: Tensor, norm: Tensor, *rest: Any,
) -> None:  # fmt: skip
    sizes = {"TARGET": target, "EPS": eps, "ONE_SIDED": one_sided, "MEAN": weight != 1, "SUMMED": summed}
    launch_rows(kernel, rows, cols, norm, gradient, stride, gpenalty, norm, *rest, rows, cols, split=split, **sizes)


backward = partial(_launch, backward_kernel, True)
double_backward = partial(_launch, double_backward_kernel, False)
