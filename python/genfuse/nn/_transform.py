"""Invertible maps with their log-determinant, and how they are put together."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import constraints

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
    one more pass, and gradients are as exact as the inverses are. Gradients of first order only; layers must have the
    same result at every call, which dropout does not.
    """

    def __init__(self, transforms: Sequence[Transform], *, reversible: bool = False) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.reversible = reversible
        if transforms:
            self.domain, self.codomain = transforms[0].domain, transforms[-1].codomain

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # A transform of torch.func keeps what it needs for itself.
        if self.reversible and torch.is_grad_enabled() and (torch.compiler.is_compiling() or not transformed()):
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
        ctx.composite, ctx.weights = composite, weights
        kind = x.device.type
        ctx.autocast = partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,  # what is cached without gradients would be used with them
        )
        ctx.save_for_backward(y, context)
        return y, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, glogdet: Tensor) -> tuple[Tensor | None, ...]:
        y, context = ctx.saved_tensors
        y, gcontext = y.detach(), None
        gweights: dict[int, Tensor | None] = {}
        for transform in reversed(ctx.composite.transforms):
            with torch.no_grad(), ctx.autocast():
                x, _ = transform.inverse(y, context)
            with torch.enable_grad(), ctx.autocast():
                leaves = [x.requires_grad_()]
                own = None
                if context is not None:
                    leaves.append(own := context.detach().requires_grad_(context.requires_grad))
                weights = [w for w in transform.parameters() if w.requires_grad]
                wanted = [leaf for leaf in (*leaves, *weights) if leaf.requires_grad]
                made = zip(transform(x, own), (gy, glogdet), strict=True)
            # A log-determinant may be a constant.
            outputs, received = zip(*((output, g) for output, g in made if output.requires_grad), strict=True)
            gradients = torch.autograd.grad(outputs, wanted, received, allow_unused=True)
            found = dict(zip(map(id, wanted), gradients, strict=True))
            y, gy = x.detach(), found[id(x)]
            if own is not None:
                gcontext = _sum(gcontext, found.get(id(own)))
            for w in weights:  # which several layers may share
                gweights[id(w)] = _sum(gweights.get(id(w)), found[id(w)])
        return None, gy, gcontext, *(gweights.get(id(w)) for w in ctx.weights)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else (a if b is None else a + b)
