"""Glow (arXiv 1807.03039): activation normalisation, learned 1x1 convolutions and couplings."""

from dataclasses import dataclass
from typing import Any, Literal

from genfuse import flows
from genfuse.models._flow import FlowModel, NetworkConfig, one_per_block
from genfuse.models.realnvp import Network, check_network, multiscale
from genfuse.ops import Scale


@dataclass(frozen=True)
class GlowConfig(NetworkConfig):
    """Settings of a Glow. Raises SettingsError for values outside their range."""

    network: Network = "auto"  # conv: images, at several scales; mlp: any shape, as vectors; auto: conv for images
    coupling: flows.CouplingKind = "affine"  # or additive
    # affine: how the log-scales are bounded; auto: conv by softclip, mlp by the sigmoid of the paper's code
    scale: Literal["auto", Scale] = "auto"
    steps: int = 8  # of flow, at each scale
    scales: int = 2  # conv: each halves height and width; at its end half of the cells leave, but for the last
    channels: tuple[int, ...] = (32,)  # conv: width of each coupling's network, one number
    hidden: tuple[int, ...] = (256, 256)  # mlp: widths of each coupling's network
    _positive = ("steps", "scales", "channels", "hidden")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.shape, self.network)


class Glow(FlowModel):
    """The flow `genfuse.flows.Glow`: steps of activation normalisation, an invertible linear map, and a coupling."""

    Config = GlowConfig
    flow_class = flows.Glow
    former = {"squash": False, "scale": "sigmoid"}

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return one_per_block(super().current(settings), "channels", 64, 1)

    @classmethod
    def flow_of(cls, config: GlowConfig, **more: Any) -> flows.Flow:
        images = multiscale(config.shape, config.network)
        scale = ("softclip" if images else "sigmoid") if config.scale == "auto" else config.scale
        return super().flow_of(config, transforms=config.steps, scale=scale, multiscale=images, network=None, **more)
