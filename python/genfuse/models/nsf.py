"""Neural spline flows (arXiv 1906.04032): rational-quadratic splines, in couplings or autoregressive."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from genfuse.errors import SettingsError
from genfuse.models._flow import FlowConfig, FlowModel
from genfuse.nn import AutoregressiveSpline, Flatten, LULinear, ResidualMLP, SplineCoupling, Transform, half


@dataclass(frozen=True)
class _SplineConfig(FlowConfig):
    layers: int = 5  # splines; before each, and after the last, there is a linear layer
    bins: int = 8  # of each spline
    bound: float = 3.0  # the splines are in [-bound, bound], and the identity outside

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("layers", "bins", "bound")
        if self.bins > 1000:
            raise SettingsError(f"bins must be at most 1000, as each takes at least 1/1000 of the box; got {self.bins}")


@dataclass(frozen=True)
class NSFConfig(_SplineConfig):
    """Settings of a coupling spline flow, RQ-NSF (C). Raises SettingsError for values outside their range."""

    hidden: int = 128  # width of each coupling's residual network
    blocks: int = 2  # of each coupling's residual network
    dropout: float = 0.0  # in each block

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("hidden", "blocks")
        half(self.dimensions)
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.dropout and self.reversible:
            raise SettingsError("reversible computes each layer twice, and dropout would differ: set dropout to 0")


@dataclass(frozen=True)
class NSFARConfig(_SplineConfig):
    """Settings of an autoregressive spline flow, RQ-NSF (AR). Raises SettingsError for values outside their range."""

    hidden: tuple[int, ...] = (256, 256)  # widths of each MADE's hidden layers

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("hidden")


class NSF(FlowModel):
    """Neural spline flow with couplings: half of the coordinates decide on the splines of the others; between them
    linear layers by LU, which start as random permutations."""

    Config: ClassVar[type] = NSFConfig

    def layers(self) -> Iterator[Transform]:
        c = self.config
        assert isinstance(c, _SplineConfig)
        if len(c.shape) > 1:
            yield Flatten(c.shape)
        for _ in range(c.layers):
            yield LULinear(c.dimensions)
            yield self.spline()
        yield LULinear(c.dimensions)

    def spline(self) -> Transform:
        c = self.config
        assert isinstance(c, NSFConfig)
        d, kept = c.dimensions, half(c.dimensions)
        network = ResidualMLP(kept, (d - kept) * (3 * c.bins - 1), c.hidden, c.blocks, c.context, c.dropout)
        return SplineCoupling(network, kept, c.bins, c.bound)


class NSFAR(NSF):
    """Autoregressive neural spline flow: each coordinate's spline is decided by the coordinates before it. The density
    takes one pass; so does sampling, by one sweep over the hidden units."""

    Config: ClassVar[type] = NSFARConfig

    def spline(self) -> Transform:
        c = self.config
        assert isinstance(c, NSFARConfig)
        return AutoregressiveSpline(c.dimensions, c.hidden, context=c.context, bins=c.bins, bound=c.bound)
