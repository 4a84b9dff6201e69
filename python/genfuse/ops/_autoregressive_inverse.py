"""The inverse of a masked autoregressive layer in one sweep over its coordinates, each hidden unit computed once."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genfuse.ops import _affine_coupling, _op
from genfuse.ops import _rational_quadratic_spline as _spline
from genfuse.ops._affine_coupling import Scale

MOST_LAYERS = 64  # which go to a GPU with a launch's parameters; as portable.h has it


class Settings(NamedTuple):
    """The transform of a coordinate, an affine one, or with bins above 0 a spline; and the shape of the network."""

    scale: str
    bins: int
    bound: float
    tails: str
    min_width: float
    min_height: float
    min_derivative: float
    damping: float
    residual: bool = False
    slope: float = 0.0

    @property
    def spline(self) -> _spline.Settings:
        return _spline_of(self)

    @property
    def params(self) -> int:
        """Of a coordinate."""
        return self.spline.params if self.bins else 2

    def inverse(self, y: Tensor, params: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Undo the transform of D coordinates (N, D), given their parameters by coordinate, (N, D P)."""
        if self.bins:
            by_coordinate = params.unflatten(1, (y.shape[1], self.params))
            return _spline._fused(y, by_coordinate, None, *self.spline.arguments)
        return _affine_coupling._fused(y, params, factor, None, 0, self.scale, self.slope, True, False, True)


def _spline_of(s: Settings) -> _spline.Settings:  # a function, as PyTorch 2.6 does not compile properties of tuples
    return _spline.Settings(
        s.bins, s.bound, s.tails, True, s.min_width, s.min_height, s.min_derivative, s.damping, s.slope
    )


def _adds(layer: int, residual: bool) -> bool:
    """Whether a hidden layer makes what is added up along the blocks of a residual network."""
    return residual and layer % 2 == 0


def _rectified(layer: int, layers: int, residual: bool) -> bool:
    """Whether ReLU follows a hidden layer: in front of the last layer a residual network has none."""
    return not residual or layer < layers - 2


def by_layer(bounds: Sequence[int], layers: int) -> list[list[int]]:
    """Of each hidden layer, where the units of each degree start, and where the last end."""
    length = len(bounds) // max(layers, 1)
    return [list(bounds[i * length : (i + 1) * length]) for i in range(layers)]


def formula(
    y: Tensor,  # (N, D)
    context: Tensor | None,  # (N, H1)
    factor: Tensor | None,  # (D,)
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    s = Settings(*settings)
    *blocks, outputs = [*by_layer(bounds, len(weights) - 1), [k * s.params for k in range(y.shape[1] + 1)]]
    x, logdet = y[:, :0], y.new_zeros(y.shape[0])
    hidden = [x] * len(blocks)  # the units that are known
    with torch.autocast(y.device.type, enabled=False):
        for k in range(y.shape[1]):
            known = total = x
            for i, starts in enumerate(blocks):
                new = slice(starts[k], starts[k + 1])
                if new.start < new.stop:
                    a = F.linear(known, weights[i][new, : known.shape[1]], biases[i][new])
                    if i == 0 and context is not None:
                        a = a + context[:, new]
                    if _adds(i, s.residual):
                        a = total = a + total if i else a
                    hidden[i] = torch.cat([hidden[i], a.relu() if _rectified(i, len(weights), s.residual) else a], 1)
                known = hidden[i]
            new = slice(outputs[k], outputs[k + 1])
            params = F.linear(known, weights[-1][new, : known.shape[1]], biases[-1][new])  # (N, P)
            own = None if factor is None else factor[k : k + 1]
            x_k, logdet_k = s.inverse(y[:, k : k + 1], params, own)
            x, logdet = torch.cat([x, x_k], 1), logdet + logdet_k
    return x.contiguous(), logdet


def _widths(columns: int, layers: int, bounds: Sequence[Sequence[int]], params: int, residual: bool) -> list[int]:
    """How wide a network's input and its layers are; raises a ValueError for bounds that make no network."""
    if layers > MOST_LAYERS:
        raise ValueError(f"weights must be of at most {MOST_LAYERS} layers, got {layers}")
    for i, starts in enumerate(bounds):
        if len(starts) != columns + 1 or starts[0] != 0 or any(a > b for a, b in pairwise(starts)):
            raise ValueError(
                f"bounds[{i}] must be {columns + 1} numbers that start at 0 and never fall, got {list(starts)}"
            )
    if residual and any(list(starts) != list(bounds[0]) for starts in (*bounds[2::2], bounds[-1])):
        raise ValueError(
            "bounds of a residual network must be of one hidden layer and pairs of them, of which the second has the "
            f"first layer's again; got {[list(starts) for starts in bounds]}"
        )
    return [columns, *(starts[-1] for starts in bounds), columns * params]


def _takes(
    y: Tensor, context: Tensor | None, factor: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    bounds: Sequence[int], *settings: Any,
) -> tuple:  # fmt: skip
    s, ((rows, columns), dtype), hidden = Settings(*settings), _op.matrix(y), len(weights) - 1
    if dtype is not _op.wide(y) or hidden < 1 or len(bounds) != hidden * (columns + 1):
        raise ValueError("y must be (N, D), float32 or float64, and bounds D + 1 numbers for each hidden layer")
    _affine_coupling.checked_slope(s.scale, None if s.bins else s.slope or None, factor)
    if s.bins:
        _spline.check_settings(s.spline)
    widths = _widths(columns, len(weights), by_layer(bounds, hidden), s.params, s.residual)
    return (
        _op.matrix(y), ((rows, widths[1]), dtype), ((columns,), dtype),
        [((b, a), dtype) for a, b in pairwise(widths)], [((b,), dtype) for b in widths[1:]],
    )  # fmt: skip


def _results(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _op.like(y), y.new_empty((y.shape[0],))


@cache
def _starts(bounds: tuple[int, ...], columns: int, params: int, pinned: bool) -> Tensor:
    """The bounds, and those of the last layer. From pinned memory they are copied to a GPU without a wait, and in a
    graph's capture too."""
    starts = torch.tensor([*bounds, *range(0, (columns + 1) * params, params)], device="cpu")
    return starts.pin_memory() if pinned else starts


def _network(weights: Sequence[Tensor], bounds: Sequence[int], columns: int, params: int) -> tuple:
    device = weights[0].device
    starts = _starts(tuple(bounds), columns, params, device.type == "cuda").to(device, non_blocking=True)
    return [w.contiguous() for w in weights], starts, columns + 1


def _problem(
    y: Tensor, context: Tensor | None, factor: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    bounds: Sequence[int], *settings: Any,
) -> tuple:  # fmt: skip
    s = Settings(*settings)
    (rows, columns), dtype = y.shape, _op.DTYPES[y.dtype]
    units = [len(b) for b in biases[:-1]]
    kind, constant = _affine_coupling._settings(y, s.scale, s.slope, factor, False, True)[1:3]
    kept = columns + sum(units) + s.residual * units[0] + s.params
    size = _op._C.autoregressive_inverse_workspace(dtype, rows, kept) if y.is_cuda else 0
    return (
        dtype, *_op.rows(y), rows, columns, *((None, 0) if context is None else _op.rows(context)),
        *_network(weights, bounds, columns, s.params), [b.contiguous() for b in biases], kept,
        y.new_empty(size // y.element_size()) if size else None, s.residual,
        *((0, 0.0, None) if s.bins else (kind, constant, None if factor is None else factor.contiguous())),
        s.bins, _spline.TAILS[s.tails], True, s.min_width, s.min_height, s.min_derivative, s.spline.edge, s.damping,
        s.spline.clip, *s.spline.box,
    )  # fmt: skip


def sweep(
    gx: Tensor,  # (D, N)
    slope: Tensor,  # (D P, N)
    offset: Tensor,  # (D P, N)
    activations: Sequence[Tensor],  # (H, N) of each hidden layer
    weights: Sequence[Tensor],
    bounds: Sequence[int],
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """The sweep backwards: when all units of degree k and above have their gradients, that of coordinate k - 1 is
    complete. The gradients of the parameters of a coordinate are its own times slope, plus offset.

    Returns the gradients of x, and of what each layer adds to its biases, one after the other, (D + H + ... + D P, N);
    and for each of them how many inputs it comes after, or is made of.
    """
    d, last = len(gx), len(activations)
    blocks = [*by_layer(bounds, last), [k * (len(slope) // d) for k in range(d + 1)]]
    gx, gradients = gx.clone(), [gx[:0]] * (last + 1)  # of units of degree k and above
    for k in reversed(range(d)):
        own = slice(blocks[-1][k], blocks[-1][k + 1])
        gradients[-1] = torch.cat([slope[own] * gx[k] + offset[own], gradients[-1]])
        for i in reversed(range(last)):
            new = slice(blocks[i][k], blocks[i][k + 1])
            g = weights[i + 1][blocks[i + 1][k] :, new].mT @ gradients[i + 1]
            if _rectified(i, last + 1, residual):
                g = g.masked_fill(activations[i][new] <= 0, 0)
            if _adds(i, residual) and i + 2 < last:
                g = g + gradients[i + 2][: len(g)]
            gradients[i] = torch.cat([g, gradients[i]])
        if k:
            gx[k - 1] += weights[0][blocks[0][k] :, k - 1] @ gradients[0]
    degrees = [k for starts in blocks for k, (a, b) in enumerate(pairwise(starts)) for _ in range(a, b)]
    return torch.cat([gx, *gradients]), torch.tensor([*range(1, d + 1), *degrees], device=gx.device)


def _sweep_results(gx: Tensor, slope: Tensor, offset: Tensor, activations: Sequence[Tensor], *rest: Any) -> tuple:
    units = len(gx) + sum(map(len, activations)) + len(slope)
    return gx.new_empty(units, gx.shape[1]), gx.new_empty(units, dtype=torch.int64)


def _sweep_takes(
    gx: Tensor, slope: Tensor, offset: Tensor, activations: Sequence[Tensor], weights: Sequence[Tensor],
    bounds: Sequence[int], residual: bool,
) -> tuple:  # fmt: skip
    (columns, rows), dtype, hidden = *_op.matrix(gx), len(weights) - 1
    if not columns or hidden < 1 or dtype is not _op.wide(gx) or len(bounds) != hidden * (columns + 1):
        raise ValueError("gx must be (D, N), float32 or float64, and bounds D + 1 numbers for each hidden layer")
    widths = _widths(columns, len(weights), by_layer(bounds, hidden), slope.shape[0] // columns, residual)
    of_layers = [((b, rows), dtype) for b in widths]
    return (
        of_layers[0], of_layers[-1], of_layers[-1], of_layers[1:-1], [((b, a), dtype) for a, b in pairwise(widths)],
    )  # fmt: skip


def _sweep_problem(
    gx: Tensor, slope: Tensor, offset: Tensor, activations: Sequence[Tensor], weights: Sequence[Tensor],
    bounds: Sequence[int], residual: bool,
) -> tuple:  # fmt: skip
    return (
        _op.DTYPES[gx.dtype], gx.shape[1], gx.contiguous(), slope.contiguous(), offset.contiguous(),
        [a.contiguous() for a in activations], *_network(weights, bounds, len(gx), len(slope) // len(gx)), residual,
    )  # fmt: skip


_sweep = _op.fused(
    "autoregressive_inverse_backward(Tensor gx, Tensor slope, Tensor offset, Tensor[] activations, Tensor[] weights, "
    "int[] bounds, bool residual) -> (Tensor, Tensor)",
    formula=sweep,
    results=_sweep_results,
    problem=_sweep_problem,
    takes=_sweep_takes,
)


def gradients(
    needed: Sequence[bool], gx: Tensor, glogdet: Tensor, y: Tensor, x: Tensor, context: Tensor | None,
    factor: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor], bounds: Sequence[int], *settings: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients for y, context, factor, and those weights and biases that need them, without a graph."""
    s = Settings(*settings)
    activations, total = [x.mT], None  # (units, N)
    for i, (w, b) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        a = torch.addmm(b[:, None], w, activations[-1])
        if i == 0 and context is not None:
            a += context.mT
        if _adds(i, s.residual):
            a = total = a if total is None else a + total
        activations.append(a.relu() if _rectified(i, len(weights), s.residual) else a)
    params = torch.addmm(biases[-1], activations[-1].mT, weights[-1].mT)  # (N, D P)
    with torch.enable_grad():
        own = y.detach().requires_grad_(), params.requires_grad_()
        free = None if factor is None else factor.detach().requires_grad_()
        again, logdet = s.inverse(*own, free)
    # What is linear in the gradient for x, which is not complete yet, and the rest.
    direct, slope = torch.autograd.grad(again, own, torch.ones_like(again), retain_graph=True)
    rest, offset = torch.autograd.grad(logdet, own, glogdet, retain_graph=free is not None)
    made, degrees = _sweep(gx.mT, slope.mT, offset.mT, activations[1:], weights, bounds, s.residual)
    sizes = [y.shape[1], *map(len, biases)]
    total, *by_unit = made.split(sizes)
    gfactor = None if free is None else torch.autograd.grad((again, logdet), free, (total.mT, glogdet))[0]
    n, at = len(weights), degrees.split(sizes)
    gweights = [
        (g @ a.mT).masked_fill_(end[:, None] < start, 0) if wanted else None
        for wanted, g, a, end, start in zip(needed[3 : 3 + n], by_unit, activations, at[1:], at[:-1], strict=True)
    ]
    gbiases = [g.sum(1) if wanted else None for wanted, g in zip(needed[3 + n : 3 + 2 * n], by_unit, strict=True)]
    gcontext = None if context is None else by_unit[0].mT
    return direct * total.mT + rest, gcontext, gfactor, *gweights, *gbiases


def _backward(
    needed: Sequence[bool], cotangents: tuple[Tensor | None, Tensor | None], y: Tensor, context: Tensor | None,
    factor: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor], bounds: Sequence[int], *settings: Any,
    outputs: tuple[Tensor],
) -> Sequence[Tensor | None]:  # fmt: skip
    (x,), (gx, glogdet) = outputs, cotangents
    gx = torch.zeros_like(x) if gx is None else gx
    glogdet = x.new_zeros(x.shape[0]) if glogdet is None else glogdet
    stands_for_others = _op.transformed() or _op.without_memory(gx, glogdet)
    if not (torch.is_grad_enabled() or stands_for_others) and y.shape[1]:
        with torch.autocast(y.device.type, enabled=False):
            return gradients(needed, gx, glogdet, y, x, context, factor, weights, biases, bounds, *settings)
    given = y, context, factor, weights, biases, bounds, *settings
    return _op.needed_gradients(formula, (gx, glogdet), given, needed[: 3 + 2 * len(weights)])


_fused = _op.fused(
    "autoregressive_inverse(Tensor y, Tensor? context, Tensor? factor, Tensor[] weights, Tensor[] biases, "
    "int[] bounds, str scale, "
    "int bins, float bound, str tails, float min_width, float min_height, float min_derivative, float damping, "
    "bool residual, float slope) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=_problem,
    backward=_backward,
    keep=(0,),
    takes=_takes,
)


def autoregressive_inverse(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[Sequence[int]],
    *,
    context: Tensor | None = None,
    scale: Scale = "tanh",
    slope: float | None = None,
    factor: Tensor | None = None,
    bins: int = 0,
    bound: float = 3.0,
    tails: str = "linear",
    min_width: float | None = None,
    min_height: float | None = None,
    min_derivative: float | None = None,
    damping: float = 1.0,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Undo a masked autoregressive layer, with the log-determinant, at the price of about one pass of its network.

    The layer transforms each coordinate by parameters that a masked network (MADE, arXiv 1502.03509) makes of those
    before it, :math:`y_i = f(x_i; \theta_i(x_{<i}))` (arXiv 1705.07057, arXiv 1906.04032). As :math:`x_{<i}` becomes
    known, so do the hidden units that depend on it: each is computed once, where a pass of the whole network for each
    coordinate would compute it D times. Gradients, by the same sweep backwards, cost about as much as those of the
    network. Differentiable to any order.

    The network has ReLU after each layer but the last. A hidden unit of degree k, from 0 to D - 1, sees the first k
    inputs, and in later layers the units of degrees up to k; the parameters of feature i, from 0, see the units of
    degrees up to i. Units of each layer are sorted by degree.

    A residual network, as nflows has it, is a first layer, blocks of two, which make
    :math:`h + W_2 \operatorname{relu}(W_1 \operatorname{relu}(h) + b_1) + b_2` of h, and the last layer, with no ReLU
    between the blocks and the last layer.

    Args:
        y: (N, D), of any strides. float32, float64, float16 or bfloat16; of 16 bits, all is computed in float32.
        weights: of each layer, (outputs, inputs), already masked: entries between what must not see each other are 0,
            and get gradients 0. The last has 2 D rows for the affine transform, first all log-scales, then all shifts,
            or D P for the spline, first all of the first feature.
        biases: of each layer, (outputs).
        bounds: for each hidden layer D + 1 numbers: where the units of each degree start, and the number of units.
        context: what is added to the first layer before its ReLU, (N, H1), such as a linear map of what the density is
            conditioned on.
        scale, slope, factor: how the affine transform bounds its log-scale, as in `affine_coupling`; factor, (D,).
        bins: 0 for the affine transform; else the bins of a spline, of which the others are settings too, as in
            `rational_quadratic_spline`.
        residual: whether the hidden layers after the first are in pairs that make residual blocks.

    Returns:
        x, of y's shape and dtype, contiguous; and the log-determinant of the inverse, log |det dx/dy|, (N,), in nats,
        float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes, devices or sizes do not go together; for more than 64 layers;
            and, with tails="none", for a y outside the box, as in `rational_quadratic_spline`.
    """
    _op.check_alike(y, "y")
    if y.dim() != 2:
        raise ValueError(f"y must be (N, D), got shape {tuple(y.shape)}")
    n, d = y.shape
    least = _affine_coupling.checked_slope(scale, None if bins else slope, factor)
    default = 1e-3 if slope is None else 0.0
    w, h, derivative = (default if m is None else m for m in (min_width, min_height, min_derivative))
    least = (slope or 0.0) if bins else least
    settings = Settings(scale, bins, float(bound), tails, w, h, derivative, damping, residual, least)
    if bins:
        spline = _spline_of(settings)
        _spline.check_settings(spline)
        _spline.check_inside(y, "y", spline)
    if not len(bounds):
        raise ValueError("bounds must be of at least one hidden layer, got none")
    if not len(weights) == len(biases) == len(bounds) + 1:
        raise ValueError(
            "weights and biases must be one more than bounds, which are of hidden layers; "
            f"got {len(weights)}, {len(biases)} and {len(bounds)}"
        )
    widths = _widths(d, len(weights), bounds, settings.params, residual)
    if y.dtype in (torch.float16, torch.bfloat16):
        context, factor = (None if t is None else t.float() for t in (context, factor))
        x, logdet = autoregressive_inverse(
            y.float(), [w.float() for w in weights], [b.float() for b in biases], bounds, context=context,
            factor=factor, **{**settings._asdict(), "slope": slope},
        )  # fmt: skip
        return x.to(y.dtype), logdet
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]]
    shapes = {f"weights[{i}]": (w, (widths[i + 1], widths[i])) for i, w in enumerate(weights)}
    shapes.update({f"biases[{i}]": (b, (widths[i + 1],)) for i, b in enumerate(biases)})
    if context is not None:
        shapes["context"] = (context, (n, widths[1]))
    if factor is not None:
        shapes["factor"] = (factor, (d,))
    _op.check_alike(y, "y", **shapes)
    if not bins:  # the kernels take outputs by feature
        weights = [*weights[:-1], weights[-1].view(2, d, widths[-2]).transpose(0, 1).reshape(2 * d, widths[-2])]
        biases = [*biases[:-1], biases[-1].view(2, d).t().reshape(-1)]
    flat = tuple(int(start) for starts in bounds for start in starts)
    return _fused(y, context, factor, list(weights), list(biases), flat, *settings)
