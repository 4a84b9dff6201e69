"""Points between real and fake examples: the noise and the mixture in one pass."""

from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op, _philox
from genfuse.ops._op import _C


def formula(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    return epsilon * real + (1 - epsilon) * fake


def eager(real: Tensor, fake: Tensor, epsilon: Tensor | None = None) -> Tensor:
    if epsilon is None:
        epsilon = torch.rand(real.shape[0], dtype=real.dtype, device=real.device)
    return formula(real, fake, epsilon.view(-1, *[1] * (real.dim() - 1)))


def _output(real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None) -> Tensor:
    there = fake if real is None else real
    assert there is not None
    return _op.like(there)


def reference(real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None) -> Tensor:
    x = _output(real, fake, seed, epsilon)
    if epsilon is None:
        assert seed is not None
        epsilon = _philox.uniform(seed, x.shape[:1]).to(_op.wide(x))
    zero = epsilon.new_zeros(())
    return x.copy_(formula(zero if real is None else real, zero if fake is None else fake, epsilon[:, None]))


def _native(real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None) -> Tensor:
    x = _output(real, fake, seed, epsilon)
    real, real_stride = (None, 0) if real is None else _op.rows(real)
    fake, fake_stride = (None, 0) if fake is None else _op.rows(fake)
    address = [0 if t is None else t.data_ptr() for t in (real, fake, seed, epsilon)]
    _C.interpolate(
        _op.DTYPES[x.dtype], address[0], real_stride, address[1], fake_stride, *address[2:], *x.shape,
        x.data_ptr(), *_op.place(x),
    )  # fmt: skip
    return x


# Of real and fake, (N, D), of which one may be missing and is 0 then; and epsilon (N,), or the seed that it comes from.
_between = _op.define(
    "interpolate(Tensor? real, Tensor? fake, Tensor? seed, Tensor? epsilon) -> Tensor",
    reference=reference,
    fake=_output,
    native=_native,
    triton="interpolate:between",
)


class Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, real: Tensor | None, fake: Tensor | None, seed: Tensor | None, epsilon: Tensor | None
    ) -> Tensor:
        ends = (real, fake) if ctx.needs_input_grad[3] else (None, None)
        ctx.save_for_backward(*ends, seed, epsilon)
        return _between(real, fake, seed, epsilon)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        real, fake, seed, epsilon = ctx.saved_tensors
        of_real, of_fake, _, of_epsilon = ctx.needs_input_grad
        # A point is linear in its ends: each one's gradient is the point between g and 0, and so to any order.
        # Grad mode is on in here only under create_graph=True: then stay differentiable.
        between = Interpolate.apply if torch.is_grad_enabled() else _between
        return (
            between(g, None, seed, epsilon) if of_real else None,
            between(None, g, seed, epsilon) if of_fake else None,
            None,
            _of_epsilon(g, real, fake, epsilon) if of_epsilon else None,
        )


def _of_epsilon(g: Tensor, real: Tensor | None, fake: Tensor | None, epsilon: Tensor) -> Tensor:
    ends: list[Any] = [0 if end is None else end.to(epsilon.dtype) for end in (real, fake)]
    return (g * (ends[0] - ends[1])).sum(1)


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
        _op.complain_unless_like(real, "real", fake=(fake, tuple(real.shape)))
    noise: tuple[Tensor | None, Tensor | None]
    if epsilon is None:
        noise = _philox.seed(real, generator), None
    else:
        _op.complain_unless_like(real, "real", epsilon=(epsilon, real.shape[:1], _op.wide(real)))
        noise = None, epsilon.to(_op.wide(real)).contiguous()
    if real.dim() == 2:
        return Interpolate.apply(real, fake, *noise)
    order = _op.order(real)
    x = Interpolate.apply(_op.flatten(real, order), _op.flatten(fake, order), *noise)
    return _op.unflatten(x, real.shape, order)


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    real, fake = torch.randn((2, *size), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return {"real": real.detach().requires_grad_(), "fake": fake.detach().requires_grad_()}


def _replay(arguments: dict[str, Any]) -> dict[str, Any]:
    real = arguments["real"]
    return {"epsilon": _philox.uniform(_philox.seed(real), real.shape[:1])}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, d = size
    return 3 * n * d * itemsize, 4 * n * d * itemsize  # real, fake, x; g twice, both gradients


_op.OPERATORS["interpolate"] = _op.Operator(
    name="interpolate",
    function=interpolate,
    eager=eager,
    kernels=(_between,),
    sizes=((64, 784), (256, 3072), (64, 49152)),
    example=_example,
    moved=_moved,
    replay=_replay,
)
