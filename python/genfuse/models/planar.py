"""Planar and radial flows (arXiv 1505.05770)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from genfuse import flows
from genfuse.data import Dataset
from genfuse.models._flow import FlowConfig, FlowModel


@dataclass(frozen=True)
class PlanarConfig(FlowConfig):
    """Settings of a planar or radial flow. Raises SettingsError for values outside their range."""

    layers: int = 32  # each bends space along one direction, or around one point
    _positive = ("layers",)


class PlanarFlow(FlowModel):
    """The flow `genfuse.flows.Planar`: the density is one pass, and sampling solves for one number a layer."""

    Config = PlanarConfig
    flow_class = flows.Planar

    def doubts(self, data: Dataset) -> Iterator[str]:
        if not data.is_image:
            yield from super().doubts(data)
        else:
            yield (
                f"a {self.plugin or 'planar'} flow is made for a few dimensions: each layer bends space along one "
                f"direction, and {data.name!r} has {math.prod(data.shape)}, so samples will be noise; glow is made "
                "for images"
            )


class RadialFlow(PlanarFlow):
    """The flow `genfuse.flows.Radial`: radial layers, inverted in closed form."""

    flow_class = flows.Radial
