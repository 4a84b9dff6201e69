"""Invertible maps with their log-determinant, and how they are put together."""

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils.stateless import _reparametrize_module

from genfuse.errors import SettingsError
from genfuse.ops import transformed


class Transform(nn.Module):
    """Base: a differentiable bijection y = f(x) of each example, which may depend on a context.

    A subclass gives `forward` and `inverse`. Both take examples (N, ...) and a context (N, C) or None, and return the
    transformed examples and the log-determinant of what was done, log |det dy/dx| or log |det dx/dy|, (N,) in nats.
    A flow is trained in the direction of `forward`, which by convention leads from the data to the base distribution.

    A subclass says more if it can: ``features``, its number of features or channels, if it was made for one; where its
    coordinates lie, ``domain`` before and ``codomain`` after it (`torch.distributions.constraints`, of one coordinate);
    and `forward_shape` and `inverse_shape`, if it changes the shape of an example.
    """

    features: int | None = None
    domain: constraints.Constraint = constraints.real
    codomain: constraints.Constraint = constraints.real

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def joined(self, before: "Transform", x: Tensor) -> tuple[Tensor, Tensor] | None:
        """`forward` of what the transform ``before`` makes of x, and the log-determinant of both, if they are quicker
        together than one after the other; else None."""
        return None

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        """f(x), or with ``inverse`` the x of it, of numbers on the grid of a `genfuse.applications.Coder`, one to one:
        what f spreads takes bits from its stack, and what f draws together puts them there. Within
        `genfuse.applications.Exact`. Raises SettingsError for a transform that has none."""
        raise SettingsError(f"a flow with {type(self).__name__} does not compress: realnvp, glow and nsf do")

    def forward_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """The shape of f(x) for an x of ``shape``, None if it is not known."""
        return (self.features,) if shape is None and self.features is not None else shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the x for which f(x) has ``shape``."""
        return shape


class Movement(Transform):
    """Base of those that move cells to other places."""

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        return (self.inverse if inverse else self)(x)[0]


class Inverse(Transform):
    """A transform the other way round."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform, self.features = transform, transform.features
        self.domain, self.codomain = transform.codomain, transform.domain

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(y, context)

    def forward_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        shape = self.transform.forward_shape(None) if shape is None else shape
        return None if shape is None else self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.transform.forward_shape(shape) or shape


class Composite(Transform):
    """Transforms one after another.

    With ``reversible`` the activations of a forward pass are not kept: the backward pass recomputes each layer's input
    from its output by its inverse (arXiv 1707.04585), so that memory does not grow with the number of layers. It costs
    one more pass, and gradients are as exact as the inverses are. Layers must have the same result at every call, which
    dropout does not. Under ``create_graph`` and in transforms of torch.func activations are kept after all.
    """

    def __init__(self, transforms: Sequence[Transform], *, reversible: bool = False) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.reversible = reversible
        if transforms:
            self.domain, self.codomain = transforms[0].domain, transforms[-1].codomain

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # A transform of torch.func keeps what it needs for itself; torch.jit.trace knows PyTorch's operations alone.
        own = torch.compiler.is_compiling() or not (transformed() or torch.jit.is_tracing())
        if self.reversible and torch.is_grad_enabled() and own:
            return _Reversible.apply(self, x, context, *self.parameters())
        return self.run(x, context)

    def run(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward` with all activations kept for the backward pass."""
        logdets, layers, i = [], list(self.transforms), 0
        while i < len(layers):
            after = layers[i + 1] if i + 1 < len(layers) else None
            both = after.joined(layers[i], x) if isinstance(after, Transform) else None  # type: ignore[arg-type]
            x, logdet = both or layers[i](x, context)
            logdets.append(logdet)
            i += 2 if both else 1
        return x, _total(logdets, x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdets = []
        for transform in reversed(self.transforms):
            y, logdet = transform.inverse(y, context)  # type: ignore[operator]
            logdets.append(logdet)
        return y, _total(logdets, y)

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        for transform in reversed(self.transforms) if inverse else self.transforms:
            x = transform.code(coder, x, inverse)  # type: ignore[operator]
        return x

    def forward_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        for transform in self.transforms:
            shape = transform.forward_shape(shape)  # type: ignore[operator]
        return shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for transform in reversed(self.transforms):
            shape = transform.inverse_shape(shape)  # type: ignore[operator]
        return shape


def _total(logdets: list[Tensor], x: Tensor) -> Tensor:
    """Their sum, (N,), in one operation."""
    return torch.stack(logdets).sum(0) if logdets else x.new_zeros(x.shape[0])


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, composite: Composite, x: Tensor, context: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, logdet = composite.run(x, context)
        ctx.composite = composite
        kind = x.device.type
        ctx.autocast = partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,  # what is cached without gradients would be used with them
        )
        ctx.save_for_backward(x, y, context, *weights)
        return y, logdet

    @staticmethod
    def backward(ctx: Any, gy: Tensor, glogdet: Tensor) -> tuple[Tensor | None, ...]:
        x, y, context, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_ordinary(ctx, x, context, weights, (gy, glogdet))
        gcontext = None
        gweights: dict[int, Tensor | None] = {}
        with _holding(ctx.composite, weights):
            for transform in reversed(ctx.composite.transforms):
                with ctx.autocast():
                    x, _ = transform.inverse(y, context)
                with torch.enable_grad(), ctx.autocast():
                    leaves = [x := x.detach().requires_grad_()]
                    own = None
                    if context is not None:
                        leaves.append(own := context.detach().requires_grad_(context.requires_grad))
                    wanted = [t for t in (*leaves, *transform.parameters()) if t.requires_grad]
                    gradients = _gradients(transform(x, own), wanted, (gy, glogdet))
                found = dict(zip(map(id, wanted), gradients, strict=True))
                y, gy = x.detach(), found.pop(id(x))
                if own is not None:
                    gcontext = _sum(gcontext, found.pop(id(own), None))
                for key, gradient in found.items():  # of weights, which several layers may share
                    gweights[key] = _sum(gweights.get(key), gradient)
            return None, gy, gcontext, *(gweights.get(id(w)) for w in ctx.composite.parameters())


def _ordinary(
    ctx: Any, x: Tensor, context: Tensor | None, weights: Sequence[Tensor], received: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The gradients under ``create_graph``: autograd's, of one more forward pass, which keeps all activations."""
    # Aliases end the graph here: x may itself be made of the context, and of the same weights.
    given = [None if t is None else t.view_as(t) for t in (x, context, *weights)]
    with _holding(ctx.composite, given[2:]), ctx.autocast():
        outputs = ctx.composite.run(*given[:2])
    wanted = [i for i, t in enumerate(given) if t is not None and t.requires_grad]
    gradients = _gradients(outputs, [given[i] for i in wanted], received, create_graph=True)
    found = dict(zip(wanted, gradients, strict=True))
    return [found.get(i) for i in range(len(given))]


def _gradients(
    outputs: tuple[Tensor, Tensor], wanted: Sequence[Any], received: tuple[Tensor, Tensor], create_graph: bool = False
) -> tuple[Any, ...]:
    # A log-determinant may be a constant.
    some, given = zip(*((o, g) for o, g in zip(outputs, received, strict=True) if o.requires_grad), strict=True)
    return torch.autograd.grad(some, wanted, given, allow_unused=True, create_graph=create_graph)


def _holding(composite: Composite, weights: Sequence[Any]) -> AbstractContextManager[None]:
    """The composite with these weights, which a `torch.func.functional_call` may have given it, for its own."""
    named = dict(composite.named_parameters())
    if all(map(operator.is_, named.values(), weights)):
        return nullcontext()
    return _reparametrize_module(composite, dict(zip(named, weights, strict=True)), tie_weights=True)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else (a if b is None else a + b)
