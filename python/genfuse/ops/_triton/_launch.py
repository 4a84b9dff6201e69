"""What launches of Triton kernels have in common."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, PROGRAMS = 1024, 1024  # how many elements a program takes at a time; how many programs keep a GPU busy


def launch(kernel: Any, grid: tuple[int, ...], result: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel, computing in float64 if the result is of that dtype; nothing for an empty grid."""
    if all(grid):
        kernel[grid](*arguments, WIDE=result.dtype is torch.float64, **constants)


def block_of(cols: int) -> int:
    """How many columns a program takes at a time."""
    return min(TILE, max(4, triton.next_power_of_2(cols)))


def launch_rows(
    kernel: Any, rows: int, cols: int, result: Tensor, *arguments: Any, split: bool = False, **constants: Any
) -> None:
    """`launch` one program a tile of rows, of several if they are short, which goes over the columns in blocks; with
    ``split``, up to as many programs a tile as there are blocks, if there are few rows. A kernel takes the first ones
    from `rows_of`, and blocks of columns from program_id(1), num_programs(1) of them apart."""
    block = block_of(cols)
    tiles, pieces = triton.cdiv(rows, TILE // block), 1
    if split and tiles and 0 < cols < 1 << 30:  # a step over all pieces must not leave 32 bits
        pieces = min(triton.cdiv(cols, block), triton.cdiv(PROGRAMS, tiles))
    sizes = {"ROWS": TILE // block, "BLOCK": block, "num_warps": 4 if block < TILE else 8}
    launch(kernel, (tiles, pieces), result, *arguments, **sizes, **constants)


@triton.jit
def rows_of(rows, ROWS: tl.constexpr):
    """The rows of a program, (ROWS, 1), counted in 64 bits, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row < rows
