"""Affine coupling: bounded scale, shift, pass-through and log-determinant in one pass."""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.ops import _op
from genfuse.ops._op import _C

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
    s = log_scale(raw, scale)
    if mask is not None:
        s, t = s.masked_fill(mask, 0), t.masked_fill(mask, 0)
    y = (moved - t) * (-s).exp() if inverse else moved * s.exp() + t
    logdet = s.sum(-1)
    return torch.cat([before, y, after], dim=-1), -logdet if inverse else logdet


def gradient(
    gy: Tensor, glogdet: Tensor, x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    raw, t = params.chunk(2, dim=-1)
    s, glogdet = log_scale(raw, scale), glogdet.unsqueeze(-1)
    parts = _parts(x.shape[-1], split)
    slope = {"tanh": lambda: 1 - s**2, "exp": lambda: torch.ones_like(s), "sigmoid": lambda: (-raw - 2).sigmoid()}
    (before, g, after), moved = gy.split(parts, -1), x.split(parts, -1)[1]
    factor = moved - t if inverse else moved
    gx = g * (-s if inverse else s).exp()
    gs = gx * factor + glogdet
    graw, gt = (-gs if inverse else gs) * slope[scale](), -gx if inverse else g
    if mask is not None:
        gx, graw, gt = torch.where(mask, g, gx), graw.masked_fill(mask, 0), gt.masked_fill(mask, 0)
    return torch.cat([before, gx, after], dim=-1), torch.cat([graw, gt.expand_as(graw)], dim=-1)


def eager(
    x: Tensor, params: Tensor, mask_or_split: Tensor | int, *, scale: str = "tanh", inverse: bool = False
) -> tuple[Tensor, Tensor]:
    mask = mask_or_split if isinstance(mask_or_split, Tensor) else None
    return formula(x, params, mask, 0 if mask is not None else int(mask_or_split), scale, inverse)


def _outputs(
    x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _op.like(x), x.new_empty((x.shape[0],), dtype=_op.wide(x))


def _gradients(gy: Tensor, glogdet: Tensor, x: Tensor, params: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _op.like(x), _op.like(params)


def reference(
    x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, logdet = formula(x.to(_op.wide(x)), params.to(_op.wide(x)), mask, split, scale, inverse)
    return y.to(x.dtype).contiguous(), logdet.contiguous()


def backward_reference(
    gy: Tensor, glogdet: Tensor, x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    wide = _op.wide(x)
    gx, gparams = gradient(gy.to(wide), glogdet, x.to(wide), params.to(wide), mask, split, scale, inverse)
    return gx.to(x.dtype).contiguous(), gparams.to(x.dtype).contiguous()


def _problem(x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool) -> tuple:
    """What both compiled kernels take first, and the tensors whose addresses stand in it."""
    x, x_stride = _op.rows(x)
    params, params_stride = _op.rows(params)
    return (
        _op.DTYPES[x.dtype], SCALES.index(scale), inverse, x.data_ptr(), x_stride, params.data_ptr(), params_stride,
        0 if mask is None else mask.data_ptr(), x.shape[0], x.shape[1],
        *_parts(x.shape[1], split)[:2],
    ), (x, params)  # fmt: skip


def _native(
    x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, logdet = _outputs(x, params, mask, split, scale, inverse)
    problem, _alive = _problem(x, params, mask, split, scale, inverse)
    _C.affine_coupling(*problem, y.data_ptr(), logdet.data_ptr(), *_op.place(x))
    return y, logdet


def _native_backward(
    gy: Tensor, glogdet: Tensor, x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    gx, gparams = _gradients(gy, glogdet, x, params)
    gy, glogdet = gy.contiguous(), glogdet.contiguous()
    problem, _alive = _problem(x, params, mask, split, scale, inverse)
    _C.affine_coupling_backward(
        *problem, gy.data_ptr(), glogdet.data_ptr(), gx.data_ptr(), gparams.data_ptr(), *_op.place(x)
    )
    return gx, gparams


_SETTINGS = "Tensor x, Tensor params, Tensor? mask, SymInt split, str scale, bool inverse) -> (Tensor, Tensor)"
_forward = _op.define(
    f"affine_coupling({_SETTINGS}",
    reference=reference,
    fake=_outputs,
    native=_native,
    triton="affine_coupling:forward",
)
_backward = _op.define(
    f"affine_coupling_backward(Tensor gy, Tensor glogdet, {_SETTINGS}",
    reference=backward_reference,
    fake=_gradients,
    native=_native_backward,
    triton="affine_coupling:backward",
)


class AffineCoupling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, params: Tensor, mask: Tensor | None, split: int, scale: str, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, params, mask)
        ctx.settings = split, scale, inverse
        return _forward(x, params, mask, split, scale, inverse)

    @staticmethod
    def backward(ctx: Any, gy: Tensor, glogdet: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on in here only under create_graph=True: then stay differentiable.
        backward = backward_reference if torch.is_grad_enabled() else _backward
        gx, gparams = backward(gy, glogdet, *ctx.saved_tensors, *ctx.settings)
        return gx, gparams, None, None, None, None


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
    y, logdet = AffineCoupling.apply(flat, raw, mask, split * cells, scale, inverse)
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


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    n, d = size
    make = torch.Generator().manual_seed(1)
    x, params = torch.randn(n, d, generator=make), torch.randn(n, 2 * (d - d // 2), generator=make)
    leaves = {"x": x.to(device, dtype), "params": params.to(device, dtype)}
    return {**{name: t.requires_grad_() for name, t in leaves.items()}, "mask_or_split": d // 2}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, d = size
    # x, params of as many, y and logdet; gy, glogdet, x, params and the gradients of the last two
    return (3 * n * d + n) * itemsize, (5 * n * d + n) * itemsize


_op.OPERATORS["affine_coupling"] = _op.Operator(
    name="affine_coupling",
    function=affine_coupling,
    eager=eager,
    kernels=(_forward, _backward),
    sizes=((1, 8), (256, 32), (4096, 64), (65536, 64)),
    example=_example,
    moved=_moved,
)
