"""Planar and radial flows (arXiv 1505.05770)."""

from collections.abc import Iterator
from dataclasses import dataclass

from genfuse.models._flow import FlowConfig, FlowModel
from genfuse.nn import Flatten, Planar, Radial, Transform


@dataclass(frozen=True)
class PlanarConfig(FlowConfig):
    """Settings of a planar or radial flow. Raises SettingsError for values outside their range."""

    layers: int = 32  # each bends space along one direction, or around one point

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("layers")


class PlanarFlow(FlowModel):
    """Planar layers from the data to the base: the density is one pass, and sampling solves for one number a layer."""

    Config = PlanarConfig
    config: PlanarConfig
    layer: type[Planar | Radial] = Planar

    def layers(self) -> Iterator[Transform]:
        c = self.config
        if len(c.shape) > 1:
            yield Flatten(c.shape)
        for _ in range(c.layers):
            yield self.layer(c.dimensions, c.context)


class RadialFlow(PlanarFlow):
    """Radial layers from the data to the base, inverted in closed form."""

    layer = Radial
