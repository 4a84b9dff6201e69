"""An operator of one's own: y = x / (1 + |x|), which squashes to (-1, 1), and its log-determinant. No C++ is needed."""

import sys

import torch
import triton
import triton.language as tl

from genfuse import ops


def formula(x):
    below = 1 + x.abs()  # (N, D)
    return x / below, -2 * below.log().sum(-1)


@triton.jit
def kernel(x, y, logdet, cols, BLOCK: tl.constexpr):
    row, total = tl.program_id(0).to(tl.int64), 0.0
    for start in range(0, cols, BLOCK):
        j = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * cols + j, j < cols, 0.0)
        tl.store(y + row * cols + j, value / (1 + tl.abs(value)), j < cols)
        total -= 2 * tl.sum(tl.log(1 + tl.abs(value)))
    tl.store(logdet + row, total)


def forward(x, y, logdet):  # the problem, then the results
    launch = kernel[(x.shape[0],)]  # a program a row
    launch(x, y, logdet, x.shape[1], BLOCK=128)


squash = ops.fused(
    "example::squash(Tensor x) -> (Tensor, Tensor)",
    formula=formula,
    results=lambda x: (torch.empty_like(x), x.new_empty(x.shape[0])),
    problem=lambda x: (x.contiguous(),),
    triton=sys.modules[__name__],
)
