"""Log-density of a standard normal plus a log-determinant: the end of a flow in one pass."""

import math
from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._op import _C


def formula(z: Tensor, logdet: Tensor | None) -> Tensor:
    log_prob = -0.5 * (z**2).sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]
    return log_prob if logdet is None else log_prob + logdet


def gradient(g: Tensor, z: Tensor) -> Tensor:
    return -g.unsqueeze(-1) * z


def _output(z: Tensor, logdet: Tensor | None) -> Tensor:
    return z.new_empty(z.shape[:-1], dtype=_op.wide(z))


def _gradient(g: Tensor, z: Tensor) -> Tensor:
    return _op.like(z)


def reference(z: Tensor, logdet: Tensor | None) -> Tensor:
    return formula(z.to(_op.wide(z)), logdet).contiguous()


def backward_reference(g: Tensor, z: Tensor) -> Tensor:
    return gradient(g, z.to(g.dtype)).to(z.dtype).contiguous()


def _problem(z: Tensor) -> tuple[tuple, Tensor]:
    """What both compiled kernels take first, and the tensor whose address stands in it."""
    z, stride = _op.rows(z)
    return (_op.DTYPES[z.dtype], z.data_ptr(), stride, z.shape[:-1].numel(), z.shape[-1]), z


def _native(z: Tensor, logdet: Tensor | None) -> Tensor:
    log_prob = _output(z, logdet)
    logdet = None if logdet is None else logdet.contiguous()
    problem, _alive = _problem(z)
    _C.standard_normal_log_prob(
        *problem, 0 if logdet is None else logdet.data_ptr(), log_prob.data_ptr(), *_op.place(z)
    )
    return log_prob


def _native_backward(g: Tensor, z: Tensor) -> Tensor:
    gz, g = _gradient(g, z), g.contiguous()
    problem, _alive = _problem(z)
    _C.standard_normal_log_prob_backward(*problem, g.data_ptr(), gz.data_ptr(), *_op.place(z))
    return gz


_forward = _op.define(
    "standard_normal_log_prob(Tensor z, Tensor? logdet) -> Tensor",
    reference=reference,
    fake=_output,
    native=_native,
    triton="standard_normal_log_prob:forward",
)
_backward = _op.define(
    "standard_normal_log_prob_backward(Tensor g, Tensor z) -> Tensor",
    reference=backward_reference,
    fake=_gradient,
    native=_native_backward,
    triton="standard_normal_log_prob:backward",
)


class StandardNormalLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, logdet: Tensor | None) -> Tensor:
        ctx.save_for_backward(z)
        return _forward(z, logdet)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # Grad mode is on in here only under create_graph=True: then stay differentiable.
        backward = backward_reference if torch.is_grad_enabled() else _backward
        of_z, of_logdet = ctx.needs_input_grad
        return backward(g, *ctx.saved_tensors) if of_z else None, g if of_logdet else None


def standard_normal_log_prob(z: Tensor, logdet: Tensor | None = None) -> Tensor:
    r"""Log-density of a standard normal at z, plus the log-determinant of the flow that led there.

    .. math::
        \log \mathcal N(z; 0, I) + \mathrm{logdet} =
        \mathrm{logdet} - \tfrac12 \sum_d z_d^2 - \tfrac D2 \log 2 \pi

    The change of variables that ends a normalizing flow (arXiv 1505.05770, section 3). Differentiable to any order.

    Args:
        z: (..., D), of any strides; float32, float64, float16 or bfloat16.
        logdet: (...), in nats, of z's dtype or the result's; None for 0.

    Returns:
        The log-density, (...), in nats, float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    _op.complain_unless_like(z, "z", **({} if logdet is None else {"logdet": (logdet, z.shape[:-1], _op.wide(z))}))
    return StandardNormalLogProb.apply(z, None if logdet is None else logdet.to(_op.wide(z)))


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    make = torch.Generator().manual_seed(1)
    z, logdet = torch.randn(size, generator=make), torch.randn(size[:-1], generator=make)
    z = z.to(device, dtype)
    return {"z": z.requires_grad_(), "logdet": logdet.to(device, _op.wide(z)).requires_grad_()}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, d = size
    return (n * d + 2 * n) * itemsize, (2 * n * d + n) * itemsize  # z, logdet, the result; z, its gradient, g


_op.OPERATORS["standard_normal_log_prob"] = _op.Operator(
    name="standard_normal_log_prob",
    function=standard_normal_log_prob,
    eager=formula,
    kernels=(_forward, _backward),
    sizes=((1, 8), (256, 32), (4096, 64), (65536, 64)),
    example=_example,
    moved=_moved,
)
