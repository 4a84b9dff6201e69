"""What launches of Triton kernels have in common."""

from typing import Any

import torch
import triton
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], result: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel, computing in float64 if the result is of that dtype; nothing for an empty grid."""
    if all(grid):
        kernel[grid](*arguments, WIDE=result.dtype is torch.float64, **constants)


def block_of(cols: int) -> int:
    """How many columns a program takes at a time."""
    return min(1024, max(16, triton.next_power_of_2(cols)))


def launch_rows(kernel: Any, rows: int, cols: int, result: Tensor, *arguments: Any, **constants: Any) -> None:
    """`launch` one program a row, which goes over the columns in blocks."""
    block = block_of(cols)
    launch(kernel, (rows,), result, *arguments, BLOCK=block, num_warps=max(1, min(8, block // 128)), **constants)
