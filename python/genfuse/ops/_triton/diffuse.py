"""The forward process of diffusion: a block of elements a program; backward one program an example."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._diffuse import _gradients, _outputs
from genfuse.ops._triton._noise import normals

BLOCK = 1024


@triton.jit
def _eps(noise, seed, first, mask, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """The noise of elements [first, first + BLOCK)."""
    if noise is not None:
        return tl.load(noise + first + tl.arange(0, BLOCK), mask, 0.0).to(tl.float64 if WIDE else tl.float32)
    return normals(tl.load(seed), first, BLOCK, ALIGNED, WIDE)


@triton.jit
def forward_kernel(
    x0, x0_stride, seed, noise, alpha, sigma, x_t, target, rows, cols,
    TARGET: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    mask = i < rows * cols
    row = i // cols
    eps = _eps(noise, seed, first, mask, BLOCK, True, WIDE)
    x = tl.load(x0 + row * x0_stride + i % cols, mask, 0.0).to(wide)
    a = tl.load(alpha + row, mask, 0.0)
    s = tl.load(sigma + row, mask, 0.0)
    tl.store(x_t + i, (a * x + s * eps).to(x_t.dtype.element_ty), mask)
    if TARGET == "noise":
        tl.store(target + i, eps.to(x_t.dtype.element_ty), mask)
    if TARGET == "v":
        tl.store(target + i, (a * eps - s * x).to(x_t.dtype.element_ty), mask)
    if TARGET == "velocity":
        tl.store(target + i, (eps - x).to(x_t.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    x0, x0_stride, seed, noise, gx_t, gv, galpha, gsigma, rows, cols,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    of_alpha = tl.zeros((BLOCK,), wide)
    of_sigma = tl.zeros((BLOCK,), wide)
    for start in range(0, cols, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < cols
        eps = _eps(noise, seed, row * cols + start, mask, BLOCK, ALIGNED, WIDE)
        x = tl.load(x0 + row * x0_stride + columns, mask, 0.0).to(wide)
        g = tl.load(gx_t + row * cols + columns, mask, 0.0).to(wide)
        of_alpha += g * x
        of_sigma += g * eps
        if gv is not None:
            g = tl.load(gv + row * cols + columns, mask, 0.0).to(wide)
            of_alpha += g * eps
            of_sigma -= g * x
    tl.store(galpha + row, tl.sum(of_alpha, 0))
    tl.store(gsigma + row, tl.sum(of_sigma, 0))


def _launch(
    kernel: Any, grid: tuple[int], x0: Tensor, seed: Tensor | None, noise: Tensor | None, *tensors: Any, **fixed: Any
) -> None:
    x0, x0_stride = _op.rows(x0)
    noise = None if noise is None else noise.contiguous()
    sizes = {"rows": x0.shape[0], "cols": x0.shape[1], "WIDE": x0.dtype is torch.float64}
    with torch.cuda.device(x0.device) if x0.is_cuda else contextlib.nullcontext():
        kernel[grid](x0, x0_stride, seed, noise, *tensors, **sizes, **fixed)


def forward(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str
) -> tuple[Tensor, Tensor]:
    x_t, of_target = _outputs(x0, alpha, sigma, seed, noise, target)
    if x0.numel():
        grid = (triton.cdiv(x0.numel(), BLOCK),)
        tensors = (alpha.contiguous(), sigma.contiguous(), x_t, of_target)
        _launch(forward_kernel, grid, x0, seed, noise, *tensors, TARGET=target, BLOCK=BLOCK)
    return x_t, of_target


def backward(
    gx_t: Tensor, gv: Tensor | None, x0: Tensor, seed: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    galpha, gsigma = _gradients(gx_t)
    rows, cols = x0.shape
    if rows:
        gv = None if gv is None else gv.contiguous()
        block = min(BLOCK, max(16, triton.next_power_of_2(cols)))
        tensors = (gx_t.contiguous(), gv, galpha, gsigma)
        _launch(backward_kernel, (rows,), x0, seed, noise, *tensors, ALIGNED=cols % 4 == 0, BLOCK=block)
    return galpha, gsigma
