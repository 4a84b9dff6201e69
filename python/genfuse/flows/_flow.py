"""A flow: transforms and a base that make a `torch.distributions.Distribution` of a context."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform, constraints

from genfuse.nn import Composite
from genfuse.nn import Transform as FlowTransform
from genfuse.ops import has_values, standard_normal_log_prob


class StandardNormal(nn.Module):
    """The base N(0, I) of latents z of ``shape``, one or more sizes: the base of a flow unless another is given."""

    zeros: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(shape), persistent=False)

    def forward(self, context: Tensor | None = None) -> Distribution:
        return Independent(Normal(self.zeros, torch.ones_like(self.zeros)), self.zeros.dim())


class _Fixed(nn.Module):
    """A base that depends on no context: a distribution whose tensors are buffers here."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        if count := len(distribution.batch_shape):
            distribution = Independent(distribution, count)
        self.distribution = _with_tensors(distribution, self._keep)  # a copy, which no use of the original changes

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            raise ValueError(
                f"base: the distribution's {name.rpartition('.')[2]} requires a gradient, which would not reach it: "
                "give a module that makes the distribution of its parameters"
            )
        self.register_buffer(name.replace(".", "_"), tensor.clone())
        return tensor

    def forward(self, context: Tensor | None = None) -> Distribution:
        return _with_tensors(self.distribution, lambda name, tensor: self.get_buffer(name.replace(".", "_")))


def _with_tensors(value: Any, replace: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """A copy of a distribution, and of all that it is made of, with each tensor replaced, given its path."""
    if isinstance(value, Tensor):
        return replace(name, value)
    if isinstance(value, list | tuple) and not isinstance(value, Size):
        return type(value)(_with_tensors(each, replace, f"{name}.{i}") for i, each in enumerate(value))
    if not isinstance(value, Distribution | Transform):
        return value
    made = object.__new__(type(value))
    for key, each in vars(value).items():
        if key == "_inv" and type(value).__name__ != "_InverseTransform":
            each = None  # the inverse, which a transform keeps once it was asked for
        made.__dict__[key] = _with_tensors(each, replace, f"{name}.{key}".lstrip("."))
    return made


class Flow(nn.Module):
    """A normalizing flow: x = f^-1(z) of z drawn from a base, with an invertible f that may depend on a context.

    >>> flow = Flow([LULinear(2), AffineCoupling(MLPConditioner(1, 2, context=3), split=1)], context=3)
    >>> flow(torch.randn(10, 3)).log_prob(torch.randn(10, 2))  # of shape (10,), in nats

    Args:
        transforms: f, one after another from the data to the base: `genfuse.nn.Transform`, which take a context (N, C).
        base: of z: a `torch.distributions.Distribution`, whose tensors go where the flow goes and whose batch
            dimensions count as those of an example; or a module that makes such a distribution, of batch shape (N,) or
            (), of the context (N, C), or of None. N(0, I) if it is left out.
        context: C, the features of the context that the transforms were made for; 0 for none, None if it is not known.
        embedding: a network that makes the context (..., C) of whatever `forward` and `log_prob` are given. Its weights
            are trained with the flow's.
        reversible: whether the backward pass recomputes activations, as in `genfuse.nn.Composite`.

    Raises ValueError if no base is given, and no transform knows how many features it has.
    """

    def __init__(
        self,
        transforms: FlowTransform | Iterable[FlowTransform],
        base: Distribution | nn.Module | None = None,
        *,
        context: int | None = None,
        embedding: nn.Module | None = None,
        reversible: bool = False,
    ) -> None:
        super().__init__()
        transforms = [transforms] if isinstance(transforms, FlowTransform) else [*transforms]
        self.transform = Composite(transforms, reversible=reversible)
        self.context, self.embedding = context, embedding
        shape = self.transform.forward_shape(None)
        if isinstance(base, Distribution):
            base = _Fixed(base)
        elif base is None:
            if shape is None:
                raise ValueError("base: no transform knows its number of features: give base=StandardNormal(features)")
            base = StandardNormal(*shape)
        if isinstance(base, StandardNormal | _Fixed):
            shape = tuple(base().event_shape)
        self.base = base
        self.event_shape = None if shape is None else self.transform.inverse_shape(shape)  # of x, if it is known

    def forward(self, context: Tensor | None = None, *, validate_args: bool | None = None) -> "FlowDistribution":
        """p(x | context). Its batch shape is that of the context, (..., C), or of what `embedding` makes of it.

        Raises ValueError for a context that is missing, not wanted, or of another number of features.
        """
        embedded = self.embed(context)
        return FlowDistribution(self, embedded, Size() if embedded is None else embedded.shape[:-1], validate_args)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context), (N,) nats, for x (N, *event_shape) and a context of as many rows, or none.

        The quick way: nothing is broadcast or checked. Raises ValueError as `forward` does.
        """
        embedded = self.embed(context)
        z, logdet = self.transform(x, embedded)  # (N, D), (N,)
        return self.base_log_prob(z, logdet, embedded)

    def embed(self, context: Tensor | None) -> Tensor | None:
        """The context (..., C) as transforms and base see it, of the flow's type: what `embedding` makes of it.

        Raises ValueError for a context that is missing, not wanted, or of another number of features.
        """
        wanted = "no context" if self.context == 0 else f"a context (..., {self.context})"
        if context is None:
            if self.context or self.embedding is not None:
                wanted = wanted if self.embedding is None else "a context, for its embedding"
                raise ValueError(f"context: this flow was made for {wanted}, got None")
            return None
        embedded = context if self.embedding is None else self.embedding(context)
        if self.context is not None and (self.context == 0 or embedded.shape[-1:] != (self.context,)):
            embedding = "" if self.embedding is None else " from its embedding"
            raise ValueError(f"context: this flow was made for {wanted}, got {tuple(embedded.shape)}{embedding}")
        for weight in self.parameters():  # `next` with a default is not compiled by PyTorch 2.6
            return embedded.to(weight.dtype)
        return embedded

    def base_of(self, embedded: Tensor | None) -> Distribution:
        """p(z | context) for an embedded context (N, C) or None, of batch shape (N,) or ()."""
        base = self.base(embedded)
        extra = len(base.batch_shape) - (embedded is not None)
        if not base.event_shape:
            extra = max(1, extra)
        return Independent(base, extra) if extra > 0 else base

    def base_log_prob(self, z: Tensor, logdet: Tensor, embedded: Tensor | None = None) -> Tensor:
        """log p(z | context) + logdet, (N,) nats, for latents (N, D) and an embedded context (N, C) or None."""
        if isinstance(self.base, StandardNormal):
            return standard_normal_log_prob(z.flatten(1), logdet)
        return self.base_of(embedded).log_prob(z) + logdet


class FlowDistribution(Distribution):
    """p(x | context) of a flow, as `Flow` makes it: batch shape (...) of the context (..., C), x (..., *event_shape).

    `log_prob` takes x of any shape that broadcasts with the batch shape. `rsample` and `rsample_and_log_prob` are
    differentiable with respect to the flow's weights and the context. Mean, variance, entropy and the like are not
    known in closed form, and raise NotImplementedError.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self, flow: Flow, embedded: Tensor | None, batch_shape: Size, validate_args: bool | None = None
    ) -> None:
        self.flow, self.embedded = flow, embedded  # (*batch_shape, C)
        shape = flow.event_shape
        if shape is None:
            shape = flow.transform.inverse_shape(tuple(flow.base_of(self._rows(batch_shape)).event_shape))
        super().__init__(batch_shape, Size(shape), validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.flow.transform.domain, len(self.event_shape))

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.flow.base_of(self._rows(self.batch_shape)).has_rsample

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        new = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.empty(()).expand(self.batch_shape).expand(*batch_shape).shape  # raises, as tensors do
        new.flow, new.embedded = self.flow, self.embedded
        if self.embedded is not None:
            new.embedded = self.embedded.expand(*batch_shape, self.embedded.shape[-1])
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        # Constraints can check neither nothing nor what is traced.
        if self._validate_args and has_values(value) and value.numel():
            self._validate_sample(value)
        lead = value.shape[: value.dim() - len(self.event_shape)]
        shape = torch.broadcast_shapes(lead, self.batch_shape)
        rows = self._rows(shape)
        x = value.expand(*shape, *self.event_shape).reshape(-1, *self.event_shape)
        z, logdet = self.flow.transform(x, rows)
        return self.flow.base_log_prob(z, logdet, rows).view(shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(sample_shape, "sample")[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._draw(sample_shape, "rsample")[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draws x, (*sample_shape, *batch_shape, *event_shape), and their log-density in nats, in one pass."""
        x, z, logdet, rows = self._draw(sample_shape, "rsample")
        return x, self.flow.base_log_prob(z, -logdet, rows).view(x.shape[: x.dim() - len(self.event_shape)])

    def _draw(self, sample_shape: Sequence[int], verb: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x in its whole shape; z, log |det dx/dz| and the embedded context by rows."""
        shape = Size(sample_shape) + self.batch_shape
        rows = self._rows(shape)
        base = self.flow.base_of(rows)
        z = getattr(base, verb)(() if base.batch_shape else (math.prod(shape),))  # (N, D)
        x, logdet = self.flow.transform.inverse(z, rows)
        return x.view(*shape, *self.event_shape), z, logdet, rows

    def _rows(self, shape: Size) -> Tensor | None:
        """The embedded context for each example of ``shape``, (N, C)."""
        if self.embedded is None:
            return None
        return self.embedded.expand(*shape, self.embedded.shape[-1]).flatten(0, -2) if shape else self.embedded[None]
