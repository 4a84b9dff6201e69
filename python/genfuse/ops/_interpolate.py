"""Points between real and fake examples: the noise and the mixture in one pass."""

from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op, _philox


def _there(real: Tensor | None, fake: Tensor | None) -> Tensor:
    there = fake if real is None else real
    if there is None:
        raise ValueError("real or fake must be given")
    return there


def formula(real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None) -> Tensor:
    there = _there(real, fake)
    if epsilon is None:
        assert seed is not None
        epsilon = _philox.uniform(seed, there.shape[:1])
    epsilon = epsilon.to(there.dtype)[:, None]  # (N, 1)
    points = torch.zeros_like(there) if real is None else epsilon * real  # (N, D)
    return points if fake is None else points + (1 - epsilon) * fake


def _problem(real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None) -> tuple:
    there = _there(real, fake)
    real, real_stride = (None, 0) if real is None else _op.rows(real)
    fake, fake_stride = (None, 0) if fake is None else _op.rows(fake)
    epsilon = None if epsilon is None else epsilon.contiguous()
    return _op.DTYPES[there.dtype], real, real_stride, fake, fake_stride, seed, epsilon, *there.shape


def _backward(
    needed: tuple[bool, ...], cotangents: tuple[Tensor], real: Tensor | None, fake: Tensor | None,
    seed: Tensor | None, epsilon: Tensor | None, outputs: tuple[Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """A point is linear in its ends: the gradient of each is the point between g and 0."""
    (g,) = cotangents
    of_epsilon = None
    if needed[3]:
        assert epsilon is not None
        ends: list[Any] = [0 if end is None else end.to(epsilon.dtype) for end in (real, fake)]
        of_epsilon = (g * (ends[0] - ends[1])).sum(1)
    return (
        _fused(g, None, seed, epsilon) if needed[0] else None,
        _fused(None, g, seed, epsilon) if needed[1] else None,
        None,
        of_epsilon,
    )


def _takes(real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None) -> tuple:
    there = _there(real, fake)
    return *[_op.matrix(there)] * 2, *_philox.takes(seed, epsilon, there.shape[:1], _op.wide(there))


# Of real and fake, (N, D), of which one may be missing and is 0 then; and epsilon (N,), or the seed that it comes from.
_fused = _op.fused(
    "interpolate(Tensor? real, Tensor? fake, Tensor? seed, Tensor? epsilon) -> Tensor",
    formula=formula,
    results=lambda real, fake, *noise: _op.like(_there(real, fake)),
    problem=_problem,
    triton="genfuse.ops._triton.interpolate",
    backward=_backward,
    saved=lambda needed, real, fake, *noise: (*((real, fake) if needed[3] else (None, None)), *noise),
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
