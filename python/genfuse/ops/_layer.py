"""A layer of a flow as one node of autograd's graph: a network, and the transform by what it makes."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfuse.ops import _affine_coupling, _mlp, _op
from genfuse.ops import _rational_quadratic_spline as _spline


class Network(NamedTuple):
    """What makes a layer's parameters of what it is shown: the arguments of `mlp`."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    residual: bool = False
    added: Tensor | None = None
    gates: Sequence[Tensor] = ()
    counts: Tensor | None = None
    context: Tensor | None = None  # (N, C), shown beside what is shown of x
    limit: float | None = None  # of what is shown of x: within [-limit, limit], or if it is 0, asinh(x)


def _affine(x: Tensor, params: Tensor, split: int, scale: str, slope: float, inverse: bool) -> tuple:
    return x, params, None, None, split, scale, slope, False, False, inverse


def _splined(x: Tensor, params: Tensor, settings: tuple) -> tuple:
    return x, params.reshape(*x.shape, params.shape[1] // max(x.shape[1], 1)), None, *settings


_FUSED = {"affine_coupling": _affine_coupling._fused, "rational_quadratic_spline": _spline._fused}
_KERNELS: dict[str, tuple[Any, Any]]
_KERNELS = {name: (_op.KERNELS[name], _op.KERNELS[f"{name}_backward"]) for name in _FUSED}


def _squash(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit) if limit else x.asinh()


def _shown(x: Tensor, context: Tensor | None, shown: slice, limit: float) -> tuple:
    """What its kernel takes of what a network sees."""
    x, stride = _op.rows(x)
    first, stop, _ = shown.indices(x.shape[1])
    of_context = (None, 0, 0) if context is None else (*_op.rows(context), context.shape[1])
    return _op.DTYPES[x.dtype], x, stride, *x.shape, first, stop - first, *of_context, limit


def _see(x: Tensor, context: Tensor | None, shown: slice, limit: float | None) -> Tensor:
    if limit is None:
        return x[:, shown] if context is None else torch.cat([x[:, shown], context], 1)
    given = _shown(x, context, shown, limit)
    seen = x.new_empty(x.shape[0], given[6] + given[9])
    _op._C.mlp_seen(*given, seen, -1, 0)
    return seen


def _whole(x: Tensor, y: Tensor, shown: slice, moved: slice | None) -> Tensor:
    """The features that moved, and beside them those that were shown, if these passed through apart from them."""
    if moved is None:
        return y
    return torch.cat([x[:, shown], y] if moved.stop is None else [y, x[:, shown]], 1)


class _Layer(torch.autograd.Function):
    """The kernels of both parts, one after the other; gradients of a second order are those of `_composed`."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple, settings: tuple, x: Tensor, context: Any, added: Any, counts: Any, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        transform, arguments, shown, moved, limit = how
        seen = _see(x, context, shown, limit)
        given = _mlp._nested(settings, seen, added, counts, parameters)
        params, hidden = made = _mlp._results(*given)
        _op._C.mlp(*_mlp._problem(*given), *made, -1, 0)
        part = x if moved is None else x[:, moved]
        y, logdet = _KERNELS[transform][0].native(*arguments(part, params))
        y = _whole(x, y, shown, moved)
        ctx.save_for_backward(x, context, added, counts, seen, params, hidden, *parameters)
        ctx.how, ctx.settings = how, settings
        ctx.set_materialize_grads(False)
        return y, logdet

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, glogdet: Tensor | None) -> tuple:
        x, context, added, counts, seen, params, hidden, *parameters = saved = ctx.saved_tensors
        transform, arguments, shown, moved, limit = ctx.how
        gy = torch.zeros_like(x) if gy is None else gy
        glogdet = x.new_zeros(x.shape[0]) if glogdet is None else glogdet
        needed = ctx.needs_input_grad[2:]
        every = (x, context, added, *parameters)
        wanted = [*needed[:3], *needed[4:]]
        plain = _op.plain((gy, glogdet, *saved))
        if torch.is_grad_enabled() or _op.without_memory(gy, glogdet) or not plain:
            again = partial(_composed, ctx.how, ctx.settings, counts)
            found = _op.needed_gradients(again, (gy, glogdet), every, wanted)
            return None, None, *found[:3], None, *found[3:]
        part, gpart = (x, gy) if moved is None else (x[:, moved], gy[:, moved])
        gmoved, gparams = _KERNELS[transform][1].native(gpart, glogdet, *arguments(part, params))
        given = _mlp._nested(ctx.settings, seen, added, counts, parameters)
        results = [_op.like(t) if w else None for t, w in zip((added, *parameters), wanted[2:], strict=True)]
        gseen = _op.like(seen) if wanted[0] or wanted[1] else None
        problem = _mlp._problem(*given)
        _op._C.mlp_backward(*problem, gparams.reshape(params.shape), hidden.contiguous(), [gseen, *results], -1, 0)
        gx = gcontext = None
        if gseen is not None:
            gcontext = gseen[:, gseen.shape[1] - context.shape[1] :] if wanted[1] else None
            if wanted[0]:
                gx = x.new_empty(x.shape)
                passed = (None, 0) if moved is None else _op.rows(gy)
                given = _shown(x, context, shown, math.inf if limit is None else limit)
                _op._C.mlp_seen_backward(*given, gseen, *passed, gmoved.contiguous(), gx, -1, 0)
        return None, None, gx, gcontext, results[0], None, *results[1:]


def _composed(
    how: tuple, settings: tuple, counts: Any, x: Tensor, context: Any, added: Any, *parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of one operator for each part."""
    transform, arguments, shown, moved, limit = how
    seen = _squash(x[:, shown], limit)
    seen = seen if context is None else torch.cat([seen, context], 1)
    _, _, _, weights, biases, gates, slope, residual = _mlp._nested(settings, seen, added, counts, parameters)
    params = _mlp.mlp(
        seen, weights, biases, slope=slope, residual=residual, added=added, gates=gates, counts=counts
    ).to(x.dtype)
    part = x if moved is None else x[:, moved]
    y, logdet = _FUSED[transform](*arguments(part, params))
    return _whole(x, y, shown, moved), logdet


_apply = super(torch.autograd.Function, _Layer).apply


def _check(how: tuple, x: Tensor, network: Network, each: int) -> None:
    """Raise a ValueError for what does not go with x (N, D), or a network that makes no ``each`` numbers a feature."""
    if x.dim() != 2:
        raise ValueError(f"x must be (N, D), got {tuple(x.shape)}")
    _op.check_alike(x, "x")
    weights, biases, context = network.weights, network.biases, network.context
    if len(weights) == 0 or len(weights) != len(biases):
        raise ValueError(f"weights and biases must be of as many layers, at least 1; got {len(weights)}, {len(biases)}")
    (rows, columns), (_, _, shown, _, _) = x.shape, how
    if abs(split := shown.stop or shown.start or 0) >= columns and split:
        raise ValueError(f"split must be above -{columns} and below {columns}, x's number of features, got {split}")
    seen = len(range(columns)[shown])
    moved = columns if seen == columns else columns - seen
    of_context: dict[str, Any] = {} if context is None else {"context": (context, (rows, context.shape[-1]))}
    inputs = seen + (0 if context is None else context.shape[-1])
    hidden = _mlp._widths(weights)[1:-1]
    widths, others = [inputs, *hidden, moved * each], (network.added, network.counts)
    _mlp._check_layers(x, widths, *others, weights, biases, network.gates, **of_context)
    _mlp._check_blocks(widths, len(network.gates), network.residual)


def _layer(how: tuple, x: Tensor, network: Network, each: int) -> tuple[Tensor, Tensor]:
    _check(how, x, network, each)
    settings = len(network.weights), 0.0, network.residual
    others = network.context, network.added, network.counts
    parameters = (*network.weights, *network.biases, *network.gates)
    quick = (
        not _op.compiling()
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and settings[0] <= _mlp.MOST_LAYERS
        and all(k.chosen["cpu"] is k.native is not None for k in (_mlp._KERNEL, *_KERNELS[how[0]]))
        and not torch.is_autocast_enabled("cpu")
        and _op.plain((x, *others, *parameters))
    )
    if quick:
        try:
            return _apply(how, settings, x, *others, *parameters)
        except BufferError:  # a tensor without memory, such as what is left of a transform that has ended
            pass
    return _composed(how, settings, others[2], x, *others[:2], *parameters)


def affine_layer(
    x: Tensor,
    network: Network,
    split: int = 0,
    *,
    scale: _affine_coupling.Scale = "tanh",
    slope: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`affine_coupling` of x (N, D) by the parameters that a network makes of the features which pass through, as one
    node of autograd's graph. With split 0 all move, and the network is shown all, as a masked one may be.

    Arguments, results and errors are those of `affine_coupling` and `mlp`. Differentiable to any order.
    """
    slope = _affine_coupling.checked_slope(scale, slope, None)
    shown = slice(split or None) if split >= 0 else slice(split, None)
    arguments = partial(_affine, split=split, scale=scale, slope=slope, inverse=inverse)
    return _layer(("affine_coupling", arguments, shown, None, network.limit), x, network, 2)


def spline_layer(x: Tensor, network: Network, split: int, settings: _spline.Settings) -> tuple[Tensor, Tensor]:
    """`rational_quadratic_spline` of x (N, D) in the same way; ``settings`` are not of tails "none"."""
    moved = None if not split else slice(split, None) if split > 0 else slice(split)
    shown = slice(split or None) if split >= 0 else slice(split, None)
    arguments = partial(_splined, settings=_spline._arguments(settings))
    how = "rational_quadratic_spline", arguments, shown, moved, network.limit
    return _layer(how, x, network, _spline._count(settings.bins, settings.tails))
