"""Points between real and fake examples: one program a row."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._interpolate import _output
from genfuse.ops._triton._noise import uniform_at


@triton.jit
def between_kernel(
    real, real_stride, fake, fake_stride, seed, epsilon, x, cols, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    eps = tl.load(epsilon + row) if epsilon is not None else uniform_at(tl.load(seed), row, WIDE)
    for start in range(0, cols, BLOCK):
        j = start + tl.arange(0, BLOCK)
        point = tl.zeros((BLOCK,), wide)
        if real is not None:
            point += eps * tl.load(real + row * real_stride + j, j < cols, 0.0).to(wide)
        if fake is not None:
            point += (1.0 - eps) * tl.load(fake + row * fake_stride + j, j < cols, 0.0).to(wide)
        tl.store(x + row * cols + j, point.to(x.dtype.element_ty), j < cols)


def between(real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None) -> Tensor:
    x = _output(real, fake, seed, epsilon)
    rows, cols = x.shape
    if rows:
        real, real_stride = (None, 0) if real is None else _op.rows(real)
        fake, fake_stride = (None, 0) if fake is None else _op.rows(fake)
        block = min(1024, max(16, triton.next_power_of_2(cols)))
        constants = {"BLOCK": block, "WIDE": x.dtype is torch.float64, "num_warps": max(1, min(8, block // 128))}
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            between_kernel[(rows,)](real, real_stride, fake, fake_stride, seed, epsilon, x, cols, **constants)
    return x
