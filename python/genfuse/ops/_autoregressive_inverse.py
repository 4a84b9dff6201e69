"""The inverse of a masked autoregressive layer in one sweep over its coordinates, each hidden unit computed once."""

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genfuse.ops import _affine_coupling, _op
from genfuse.ops import _rational_quadratic_spline as _spline
from genfuse.ops._affine_coupling import SCALES, Scale
from genfuse.ops._op import _C


class Settings(NamedTuple):
    """The transform of a coordinate: an affine one, or with bins above 0 a spline."""

    scale: str
    bins: int
    bound: float
    tails: str
    min_width: float
    min_height: float
    min_derivative: float
    damping: float

    @property
    def spline(self) -> _spline.Settings:
        return _spline.Settings(self.bins, self.bound, self.tails, True, *self[4:])

    @property
    def params(self) -> int:
        """Of a coordinate."""
        return self.spline.params if self.bins else 2

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Undo the transform of one coordinate (N, 1), given its parameters (N, P)."""
        if self.bins:
            return _spline._fused(y, params.unsqueeze(1), None, *self.spline.arguments)
        return _affine_coupling._fused(y, params, None, None, 0, self.scale, 0.0, False, False, True)

    def gradients(self, gx: Tensor, glogdet: Tensor, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Those of `inverse`, for y and for params."""
        if self.bins:
            gy, gparams = torch.ops.genfuse.rational_quadratic_spline_backward(
                gx, glogdet, y, params.unsqueeze(1), None, *self.spline.arguments
            )
            return gy, gparams.squeeze(1)
        settings = (None, None, 0, self.scale, 0.0, False, False, True)
        return torch.ops.genfuse.affine_coupling_backward(gx, glogdet, y, params, *settings)


def by_layer(bounds: Sequence[int], layers: int) -> list[list[int]]:
    """Of each hidden layer, where the units of each degree start, and where the last end."""
    length = len(bounds) // max(layers, 1)
    return [list(bounds[i * length : (i + 1) * length]) for i in range(layers)]


def formula(
    y: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    s = Settings(*settings)
    *blocks, outputs = [*by_layer(bounds, len(weights) - 1), [k * s.params for k in range(y.shape[1] + 1)]]
    x, logdet = y[:, :0], y.new_zeros(len(y))
    hidden = [x] * len(blocks)  # the units that are known
    with torch.autocast(y.device.type, enabled=False):
        for k in range(y.shape[1]):
            known = x
            for i, starts in enumerate(blocks):
                new = slice(starts[k], starts[k + 1])
                if new.start < new.stop:
                    a = F.linear(known, weights[i][new, : known.shape[1]], biases[i][new])
                    if i == 0 and context is not None:
                        a = a + context[:, new]
                    hidden[i] = torch.cat([hidden[i], a.relu()], 1)
                known = hidden[i]
            new = slice(outputs[k], outputs[k + 1])
            params = F.linear(known, weights[-1][new, : known.shape[1]], biases[-1][new])
            x_k, logdet_k = s.inverse(y[:, k : k + 1], params)
            x, logdet = torch.cat([x, x_k], 1), logdet + logdet_k
    return x.contiguous(), logdet


def _results(y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _op.like(y), y.new_empty((y.shape[0],))


def reverse_sweep(
    gx: Tensor,
    glogdet: Tensor,
    y: Tensor,
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    *settings: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients for y, for what enters the first layer, and for weights and biases.

    The sweep backwards: when all units of degree k and above have theirs, that of coordinate k - 1 is complete.
    """
    s = Settings(*settings)
    blocks = by_layer(bounds, len(weights) - 1)
    activations = [x]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        a = F.linear(activations[-1], w, b)
        if i == 0 and context is not None:
            a += context
        activations.append(a.relu_() if i < len(blocks) else a)
    params = activations.pop()

    gx, gy = gx.clone(memory_format=torch.contiguous_format), torch.empty_like(x)
    gradients = [torch.empty_like(a) for a in (*activations[1:], params)]
    for k in reversed(range(y.shape[1])):
        one, own = slice(k, k + 1), slice(k * s.params, (k + 1) * s.params)
        gy[:, one], gradients[-1][:, own] = s.gradients(gx[:, one], glogdet, y[:, one], params[:, own])
        after = slice(own.start, None)
        for i in reversed(range(len(blocks))):
            new = slice(blocks[i][k], blocks[i][k + 1])
            g = gradients[i + 1][:, after] @ weights[i + 1][after, new]
            gradients[i][:, new] = g * (activations[i + 1][:, new] > 0)
            after = slice(new.start, None)
        if k:
            gx[:, k - 1] += gradients[0][:, after] @ weights[0][after, k - 1]

    degrees = torch.arange(y.shape[1], device=y.device)
    counts = [torch.tensor(starts, device=y.device).diff() for starts in blocks]
    ends = [degrees.repeat_interleave(n) for n in counts] + [degrees.repeat_interleave(s.params)]
    starts = [degrees + 1, *ends[:-1]]  # a unit of degree k sees k inputs
    gweights = [
        (g.mT @ a).masked_fill_(end[:, None] < start, 0)
        for g, a, end, start in zip(gradients, activations, ends, starts, strict=True)
    ]
    return gy, gradients[0], gweights, [g.sum(0) for g in gradients]


def _native(
    y: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    *rest: Any,
) -> None:
    *settings, x, logdet, device, stream = rest
    s = Settings(*settings)
    layers = [(w.contiguous(), b.contiguous()) for w, b in zip(weights, biases, strict=True)]
    y, y_stride = _op.rows(y)
    context, context_stride = (None, 0) if context is None else _op.rows(context)
    # As launch.h has them: the bounds, then addresses and number of units of each layer.
    table = torch.tensor([*bounds, *(i for w, b in layers for i in (w.data_ptr(), b.data_ptr(), len(b)))]).to(y.device)
    problem = _C.AutoregressiveInverse(
        _op.DTYPES[y.dtype], y.data_ptr(), y_stride, 0 if context is None else context.data_ptr(), context_stride,
        *y.shape, table.data_ptr() + 8 * len(bounds), len(layers) - 1, sum(len(b) for b in biases[:-1]),
        table.data_ptr(), SCALES.index(s.scale), s.bins, _spline.TAILS[s.tails], s.bound, s.min_width, s.min_height,
        s.min_derivative, s.spline.edge, s.damping,
    )  # fmt: skip
    size = _C.autoregressive_inverse_workspace(problem) if y.is_cuda else 0
    workspace = y.new_empty(size // y.element_size())
    _C.autoregressive_inverse(
        problem, x.data_ptr(), logdet.data_ptr(), workspace.data_ptr() if size else 0, device, stream
    )


def _backward(
    needed: Sequence[bool],
    cotangents: tuple[Tensor | None, Tensor | None],
    y: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    *settings: Any,
    outputs: tuple[Tensor, Tensor],
) -> Sequence[Tensor | None]:
    gx, glogdet = (torch.zeros_like(o) if g is None else g for g, o in zip(cotangents, outputs, strict=True))
    if not (torch.is_grad_enabled() or _op.transformed()):
        with torch.autocast(y.device.type, enabled=False):
            gy, gfirst, gweights, gbiases = reverse_sweep(
                gx, glogdet, y, outputs[0], context, weights, biases, bounds, *settings
            )
        return gy, None if context is None else gfirst, *gweights, *gbiases
    n = len(weights)

    def flat(*tensors: Any) -> tuple[Tensor, Tensor]:
        return formula(tensors[0], tensors[1], tensors[2 : 2 + n], tensors[2 + n :], bounds, *settings)

    by = [i for i, wanted in enumerate(needed) if wanted]
    found = _op.differentiate(flat, (gx, glogdet), (y, context, *weights, *biases), by)
    return [*map(dict(zip(by, found, strict=True)).get, range(2 + 2 * n))]


_fused = _op.fused(
    "autoregressive_inverse(Tensor y, Tensor? context, Tensor[] weights, Tensor[] biases, int[] bounds, str scale, "
    "int bins, float bound, str tails, float min_width, float min_height, float min_derivative, float damping) "
    "-> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    native=_C and SimpleNamespace(autoregressive_inverse=_native, build_info=_C.build_info),
    backward=_backward,
)


def autoregressive_inverse(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[Sequence[int]],
    *,
    context: Tensor | None = None,
    scale: Scale = "tanh",
    bins: int = 0,
    bound: float = 3.0,
    tails: str = "linear",
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    damping: float = 1.0,
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

    Args:
        y: (N, D), of any strides. float32, float64, float16 or bfloat16; of 16 bits, all is computed in float32.
        weights: of each layer, (outputs, inputs), already masked: entries between what must not see each other are 0,
            and get gradients 0. The last has 2 D rows for the affine transform, first all log-scales, then all shifts,
            or D P for the spline, first all of the first feature.
        biases: of each layer, (outputs).
        bounds: for each hidden layer D + 1 numbers: where the units of each degree start, and the number of units.
        context: what is added to the first layer before its ReLU, (N, H1), such as a linear map of what the density is
            conditioned on.
        scale: how the affine transform bounds its log-scale, as in `affine_coupling`.
        bins: 0 for the affine transform; else the bins of a spline, of which the others are settings too, as in
            `rational_quadratic_spline`.

    Returns:
        x, of y's shape and dtype, contiguous; and the log-determinant of the inverse, log |det dx/dy|, (N,), in nats,
        float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes, devices or sizes do not go together; and, with tails="none", for
            a y outside the box, as in `rational_quadratic_spline`.
    """
    _op.complain_unless_like(y, "y")
    if y.dim() != 2:
        raise ValueError(f"y must be (N, D), got shape {tuple(y.shape)}")
    n, d = y.shape
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = Settings(scale, bins, float(bound), tails, min_width, min_height, min_derivative, damping)
    if bins:
        _spline.complain_unless_valid(settings.spline)
        _spline.complain_unless_inside(y, "y", settings.spline)
    if not len(bounds):
        raise ValueError("bounds must be of at least one hidden layer, got none")
    if not len(weights) == len(biases) == len(bounds) + 1:
        raise ValueError(
            "weights and biases must be one more than bounds, which are of hidden layers; "
            f"got {len(weights)}, {len(biases)} and {len(bounds)}"
        )
    widths = [d, *(starts[-1] if len(starts) else 0 for starts in bounds), d * settings.params]
    for i, starts in enumerate(bounds):
        if len(starts) != d + 1 or starts[0] != 0 or any(a > b for a, b in pairwise(starts)):
            raise ValueError(f"bounds[{i}] must be {d + 1} numbers that start at 0 and never fall, got {list(starts)}")
    if y.dtype in (torch.float16, torch.bfloat16):
        x, logdet = autoregressive_inverse(
            y.float(), [w.float() for w in weights], [b.float() for b in biases], bounds,
            context=None if context is None else context.float(), **settings._asdict(),
        )  # fmt: skip
        return x.to(y.dtype), logdet
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]]
    shapes = {f"weights[{i}]": (w, (widths[i + 1], widths[i])) for i, w in enumerate(weights)}
    shapes |= {f"biases[{i}]": (b, (widths[i + 1],)) for i, b in enumerate(biases)}
    if context is not None:
        shapes["context"] = (context, (n, widths[1]))
    _op.complain_unless_like(y, "y", **shapes)
    if not bins:  # the kernels take outputs by feature
        weights = [*weights[:-1], weights[-1].view(2, d, -1).transpose(0, 1).reshape(2 * d, -1)]
        biases = [*biases[:-1], biases[-1].view(2, d).t().reshape(-1)]
    flat = tuple(int(start) for starts in bounds for start in starts)
    return _fused(y, context, list(weights), list(biases), list(flat), *settings)
