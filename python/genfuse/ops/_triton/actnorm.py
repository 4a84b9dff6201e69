"""ActNorm: one program a row of features or a channel of an image; backward one a chunk of examples."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._actnorm import _gradients, _outputs, chunks


@triton.jit
def forward_kernel(
    x, x_stride, log_scale, shift, y, logdet, channels, cells,
    INVERSE: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    example, channel, width = row, row * 0, channels
    if IMAGES:
        example, channel, width = row // channels, row % channels, cells
    x, y = x + example * x_stride + channel * cells, y + row * width
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
        j = (c * cells + (start + lane if IMAGES else 0))[None, :]
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


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *tensors: Tensor, block: int, **sizes: Any) -> None:
    x, x_stride = _op.rows(x)
    constants = {"BLOCK": block, "WIDE": x.dtype is torch.float64}
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[grid](x, x_stride, *(t.contiguous() for t in tensors), **sizes, **constants)


def forward(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple[Tensor, Tensor]:
    y, logdet = _outputs(x, log_scale, shift, cells, inverse)
    channels = log_scale.shape[0]
    images = cells != 1 and channels > 0
    if x.shape[0]:
        block = min(1024, max(16, triton.next_power_of_2(cells if images else channels)))
        grid = (x.shape[0] * (channels if images else 1),)
        sizes = {"channels": channels, "cells": cells, "INVERSE": inverse, "IMAGES": images}
        _launch(forward_kernel, grid, x, log_scale, shift, y, logdet, block=block, **sizes)
    return y, logdet


def backward(
    gy: Tensor, glogdet: Tensor, x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gx, *_ = _gradients(gy, glogdet, x, log_scale, shift)
    channels, images = log_scale.shape[0], cells != 1
    partial = log_scale.new_zeros((chunks(x, cells), 2, channels))
    if partial.numel():
        block = min(1024, max(16, triton.next_power_of_2(cells))) if images else 32
        grid = (channels if images else triton.cdiv(channels, block), partial.shape[0])
        sizes = {"rows": x.shape[0], "channels": channels, "cells": cells}
        fixed = {"INVERSE": inverse, "IMAGES": images, "ROWS": max(1, 1024 // block if not images else 256 // block)}
        _launch(backward_kernel, grid, x, log_scale, shift, gy, glogdet, gx, partial, block=block, **sizes, **fixed)
    return gx, partial[:, 0].sum(0), partial[:, 1].sum(0)
