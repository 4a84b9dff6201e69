"""ActNorm: one program a row of features or a channel of an image; backward one a chunk of examples."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import block_of, launch


@triton.jit
def forward_kernel(
    x, x_stride, log_scale, shift, y, logdet, channels, cells,
    INVERSE: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    program = tl.program_id(0)
    example, channel, width = program, 0, channels
    if IMAGES:  # divided in 32 bits, which are several times as fast as 64
        example, channel, width = program // channels, program % channels, cells
    x += example.to(tl.int64) * x_stride + tl.cast(channel, tl.int64) * cells
    y += program.to(tl.int64) * width
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        c = j * 0 + channel if IMAGES else j
        s = tl.load(log_scale + c, c < channels, 0.0)
        t = tl.load(shift + c, c < channels, 0.0)
        v = tl.load(x + j, j < width, 0.0).to(wide)
        out = (v - t) * tl.exp(-s) if INVERSE else v * tl.exp(s) + t
        tl.store(y + j, out.to(y.dtype.element_ty), j < width)
    if channel == 0:
        total = tl.zeros((BLOCK,), wide)
        for start in range(0, channels, BLOCK):
            c = start + tl.arange(0, BLOCK)
            total += tl.load(log_scale + c, c < channels, 0.0)
        sum = tl.sum(total, 0) * cells
        tl.store(logdet + example, -sum if INVERSE else sum)


@triton.jit
def backward_kernel(
    x, x_stride, log_scale, shift, gy, glogdet, gx, partial, rows, channels, cells,
    INVERSE: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    tile, chunk, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    begin, end = rows * chunk // chunks, rows * (chunk + 1) // chunks
    of_scale = tl.zeros((ROWS, BLOCK), wide)
    of_shift = tl.zeros((ROWS, BLOCK), wide)
    # A tile is a channel of images, all of whose cells it goes over, or as many features as it is wide.
    lane = tl.arange(0, BLOCK)
    c = lane * 0 + tile if IMAGES else tile * BLOCK + lane
    t = tl.load(shift + c, c < channels, 0.0)[None, :]
    s = tl.load(log_scale + c, c < channels, 0.0)[None, :]
    scale = tl.exp(-s) if INVERSE else tl.exp(s)
    for start in range(0, cells, BLOCK if IMAGES else 1):
        there = ((start + lane < cells) if IMAGES else (c < channels))[None, :]
        j = (c.to(tl.int64) * cells + (start + lane if IMAGES else 0))[None, :]
        for first in range(begin, end, ROWS):
            i = (first + tl.arange(0, ROWS))[:, None]
            inside = (i < end) & there
            v = tl.load(x + i * x_stride + j, inside, 0.0).to(wide)
            g = tl.load(gy + i * channels * cells + j, inside, 0.0).to(wide)
            gl = tl.load(glogdet + i, i < end, 0.0)
            scaled = g * scale
            gs = scaled * (v - t if INVERSE else v) + gl
            of_scale += tl.where(inside, -gs if INVERSE else gs, 0.0)
            of_shift += -scaled if INVERSE else g
            tl.store(gx + i * channels * cells + j, scaled.to(gx.dtype.element_ty), inside)
    partial += chunk * 2 * channels
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
    grid, sizes = (rows * (channels if images else 1),), {"INVERSE": inverse, "IMAGES": images}
    given = (x, x_stride, log_scale, shift, y, logdet, channels, cells)
    launch(forward_kernel, grid, y, *given, **sizes, BLOCK=block_of(cells if images else channels))


def backward(
    dtype: int, inverse: bool, x: Tensor, x_stride: int, log_scale: Tensor, shift: Tensor,
    rows: int, channels: int, cells: int, gy: Tensor, glogdet: Tensor, chunks: int, partial: Tensor,
    gx: Tensor, glog_scale: Tensor, gshift: Tensor,
) -> None:  # fmt: skip
    images, partial = cells != 1, partial.to(log_scale.dtype)
    block = block_of(cells) if images else 32
    grid = (channels if images else triton.cdiv(channels, block), chunks)
    sizes = {"INVERSE": inverse, "IMAGES": images, "BLOCK": block, "ROWS": max(1, (256 if images else 1024) // block)}
    given = (x, x_stride, log_scale, shift, gy, glogdet, gx, partial, rows, channels, cells)
    launch(backward_kernel, grid, gx, *given, **sizes)
    torch.sum(partial[:, 0], 0, out=glog_scale)
    torch.sum(partial[:, 1], 0, out=gshift)
