"""Points between two batches, one random share for each example, drawn where it is used."""

from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op, _philox
from genfuse.ops._op import _C


def formula(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    epsilon = epsilon.view(-1, *[1] * (real.dim() - 1))
    return epsilon * real + (1 - epsilon) * fake


def eager(real: Tensor, fake: Tensor, epsilon: Tensor | None = None) -> Tensor:
    if epsilon is None:
        epsilon = torch.rand(len(real), dtype=_op.wide(real), device=real.device)
    return formula(real, fake, epsilon.to(real.dtype))


def _outputs(real: Tensor, fake: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return _op.like(real), real.new_empty(real.shape[:1], dtype=_op.wide(real))


def reference(real: Tensor, fake: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    wide = _op.wide(real)
    epsilon = _philox.uniform(seed, (len(real),)).to(wide)
    return formula(real.to(wide), fake.to(wide), epsilon).to(real.dtype).contiguous(), epsilon


def _native(real: Tensor, fake: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    x, epsilon = _outputs(real, fake, seed)
    (real, real_stride), (fake, fake_stride) = _op.rows(real), _op.rows(fake)
    _C.interpolate(
        _op.DTYPES[real.dtype], real.data_ptr(), real_stride, fake.data_ptr(), fake_stride, seed.data_ptr(),
        *real.shape, x.data_ptr(), epsilon.data_ptr(), *_op.place(real),
    )  # fmt: skip
    return x, epsilon


_forward = _op.define(
    "interpolate(Tensor real, Tensor fake, Tensor seed) -> (Tensor, Tensor)",
    reference=reference,
    fake=_outputs,
    native=_native,
    triton="interpolate:forward",
)


class Interpolate(torch.autograd.Function):
    """Of (N, D). The result is linear in both, so that its gradient is differentiable as it stands."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, fake: Tensor, seed: Tensor) -> Tensor:
        x, epsilon = _forward(real, fake, seed)
        ctx.save_for_backward(epsilon)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        (epsilon,) = ctx.saved_tensors
        share = epsilon[:, None]
        return (share * g).to(g.dtype), ((1 - share) * g).to(g.dtype), None


def interpolate(real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Points between real and fake examples, :math:`\epsilon x + (1 - \epsilon) \tilde x` with one
    :math:`\epsilon \sim U(0, 1)` for each example: where WGAN-GP looks at the critic's gradient (arXiv 1704.00028,
    algorithm 1).

    One seed gives the same points on every device and implementation. Differentiable to any order.

    Args:
        real, fake: x and :math:`\tilde x`, (N, ...), of any strides; float32, float64, float16 or bfloat16. Of 16 bits,
            they are mixed in float32.
        generator: of their device; default PyTorch's own, which `torch.manual_seed` rules.

    Returns:
        (N, ...), of their dtype, contiguous.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    if real.shape != fake.shape or real.dtype is not fake.dtype or real.device != fake.device:
        _op.complain_unless_like(real, "real", fake=(fake, real.shape))
    if real.dtype not in _op.DTYPES or not real.dim():
        _op.complain_unless_like(real, "real")
    flat = (t if t.dim() == 2 else t.reshape(t.shape[0], t.shape[1:].numel()) for t in (real, fake))
    return Interpolate.apply(*flat, _philox.seed(real, generator)).view(real.shape)


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    make = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(size, generator=make).to(device, dtype).requires_grad_() for _ in range(2))
    return {"real": real, "fake": fake}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, d = size
    return (3 * n * d + n) * itemsize, (3 * n * d + n) * itemsize  # both and the result; its gradient and theirs


_op.OPERATORS["interpolate"] = _op.Operator(
    name="interpolate",
    function=interpolate,
    eager=eager,
    kernels=(_forward,),
    sizes=((64, 784), (256, 3072), (64, 49152)),
    example=_example,
    moved=_moved,
    replay=lambda arguments: {
        "epsilon": _philox.uniform(_philox.seed(arguments["real"]), (len(arguments["real"]),)).to(torch.float64)
    },
)
