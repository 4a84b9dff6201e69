"""The adversarial autoencoder, arXiv 1511.05644."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.errors import SettingsError
from genfuse.models import Batch, GenerativeModel, Player, adam
from genfuse.nn import mlp


@dataclass(frozen=True)
class AAEConfig:
    """Settings of `AAE`. Raises SettingsError for values outside their range."""

    shape: tuple[int, ...] = (1, 28, 28)  # of one example; taken from the data
    levels: int | None = 256  # of discrete data, None for real-valued data; taken from the data
    latent_dim: int = 8
    hidden: tuple[int, ...] = (128,)  # widths of the encoder's layers; the decoder has them in reverse
    weight: float = 0.1  # of the adversarial term, beside the squared error of an example's cells
    lr: float = 1e-3  # of both players

    def __post_init__(self) -> None:
        for name in ("latent_dim", "weight", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if min(self.hidden, default=1) < 1:
            raise SettingsError(f"hidden must be widths of at least 1, got {self.hidden}")


class AAE(GenerativeModel):
    """An autoencoder whose codes a discriminator cannot tell from draws of N(0, I), so that these can be decoded.

    Two players: the ``discriminator``, and the ``autoencoder``, which reconstructs and deceives it (section 2).
    """

    Config = AAEConfig

    def __init__(self, config: AAEConfig) -> None:
        super().__init__(config)
        cells, hidden, latent = math.prod(config.shape), config.hidden, config.latent_dim
        self.encoder = nn.Sequential(nn.Flatten(), mlp([cells, *hidden, latent]))
        self.decoder = nn.Sequential(
            mlp([latent, *hidden[::-1], cells]),
            nn.Identity() if config.levels is None else nn.Sigmoid(),
            nn.Unflatten(1, config.shape),
        )
        self.discriminator = mlp([latent, *hidden, 1])

    def players(self) -> list[Player]:
        autoencoder = [*self.encoder.parameters(), *self.decoder.parameters()]
        return [
            Player("discriminator", self.discriminator.parameters(), adam(self.config.lr)),
            Player("autoencoder", autoencoder, adam(self.config.lr)),
        ]

    def loss(self, batch: Batch, player: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Means per example: of the discriminator in nats, of the autoencoder with the squared error of an example."""
        if player == "discriminator":
            with torch.no_grad():
                codes = self.encode(batch.x)
            real, fake = self.discriminator(torch.randn_like(codes)), self.discriminator(codes)
            return F.softplus(-real).mean() + F.softplus(fake).mean(), {"real": real.mean(), "fake": fake.mean()}
        codes = self.encode(batch.x)
        reconstruction = (self.decode(codes) - batch.x).flatten(1).square().sum(1).mean()
        deception = F.softplus(-self.discriminator(codes)).mean()
        return reconstruction + self.config.weight * deception, {
            "reconstruction": reconstruction,
            "deception": deception,
        }

    def encode(self, x: Tensor) -> Tensor:
        """Codes (N, latent_dim) of examples (N, *shape)."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Examples (N, *shape) of codes (N, latent_dim)."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(n, self.config.latent_dim, device=self.device, generator=generator)
        return self.decode(z)
