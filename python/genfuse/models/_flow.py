"""What all normalizing flows share: the density, sampling, and the way from data to the flow and back."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.models._base import Batch, GenerativeModel, ModelConfig
from genfuse.nn import (
    AffineCoupling,
    Composite,
    ConvConditioner,
    Dequantize,
    Logit,
    Transform,
    checkerboard,
)
from genfuse.ops import standard_normal_log_prob

if TYPE_CHECKING:
    from genfuse.data import Dataset

Dequantization = Literal["uniform", "variational"]


@dataclass(frozen=True)
class FlowConfig(ModelConfig):
    """Settings of every flow. Raises SettingsError for values outside their range."""

    logit: float = 0.05  # discrete data: the flow sees logit(a + (1 - 2 a) v) of v in [0, 1) with this a; 0: v - 1/2
    dequantization: Dequantization = "uniform"  # discrete data: the noise that makes levels real numbers
    reversible: bool = False  # recompute activations in the backward pass: memory does not grow with depth

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.logit < 0.5:
            raise SettingsError(f"logit must be at least 0 and below 0.5, got {self.logit}")
        if self.dequantization == "variational" and (self.levels is None or len(self.shape) != 3):
            raise SettingsError(
                f"dequantization 'variational' is for images of discrete levels, got shape {self.shape} and levels "
                f"{self.levels}: use 'uniform'"
            )
        self.check_choices(dequantization=Dequantization)


class FlowModel(GenerativeModel):
    """A normalizing flow: x = f^-1(z) of z ~ N(0, I), with an invertible f. A subclass gives `layers`.

    Real-valued examples x are (N, *shape), with exact densities in nats. Discrete ones, x = k / (levels - 1), are
    dequantised: `elbo` is a lower bound of log P(x), and `bits_per_dim` the same in bits per cell. Latents z are
    (N, D), as many as an example has cells. Labels y, (N,), are for conditional models, and for them alone.
    """

    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.dequantize: Dequantize | None = None
        reals: list[Transform] = []
        if config.levels is not None:
            noise = _variational_noise(config.shape) if config.dequantization == "variational" else None
            self.dequantize = Dequantize(config.levels, noise)
            reals = [Logit(config.logit) if config.logit else _Centre()]
        self.flow = Composite([*reals, *self.layers()], reversible=config.reversible)

    def layers(self) -> Iterable[Transform]:
        """The layers of f, from examples (N, *shape) to latents (N, D)."""
        raise NotImplementedError(f"{type(self).__name__} has no layers")

    @property
    def likelihoods(self) -> tuple[str, ...]:
        return ("log_prob",) if self.dequantize is None else ("elbo", "bits_per_dim")

    def check_data(self, data: "Dataset") -> None:
        super().check_data(data)
        self.check_levels(data)

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """-log p(x), or for discrete data minus its lower bound, in the mean over the batch."""
        y = batch.y if self.conditional else None
        nll = -(self.log_prob(batch.x, y) if self.dequantize is None else self.elbo(batch.x, y)).mean()
        return nll, {} if self.dequantize is None else {"bits_per_dim": nll.detach() / self._nats_per_bit}

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x), exact, (N,) nats. Where the data is discrete, x are dequantised values in [0, 1)."""
        z, logdet = self.flow(self.checked(x), self.context_of(y, len(x)))
        return standard_normal_log_prob(z, logdet)

    def elbo(self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """A lower bound of log P(x) of discrete x, (N,) nats, with one draw of the dequantisation noise.

        Raises SettingsError for a model of real-valued data, which has `log_prob`.
        """
        if self.dequantize is None:
            raise SettingsError("elbo is for discrete data; the model is of real-valued data: use log_prob")
        v, log_weight = self.dequantize(self.checked(x), generator)
        return self.log_prob(v, y) + log_weight

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """-elbo / (D ln 2), (N,): bits that each of the D cells, of ``levels`` levels, costs (arXiv 1511.01844)."""
        return -self.elbo(x, y, generator=generator) / self._nats_per_bit

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z = f(x), (N, D); of discrete x at the middle of its bins."""
        x = self.checked(x)
        if (levels := self.config.levels) is not None:
            x = ((x * (levels - 1)).round() + 0.5) / levels
        return self.flow(x, self.context_of(y, len(x)))[0]

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """x = f^-1(z), (N, *shape), for latents (N, D); discrete x are on their levels."""
        return self._decode(z, self.context_of(y, len(z)))

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        x, _ = self.flow.inverse(z, context)
        return x if self.dequantize is None else self.dequantize.inverse(x)

    def trajectory(self, z: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """z (N, D), and what each layer makes of it on the way to the data; the last is in the data's space."""
        steps, context = [z], self.context_of(y, len(z))
        for transform in reversed(self.flow.transforms):
            steps.append(transform.inverse(steps[-1], context)[0])  # type: ignore[operator]
        return steps

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        y: Tensor | int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n draws, (n, *shape), of latents with standard deviation ``temperature``; 1 is the model itself.

        ``y`` are the labels of a conditional model, (n,), or one for all; left out, they are drawn uniformly.
        """
        z, context = self._draw(n, y, temperature, generator)
        rows = max(1, 2**22 // self.config.dimensions)
        contexts = repeat(None) if context is None else context.split(rows)
        return torch.cat([self._decode(*part) for part in zip(z.split(rows), contexts, strict=False)])

    @torch.no_grad()
    def sample_and_log_prob(
        self,
        n: int,
        *,
        y: Tensor | int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws as of `sample`, and the log-density of what they were drawn from, (n,) nats, in the same pass.

        Raises SettingsError for discrete data, of whose log-probability there are only bounds: use sample and elbo.
        """
        if self.dequantize is not None:
            raise SettingsError("sample_and_log_prob is for real-valued data; of discrete data use sample, then elbo")
        z, context = self._draw(n, y, temperature, generator)
        x, logdet = self.flow.inverse(z, context)
        scaled = standard_normal_log_prob(z / temperature, -logdet)
        return x, scaled - self.config.dimensions * math.log(temperature)

    def _draw(
        self, n: int, y: Tensor | int | None, temperature: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Latents and the context."""
        if not 0 < temperature < math.inf:
            raise SettingsError(f"temperature must be above 0 and finite, got {temperature}")
        context = self.draw_context(n, y, generator)
        where = torch.device("cpu") if generator is None else generator.device
        z = torch.randn(n, self.config.dimensions, device=where, generator=generator) * temperature
        return z.to(next(self.parameters())), context

    @property
    def _nats_per_bit(self) -> float:
        return self.config.dimensions * math.log(2)


class _Centre(Transform):
    """y = x - 1/2."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x - 0.5, x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y + 0.5, y.new_zeros(len(y))


def _variational_noise(shape: tuple[int, ...]) -> Transform:
    channels, height, width = shape
    return Composite(
        [
            AffineCoupling(
                ConvConditioner(channels, 2 * channels, 32, context=channels), checkerboard(height, width, bool(i % 2))
            )
            for i in range(4)
        ]
    )
