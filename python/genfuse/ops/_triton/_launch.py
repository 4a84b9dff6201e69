"""What launches of Triton kernels have in common."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._op import LONG

TILE, PROGRAMS = 1024, 1024  # how many elements a program takes at a time; how many programs keep a GPU busy


def launch(kernel: Any, grid: tuple[int, ...], result: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel, computing in float64 if the result is of that dtype; nothing for an empty grid."""
    if all(grid):
        kernel[grid](*arguments, WIDE=result.dtype is torch.float64, **constants)


def cdiv(n: int, parts: int) -> int:
    """n / parts rounded up, in a hundredth of the time that Triton's own takes, which is that of half a launch."""
    return -(-n // parts)


def power_of_2(n: int) -> int:
    """The least power of 2 that is no less than n."""
    return 1 << max(0, n - 1).bit_length()


def block_of(cols: int) -> int:
    """How many columns a program takes at a time."""
    return min(TILE, max(4, power_of_2(cols)))


def launch_rows(
    kernel: Any, rows: int, cols: int, result: Tensor, *arguments: Any, split: bool = False, **constants: Any
) -> None:
    """`launch` one program a tile of rows, of several if they are short, which goes over the columns in blocks; with
    ``split``, up to as many programs a tile as there are blocks, if there are few rows. A kernel takes the first ones
    from `rows_of`, and blocks of columns from program_id(1), num_programs(1) of them apart."""
    block = block_of(cols) if split or cols < LONG else 4 * TILE  # more loads under way in sums that are not shared
    height = max(1, TILE // block)
    tiles, pieces = cdiv(rows, height), 1
    if split and tiles and 0 < cols < 1 << 30:  # a step over all pieces must not leave 32 bits
        pieces = min(cdiv(cols, block), cdiv(PROGRAMS, tiles))
    sizes = {"ROWS": height, "BLOCK": block, "num_warps": 8 if block <= TILE else 16}
    launch(kernel, (tiles, pieces), result, *arguments, **sizes, **constants)


@triton.jit
def rows_of(rows, ROWS: tl.constexpr):
    """The rows of a program, (ROWS, 1), counted in 64 bits, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row < rows
