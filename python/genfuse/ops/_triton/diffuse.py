"""The forward process of diffusion: a block of elements a program; backward one program a tile of examples."""

import math

import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import cdiv, launch, launch_rows, rows_of
from genfuse.ops._triton._noise import eps_of

BLOCK = 1024
NOISE, V, VELOCITY = (tl.constexpr(kind) for kind in (1, 2, 3))  # as math.h numbers the targets


@triton.jit
def forward_kernel(
    x0, x0_stride, seed, noise, alpha, sigma, x_t, target, rows, cols,
    TARGET: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    key = tl.load(seed) if seed is not None else 0
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    mask = i < tl.cast(rows, tl.int64) * cols
    row = i // cols
    eps = eps_of(noise, key, first, mask, BLOCK, 4, WIDE)
    x = tl.load(x0 + row * x0_stride + i % cols, mask, 0.0).to(wide)
    a = tl.load(alpha + row, mask, 0.0)
    s = tl.load(sigma + row, mask, 0.0)
    tl.store(x_t + i, (a * x + s * eps).to(x_t.dtype.element_ty), mask)
    if TARGET == NOISE:
        tl.store(target + i, eps.to(x_t.dtype.element_ty), mask)
    if TARGET == V:
        tl.store(target + i, (a * eps - s * x).to(x_t.dtype.element_ty), mask)
    if TARGET == VELOCITY:
        tl.store(target + i, (eps - x).to(x_t.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    x0, x0_stride, seed, noise, gx_t, gv, galpha, gsigma, rows, cols,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    key = tl.load(seed) if seed is not None else 0
    row, here = rows_of(rows, ROWS)
    of_alpha = tl.zeros((ROWS, BLOCK), wide)
    of_sigma = tl.zeros((ROWS, BLOCK), wide)
    for start in range(0, cols, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        mask = here & (columns < cols)
        eps = eps_of(noise, key, row * cols + start, mask, BLOCK, ALIGNED, WIDE)
        x = tl.load(x0 + row * x0_stride + columns, mask, 0.0).to(wide)
        g = tl.load(gx_t + row * cols + columns, mask, 0.0).to(wide)
        of_alpha += g * x
        of_sigma += g * eps
        if gv is not None:
            g = tl.load(gv + row * cols + columns, mask, 0.0).to(wide)
            of_alpha += g * eps
            of_sigma -= g * x
    tl.store(galpha + row, tl.sum(of_alpha, 1, keep_dims=True), here)
    tl.store(gsigma + row, tl.sum(of_sigma, 1, keep_dims=True), here)


def forward(
    dtype: int, x0: Tensor, x0_stride: int, seed: Tensor | None, noise: Tensor | None, rows: int, cols: int,
    partial: Tensor | None, kind: int, alpha: Tensor, sigma: Tensor, x_t: Tensor, target: Tensor,
) -> None:  # fmt: skip
    given = (x0, x0_stride, seed, noise, alpha, sigma, x_t, target, rows, cols)
    launch(forward_kernel, (cdiv(rows * cols, BLOCK),), x_t, *given, TARGET=kind, BLOCK=BLOCK)


def backward(
    dtype: int, x0: Tensor, x0_stride: int, seed: Tensor | None, noise: Tensor | None, rows: int, cols: int,
    partial: Tensor | None, *tensors: Tensor | None,
) -> None:  # fmt: skip
    given = (x0, x0_stride, seed, noise, *tensors, rows, cols)
    launch_rows(backward_kernel, rows, cols, x0, *given, ALIGNED=math.gcd(cols, 4))
