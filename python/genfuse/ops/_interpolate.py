"""Points between real and fake examples: the noise and the mixture in one pass."""

from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op, _philox


def _epsilon(like: Tensor, seed: Tensor | None, epsilon: Tensor | None) -> Tensor:
    """(N, 1), of the dtype of ``like``."""
    if epsilon is None:
        assert seed is not None
        epsilon = _philox.uniform(seed, like.shape[:1])
    return epsilon.to(like.dtype)[:, None]


def formula(real: Tensor, fake: Tensor, seed: Tensor | None, epsilon: Tensor | None) -> Tensor:
    epsilon = _epsilon(real, seed, epsilon)
    return epsilon * real + (1 - epsilon) * fake  # (N, D)


def gradients(g: Tensor, seed: Tensor | None, epsilon: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of real and fake."""
    epsilon = _epsilon(g, seed, epsilon)
    return epsilon * g, (1 - epsilon) * g


def _problem(there: Tensor, seed: Tensor | None, epsilon: Tensor | None, *further: Any) -> tuple:
    return _op.DTYPES[there.dtype], seed, None if epsilon is None else epsilon.contiguous(), *there.shape, *further


def _backward(
    needed: tuple[bool, ...], cotangents: tuple[Tensor], real: Any, fake: Any, seed: Tensor | None, epsilon: Any,
    outputs: tuple[Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    (g,) = cotangents
    of_real, of_fake = _gradients(g, seed, epsilon) if needed[0] or needed[1] else (None, None)
    of_epsilon = None
    if needed[3]:  # for which real and fake are saved, and else None
        of_epsilon = (g * (real.to(epsilon.dtype) - fake.to(epsilon.dtype))).sum(1)
    return of_real if needed[0] else None, of_fake if needed[1] else None, None, of_epsilon


def _takes(there: Tensor, seed: Tensor | None, epsilon: Tensor | None) -> tuple:
    return _op.matrix(there), *_philox.takes(seed, epsilon, there.shape[:1], _op.wide(there))


_TRITON = "genfuse.ops._triton.interpolate"
# Of real, fake and g, (N, D); and epsilon (N,), or the seed that it comes from.
_fused = _op.fused(
    "interpolate(Tensor real, Tensor fake, Tensor? seed, Tensor? epsilon) -> Tensor",
    formula=formula,
    results=lambda real, fake, seed, epsilon: _op.like(real),
    problem=lambda real, fake, seed, epsilon: _problem(real, seed, epsilon, *_op.rows(real), *_op.rows(fake)),
    triton=_TRITON,
    backward=_backward,
    saved=lambda needed, real, fake, *noise: (*((real, fake) if needed[3] else (None, None)), *noise),
    takes=lambda real, fake, seed, epsilon: (_op.matrix(real), *_takes(real, seed, epsilon)),
)
_gradients = _op.fused(
    "interpolate_backward(Tensor g, Tensor? seed, Tensor? epsilon) -> (Tensor, Tensor)",
    formula=gradients,
    results=lambda g, seed, epsilon: (_op.like(g), _op.like(g)),
    problem=lambda g, seed, epsilon: _problem(g, seed, epsilon, g.contiguous()),
    triton=f"{_TRITON}:backward",
    takes=_takes,
)


def interpolate(
    real: Tensor, fake: Tensor, generator: torch.Generator | None = None, *, epsilon: Tensor | None = None
) -> Tensor:
    r"""Draw a point on the line between each real example and its fake one.

    .. math::
        \hat x = \epsilon\, x + (1 - \epsilon)\, \tilde x, \qquad \epsilon \sim U[0, 1]

    with one :math:`\epsilon` for each example: where WGAN-GP penalises the critic's gradient (arXiv 1704.00028,
    algorithm 1). One seed gives the same points on every device and implementation, to rounding. Differentiable to any
    order.

    Args:
        real: x, (N, ...), of any strides; float32, float64, float16 or bfloat16.
        fake: of real's shape and dtype.
        generator: of real's device; default PyTorch's own, which `torch.manual_seed` rules.
        epsilon: (N,), of real's dtype, or float32 beside 16 bits, in place of drawn numbers. It may require grad.

    Returns:
        The points, of real's shape and dtype, and with its order of axes in memory.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    if (
        real.shape != fake.shape
        or real.dtype is not fake.dtype
        or real.device != fake.device
        or real.dtype not in _op.DTYPES
        or not real.dim()
    ):
        _op.check_alike(real, "real", fake=(fake, tuple(real.shape)))
    noise: tuple[Tensor | None, Tensor | None]
    if epsilon is None:
        noise = _philox.seed(real, generator), None
    else:
        _op.check_alike(real, "real", epsilon=(epsilon, real.shape[:1], _op.wide(real)))
        noise = None, epsilon.to(_op.wide(real)).contiguous()
    if real.dim() == 2:
        return _fused(real, fake, *noise)
    order = _op.order(real)
    x = _fused(_op.flatten(real, order), _op.flatten(fake, order), *noise)
    return _op.unflatten(x, real.shape, order)
