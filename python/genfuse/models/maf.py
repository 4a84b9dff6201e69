"""Masked autoregressive flow (arXiv 1705.07057) and inverse autoregressive flow (arXiv 1606.04934)."""

from collections.abc import Iterator
from dataclasses import dataclass

from genfuse.models._flow import FlowConfig, FlowModel
from genfuse.models.realnvp import Scale
from genfuse.nn import ActNorm, AutoregressiveAffine, Flatten, Inverse, Permutation, Transform


@dataclass(frozen=True)
class MAFConfig(FlowConfig):
    """Settings of an autoregressive flow. Raises SettingsError for values outside their range."""

    layers: int = 5  # each a MADE; the order of the coordinates is reversed between two
    hidden: tuple[int, ...] = (256, 256)  # widths of each MADE's hidden layers
    scale: Scale = "tanh"  # how the log-scales are bounded
    actnorm: bool = True  # normalise activations between layers, where the paper has batch normalisation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(scale=Scale)
        self.check_positive("layers", "hidden")


class MAF(FlowModel):
    """Masked autoregressive flow: coordinate by coordinate, z_i = x_i exp(s_i) + t_i with s_i and t_i made of the
    coordinates of x before i. The density takes one pass; so does sampling, by one sweep over the hidden units."""

    Config = MAFConfig
    config: MAFConfig

    def layers(self) -> Iterator[Transform]:
        c = self.config
        if len(c.shape) > 1:
            yield Flatten(c.shape)
        for i in range(c.layers):
            if i:
                yield Permutation.reversed(c.dimensions)
            if i and c.actnorm:
                yield ActNorm(c.dimensions)
            yield self.autoregressive()

    def autoregressive(self) -> Transform:
        c = self.config
        return AutoregressiveAffine(c.dimensions, c.hidden, context=c.context, scale=c.scale)


class IAF(MAF):
    """Inverse autoregressive flow: MAF with data and noise exchanged in each layer. Sampling is the direct pass; the
    density, with its gradients, takes the sweep."""

    def autoregressive(self) -> Transform:
        return Inverse(super().autoregressive())
