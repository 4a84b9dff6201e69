"""RealNVP (arXiv 1605.08803): affine couplings; of vectors, or of images at several scales."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from genfuse import flows
from genfuse.errors import SettingsError
from genfuse.models._flow import FlowModel, NetworkConfig, one_per_block
from genfuse.ops import Scale

Network = Literal["auto", "mlp", "conv"]

MANY = 4096  # cells of an image up to which networks are dense: on MNIST a step costs a 30th of a conv one
FEW = 256  # cells of an example that a linear layer may mix: its products with itself take their cube


@dataclass(frozen=True)
class RealNVPConfig(NetworkConfig):
    """Settings of a RealNVP. Raises SettingsError for values outside their range."""

    # conv: images, at several scales; mlp: any shape, as vectors; auto: conv for images of over 4,096 cells
    network: Network = "auto"
    scale: Scale = "softclip"  # how the log-scales of the couplings are bounded
    layers: int = 10  # mlp: couplings
    hidden: tuple[int, ...] = (256, 256)  # mlp: widths of each coupling's network
    # mlp: learned linear layers between couplings, or halves that are kept in turn; None: up to 256 cells
    linear: bool | None = None
    interleaved: bool = True  # mlp, images: the halves are the colours of a checkerboard
    scales: int = 2  # conv: how many; between two, height and width are halved and half of the cells leave
    channels: tuple[int, ...] = (64, 64)  # conv: width of each residual block of a coupling's network, all the same
    _positive = ("layers", "hidden", "scales", "channels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self.shape, self.network)


def check_network(shape: tuple[int, ...], network: str) -> None:
    """Raise SettingsError unless examples of a convolutional network are images."""
    if network == "conv" and len(shape) != 3:
        raise SettingsError(f"network {network!r} needs images, shape (C, H, W), got {shape}: use network 'mlp'")


def multiscale(shape: tuple[int, ...], network: str, few: int = 0) -> bool:
    """Whether the network is convolutional: if that is left open, for images of more than ``few`` cells."""
    return network == "conv" or (network == "auto" and len(shape) == 3 and math.prod(shape) > few)


class RealNVP(FlowModel):
    """The flow `genfuse.flows.RealNVP`: couplings that keep one half and the other in turn, or checkerboards and
    channels of images at several scales."""

    Config = RealNVPConfig
    flow_class = flows.RealNVP
    former = {"squash": False, "scale": "tanh", "linear": False, "interleaved": False}

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if "shape" in settings and "interleaved" not in settings and settings.get("network", "auto") == "auto":
            settings = {**settings, "network": "conv" if len(settings["shape"]) == 3 else "mlp"}  # as it was then
        return one_per_block(super().current(settings), "channels", 64, 2)

    @classmethod
    def flow_of(cls, config: RealNVPConfig, **more: Any) -> flows.Flow:
        linear = math.prod(config.shape) <= FEW if config.linear is None else config.linear
        images = multiscale(config.shape, config.network, MANY)
        return super().flow_of(config, linear=linear, multiscale=images, network=None, **more)
