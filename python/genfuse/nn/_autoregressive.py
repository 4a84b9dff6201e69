"""Masked autoregressive layers: each coordinate is transformed by what a masked network makes of those before it."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from genfuse import ops
from genfuse.errors import SettingsError
from genfuse.nn._conditioners import Tails, damping_of, soft_slope, spline_settings
from genfuse.nn._mlp import untouched
from genfuse.nn._transform import Transform

LIMIT = 5.0  # of what squashed networks see


class MADE(nn.Module):
    """Masked MLP with ReLU whose outputs for a feature depend on the features before it alone (arXiv 1502.03509).

    Features come in their natural order. A hidden unit of degree k sees the first k of them; units of each layer are
    sorted by degree, evenly spread. Maps x (N, D), and the context (N, C) if ``context`` is not 0, to ``outputs``
    numbers for each feature, (N, D outputs): by feature, or with ``by_feature=False`` first the first of each feature.

    With ``residual``, hidden layers after the first are in pairs, which make blocks h + W2 relu(W1 relu(h) + b1) + b2,
    without ReLU after the last one, as in nflows. If ``squash``, it sees x as within
    [-5, 5], for the reason that `MLPConditioner` gives.

    Raises SettingsError for no features, no hidden layer, widths that are not positive, blocks that do not fit, or
    squash in a residual network.
    """

    counts: Tensor

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        context: int = 0,
        by_feature: bool = True,
        residual: bool = False,
        squash: bool = False,
    ) -> None:
        super().__init__()
        if features < 1:
            raise SettingsError(f"features must be at least 1, got {features}")
        if not hidden or min(hidden) < 1:
            raise SettingsError(f"hidden must be at least one positive width, got {tuple(hidden)}")
        if residual and (len(hidden) % 2 == 0 or len(set(hidden[::2])) > 1):
            raise SettingsError(
                "hidden of a residual network must be one width and pairs of widths, of which the second is the first "
                f"width again; got {tuple(hidden)}"
            )
        if residual and squash:
            raise SettingsError("squash is for networks without residual blocks: leave one of the two out")
        self.residual, self.squash = residual, squash
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None
        # Without a context, units of degree 0 would be constants.
        first = 0 if context or features == 1 else 1
        spread = features - first
        each = torch.arange(features)
        last = each.repeat_interleave(outputs) if by_feature else each.repeat(outputs)
        degrees = [first + torch.arange(width) * spread // width for width in hidden]
        edges = torch.arange(features + 1)
        self.bounds = tuple(tuple(torch.searchsorted(d, edges).tolist()) for d in degrees)
        seen = [each + 1, *degrees]  # from which degree on
        kind = torch.get_default_dtype()  # that of the weights
        masks = [(own[:, None] >= of).to(kind) for own, of in zip([*degrees, last], seen, strict=True)]
        self.layers = nn.ModuleList(map(_MaskedLinear, masks))
        self.register_buffer("counts", torch.cat([mask.sum(1).long() for mask in masks]), persistent=False)

    def weights(self) -> list[Tensor]:
        """Weights of the layers, masked, so that what an optimizer does to entries outside the mask has no effect.

        Raises ValueError for a layer whose hooks, or a forward of its own, do more than make its weight.
        """
        layers: Any = self.layers
        for layer in layers:
            if not untouched(layer, _MaskedLinear):  # hooks of pruning and the like make its weight when it is called
                _check_linear(layer, layer.masked)
        return [layer.masked() for layer in layers]

    def biases(self) -> list[Tensor]:
        """The bias of each layer."""
        return [layer.bias for layer in self.layers]  # type: ignore[misc]

    def project(self, context: Tensor | None) -> Tensor | None:
        """What the context adds to the first layer, (N, hidden[0]).

        Raises ValueError for a context that is missing, or one that the network was not made for.
        """
        if (context is None) != (self.context is None):
            wanted = "no context" if self.context is None else f"a context (N, {self.context.in_features})"
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context: this network was made for {wanted}, got {got}")
        return None if context is None or self.context is None else self.context(context)

    def inverse(self, y: Tensor, context: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
        """x (N, D) whose coordinates, transformed by what this network makes of those before them, are y; and the
        log-determinant (N,). The transform's settings are those of `genfuse.ops.autoregressive_inverse`."""
        weights, biases, bounds, added = self.weights(), self.biases(), self.bounds, self.project(context)
        if self.context is not None and not untouched(self.context, nn.Linear):
            _check_linear(self.context, lambda: self.context.weight)  # type: ignore[union-attr]
        if self.squash and (features := y.shape[1]) > 1:
            # The sweep knows ReLU alone. As clamp(x) = relu(x + 5) - relu(x - 5) - 5, a layer of two units
            # for each feature but the last comes first; the context passes it as relu(c) - relu(-c).
            first, many = weights[0][:, :-1], 0
            pairs = [torch.stack([first, -first], 2).flatten(1)]
            if context is not None and self.context is not None:
                many = 2 * context.shape[1]
                pairs = [self.context.weight, -self.context.weight, *pairs]
                added = F.pad(torch.cat([context, -context], 1), (0, 2 * features - 2))
            ends = torch.stack([biases[0].new_full((features - 1,), each) for each in (LIMIT, -LIMIT)], 1)
            ones = torch.eye(features, dtype=y.dtype, device=y.device)[:-1].repeat_interleave(2, 0).to(first)
            weights = [F.pad(ones, (0, 0, many, 0)), torch.cat(pairs, 1), *weights[1:]]
            biases = [F.pad(ends.flatten(), (many, 0)), biases[0] - LIMIT * first.sum(1), *biases[1:]]
            bounds = ((0, *range(many, many + 2 * features, 2)), *bounds)
        added = None if added is None else added.to(y.dtype)  # under autocast it is of 16 bits
        return ops.autoregressive_inverse(y, weights, biases, bounds, context=added, residual=self.residual, **settings)

    def network(self, x: Tensor, context: Tensor | None = None) -> ops.Network | None:
        """The network as a layer of a flow takes it; None if its layers were changed, or have hooks."""
        if not all(untouched(layer, _MaskedLinear) for layer in self.layers):
            return None
        weights: list[Any] = [layer.weight for layer in self.layers] if x.is_cpu else self.weights()
        counts = self.counts if x.is_cpu else None  # the CPU's kernel leaves out what is masked
        added, limit = self.project(context), LIMIT if self.squash else None
        added = None if added is None else added.to(x.dtype)  # under autocast it is of 16 bits
        return ops.Network(weights, self.biases(), self.residual, added, counts=counts, limit=limit)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        n = self.network(x, context)
        x = x.clamp(-LIMIT, LIMIT) if self.squash else x
        if n is not None:
            return ops.mlp(x, n.weights, n.biases, added=n.added, residual=n.residual, counts=n.counts)
        first, *hidden, last = self.layers
        h, added = first(x), self.project(context)  # (N, hidden[0])
        h = h if added is None else h + added
        if self.residual:
            for one, two in zip(hidden[::2], hidden[1::2], strict=True):
                h = h + two(F.relu(one(F.relu(h))))
            return last(h)
        for layer in hidden:
            h = layer(F.relu(h))
        return last(F.relu(h))


def _check_linear(layer: Any, weight: Callable[[], Tensor]) -> None:
    """Call a layer, so that hooks make its weight, and raise a ValueError if they or a forward of its own do more."""
    like = next(layer.parameters())  # a weight that a hook made may have the dtype that the layer had before
    probe = torch.linspace(-1, 1, layer.in_features).to(like).expand(2, -1)
    with torch.autocast(like.device.type, enabled=False):
        made = layer(probe)
    if not ops.has_values(made):
        return
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        expected = F.linear(probe, weight(), layer.bias)
        most = torch.finfo(made.dtype).eps ** 0.5 * expected.abs().max().clamp(min=1)
        if made.shape != expected.shape or not bool(((made - expected).abs() <= most).all()):
            raise ValueError(
                f"{layer} has hooks or a forward that do more than make its weight, which is all that the inverse of a "
                "masked network takes: take them off before its inverse, or its samples, are asked for"
            )


class _MaskedLinear(nn.Linear):
    """A linear layer whose weight is 0 where its mask (outputs, inputs) is."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def masked(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked(), self.bias)


class AutoregressiveAffine(Transform):
    r"""Masked autoregressive flow's layer, :math:`y_i = x_i e^{s_i} + t_i` with s, t made of :math:`x_{<i}` by `MADE`.

    MAF (arXiv 1705.07057) with its density in one pass; `Inverse` of it is a layer of IAF (arXiv 1606.04934), which
    samples in one. The other way costs one sweep, about as much: see `genfuse.ops.autoregressive_inverse`.

    Raises ValueError for settings that make no layer, as `MADE` does too.

    Args:
        features: D; x is (N, D).
        hidden: widths of MADE's hidden layers.
        context: C features of the context (N, C) that all depends on, or 0.
        scale: how the log-scale s is bounded: "tanh", "softclip" (to [-3, 3]), "exp" (not at
            all) or "sigmoid", as in `affine_coupling`.
        residual: whether the hidden layers make residual blocks, as in `MADE`.
        squash: whether the network sees features squashed, as in `MADE`.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        *,
        context: int = 0,
        scale: ops.Scale = "tanh",
        residual: bool = False,
        squash: bool = False,
    ) -> None:
        super().__init__()
        if scale not in get_args(ops.Scale):
            raise ValueError(f"scale must be one of {', '.join(get_args(ops.Scale))}, got {scale!r}")
        self.features = features
        self.scale: ops.Scale = scale
        self.made = MADE(features, hidden, 2, context=context, by_feature=False, residual=residual, squash=squash)
        _start_near_zero(self.made)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network, slope = self.made.network(x, context), soft_slope(self.scale, 3)
        if network is None:
            return ops.affine_coupling(x, self.made(x, context).to(x.dtype), 0, scale=self.scale, slope=slope)
        return ops.affine_layer(x, network, scale=self.scale, slope=slope)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.made.inverse(y, context, scale=self.scale, slope=soft_slope(self.scale, 3))


class AutoregressiveSpline(Transform):
    r"""Autoregressive neural spline layer: y_i is a rational-quadratic spline of x_i, made of :math:`x_{<i}` by `MADE`.

    RQ-NSF (AR) of arXiv 1906.04032. The inverse costs one sweep: see `genfuse.ops.autoregressive_inverse`.

    Raises ValueError for settings that make no layer, as `MADE` does too.

    Args:
        features, hidden, context, residual, squash: as in `AutoregressiveAffine`.
        bins: of each spline.
        bound: each maps [-bound, bound] to itself, in the units of x.
        tails: what is outside: "linear" (the identity), "circular" or "none", as in `rational_quadratic_spline`.
        damped: as in `SplineCoupling`.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        *,
        context: int = 0,
        bins: int = 8,
        bound: float = 3.0,
        tails: Tails = "linear",
        damped: float = 0.0,
        residual: bool = False,
        squash: bool = False,
    ) -> None:
        super().__init__()
        settings = spline_settings(bins, bound, tails)
        self.features, self.parameters_each = features, settings.params
        if tails == "none":
            self.domain = self.codomain = constraints.interval(-float(bound), float(bound))
        self.made = MADE(features, hidden, settings.params, context=context, residual=residual, squash=squash)
        damping = damping_of(self.made.weights()[-1].shape[1], damped)
        self.spline = settings._replace(damping=damping)
        self.settings: dict[str, Any] = {"bins": bins, "bound": settings.bound, "tails": tails, "damping": damping}
        _start_near_zero(self.made)
        with torch.no_grad():  # equal bins and slopes of 1 make the identity
            self.made.biases()[-1].view(features, -1)[:, 2 * bins :] = settings.unit_derivative

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network = self.made.network(x, context) if self.spline.tails != "none" else None  # which has to look at x first
        if network is not None:
            return ops.spline_layer(x, network, 0, self.spline)
        params = self.made(x, context).to(x.dtype).unflatten(1, (self.features, self.parameters_each))  # (N, D, P)
        return ops.rational_quadratic_spline(x, params, **self.settings)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.made.inverse(y, context, **self.settings)


def _start_near_zero(made: MADE) -> None:
    weight, bias = made.layers[-1].parameters()
    with torch.no_grad():
        weight.mul_(0.01)
        bias.zero_()
