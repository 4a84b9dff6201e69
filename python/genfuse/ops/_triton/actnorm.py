"""ActNorm: one program a tile of rows of features or of channels of images; backward one a share of the examples."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import TILE, block_of, cdiv, launch, launch_rows, rows_of


@triton.jit
def forward_kernel(
    x, x_stride, log_scale, shift, y, logdet, rows, channels, cells, INVERSE: tl.constexpr, IMAGES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row, here = rows_of(rows, ROWS)
    example, channel, width = row, row * 0, channels
    if IMAGES:
        example, channel, width = row // channels, row % channels, cells
    x += example * x_stride + channel * cells
    y += row * width
    for start in range(tl.program_id(1) * BLOCK, width, tl.num_programs(1) * BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        there = here & (j < width)
        c = channel if IMAGES else j
        s = tl.load(log_scale + c, c < channels, 0.0)
        t = tl.load(shift + c, c < channels, 0.0)
        v = tl.load(x + j, there, 0.0).to(wide)
        out = (v - t) * tl.exp(-s) if INVERSE else v * tl.exp(s) + t
        tl.store(y + j, out.to(y.dtype.element_ty), there)
    if tl.program_id(1) == 0:
        total = tl.zeros((BLOCK,), wide)
        for start in range(0, channels, BLOCK):
            c = start + tl.arange(0, BLOCK)
            total += tl.load(log_scale + c, c < channels, 0.0)
        sum = tl.sum(total, 0) * cells + tl.zeros((ROWS, 1), wide)
        tl.store(logdet + example, -sum if INVERSE else sum, here & (channel == 0))


@triton.jit
def backward_kernel(
    x, x_stride, log_scale, shift, gy, gx, partial, rows, channels, cells,
    INVERSE: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    tile, chunk, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    # What cancels among many examples would leave nothing of a float32's digits.
    of_scale = tl.zeros((ROWS, BLOCK), tl.float64)
    of_shift = tl.zeros((ROWS, BLOCK), tl.float64)
    # A tile is a channel of images, all of whose cells it goes over, or as many features as it is wide.
    lane = tl.arange(0, BLOCK)
    c = lane * 0 + tile if IMAGES else tile * BLOCK + lane
    t = tl.load(shift + c, c < channels, 0.0)[None, :]
    s = tl.load(log_scale + c, c < channels, 0.0)[None, :]
    scale = tl.exp(-s) if INVERSE else tl.exp(s)
    for start in range(0, cells, BLOCK if IMAGES else 1):
        there = ((start + lane < cells) if IMAGES else (c < channels))[None, :]
        j = (c.to(tl.int64) * cells + (start + lane if IMAGES else 0))[None, :]
        for first in range(chunk * ROWS, rows, chunks * ROWS):
            i = (first + tl.arange(0, ROWS))[:, None]
            inside = (i < rows) & there
            v = tl.load(x + i * x_stride + j, inside, 0.0).to(wide)
            g = tl.load(gy + i * channels * cells + j, inside, 0.0).to(wide)
            scaled = g * scale
            gs = scaled * (v - t if INVERSE else v)
            of_scale += tl.where(inside, -gs if INVERSE else gs, 0.0).to(tl.float64)
            of_shift += (-scaled if INVERSE else g).to(tl.float64)
            tl.store(gx + i * channels * cells + j, scaled.to(gx.dtype.element_ty), inside)
    partial += chunk * (2 * channels + 1)
    if IMAGES:
        tl.store(partial + tile, tl.sum(of_scale))
        tl.store(partial + channels + tile, tl.sum(of_shift))
    else:
        tl.store(partial + c, tl.sum(of_scale, 0), c < channels)
        tl.store(partial + channels + c, tl.sum(of_shift, 0), c < channels)


def forward(
    dtype: int, inverse: bool, x: Tensor, x_stride: int, log_scale: Tensor, shift: Tensor,
    rows: int, channels: int, cells: int, y: Tensor, logdet: Tensor,
) -> None:  # fmt: skip
    images = cells != 1 and channels > 0
    rows, width = (rows * channels, cells) if images else (rows, channels)
    given = (x, x_stride, log_scale, shift, y, logdet, rows, channels, cells)
    launch_rows(forward_kernel, rows, width, y, *given, split=True, INVERSE=inverse, IMAGES=images)


def backward(
    dtype: int, inverse: bool, x: Tensor, x_stride: int, log_scale: Tensor, shift: Tensor,
    rows: int, channels: int, cells: int, gy: Tensor, glogdet: Tensor, chunks: int, partial: Tensor,
    gx: Tensor, glog_scale: Tensor, gshift: Tensor,
) -> None:  # fmt: skip
    images = cells != 1
    block = block_of(cells) if images else min(32, block_of(channels))
    grid = (channels if images else cdiv(channels, block), chunks)
    sizes = {"INVERSE": inverse, "IMAGES": images, "BLOCK": block, "ROWS": TILE // block, "num_warps": 8}
    given = (x, x_stride, log_scale, shift, gy, gx, partial, rows, channels, cells)
    launch(backward_kernel, grid, gx, *given, **sizes)
    sums, of_logdet = partial[:, :-1].sum(0), glogdet.sum(dtype=partial.dtype)
    glog_scale.copy_(torch.add(sums[:channels], of_logdet, alpha=-cells if inverse else cells))
    gshift.copy_(sums[channels:])
