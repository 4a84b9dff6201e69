"""RealNVP (arXiv 1605.08803): affine couplings; of vectors, or of images at several scales."""

from dataclasses import dataclass
from typing import Any, Literal

from genfuse import flows
from genfuse.errors import SettingsError
from genfuse.models._flow import FlowModel, NetworkConfig, one_per_block
from genfuse.ops import Scale

Network = Literal["auto", "mlp", "conv"]


@dataclass(frozen=True)
class RealNVPConfig(NetworkConfig):
    """Settings of a RealNVP. Raises SettingsError for values outside their range."""

    network: Network = "auto"  # conv: images, at several scales; mlp: any shape, as vectors; auto: conv for images
    scale: Scale = "softclip"  # how the log-scales of the couplings are bounded
    layers: int = 10  # mlp: couplings
    hidden: tuple[int, ...] = (256, 256)  # mlp: widths of each coupling's network
    linear: bool = True  # mlp: learned linear layers between couplings; or halves that are kept in turn
    scales: int = 2  # conv: how many; between two, height and width are halved and half of the cells leave
    channels: tuple[int, ...] = (64, 64)  # conv: width of each residual block of a coupling's network, all the same

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(network=Network, scale=Scale)
        self.check_positive("layers", "hidden", "scales", "channels")
        check_network(self.shape, self.network)


def check_network(shape: tuple[int, ...], network: str) -> None:
    """Raise SettingsError unless examples of a convolutional network are images."""
    if network == "conv" and len(shape) != 3:
        raise SettingsError(f"network {network!r} needs images, shape (C, H, W), got {shape}: use network 'mlp'")


def multiscale(shape: tuple[int, ...], network: str) -> bool:
    """Whether the network is convolutional."""
    return network == "conv" or (network == "auto" and len(shape) == 3)


class RealNVP(FlowModel):
    """The flow `genfuse.flows.RealNVP`: couplings that keep one half and the other in turn, or checkerboards and
    channels of images at several scales."""

    Config = RealNVPConfig
    former = {"squash": False, "scale": "tanh", "linear": False}

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return one_per_block(super().current(settings), "channels", 64, 2)

    @classmethod
    def flow_of(cls, config: RealNVPConfig) -> flows.Flow:
        c = config
        return flows.RealNVP(
            c.shape,
            transforms=c.layers,
            hidden=c.hidden,
            scales=c.scales,
            channels=c.channels,
            scale=c.scale,
            linear=c.linear,
            multiscale=multiscale(c.shape, c.network),
            **c.options,
        )
