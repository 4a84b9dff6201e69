"""Reparameterised sample and its KL divergence: one program a tile of rows."""

import math
from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch_rows, rows_of
from genfuse.ops._triton._noise import eps_of


@triton.jit
def forward_kernel(
    mu, mu_stride, logvar, logvar_stride, seed, noise, z, kl, rows, cols, samples,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    key = tl.load(seed) if seed is not None else 0
    total = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, cols, BLOCK):
        columns = tl.arange(0, BLOCK)[None, :]
        mask = here & (start + columns < cols)
        m = tl.load(mu + row * mu_stride + start + columns, mask, 0.0).to(dtype)
        lv = tl.load(logvar + row * logvar_stride + start + columns, mask, 0.0).to(dtype)
        sigma = tl.exp(0.5 * lv)
        total += 0.5 * (m * m + sigma * sigma - 1.0 - lv)
        for s in range(samples):
            first = (tl.cast(s, tl.int64) * rows + row) * cols + start
            eps = eps_of(noise, key, first, mask, BLOCK, ALIGNED, WIDE)
            tl.store(z + first + columns, (m + sigma * eps).to(z.dtype.element_ty), mask)
    tl.store(kl + row, tl.sum(total, 1, keep_dims=True), here)


@triton.jit
def backward_kernel(
    mu, mu_stride, logvar, logvar_stride, seed, noise, gz, gkl, gmu, glogvar, rows, cols, samples,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    key = tl.load(seed) if seed is not None else 0
    gk = tl.load(gkl + row, here, 0.0)
    for start in range(tl.program_id(1) * BLOCK, cols, tl.num_programs(1) * BLOCK):
        columns = tl.arange(0, BLOCK)[None, :]
        mask = here & (start + columns < cols)
        gz_sum = tl.zeros((ROWS, BLOCK), dtype)
        gz_eps_sum = tl.zeros((ROWS, BLOCK), dtype)
        for s in range(samples):
            first = (tl.cast(s, tl.int64) * rows + row) * cols + start
            eps = eps_of(noise, key, first, mask, BLOCK, ALIGNED, WIDE)
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
    kernel: Any, split: bool, dtype: int, mu: Tensor, mu_stride: int, logvar: Tensor, logvar_stride: int,
    seed: Tensor | None, noise: Tensor | None, rows: int, cols: int, samples: int, pieces: Tensor | None,
    *tensors: Tensor,
) -> None:  # fmt: skip
    given = (mu, mu_stride, logvar, logvar_stride, seed, noise, *tensors, rows, cols, samples)
    launch_rows(kernel, rows, cols, mu, *given, ALIGNED=math.gcd(cols, 4), split=split)


forward = partial(_launch, forward_kernel, False)
backward = partial(_launch, backward_kernel, True)
