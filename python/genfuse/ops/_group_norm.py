"""Group normalisation, an affine map of each channel and SiLU: the layers between convolutions, in one pass."""

import torch
from torch import Tensor
from torch.nn import functional as F

from genfuse.ops import _op


def formula(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    grouped = x.unflatten(2, (groups, -1))  # (N, cells, groups, C / groups)
    var, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
    z = ((grouped - mean) * (var + eps).rsqrt()).flatten(2) * scale[:, None] + shift[:, None]
    return z * z.sigmoid() if silu else z  # F.silu has no forward mode of its gradient


def _problem(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool) -> tuple:
    return _op.DTYPES[x.dtype], x.contiguous(), scale.contiguous(), shift.contiguous(), *x.shape, groups, eps, silu


def _takes(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool) -> tuple:
    rows, cells, channels = x.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: {groups} groups do not divide {channels} channels")
    of_each = (rows, channels), _op.wide(x)
    return ((rows, cells, channels), _op.storage(x)), of_each, of_each


_fused = _op.fused(
    "group_norm(Tensor x, Tensor scale, Tensor shift, SymInt groups, float eps, bool silu) -> Tensor",
    formula=formula,
    results=lambda x, *_: _op.like(x),
    problem=_problem,
    native=_op.cpu_only("group_norm", "group_norm_backward"),
    wrt=3,
    takes=_takes,
)


def _composed(x: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float, silu: bool) -> Tensor:
    """By PyTorch's own layers."""
    if scale.dim() == shift.dim() == 1:
        z = F.group_norm(x, groups, scale, shift, eps)
    else:
        axes = (..., *(None,) * (x.dim() - 2))
        z = torch.addcmul(shift[axes], F.group_norm(x, groups, eps=eps), scale[axes])
    return F.silu(z) if silu else z


def group_norm(
    x: Tensor, groups: int, scale: Tensor, shift: Tensor, *, eps: float = 1e-5, silu: bool = False
) -> Tensor:
    r"""Normalise groups of channels, scale and shift each channel, and apply SiLU if asked to.

    .. math::
        z = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \odot s + t, \qquad y = z \; \text{or} \; z \, \sigma(z)

    with mean and variance over the cells and channels of a group of an example: group normalisation (arXiv 1803.08494)
    and, with a scale and a shift for each example, the layer through which a denoiser sees its noise level (arXiv
    2105.05233, section 3.1). Differentiable to any order. A CPU has a kernel for it, which reads and writes images
    whose channels lie side by side, ``torch.channels_last``, in which convolutions are fastest there too; elsewhere it
    is PyTorch's own layers.

    Args:
        x: (N, C, H, W), or any number of axes after C; float32, float64, float16 or bfloat16.
        groups: a divisor of C.
        scale: s, (C,), or (N, C) for each example; of x's dtype, or float32 beside 16 bits.
        shift: t, as scale.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        y, of x's shape and dtype; on a CPU with channels side by side.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together, or groups that do not divide C.
    """
    if x.dim() < 3 or x.dtype not in _op.DTYPES:
        _op.check_alike(x, "x")
        raise ValueError(f"x must be (N, C, H, W), or have other axes after C; got shape {tuple(x.shape)}")
    rows, channels, wide = *x.shape[:2], _op.wide(x)
    for name, t in (("scale", scale), ("shift", shift)):
        wanted = (channels,) if t.dim() == 1 else (rows, channels)
        if t.shape != wanted or t.dtype not in (x.dtype, wide) or t.device != x.device:
            _op.check_alike(x, "x", **{name: (t, wanted, wide)})
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    if not x.is_cpu or _op.KERNELS["group_norm"].native is None:
        return _composed(x, groups, scale, shift, eps, silu)
    scale, shift = (t.to(wide).expand(rows, channels) for t in (scale, shift))
    cells = x.flatten(2).transpose(1, 2)  # (N, cells, C)
    return _fused(cells, scale, shift, groups, eps, silu).transpose(1, 2).unflatten(2, x.shape[2:])
