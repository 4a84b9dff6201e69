"""Affine coupling: bounded scale, shift, pass-through and log-determinant in one pass."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.ops import _op

Scale = Literal["tanh", "exp", "sigmoid", "softclip"]
SCALES: tuple[Scale, ...] = get_args(Scale)  # as math.h numbers them
KINDS = (*SCALES, "floored", "factored")
SLOPE = 1e-3  # of "softclip" by default


def _parts(columns: int, split: int) -> tuple[int, int, int]:
    """How many columns pass through, are moved, and pass through again."""
    return (split, columns - split, 0) if split >= 0 else (0, columns + split, -split)


def log_scale(raw: Tensor, scale: str, slope: float, factor: Tensor | None = None) -> Tensor:
    if scale == "tanh":
        return raw.tanh() if factor is None else factor * raw.tanh()
    if scale == "softclip":
        return raw / (1 + (raw / math.log(slope)).abs())
    if scale == "sigmoid":
        return ((raw + 2).sigmoid() + slope).log() if slope else F.logsigmoid(raw + 2)
    return raw


def formula(
    x: Tensor,
    params: Tensor,
    factor: Tensor | None = None,
    mask: Tensor | None = None,
    split: int = 0,
    scale: str = "tanh",
    slope: float = 0.0,
    interleaved: bool = False,
    by_element: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    before, moved, after = x.split(_parts(x.shape[-1], split), -1)
    raw, t = params.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else params.chunk(2, dim=-1)
    if mask is not None:  # of what passes through nothing has an effect, NaN included
        raw, t = raw.masked_fill(mask, 0), t.masked_fill(mask, 0)
    s = log_scale(raw, scale, slope, factor)
    if mask is not None:
        s = s.masked_fill(mask, 0)
    y = (moved - t) * (-s).exp() if inverse else moved * s.exp() + t
    s = -s if inverse else s
    logdet = torch.cat([torch.zeros_like(before), s, torch.zeros_like(after)], -1) if by_element else s.sum(-1)
    return torch.cat([before, y, after], dim=-1), logdet


def _results(x: Tensor, params: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _op.like(x), _op.sums(x, *(x.shape if rest[-2] else x.shape[:1]))


def _problem(
    x: Tensor, params: Tensor, factor: Tensor | None, mask: Tensor | None, split: int, scale: str, slope: float,
    interleaved: bool, by_element: bool, inverse: bool,
) -> tuple:  # fmt: skip
    return (
        *_settings(x, scale, slope, factor, by_element, inverse), *_op.rows(x), *_op.rows(params),
        1 + interleaved, None, 0, None if factor is None else factor.contiguous(),
        None if mask is None else mask.contiguous(), *x.shape, *_parts(x.shape[1], split)[:2],
    )  # fmt: skip


def _settings(
    x: Tensor, scale: str, slope: float, factor: Tensor | None, by_element: bool, inverse: bool
) -> tuple[int, int, float, bool, bool]:
    kind = "factored" if factor is not None else "floored" if scale == "sigmoid" and slope else scale
    constant = -1 / math.log(slope) if scale == "softclip" else slope
    return _op.DTYPES[x.dtype], KINDS.index(kind), constant, by_element, inverse


def checked_slope(scale: str, slope: float | None, factor: Tensor | None) -> float:
    """The slope, or its default; raises a ValueError for scales, slopes and factors that do not go together."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if factor is not None and scale != "tanh":
        raise ValueError(f"factor goes with scale tanh, got {scale}")
    if slope is None:
        return SLOPE if scale == "softclip" else 0.0
    if not ((0 < slope < 1 and scale == "softclip") or (0 <= slope < 1 and scale == "sigmoid")):
        raise ValueError(f"slope goes with softclip, above 0 and below 1, or sigmoid, from 0; got {slope} with {scale}")
    return slope


def _takes(
    x: Tensor, params: Tensor, factor: Tensor | None, mask: Tensor | None, split: int, scale: str, slope: float,
    *settings: bool,
) -> tuple:  # fmt: skip
    checked_slope(scale, slope or None, factor)
    ((rows, columns), dtype), wide = _op.matrix(x), _op.wide(x)
    _, moved, _ = _parts(columns, split)
    if not 0 <= moved <= columns:
        raise ValueError(f"split must be from -{columns} to {columns}, got {split}")
    return _op.matrix(x), ((rows, 2 * moved), dtype), ((moved,), wide), ((moved,), torch.bool)


_fused = _op.fused(
    "affine_coupling(Tensor x, Tensor params, Tensor? factor, Tensor? mask, SymInt split, str scale, float slope, "
    "bool interleaved, bool by_element, bool inverse) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=_problem,
    triton="genfuse.ops._triton.affine_coupling",
    wrt=2,
    takes=_takes,
)


def _formula_of_pair(
    x: Tensor, raw: Tensor, shift: Tensor, scale: str, slope: float, by_element: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    params = torch.cat([raw, shift], -1)
    return formula(x, params, None, None, 0, scale, slope, False, by_element, inverse)


def _problem_of_pair(
    x: Tensor, raw: Tensor, shift: Tensor, scale: str, slope: float, by_element: bool, inverse: bool
) -> tuple:
    if raw.stride(1) != shift.stride(1):
        raw, shift = raw.contiguous(), shift.contiguous()
    (rows, cols), (stride, step) = x.shape, raw.stride()
    return (
        *_settings(x, scale, slope, None, by_element, inverse), *_op.rows(x), raw, stride, step,
        shift, shift.stride(0), None, None, rows, cols, 0, cols,
    )  # fmt: skip


_pair = _op.fused(
    "affine_pair(Tensor x, Tensor raw, Tensor shift, str scale, float slope, bool by_element, bool inverse) "
    "-> (Tensor, Tensor)",
    formula=_formula_of_pair,
    results=_results,
    problem=_problem_of_pair,
    triton="genfuse.ops._triton.affine_coupling",
    wrt=3,
    takes=lambda x, raw, shift, scale, slope, *settings: (
        checked_slope(scale, slope or None, None) is not None and [_op.matrix(x)] * 3
    ),
)


def affine_coupling(
    x: Tensor,
    params: Tensor | tuple[Tensor, Tensor],
    mask_or_split: Tensor | int = 0,
    *,
    scale: Scale = "tanh",
    slope: float | None = None,
    factor: Tensor | None = None,
    by_element: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift some coordinates by what a conditioner made of the others, with the log-determinant.

    .. math::
        y = x \odot e^{s} + t, \qquad \log\left|\det \partial y / \partial x\right| = \sum s

    and, with ``inverse``, :math:`y = (x - t) \odot e^{-s}` and minus that sum. RealNVP (arXiv 1605.08803), section 3.2.
    The log-scale s is made of the raw parameter a: tanh(a) ("tanh"), or with a factor f, which RealNVP learns, f
    tanh(a); a itself ("exp"); log(sigmoid(a + 2) + slope) ("sigmoid": as in Glow, arXiv 1807.03039, and with slope 1e-3
    as in nflows); or a / (1 + |a / log slope|), between log slope and -log slope ("softclip", as in zuko).
    Differentiable to any order; nothing but the arguments is stored.

    Args:
        x: (..., D), or images (N, C, H, W); of any strides, though images, and rows that are not evenly spaced, are
            copied where an example is not in one piece. float32, float64, float16 or bfloat16.
        params: the conditioner's raw output, along the feature axis (the last, or C) first all log-scales, then all
            shifts: of 2 (D - |split|) or 2 (C - |split|) features with a split, of 2 D or 2 C with a mask. Or with both
            of a coordinate beside each other along a further axis, (..., D - |split|, 2). Or a tuple of log-scales and
            shifts, each as the coordinates that move; if all do, these may be views of any strides, which are not
            copied.
        mask_or_split: an int, how many of the first features pass through, or if it is negative, of the last (as in
            x[:, -k:]); or a bool tensor that is True where a
            coordinate passes through (b = 1 in the paper), of the shape of an example or one that expands to it, as
            (H, W) for a checkerboard. Parameters of coordinates that pass through have no effect.
        scale: how the log-scale is bounded.
        slope: the least scale e^s, from 0 to below 1: of "softclip", 1e-3 by default, and above 0; what is added to
            that of "sigmoid", 0 by default.
        factor: of "tanh", of a shape that expands to the coordinates of an example that move, such as (D - |split|,) or
            (C - |split|, 1, 1); of x's dtype, or float32 beside 16 bits.
        by_element: whether to return log-determinants of x's shape, 0 where a coordinate passes through.
        inverse: undo it, given the same parameters.

    Returns:
        y, of x's shape and dtype, contiguous; and logdet per example, (...) or (N,), in nats, float64 for float64 and
        float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    mask, split = (mask_or_split, 0) if isinstance(mask_or_split, Tensor) else (None, mask_or_split)
    if isinstance(split, (bool, float)):
        raise ValueError(f"mask_or_split must be an int or a bool tensor, got {split}")
    image = x.dim() == 4
    axis = 1 if image else -1
    if not x.dim() or x.dtype not in _op.DTYPES:
        _op.check_alike(x, "x")
    features = x.shape[axis]
    if mask is not None:
        mask = _flat(mask, x, "mask_or_split", tuple(x.shape[1:]) if image else (features,))
    if not -features <= split <= features:
        raise ValueError(f"mask_or_split must be from -{features} to {features}, x's number of features, got {split}")
    slope = checked_slope(scale, slope, factor)
    moved = features - abs(split)
    rows, cells = (x.shape[0], math.prod(x.shape[2:])) if image else (math.prod(x.shape[:-1]), 1)
    if factor is not None:
        factor = _flat(factor, x, "factor", (moved, *x.shape[2:]) if image else (moved,))
    flat = x if x.dim() == 2 else x.reshape(rows, features * cells)
    wanted = list(x.shape)
    wanted[axis] = moved
    if isinstance(params, Tensor):
        interleaved = params.dim() == x.dim() + 1
        if interleaved:
            wanted.append(2)
        else:
            wanted[axis] = 2 * moved  # not in place: for torch.jit.trace, sizes are tensors
        if params.shape != (*wanted,) or params.dtype is not x.dtype or params.device != x.device:
            _op.check_alike(x, "x", params=(params, tuple(wanted)))
        raw = params if params.dim() == x.dim() == 2 else params.reshape(rows, 2 * moved * cells)
        y, logdet = _fused(flat, raw, factor, mask, split * cells, scale, slope, interleaved, by_element, inverse)
    else:
        if len(params) != 2:
            raise ValueError(f"params must be a tensor, or a tuple of log-scales and shifts, got {len(params)} tensors")
        _op.check_alike(x, "x", **{f"params[{i}]": (t, tuple(wanted)) for i, t in enumerate(params)})
        first, second = (t if t.dim() == 2 else t.reshape(rows, moved * cells) for t in params)
        if mask is factor is None and not split:
            y, logdet = _pair(flat, first, second, scale, slope, by_element, inverse)
        else:
            raw = torch.cat([first, second], 1)
            y, logdet = _fused(flat, raw, factor, mask, split * cells, scale, slope, False, by_element, inverse)
    if x.dim() == 2:
        return y, logdet
    return y.view(x.shape), logdet.view(x.shape if by_element else x.shape[:1] if image else x.shape[:-1])


def _flat(t: Tensor, x: Tensor, name: str, example: tuple[int, ...]) -> Tensor:
    """The mask or the factor for every coordinate, in one piece."""
    dtypes = (torch.bool,) if name == "mask_or_split" else (x.dtype, _op.wide(x))
    if t.dtype not in dtypes or t.device != x.device:
        kind = "an int or a bool tensor" if name == "mask_or_split" else f"a {' or '.join(map(str, {*dtypes}))} tensor"
        raise ValueError(f"{name} must be {kind} on {x.device}, got {t.dtype} on {t.device}")
    try:
        return t.expand(example).reshape(-1).to(dtypes[-1])
    except RuntimeError:
        shape = f"{'the shape of an example' if name == 'mask_or_split' else 'the shape of what moves'}, {example}"
        raise ValueError(f"{name} must have {shape}, or expand to it; got {tuple(t.shape)}") from None
