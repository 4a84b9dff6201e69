"""Planar and radial flows (arXiv 1505.05770)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from genfuse import flows
from genfuse.data import Dataset
from genfuse.models._flow import FlowConfig, FlowModel

FEW = 3  # dimensions


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
        if (dimensions := math.prod(data.shape)) > FEW:
            yield (
                f"a {self.plugin or 'planar'} flow is made for a few dimensions: each layer bends space along one "
                f"direction, or around one point, and {data.name!r} has {dimensions}, so "
                + ("samples will be noise; gan and edm draw pictures" if data.is_image else "nsf will fit better")
            )


class RadialFlow(PlanarFlow):
    """The flow `genfuse.flows.Radial`: radial layers, inverted in closed form."""

    flow_class = flows.Radial
