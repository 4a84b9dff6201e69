"""Glow (arXiv 1807.03039): activation normalisation, learned 1x1 convolutions and couplings."""

from dataclasses import dataclass
from typing import Any

from genfuse import flows
from genfuse.models._flow import FlowModel, NetworkConfig, one_per_block
from genfuse.models.realnvp import Network, check_network, multiscale


@dataclass(frozen=True)
class GlowConfig(NetworkConfig):
    """Settings of a Glow. Raises SettingsError for values outside their range."""

    logit: float = 0.0  # discrete data: the flow sees logit(a + (1 - 2 a) v) of v in [0, 1) with this a; 0: v - 1/2
    network: Network = "auto"  # conv: images, at several scales; mlp: any shape, as vectors; auto: conv for images
    coupling: flows.CouplingKind = "affine"  # its scales bounded by a sigmoid as in the paper's code; or additive
    steps: int = 8  # of flow, at each scale
    scales: int = 2  # conv: each halves height and width; at its end half of the cells leave, but for the last
    channels: tuple[int, ...] = (64,)  # conv: width of each coupling's network, one number
    hidden: tuple[int, ...] = (256, 256)  # mlp: widths of each coupling's network

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(network=Network, coupling=flows.CouplingKind)
        self.check_positive("steps", "scales", "channels", "hidden")
        check_network(self.shape, self.network)


class Glow(FlowModel):
    """The flow `genfuse.flows.Glow`: steps of activation normalisation, an invertible linear map, and a coupling."""

    Config = GlowConfig
    former = {"squash": False}

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return one_per_block(super().current(settings), "channels", 64, 1)

    @classmethod
    def flow_of(cls, config: GlowConfig) -> flows.Flow:
        c = config
        return flows.Glow(
            c.shape,
            transforms=c.steps,
            coupling=c.coupling,
            hidden=c.hidden,
            scales=c.scales,
            channels=c.channels,
            multiscale=multiscale(c.shape, c.network),
            **c.options,
        )
