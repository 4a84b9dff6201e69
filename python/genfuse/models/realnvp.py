"""RealNVP (arXiv 1605.08803): affine couplings; of vectors, or of images at several scales."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from genfuse.errors import SettingsError
from genfuse.models._flow import FlowConfig, FlowModel
from genfuse.nn import (
    ActNorm,
    AffineCoupling,
    Composite,
    ConvConditioner,
    Flatten,
    MLPConditioner,
    Split,
    Squeeze,
    Transform,
    checkerboard,
    half,
)
from genfuse.ops._affine_coupling import Scale

Network = Literal["auto", "mlp", "conv"]


@dataclass(frozen=True)
class RealNVPConfig(FlowConfig):
    """Settings of a RealNVP. Raises SettingsError for values outside their range."""

    network: Network = "auto"  # conv: images, at several scales; mlp: any shape, as vectors; auto: conv for images
    scale: Scale = "tanh"  # how the log-scales of the couplings are bounded
    layers: int = 10  # mlp: couplings
    hidden: tuple[int, ...] = (256, 256)  # mlp: widths of each coupling's network
    scales: int = 2  # conv: how many; between two, height and width are halved and half of the cells leave
    channels: int = 64  # conv: width of each coupling's network
    blocks: int = 2  # conv: residual blocks of each coupling's network

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(network=Network, scale=Scale)
        self.check_positive("layers", "hidden", "scales", "channels", "blocks")
        check_scales(self.shape, self.scales - 1, self.network) if self.convolutional else half(self.dimensions)

    @property
    def convolutional(self) -> bool:
        return self.network == "conv" or (self.network == "auto" and len(self.shape) == 3)


def check_scales(shape: tuple[int, ...], halvings: int, network: str) -> None:
    """Raise SettingsError unless examples are images whose height and width can be halved so often."""
    if len(shape) != 3:
        raise SettingsError(f"network {network!r} needs images, shape (C, H, W), got {shape}: use network 'mlp'")
    if any(side % 2**halvings for side in shape[1:]):
        raise SettingsError(
            f"scales would halve height and width {halvings} times, but the images are {shape[1]}x{shape[2]}: use "
            "fewer scales, or network 'mlp'"
        )


class RealNVP(FlowModel):
    """Real-valued non-volume-preserving transformations.

    Vectors: couplings that keep the first half and the last in turn. Images: at each scale three
    checkerboard couplings, a squeeze and three couplings of channels; then half of the channels leave. The last scale
    has four checkerboard couplings. Activation normalisation stands in the place of the paper's batch normalisation, so
    that an example's density does not depend on the others of its batch.
    """

    Config = RealNVPConfig
    config: RealNVPConfig

    def layers(self) -> Iterator[Transform]:
        c = self.config
        if c.convolutional:
            yield from self._scale((c.shape[0], c.shape[1], c.shape[2]), c.scales)
            return
        if len(c.shape) > 1:
            yield Flatten(c.shape)
        d, kept = c.dimensions, half(c.dimensions)
        for i in range(c.layers):
            network = MLPConditioner(kept, 2 * (d - kept), c.hidden, c.context)
            yield AffineCoupling(network, -kept if i % 2 else kept, c.scale)

    def _scale(self, shape: tuple[int, int, int], scales: int) -> Iterator[Transform]:
        """From images of this shape to vectors."""
        c, (channels, height, width) = self.config, shape

        def couplings(channels: int, where: list) -> Iterator[Transform]:
            for mask_or_split in where:
                split = abs(mask_or_split) if isinstance(mask_or_split, int) else 0
                outputs = 2 * (channels - split)
                network = ConvConditioner(split or channels, outputs, c.channels, c.blocks, c.context)
                yield ActNorm(channels)
                yield AffineCoupling(network, mask_or_split, c.scale)

        masks = [checkerboard(height, width, bool(i % 2)) for i in range(4)]
        if scales == 1:
            yield from couplings(channels, masks)
            yield Flatten(shape)
            return
        squeezed = (4 * channels, height // 2, width // 2)
        yield from couplings(channels, masks[:3])
        yield Squeeze()
        yield from couplings(4 * channels, [2 * channels, -2 * channels, 2 * channels])
        prior = AffineCoupling(ConvConditioner(2 * channels, 4 * channels, c.channels, 0, c.context), 2 * channels)
        rest = Composite([*self._scale((2 * channels, *squeezed[1:]), scales - 1)], reversible=c.reversible)
        yield Split(prior, rest, squeezed)
