"""Affine coupling: bounded scale, shift, pass-through and log-determinant in one pass."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.ops import _op

Scale = Literal["tanh", "exp", "sigmoid"]
SCALES: tuple[Scale, ...] = get_args(Scale)  # as math.h numbers them


def _parts(columns: int, split: int) -> tuple[int, int, int]:
    """How many columns pass through, are moved, and pass through again."""
    return (split, columns - split, 0) if split >= 0 else (0, columns + split, -split)


def log_scale(raw: Tensor, scale: str) -> Tensor:
    if scale == "tanh":
        return raw.tanh()
    return raw if scale == "exp" else F.logsigmoid(raw + 2)


def formula(
    x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    before, moved, after = x.split(_parts(x.shape[-1], split), -1)
    raw, t = params.chunk(2, dim=-1)
    if mask is not None:  # of what passes through nothing has an effect, NaN included
        raw, t = raw.masked_fill(mask, 0), t.masked_fill(mask, 0)
    s = log_scale(raw, scale)
    if mask is not None:
        s = s.masked_fill(mask, 0)
    y = (moved - t) * (-s).exp() if inverse else moved * s.exp() + t
    logdet = s.sum(-1)
    return torch.cat([before, y, after], dim=-1), -logdet if inverse else logdet


def _results(
    x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _op.like(x), x.new_empty((x.shape[0],), dtype=_op.wide(x))


def _problem(x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool) -> tuple:
    return (
        _op.DTYPES[x.dtype], SCALES.index(scale), inverse, *_op.rows(x), *_op.rows(params),
        None if mask is None else mask.contiguous(), *x.shape, *_parts(x.shape[1], split)[:2],
    )  # fmt: skip


_fused = _op.fused(
    "affine_coupling(Tensor x, Tensor params, Tensor? mask, SymInt split, str scale, bool inverse) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=_problem,
    triton="genfuse.ops._triton.affine_coupling",
    wrt=2,
)


def affine_coupling(
    x: Tensor, params: Tensor, mask_or_split: Tensor | int, *, scale: Scale = "tanh", inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift some coordinates by what a conditioner made of the others, with the log-determinant.

    .. math::
        y = x \odot e^{s} + t, \qquad \log\left|\det \partial y / \partial x\right| = \sum s

    and, with ``inverse``, :math:`y = (x - t) \odot e^{-s}` and minus that sum. RealNVP (arXiv 1605.08803), section 3.2.
    The log-scale s is made of the raw parameter a: tanh(a) ("tanh"), a itself ("exp"), or log sigmoid(a + 2)
    ("sigmoid", as in Glow, arXiv 1807.03039). Differentiable to any order; nothing but the arguments is stored.

    Args:
        x: (..., D), or images (N, C, H, W); of any strides, though images, and rows that are not evenly spaced, are
            copied where an example is not in one piece. float32, float64, float16 or bfloat16.
        params: the conditioner's raw output, along the feature axis (the last, or C) first all log-scales, then all
            shifts: of 2 (D - |split|) or 2 (C - |split|) features with a split, of 2 D or 2 C with a mask.
        mask_or_split: an int, how many of the first features pass through, or if it is negative, of the last (as in
            x[:, -k:]); or a bool tensor that is True where a
            coordinate passes through (b = 1 in the paper), of the shape of an example or one that expands to it, as
            (H, W) for a checkerboard. Parameters of coordinates that pass through have no effect.
        scale: how the log-scale is bounded.
        inverse: undo it, given the same parameters.

    Returns:
        y, of x's shape and dtype, contiguous; and logdet per example, (...) or (N,), in nats, float64 for float64 and
        float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    mask, split = (mask_or_split, 0) if isinstance(mask_or_split, Tensor) else (None, mask_or_split)
    image = x.dim() == 4
    axis = 1 if image else -1
    if x.dim() < 2 or x.dtype not in _op.DTYPES:
        _op.complain_unless_like(x, "x")
        raise ValueError(f"x must be (..., D) with at least two axes, or (N, C, H, W); got shape {tuple(x.shape)}")
    features = x.shape[axis]
    if mask is not None:
        mask = _flat_mask(mask, x, tuple(x.shape[1:]) if image else (features,))
    if not -features <= split <= features:
        raise ValueError(f"mask_or_split must be from -{features} to {features}, x's number of features, got {split}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    wanted = list(x.shape)
    wanted[axis] = 2 * (features - abs(split))
    if tuple(params.shape) != tuple(wanted) or params.dtype is not x.dtype or params.device != x.device:
        _op.complain_unless_like(x, "x", params=(params, tuple(wanted)))
    rows, cells = (x.shape[0], math.prod(x.shape[2:])) if image else (math.prod(x.shape[:-1]), 1)
    flat = x if x.dim() == 2 else x.reshape(rows, features * cells)
    raw = params if x.dim() == 2 else params.reshape(rows, 2 * (features - abs(split)) * cells)
    y, logdet = _fused(flat, raw, mask, split * cells, scale, inverse)
    return (y, logdet) if x.dim() == 2 else (y.view(x.shape), logdet.view(x.shape[:1] if image else x.shape[:-1]))


def _flat_mask(mask: Tensor, x: Tensor, example: tuple[int, ...]) -> Tensor:
    """The mask for every coordinate of an example, (M,), in one piece."""
    if mask.dtype is not torch.bool or mask.device != x.device:
        got = f"{mask.dtype} on {mask.device}"
        raise ValueError(f"mask_or_split must be an int or a bool tensor on {x.device}, got {got}")
    try:
        return mask.expand(example).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"mask_or_split must have the shape of an example, {example}, or expand to it; got {tuple(mask.shape)}"
        ) from None
