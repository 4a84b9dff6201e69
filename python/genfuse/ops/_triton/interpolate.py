"""Points between two batches: one program a row."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._interpolate import _outputs
from genfuse.ops._triton._noise import _uniform, _words


@triton.jit
def forward_kernel(
    real, real_stride, fake, fake_stride, seed, x, epsilon, cols, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    w0, w1, w2, w3 = _words(tl.load(seed), row // 4)
    word = tl.where(row % 4 == 0, w0, tl.where(row % 4 == 1, w1, tl.where(row % 4 == 2, w2, w3)))
    e = _uniform(word, WIDE)
    tl.store(epsilon + row, e)
    for start in range(0, cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < cols
        a = tl.load(real + row * real_stride + column, mask, 0.0).to(wide)
        b = tl.load(fake + row * fake_stride + column, mask, 0.0).to(wide)
        tl.store(x + row * cols + column, (e * a + (1.0 - e) * b).to(x.dtype.element_ty), mask)


def forward(real: Tensor, fake: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    x, epsilon = _outputs(real, fake, seed)
    (real, real_stride), (fake, fake_stride) = _op.rows(real), _op.rows(fake)
    rows, cols = real.shape
    if rows:
        block = min(triton.next_power_of_2(max(cols, 1)), 2048)
        with torch.cuda.device(real.device) if real.is_cuda else contextlib.nullcontext():
            forward_kernel[(rows,)](
                real, real_stride, fake, fake_stride, seed, x, epsilon, cols, BLOCK=block,
                WIDE=real.dtype is torch.float64,
            )  # fmt: skip
    return x, epsilon
