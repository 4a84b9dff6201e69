"""ActNorm: scale and shift of every feature or channel, with the log-determinant, and its reductions backward."""

import math

import torch
from torch import Tensor

from genfuse.ops import _op


def formula(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple[Tensor, Tensor]:
    rows, channels = x.shape[0], log_scale.shape[0]
    x = x.unflatten(1, (channels, cells))  # (N, C, cells)
    s, t = log_scale[:, None], shift[:, None]  # (C, 1)
    y = (x - t) * (-s).exp() if inverse else x * s.exp() + t
    logdet = (cells * (-log_scale if inverse else log_scale).sum()).expand(rows)
    return y.flatten(1), logdet


def _results(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple[Tensor, Tensor]:
    return _op.like(x), _op.sums(x, x.shape[0])


def _problem(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple:
    log_scale, shift = log_scale.contiguous(), shift.contiguous()
    return _op.DTYPES[x.dtype], inverse, *_op.rows(x), log_scale, shift, x.shape[0], log_scale.shape[0], cells


def _scratch(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple[int, Tensor]:
    """How many groups of examples the kernels first sum over, and where they do: enough to keep a machine busy, and so
    few that their sums are small beside x. It does not depend on the number of threads, and so neither do the
    gradients."""
    rows, example = x.shape
    most = 1024 if x.is_cuda else 64
    least_rows = max(1, 32 // max(1, cells), 4096 // max(1, example))
    chunks = min(most, -(-rows // least_rows))
    return chunks, x.new_empty((chunks, 2 * log_scale.shape[0] + 1), dtype=torch.float64)


def _takes(x: Tensor, log_scale: Tensor, shift: Tensor, cells: int, inverse: bool) -> tuple:
    channels = log_scale.shape[0]
    of_each = (channels,), _op.wide(x)
    return ((x.shape[0], channels * cells), _op.storage(x)), of_each, of_each


_fused = _op.fused(
    "actnorm(Tensor x, Tensor log_scale, Tensor shift, SymInt cells, bool inverse) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=_problem,
    scratch=_scratch,
    triton="genfuse.ops._triton.actnorm",
    wrt=3,
    takes=_takes,
)


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
        _op.check_alike(x, "x")
        raise ValueError(f"x must be (..., D) with at least two axes, or (N, C, H, W); got shape {tuple(x.shape)}")
    wide, features = _op.wide(x), x.shape[1 if image else -1]
    if (
        not log_scale.shape == shift.shape == (features,)
        or not log_scale.dtype is shift.dtype is x.dtype is wide
        or not log_scale.device == shift.device == x.device
    ):
        _op.check_alike(x, "x", log_scale=(log_scale, (features,), wide), shift=(shift, (features,), wide))
    rows, cells = (x.shape[0], math.prod(x.shape[2:])) if image else (math.prod(x.shape[:-1]), 1)
    flat = x if x.dim() == 2 else x.reshape(rows, features * cells)
    if wide is not log_scale.dtype or wide is not shift.dtype:
        log_scale, shift = log_scale.to(wide), shift.to(wide)
    y, logdet = _fused(flat, log_scale, shift, cells, inverse)
    return (y, logdet) if x.dim() == 2 else (y.view(x.shape), logdet.view(x.shape[:1] if image else x.shape[:-1]))
