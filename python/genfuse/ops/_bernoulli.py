"""Bernoulli draws: the noise and the comparison in one pass."""

import torch
from torch import Tensor

from genfuse.ops import _op, _philox


def formula(p: Tensor, seed: Tensor) -> Tensor:
    u = _philox.uniform(seed, p.shape).to(p.dtype)
    # u <= p, not u < p: u reaches 1 in float32 and never 0, so p = 0 is never drawn and p = 1 always.
    return (u <= p).to(p.dtype)


def _problem(p: Tensor, seed: Tensor) -> tuple:
    return _op.DTYPES[p.dtype], p.contiguous(), seed, p.numel()


_fused = _op.fused(
    "bernoulli(Tensor p, Tensor seed) -> Tensor",
    formula=formula,
    results=lambda p, seed: _op.like(p),
    problem=_problem,
    triton="genfuse.ops._triton.bernoulli",
    takes=lambda p, seed: ((p.shape, _op.storage(p)), ((), torch.int64)),
)


def bernoulli(p: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw each element as 1 with probability p, else as 0: dynamic binarization in one pass.

    One seed gives the same draws on every device and implementation. Not differentiable: the result has no graph.

    Args:
        p: probabilities, of any shape and strides; float32, float64, float16 or bfloat16. What is above 1 counts as 1,
            and what is below 0, or NaN, as 0. The noise has 32 bits, rounded to p's precision, float32 at least.
        generator: of p's device; default PyTorch's own, which `torch.manual_seed` rules.

    Returns:
        0 or 1, of p's shape and dtype, contiguous.

    Raises:
        ValueError: for another dtype.
    """
    if p.dtype not in _op.DTYPES:
        raise ValueError(f"p must be float32, float64, float16 or bfloat16, got {p.dtype}")
    return _fused(p.detach() if p.requires_grad else p, _philox.seed(p, generator))
