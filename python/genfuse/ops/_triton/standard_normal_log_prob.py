"""Log-density of a standard normal plus a log-determinant: one program a row."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._standard_normal_log_prob import _gradient, _output

LOG_TWO_PI = tl.constexpr(1.8378770664093454836)


@triton.jit
def forward_kernel(z, z_stride, logdet, log_prob, cols, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), wide)
    for start in range(0, cols, BLOCK):
        j = start + tl.arange(0, BLOCK)
        value = tl.load(z + row * z_stride + j, j < cols, 0.0).to(wide)
        squares += value * value
    # A bare constant would be of float32.
    total = -0.5 * (tl.sum(squares, 0) + tl.cast(cols, wide) * tl.full((), LOG_TWO_PI, wide))
    if logdet is not None:
        total += tl.load(logdet + row)
    tl.store(log_prob + row, total)


@triton.jit
def backward_kernel(z, z_stride, g, gz, cols, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    minus_g = -tl.load(g + row)
    for start in range(0, cols, BLOCK):
        j = start + tl.arange(0, BLOCK)
        value = tl.load(z + row * z_stride + j, j < cols, 0.0).to(wide)
        tl.store(gz + row * cols + j, (minus_g * value).to(gz.dtype.element_ty), j < cols)


def _launch(kernel: Any, z: Tensor, *tensors: Tensor | None) -> None:
    z, z_stride = _op.rows(z)
    rows, cols = z.shape[:-1].numel(), z.shape[-1]
    if not rows:
        return
    block = min(1024, max(16, triton.next_power_of_2(cols)))
    constants = {"BLOCK": block, "WIDE": z.dtype is torch.float64}
    with torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext():
        kernel[(rows,)](z, z_stride, *tensors, cols=cols, **constants, num_warps=max(1, min(8, block // 128)))


def forward(z: Tensor, logdet: Tensor | None) -> Tensor:
    log_prob = _output(z, logdet)
    _launch(forward_kernel, z, None if logdet is None else logdet.contiguous(), log_prob)
    return log_prob


def backward(g: Tensor, z: Tensor) -> Tensor:
    gz = _gradient(g, z)
    _launch(backward_kernel, z, g.contiguous(), gz)
    return gz
