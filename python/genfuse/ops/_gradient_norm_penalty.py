"""The penalty on the norm of each example's gradient, with its first and second derivatives, in one pass each."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._op import _C

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "none": lambda penalty: penalty}


def formula(norm: Tensor, target: float, one_sided: bool) -> Tensor:
    excess = norm - target
    return (excess.clamp(min=0) if one_sided else excess) ** 2


def slope(norm: Tensor, target: float, one_sided: bool, eps: float) -> Tensor:
    """The derivative of the penalty of g is slope g."""
    slope = 2 - 2 * target / norm.clamp(min=eps)
    return slope.masked_fill(norm < target, 0) if one_sided else slope


def bend(norm: Tensor, dot: Tensor, target: float, one_sided: bool, eps: float) -> Tensor:
    """The derivative of slope g along v is slope v + bend g, with dot = <g, v>."""
    floor = norm.clamp(min=eps)
    bend = 2 * target / floor * (dot / floor) / floor  # one by one: the cube underflows
    return bend.masked_fill(norm < max(eps, target if one_sided else 0), 0)


def eager(gradient: Tensor, target: float = 1.0, one_sided: bool = False, reduction: str = "mean") -> Tensor:
    return _REDUCE[reduction](formula(gradient.flatten(1).norm(2, dim=1), target, one_sided))


def _outputs(gradient: Tensor, target: float, one_sided: bool, reduction: str) -> tuple[Tensor, Tensor]:
    norm = torch.empty(gradient.shape[0], dtype=_op.wide(gradient), device=gradient.device)
    return torch.empty_like(norm) if reduction == "none" else norm.new_empty(()), norm


def _ggradient(gpenalty: Tensor, gradient: Tensor, *rest: Any) -> Tensor:
    return _op.like(gradient)


def _of_both(v: Tensor, gpenalty: Tensor, gradient: Tensor, norm: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _op.like(norm), _op.like(gradient)


def weight(gradient: Tensor, reduction: str) -> float:
    """Of an example in the result."""
    return 1 / (gradient.shape[0] or math.nan) if reduction == "mean" else 1.0


def reference(gradient: Tensor, target: float, one_sided: bool, reduction: str) -> tuple[Tensor, Tensor]:
    norm = gradient.to(_op.wide(gradient)).norm(2, dim=1)
    return _REDUCE[reduction](formula(norm, target, one_sided)), norm


def backward_reference(
    gpenalty: Tensor, gradient: Tensor, norm: Tensor, target: float, one_sided: bool, reduction: str, eps: float
) -> Tensor:
    scale = weight(gradient, reduction) * gpenalty * slope(norm, target, one_sided, eps)
    return (scale[:, None] * gradient).to(gradient.dtype).contiguous()


def double_backward_reference(
    v: Tensor, gpenalty: Tensor, gradient: Tensor, norm: Tensor,
    target: float, one_sided: bool, reduction: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    v, g = v.to(norm.dtype), gradient.to(norm.dtype)
    dot, settings = (g * v).sum(1), (target, one_sided, eps)
    of_gpenalty = weight(gradient, reduction) * slope(norm, *settings) * dot
    along = slope(norm, *settings)[:, None] * v + bend(norm, dot, *settings)[:, None] * g
    scale = (weight(gradient, reduction) * gpenalty).expand_as(norm)
    return of_gpenalty, (scale[:, None] * along).to(gradient.dtype).contiguous()


def _problem(gradient: Tensor, target: float, one_sided: bool, reduction: str, eps: float) -> tuple[tuple, Tensor]:
    """What all compiled kernels take first, and the tensor whose address stands in it."""
    gradient, stride = _op.rows(gradient)
    return (
        _op.DTYPES[gradient.dtype], gradient.data_ptr(), stride, *gradient.shape,
        target, eps, weight(gradient, reduction), one_sided, reduction != "none",
    ), gradient  # fmt: skip


def _native(gradient: Tensor, target: float, one_sided: bool, reduction: str) -> tuple[Tensor, Tensor]:
    penalty, norm = _outputs(gradient, target, one_sided, reduction)
    problem, _alive = _problem(gradient, target, one_sided, reduction, 0.0)
    _C.gradient_norm_penalty(*problem, penalty.data_ptr(), norm.data_ptr(), *_op.place(gradient))
    return penalty, norm


def _native_backward(
    gpenalty: Tensor, gradient: Tensor, norm: Tensor, target: float, one_sided: bool, reduction: str, eps: float
) -> Tensor:
    ggradient, gpenalty = _op.like(gradient), gpenalty.contiguous()
    problem, _alive = _problem(gradient, target, one_sided, reduction, eps)
    _C.gradient_norm_penalty_backward(
        *problem, gpenalty.data_ptr(), norm.data_ptr(), ggradient.data_ptr(), *_op.place(gradient)
    )
    return ggradient


def _native_double_backward(
    v: Tensor, gpenalty: Tensor, gradient: Tensor, norm: Tensor,
    target: float, one_sided: bool, reduction: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of_gpenalty, of_gradient = _of_both(v, gpenalty, gradient, norm)
    gpenalty, (v, v_stride) = gpenalty.contiguous(), _op.rows(v)
    problem, _alive = _problem(gradient, target, one_sided, reduction, eps)
    _C.gradient_norm_penalty_double_backward(
        *problem, gpenalty.data_ptr(), norm.data_ptr(), v.data_ptr(), v_stride,
        of_gpenalty.data_ptr(), of_gradient.data_ptr(), *_op.place(gradient),
    )  # fmt: skip
    return of_gpenalty, of_gradient


# Of gradient (N, D). norm (N,) is kept for the derivatives; gpenalty is () or (N,), as the result that it belongs to.
_forward = _op.define(
    "gradient_norm_penalty(Tensor gradient, float target, bool one_sided, str reduction) -> (Tensor, Tensor)",
    reference=reference,
    fake=_outputs,
    native=_native,
    triton="gradient_norm_penalty:forward",
)
_SETTINGS = "Tensor gpenalty, Tensor gradient, Tensor norm, float target, bool one_sided, str reduction, float eps"
_backward = _op.define(
    f"gradient_norm_penalty_backward({_SETTINGS}) -> Tensor",
    reference=backward_reference,
    fake=_ggradient,
    native=_native_backward,
    triton="gradient_norm_penalty:backward",
)
_double_backward = _op.define(
    f"gradient_norm_penalty_double_backward(Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
    reference=double_backward_reference,
    fake=_of_both,
    native=_native_double_backward,
    triton="gradient_norm_penalty:double_backward",
)


class GradientNormPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, settings: tuple[float, bool, str, float]) -> Tensor:
        penalty, norm = _forward(gradient, *settings[:3])
        ctx.save_for_backward(gradient, norm)
        ctx.settings = settings
        return penalty

    @staticmethod
    def backward(ctx: Any, gpenalty: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on in here only under create_graph=True: then stay differentiable.
        backward = Derivative.apply if torch.is_grad_enabled() else _backward
        return backward(gpenalty, *ctx.saved_tensors, *ctx.settings), None


class Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gpenalty: Tensor, gradient: Tensor, norm: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(gpenalty, gradient, norm)
        ctx.settings = settings
        return _backward(gpenalty, gradient, norm, *settings)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gpenalty, gradient, norm = ctx.saved_tensors
        double_backward: Callable[..., tuple[Tensor, Tensor]] = _double_backward
        if torch.is_grad_enabled():  # the third order; what was kept of the norm has no graph
            double_backward, norm = double_backward_reference, gradient.to(norm.dtype).norm(2, dim=1)
        of_gpenalty, of_gradient = double_backward(v, gpenalty, gradient, norm, *ctx.settings)
        return of_gpenalty if gpenalty.dim() else of_gpenalty.sum(), of_gradient, None, None, None, None, None


def gradient_norm_penalty(
    gradient: Tensor, *, target: float = 1.0, one_sided: bool = False, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    r"""Penalise each example's gradient for a norm other than the target.

    .. math::
        \left(\lVert g \rVert_2 - t\right)^2 \quad\text{or, with one\_sided,}\quad
        \max\left(\lVert g \rVert_2 - t,\, 0\right)^2

    The norm is over all axes but the first, one for each example and never one for the batch. Target 1 is the gradient
    penalty of WGAN-GP (arXiv 1704.00028, equation 3; one-sided in its section 4), target 0 the squared norm of R1 and
    R2 (arXiv 1801.04406, equation 9). Multiply by lambda, or gamma / 2, yourself. Differentiable to any order.

    Args:
        gradient: g, (N, ...), of any strides, the critic's at N inputs; float32, float64, float16 or bfloat16. 16 bits
            are squared and summed in float32.
        target: t, at least 0.
        one_sided: leave norms below the target alone.
        reduction: "mean" over the examples, "sum", or "none".
        eps: above 0; the value does not depend on it. The derivative is :math:`2 (1 - t / \max(\lVert g \rVert, eps))
            g`: at norm 0, where the norm has none, it is 0, and it is 2 g wherever t is 0. The second derivative there
            is as large as t / eps.

    Returns:
        (), or (N,) for "none"; float64 for float64 and float32 for all others. The mean of no examples is NaN.

    Raises:
        ValueError: for a gradient without axes or of another dtype, and for settings outside their ranges.
    """
    if gradient.dtype not in _op.DTYPES or not gradient.dim():
        _op.complain_unless_like(gradient, "gradient")
    if not 0 <= target < math.inf:
        raise ValueError(f"target must be a finite norm of at least 0, got {target}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    if reduction not in _REDUCE:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    flat = gradient if gradient.dim() == 2 else _op.flatten(gradient, _op.order(gradient))
    return GradientNormPenalty.apply(flat, (float(target), bool(one_sided), reduction, float(eps)))


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    # Of norms near 1.5.
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1.5 / max(1, size[1]) ** 0.5
    return {"gradient": gradient.to(device, dtype).requires_grad_()}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, d = size
    return (n * d + n) * itemsize, (2 * n * d + n) * itemsize  # gradient, norm; gradient, its gradient, norm


_op.OPERATORS["gradient_norm_penalty"] = _op.Operator(
    name="gradient_norm_penalty",
    function=gradient_norm_penalty,
    eager=eager,
    kernels=(_forward, _backward),
    sizes=((64, 784), (256, 3072), (64, 49152)),
    example=_example,
    moved=_moved,
)
