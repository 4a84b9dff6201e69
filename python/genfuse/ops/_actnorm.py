"""ActNorm: scale and shift of every feature or channel, with the log-determinant, and its reductions backward."""

import math
from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._op import _C


def formula(x: Tensor, log_scale: Tensor, shift: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Of x (..., *example), with parameters of as many axes as an example that expand to it."""
    axes = x.dim() - log_scale.dim()
    y = (x - shift) * (-log_scale).exp() if inverse else x * log_scale.exp() + shift
    logdet = log_scale.expand(x.shape[axes:]).sum().expand(x.shape[:axes])
    return y, -logdet if inverse else logdet


def gradient(
    gy: Tensor, glogdet: Tensor, x: Tensor, log_scale: Tensor, shift: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (N, C, cells), with parameters (C, 1)."""
    gx = gy * (-log_scale if inverse else log_scale).exp()
    gs = (gx * (x - shift if inverse else x) + glogdet[:, None, None]).sum((0, 2))
    return gx, -gs if inverse else gs, (-gx if inverse else gy).sum((0, 2))


def eager(x: Tensor, log_scale: Tensor, shift: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    if x.dim() == 4:
        log_scale, shift = log_scale[:, None, None], shift[:, None, None]
    return formula(x, log_scale, shift, inverse)


def _outputs(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple[Tensor, Tensor]:
    return _op.like(x), x.new_empty((x.shape[0],), dtype=_op.wide(x))


def _gradients(
    gy: Tensor, glogdet: Tensor, x: Tensor, log_scale: Tensor, shift: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _op.like(x), _op.like(log_scale), _op.like(shift)


def _split(x: Tensor, log_scale: Tensor, cells: int) -> Tensor:
    return x.to(log_scale.dtype).unflatten(1, (log_scale.shape[0], cells))


def reference(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple[Tensor, Tensor]:
    y, logdet = formula(_split(x, log_scale, cells), log_scale[:, None], shift[:, None], inverse)
    return y.flatten(1).to(x.dtype).contiguous(), logdet.contiguous()


def backward_reference(
    gy: Tensor, glogdet: Tensor, x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gy, wide_x = (_split(t, log_scale, cells) for t in (gy, x))
    gx, glog_scale, gshift = gradient(gy, glogdet, wide_x, log_scale[:, None], shift[:, None], inverse)
    return gx.flatten(1).to(x.dtype).contiguous(), glog_scale, gshift


def chunks(x: Tensor, cells: int) -> int:
    """How many groups of examples the kernels first sum over: enough to keep a machine busy, and so few that their
    sums are small beside x. It does not depend on the number of threads, and so neither do the gradients."""
    rows, example = x.shape
    most = 256 if x.is_cuda else 64
    least_rows = max(1, 32 // max(1, cells), 4096 // max(1, example))
    return min(most, -(-rows // least_rows))


def _problem(
    x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool
) -> tuple[tuple, tuple[Tensor, ...]]:
    """What both compiled kernels take first, and the tensors whose addresses stand in it."""
    x, x_stride = _op.rows(x)
    log_scale, shift = log_scale.contiguous(), shift.contiguous()
    return (
        _op.DTYPES[x.dtype], inverse, x.data_ptr(), x_stride, log_scale.data_ptr(), shift.data_ptr(),
        x.shape[0], log_scale.shape[0], cells,
    ), (x, log_scale, shift)  # fmt: skip


def _native(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple[Tensor, Tensor]:
    y, logdet = _outputs(x, log_scale, shift, cells, inverse)
    problem, _alive = _problem(x, log_scale, shift, cells, inverse)
    _C.actnorm(*problem, y.data_ptr(), logdet.data_ptr(), *_op.place(x))
    return y, logdet


def _native_backward(
    gy: Tensor, glogdet: Tensor, x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    results = _gradients(gy, glogdet, x, log_scale, shift)
    gy, glogdet = gy.contiguous(), glogdet.contiguous()
    partial = x.new_empty((chunks(x, cells), 2, log_scale.shape[0]), dtype=torch.float64)
    problem, _alive = _problem(x, log_scale, shift, cells, inverse)
    addresses = (t.data_ptr() for t in results)
    _C.actnorm_backward(
        *problem, gy.data_ptr(), glogdet.data_ptr(), partial.shape[0], partial.data_ptr(), *addresses, *_op.place(x)
    )
    return results


_SETTINGS = "Tensor x, Tensor log_scale, Tensor shift, SymInt cells, bool inverse"
_forward = _op.define(
    f"actnorm({_SETTINGS}) -> (Tensor, Tensor)",
    reference=reference,
    fake=_outputs,
    native=_native,
    triton="actnorm:forward",
)
_backward = _op.define(
    f"actnorm_backward(Tensor gy, Tensor glogdet, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=backward_reference,
    fake=_gradients,
    native=_native_backward,
    triton="actnorm:backward",
)


class ActNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, log_scale, shift)
        ctx.settings = cells, inverse
        return _forward(x, log_scale, shift, cells, inverse)

    @staticmethod
    def backward(ctx: Any, gy: Tensor, glogdet: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on in here only under create_graph=True: then stay differentiable.
        backward = backward_reference if torch.is_grad_enabled() else _backward
        return *backward(gy, glogdet, *ctx.saved_tensors, *ctx.settings), None, None


def actnorm(x: Tensor, log_scale: Tensor, shift: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Scale and shift every feature, or every channel of images, with the log-determinant.

    .. math::
        y = x \odot e^{s} + t, \qquad \log\left|\det \partial y / \partial x\right| = HW \sum_c s_c

    and, with ``inverse``, :math:`y = (x - t) \odot e^{-s}` and minus that sum; HW is 1 for vectors. ActNorm of Glow
    (arXiv 1807.03039), section 3.1, whose scale and bias are e^s and t. Gradients of s and t are summed in one pass
    over the data, in an order that does not depend on the number of threads. Differentiable to any order.

    Args:
        x: (..., D), or images (N, C, H, W); of any strides, though images, and rows that are not evenly spaced, are
            copied where an example is not in one piece. float32, float64, float16 or bfloat16.
        log_scale: s, (D,) or (C,), of x's dtype, or float32 beside 16 bits.
        shift: t, as log_scale.
        inverse: undo it.

    Returns:
        y, of x's shape and dtype, contiguous; and logdet per example, (...) or (N,), in nats, float64 for float64 and
        float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    image = x.dim() == 4
    if x.dim() < 2:
        _op.complain_unless_like(x, "x")
        raise ValueError(f"x must be (..., D) with at least two axes, or (N, C, H, W); got shape {tuple(x.shape)}")
    wide, features = _op.wide(x), x.shape[1 if image else -1]
    if (
        not log_scale.shape == shift.shape == (features,)
        or not log_scale.dtype is shift.dtype is x.dtype is wide
        or not log_scale.device == shift.device == x.device
    ):
        _op.complain_unless_like(x, "x", log_scale=(log_scale, (features,), wide), shift=(shift, (features,), wide))
    rows, cells = (x.shape[0], math.prod(x.shape[2:])) if image else (math.prod(x.shape[:-1]), 1)
    flat = x if x.dim() == 2 else x.reshape(rows, features * cells)
    y, logdet = ActNorm.apply(flat, log_scale.to(wide), shift.to(wide), cells, inverse)
    return (y, logdet) if x.dim() == 2 else (y.view(x.shape), logdet.view(x.shape[:1] if image else x.shape[:-1]))


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    n, d = size
    make = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=make).to(device, dtype)
    log_scale, shift = (0.5 * torch.randn(d, generator=make).to(device, dtype) for _ in range(2))
    return {"x": x.requires_grad_(), "log_scale": log_scale.requires_grad_(), "shift": shift.requires_grad_()}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, d = size
    # x, y, logdet and the parameters; gy, x, gx, glogdet, the parameters and their gradients
    return (2 * n * d + n + 2 * d) * itemsize, (3 * n * d + n + 4 * d) * itemsize


_op.OPERATORS["actnorm"] = _op.Operator(
    name="actnorm",
    function=actnorm,
    eager=eager,
    kernels=(_forward, _backward),
    sizes=((1, 8), (256, 32), (4096, 64), (65536, 64)),
    example=_example,
    moved=_moved,
)
