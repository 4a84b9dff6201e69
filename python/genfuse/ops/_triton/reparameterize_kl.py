"""Reparameterised sample and its KL divergence: one program a row."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._reparameterize_kl import _gradients, _outputs
from genfuse.ops._triton._noise import normals


@triton.jit
def _eps(noise, seed, first, columns, mask, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """The noise of elements [first, first + BLOCK) of z."""
    if noise is not None:
        return tl.load(noise + first + columns, mask).to(tl.float64 if WIDE else tl.float32)
    return normals(seed, first, BLOCK, ALIGNED, WIDE)


@triton.jit
def forward_kernel(
    mu, mu_stride, logvar, logvar_stride, seed, noise, z, kl, rows, cols, samples,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(seed) if seed is not None else 0
    total = tl.zeros((BLOCK,), dtype)
    for start in range(0, cols, BLOCK):
        columns = tl.arange(0, BLOCK)
        mask = start + columns < cols
        m = tl.load(mu + row * mu_stride + start + columns, mask, 0.0).to(dtype)
        lv = tl.load(logvar + row * logvar_stride + start + columns, mask, 0.0).to(dtype)
        sigma = tl.exp(0.5 * lv)
        total += 0.5 * (m * m + sigma * sigma - 1.0 - lv)
        for s in range(samples):
            first = (s * rows + row) * cols + start
            eps = _eps(noise, key, first, columns, mask, BLOCK, ALIGNED, WIDE)
            tl.store(z + first + columns, (m + sigma * eps).to(z.dtype.element_ty), mask)
    tl.store(kl + row, tl.sum(total, 0))


@triton.jit
def backward_kernel(
    mu, mu_stride, logvar, logvar_stride, seed, noise, gz, gkl, gmu, glogvar, rows, cols, samples,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(seed) if seed is not None else 0
    gk = tl.load(gkl + row)
    for start in range(0, cols, BLOCK):
        columns = tl.arange(0, BLOCK)
        mask = start + columns < cols
        gz_sum = tl.zeros((BLOCK,), dtype)
        gz_eps_sum = tl.zeros((BLOCK,), dtype)
        for s in range(samples):
            first = (s * rows + row) * cols + start
            eps = _eps(noise, key, first, columns, mask, BLOCK, ALIGNED, WIDE)
            g = tl.load(gz + first + columns, mask, 0.0).to(dtype)
            gz_sum += g
            gz_eps_sum += g * eps
        m = tl.load(mu + row * mu_stride + start + columns, mask, 0.0).to(dtype)
        sigma = tl.exp(0.5 * tl.load(logvar + row * logvar_stride + start + columns, mask, 0.0).to(dtype))
        to = row * cols + start + columns
        tl.store(gmu + to, (gz_sum + gk * m).to(gmu.dtype.element_ty), mask)
        # (gk sigma) sigma, not gk sigma^2: finite also where sigma^2 overflows.
        tl.store(glogvar + to, (0.5 * (gz_eps_sum * sigma + (gk * sigma) * sigma - gk)).to(gmu.dtype.element_ty), mask)


def _launch(
    kernel: Any,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    noise: Tensor | None,
    samples: int | None,
    *tensors: Tensor,
) -> None:
    mu, mu_stride = _op.rows(mu)
    logvar, logvar_stride = _op.rows(logvar)
    rows, cols = mu.shape[:-1].numel(), mu.shape[-1]
    if not rows:
        return
    block = min(1024, max(16, triton.next_power_of_2(cols)))
    noise = None if noise is None else noise.contiguous()
    sizes = {"rows": rows, "cols": cols, "samples": samples or 1}
    constants = {"BLOCK": block, "ALIGNED": cols % 4 == 0, "WIDE": mu.dtype is torch.float64}
    with torch.cuda.device(mu.device) if mu.is_cuda else contextlib.nullcontext():
        kernel[(rows,)](
            *(mu, mu_stride, logvar, logvar_stride, seed, noise, *tensors),
            **sizes,
            **constants,
            num_warps=max(1, min(8, block // 128)),
        )


def forward(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    z, kl = _outputs(mu, logvar, seed, noise, samples)
    _launch(forward_kernel, mu, logvar, seed, noise, samples, z, kl)
    return z, kl


def backward(
    gz: Tensor, gkl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    gmu, glogvar = _gradients(gz, gkl, mu)
    _launch(backward_kernel, mu, logvar, seed, noise, samples, gz.contiguous(), gkl.contiguous(), gmu, glogvar)
    return gmu, glogvar
