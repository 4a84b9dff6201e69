"""Bernoulli draws: the noise and the comparison in one pass."""

from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op, _philox
from genfuse.ops._op import _C


def formula(p: Tensor, u: Tensor) -> Tensor:
    # u <= p, not u < p: u reaches 1 in float32 and never 0, so p = 0 is never drawn and p = 1 always.
    return (u <= p).to(p.dtype)


def eager(p: Tensor, noise: Tensor | None = None) -> Tensor:
    return torch.bernoulli(p) if noise is None else formula(p, noise)


def _output(p: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(p, memory_format=torch.contiguous_format)


def reference(p: Tensor, seed: Tensor) -> Tensor:
    u = _philox.uniform(seed, tuple(p.shape)).to(_op.wide(p))
    return formula(p.to(_op.wide(p)), u).to(p.dtype).contiguous()


def _native(p: Tensor, seed: Tensor) -> Tensor:
    p, x = p.contiguous(), _output(p, seed)
    _C.bernoulli(_op.DTYPES[p.dtype], p.data_ptr(), seed.data_ptr(), p.numel(), x.data_ptr(), *_op.place(p))
    return x


_draw = _op.define(
    "bernoulli(Tensor p, Tensor seed) -> Tensor",
    reference=reference,
    fake=_output,
    native=_native,
    triton="bernoulli:draw",
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
    return _draw(p.detach(), _philox.seed(p, generator))


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {"p": torch.rand(size, generator=torch.Generator().manual_seed(1)).to(device, dtype)}


def _replay(arguments: dict[str, Any]) -> dict[str, Any]:
    p = arguments["p"]
    # As rounded where it is compared: a draw is 0 or 1, and no tolerance would forgive another rounding.
    return {"noise": _philox.uniform(_philox.seed(p), tuple(p.shape)).to(_op.wide(p)).double()}


_op.OPERATORS["bernoulli"] = _op.Operator(
    name="bernoulli",
    function=bernoulli,
    eager=eager,
    kernels=(_draw,),
    sizes=((1, 8), (128, 784), (1024, 784), (16384, 784)),
    example=_example,
    moved=lambda size, itemsize: (2 * size[0] * size[1] * itemsize, 0),
    replay=_replay,
)
