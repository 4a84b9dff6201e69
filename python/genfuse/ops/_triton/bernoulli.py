"""Bernoulli draws: a block of elements a program."""

import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import cdiv, launch
from genfuse.ops._triton._noise import uniforms

BLOCK = 1024


@triton.jit
def draw_kernel(p, seed, x, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = first + offsets < n
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    u = uniforms(tl.load(seed), first, BLOCK, WIDE)
    drawn = tl.where(u <= tl.load(p + first + offsets, mask, 0.0).to(wide), 1.0, 0.0)
    tl.store(x + first + offsets, drawn.to(x.dtype.element_ty), mask)


def forward(dtype: int, p: Tensor, seed: Tensor, n: int, x: Tensor) -> None:
    launch(draw_kernel, (cdiv(n, BLOCK),), x, p, seed, x, n, BLOCK=BLOCK)
