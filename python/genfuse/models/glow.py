"""Glow (arXiv 1807.03039): activation normalisation, learned 1x1 convolutions and couplings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from genfuse.models._flow import FlowConfig, FlowModel
from genfuse.models.realnvp import Network, check_scales
from genfuse.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Composite,
    ConvConditioner,
    Flatten,
    LULinear,
    MLPConditioner,
    Split,
    Squeeze,
    Transform,
    half,
)

Coupling = Literal["affine", "additive"]


@dataclass(frozen=True)
class GlowConfig(FlowConfig):
    """Settings of a Glow. Raises SettingsError for values outside their range."""

    logit: float = 0.0  # discrete data: the flow sees logit(a + (1 - 2 a) v) of v in [0, 1) with this a; 0: v - 1/2
    network: Network = "auto"  # conv: images, at several scales; mlp: any shape, as vectors; auto: conv for images
    coupling: Coupling = "affine"  # affine, its scales bounded by a sigmoid as in the paper's code; or additive
    steps: int = 8  # of flow, at each scale
    scales: int = 2  # conv: each halves height and width; at its end half of the cells leave, but for the last
    channels: int = 64  # conv: width of each coupling's network
    hidden: tuple[int, ...] = (256, 256)  # mlp: widths of each coupling's network

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(network=Network, coupling=Coupling)
        self.check_positive("steps", "scales", "channels", "hidden")
        check_scales(self.shape, self.scales, self.network) if self.convolutional else half(self.dimensions)

    @property
    def convolutional(self) -> bool:
        return self.network == "conv" or (self.network == "auto" and len(self.shape) == 3)


class Glow(FlowModel):
    """Generative flow with invertible 1x1 convolutions. Each step of flow is an activation normalisation, an invertible
    linear map of the channels, and a coupling. Between scales half of the channels leave, with a learned prior given
    those that stay. On vectors the same steps with dense networks, at one scale."""

    Config = GlowConfig
    config: GlowConfig

    def layers(self) -> Iterator[Transform]:
        c = self.config
        if c.convolutional:
            yield from self._scale((c.shape[0], c.shape[1], c.shape[2]), c.scales)
            return
        if len(c.shape) > 1:
            yield Flatten(c.shape)
        yield from self._steps(c.dimensions, convolutional=False)

    def _steps(self, features: int, *, convolutional: bool) -> Iterator[Transform]:
        c, kept = self.config, half(features)
        outputs = (features - kept) * (2 if c.coupling == "affine" else 1)
        for _ in range(c.steps):
            yield ActNorm(features)
            yield LULinear(features, "rotation")
            network = (
                ConvConditioner(kept, outputs, c.channels, 0, c.context)
                if convolutional
                else MLPConditioner(kept, outputs, c.hidden, c.context)
            )
            if c.coupling == "affine":
                yield AffineCoupling(network, kept, "sigmoid")
            else:
                yield AdditiveCoupling(network, kept)

    def _scale(self, shape: tuple[int, int, int], scales: int) -> Iterator[Transform]:
        """From images of this shape to vectors."""
        c, channels = self.config, 4 * shape[0]
        squeezed = (channels, shape[1] // 2, shape[2] // 2)
        yield Squeeze()
        yield from self._steps(channels, convolutional=True)
        if scales == 1:
            yield Flatten(squeezed)
            return
        prior = AffineCoupling(ConvConditioner(channels // 2, channels, c.channels, 0, c.context), channels // 2, "exp")
        rest = Composite([*self._scale((channels // 2, *squeezed[1:]), scales - 1)], reversible=c.reversible)
        yield Split(prior, rest, squeezed)
