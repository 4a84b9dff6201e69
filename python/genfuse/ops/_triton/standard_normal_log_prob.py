"""Log-density of a standard normal plus a log-determinant: one program a tile of rows."""

import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch_rows, rows_of

LOG_TWO_PI = tl.constexpr(1.8378770664093454836)


@triton.jit
def forward_kernel(
    z, z_stride, logdet, log_prob, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    squares = tl.zeros((ROWS, BLOCK), wide)
    for start in range(0, cols, BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols)
        value = tl.load(z + row * z_stride + j, there, 0.0).to(wide)
        squares += value * value
    # A bare constant would be of float32.
    total = -0.5 * (tl.sum(squares, 1, keep_dims=True) + tl.cast(cols, wide) * tl.full((), LOG_TWO_PI, wide))
    if logdet is not None:
        total += tl.load(logdet + row, here)
    tl.store(log_prob + row, total, here)


@triton.jit
def backward_kernel(z, z_stride, g, gz, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    minus_g = -tl.load(g + row, here, 0.0)
    for start in range(tl.program_id(1) * BLOCK, cols, tl.num_programs(1) * BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < cols)
        value = tl.load(z + row * z_stride + j, there, 0.0).to(wide)
        tl.store(gz + row * cols + j, (minus_g * value).to(gz.dtype.element_ty), there)


def forward(
    dtype: int, z: Tensor, z_stride: int, rows: int, cols: int, logdet: Tensor | None, partial: Tensor | None,
    log_prob: Tensor,
) -> None:  # fmt: skip
    launch_rows(forward_kernel, rows, cols, log_prob, z, z_stride, logdet, log_prob, rows, cols)


def backward(
    dtype: int, z: Tensor, z_stride: int, rows: int, cols: int, logdet: Tensor | None, partial: Tensor | None,
    g: Tensor, gz: Tensor,
) -> None:  # fmt: skip
    launch_rows(backward_kernel, rows, cols, gz, z, z_stride, g, gz, rows, cols, split=True)
