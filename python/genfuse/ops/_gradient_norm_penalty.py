"""The penalty on the norm of each example's gradient, with its first and second derivatives, in one pass each."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "none": lambda penalty: penalty}


def slope(norm: Tensor, target: float, one_sided: bool, eps: float) -> Tensor:
    """The derivative of the penalty of g is slope g."""
    slope = 2 - 2 * target / norm.clamp(min=eps)
    return slope.masked_fill(norm < target, 0) if one_sided else slope


def bend(norm: Tensor, dot: Tensor, target: float, one_sided: bool, eps: float) -> Tensor:
    """The derivative of slope g along v is slope v + bend g, with dot = <g, v>."""
    floor = norm.clamp(min=eps)
    bend = 2 * target / floor * (dot / floor) / floor  # one by one: the cube underflows
    return bend.masked_fill(norm < max(eps, target if one_sided else 0), 0)


def weight(gradient: Tensor, reduction: str) -> float:
    """Of an example in the result."""
    return 1 / (gradient.shape[0] or math.nan) if reduction == "mean" else 1.0


def formula(gradient: Tensor, target: float, one_sided: bool, reduction: str, eps: float) -> tuple[Tensor, Tensor]:
    norm = gradient.norm(2, dim=1)  # (N,)
    # Below eps, as `slope` has it: the value of the norm, and the derivative of |g|^2 / (2 eps).
    floored = (gradient**2).sum(1) / (2 * eps)
    floored = torch.where(norm < eps, floored + (norm - floored).detach(), norm)
    excess = floored - target
    return _REDUCE[reduction]((excess.clamp(min=0) if one_sided else excess) ** 2), norm


def derivative(
    gpenalty: Tensor, gradient: Tensor, norm: Tensor, target: float, one_sided: bool, reduction: str, eps: float
) -> Tensor:
    norm = gradient.norm(2, dim=1)  # again: what was kept of it has no graph
    scale = weight(gradient, reduction) * gpenalty * slope(norm, target, one_sided, eps)  # (N,)
    return scale[:, None] * gradient


def second_derivative(
    v: Tensor, gpenalty: Tensor, gradient: Tensor, norm: Tensor,
    target: float, one_sided: bool, reduction: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    norm = gradient.norm(2, dim=1)
    dot, settings = (gradient * v).sum(1), (target, one_sided, eps)  # (N,)
    of_gpenalty = weight(gradient, reduction) * slope(norm, *settings) * dot
    along = slope(norm, *settings)[:, None] * v + bend(norm, dot, *settings)[:, None] * gradient  # (N, D)
    scale = (weight(gradient, reduction) * gpenalty).expand_as(norm)
    return of_gpenalty, scale[:, None] * along


def _results(gradient: Tensor, target: float, one_sided: bool, reduction: str, eps: float) -> tuple[Tensor, Tensor]:
    norm = _op.sums(gradient, gradient.shape[0])
    return torch.empty_like(norm) if reduction == "none" else norm.new_empty(()), norm


def _problem(gradient: Tensor, target: float, one_sided: bool, reduction: str, eps: float) -> tuple:
    return (
        _op.DTYPES[gradient.dtype], *_op.rows(gradient), *gradient.shape,
        target, eps, weight(gradient, reduction), one_sided, reduction != "none",
        _op.pieces(gradient) if gradient.is_cuda else None,
    )  # fmt: skip


def _problem_again(gpenalty: Tensor, gradient: Tensor, norm: Tensor, *settings: Any) -> tuple:
    return *_problem(gradient, *settings), gpenalty.contiguous(), norm.contiguous()


def _takes(gradient: Tensor, target: float, one_sided: bool, reduction: str, eps: float) -> tuple:
    if reduction not in _REDUCE:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    return (_op.matrix(gradient),)


def _takes_again(gpenalty: Tensor, gradient: Tensor, norm: Tensor, *settings: Any) -> tuple:
    of_each = gradient.shape[:1], _op.wide(gradient)
    of_penalty = of_each if settings[2] == "none" else ((), of_each[1])
    return of_penalty, *_takes(gradient, *settings), of_each


def _backward(needed: Any, cotangents: Any, gradient: Tensor, *settings: Any, outputs: Any) -> tuple[Tensor]:
    return (_derivative(cotangents[0], gradient, *outputs, *settings),)


def _backward_again(
    needed: Any, cotangents: Any, gpenalty: Tensor, gradient: Tensor, norm: Tensor, *settings: Any, outputs: Any
) -> tuple[Tensor | None, ...]:
    of_gpenalty, of_gradient = _second_derivative(cotangents[0], gpenalty, gradient, norm, *settings)
    return of_gpenalty if gpenalty.dim() else of_gpenalty.sum(), of_gradient, None


# Of gradient (N, D). norm (N,) is kept for the derivatives; gpenalty is () or (N,), as the result that it belongs to.
_SETTINGS = "float target, bool one_sided, str reduction, float eps"
_TRITON = "genfuse.ops._triton.gradient_norm_penalty"
_fused = _op.fused(
    f"gradient_norm_penalty(Tensor gradient, {_SETTINGS}) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=_problem,
    triton=_TRITON,
    backward=_backward,
    keep=(1,),
    constant=lambda *given: (1,),
    takes=_takes,
)
_derivative = _op.fused(
    f"gradient_norm_penalty_backward(Tensor gpenalty, Tensor gradient, Tensor norm, {_SETTINGS}) -> Tensor",
    formula=derivative,
    results=lambda gpenalty, gradient, *rest: _op.like(gradient),
    problem=_problem_again,
    triton=f"{_TRITON}:backward",
    backward=_backward_again,
    takes=_takes_again,
)
_second_derivative = _op.fused(
    "gradient_norm_penalty_double_backward(Tensor v, Tensor gpenalty, Tensor gradient, Tensor norm, "
    f"{_SETTINGS}) -> (Tensor, Tensor)",
    formula=second_derivative,
    results=lambda v, gpenalty, gradient, norm, *rest: (_op.like(norm), _op.like(gradient)),
    problem=lambda v, *given: (*_problem_again(*given), *_op.rows(v)),
    triton=f"{_TRITON}:double_backward",
    takes=lambda v, *given: (_op.matrix(given[1]), *_takes_again(*given)),
)


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
        _op.check_alike(gradient, "gradient")
    if not 0 <= target < math.inf:
        raise ValueError(f"target must be a finite norm of at least 0, got {target}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    if reduction not in _REDUCE:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    flat = gradient if gradient.dim() == 2 else _op.flatten(gradient, _op.order(gradient))
    return _fused(flat, float(target), bool(one_sided), reduction, float(eps))[0]
