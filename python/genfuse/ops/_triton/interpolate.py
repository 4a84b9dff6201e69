"""Points between real and fake examples: one program a row."""

import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch_rows
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


def forward(
    dtype: int, real: Tensor | None, real_stride: int, fake: Tensor | None, fake_stride: int,
    seed: Tensor | None, epsilon: Tensor | None, rows: int, cols: int, x: Tensor,
) -> None:  # fmt: skip
    launch_rows(between_kernel, rows, cols, x, real, real_stride, fake, fake_stride, seed, epsilon, x, cols)
