"""Points between real and fake examples: one program a tile of rows."""

import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch_rows, rows_of
from genfuse.ops._triton._noise import uniform_at


@triton.jit
def between_kernel(
    real, real_stride, fake, fake_stride, seed, epsilon, x, rows, cols,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    eps = tl.load(epsilon + row, here, 0.0) if epsilon is not None else uniform_at(tl.load(seed), row, WIDE)
    for start in range(tl.program_id(1) * BLOCK, cols, tl.num_programs(1) * BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols)
        of_real = tl.load(real + row * real_stride + j, there, 0.0).to(wide)
        of_fake = tl.load(fake + row * fake_stride + j, there, 0.0).to(wide)
        tl.store(x + row * cols + j, (eps * of_real + (1.0 - eps) * of_fake).to(x.dtype.element_ty), there)


@triton.jit
def gradients_kernel(
    g, seed, epsilon, greal, gfake, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    row, here = rows_of(rows, ROWS)
    eps = tl.load(epsilon + row, here, 0.0) if epsilon is not None else uniform_at(tl.load(seed), row, WIDE)
    for start in range(tl.program_id(1) * BLOCK, cols, tl.num_programs(1) * BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols)
        at = row * cols + j
        of_x = tl.load(g + at, there, 0.0).to(tl.float64 if WIDE else tl.float32)
        tl.store(greal + at, (eps * of_x).to(greal.dtype.element_ty), there)
        tl.store(gfake + at, ((1.0 - eps) * of_x).to(gfake.dtype.element_ty), there)


def forward(
    dtype: int, seed: Tensor | None, epsilon: Tensor | None, rows: int, cols: int,
    real: Tensor, real_stride: int, fake: Tensor, fake_stride: int, x: Tensor,
) -> None:  # fmt: skip
    given = (real, real_stride, fake, fake_stride, seed, epsilon, x, rows, cols)
    launch_rows(between_kernel, rows, cols, x, *given, split=True)


def backward(
    dtype: int, seed: Tensor | None, epsilon: Tensor | None, rows: int, cols: int,
    g: Tensor, greal: Tensor, gfake: Tensor,
) -> None:  # fmt: skip
    launch_rows(gradients_kernel, rows, cols, greal, g, seed, epsilon, greal, gfake, rows, cols, split=True)
