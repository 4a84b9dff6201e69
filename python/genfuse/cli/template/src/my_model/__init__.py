"""A variational autoencoder (arXiv 1312.6114) of examples of any shape: change it into a model of your own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genfuse.errors import SettingsError
from genfuse.models import Batch, GenerativeModel
from genfuse.ops import reparameterize_kl


@dataclass(frozen=True)
class MyModelConfig:
    """Settings: options --model.NAME of `genfuse train`, and keywords of genfuse.create."""

    shape: tuple[int, ...] = (1, 28, 28)  # of one example; taken from the data
    levels: int | None = 256  # of discrete data, which lies in [0, 1]; None: real-valued; taken from the data
    latent_dim: int = 10
    hidden: int = 256  # width of the networks

    def __post_init__(self) -> None:
        for name in ("latent_dim", "hidden"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")


class MyModel(GenerativeModel):
    """q(z | x) is a Gaussian, and p(x | z) one of a learned variance, the same for all cells."""

    Config = MyModelConfig

    def __init__(self, config: MyModelConfig) -> None:
        super().__init__(config)
        cells, hidden = math.prod(config.shape), config.hidden
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(cells, hidden), nn.ReLU(), nn.Linear(hidden, 2 * config.latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, cells),
            nn.Identity() if config.levels is None else nn.Sigmoid(),
            nn.Unflatten(1, config.shape),
        )
        self.log_sigma = nn.Parameter(torch.tensor(-1.5))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar (N, latent_dim) of q(z | x)."""
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """The mean (N, *shape) of p(x | z)."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)[0])

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """The negative ELBO in nats, a mean per example, and its two terms."""
        z, kl = reparameterize_kl(*self.encode(batch.x))
        error = (self.decode(z) - batch.x).flatten(1)
        gaussian = 0.5 * (error / self.log_sigma.exp()).square() + self.log_sigma + 0.5 * math.log(2 * math.pi)
        reconstruction = gaussian.sum(1).mean()
        return reconstruction + kl.mean(), {"reconstruction": reconstruction, "kl": kl.mean()}

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Means (n, *shape) of p(x | z) with z from the prior."""
        z = torch.randn(n, self.config.latent_dim, device=self.device, generator=generator)
        return self.decode(z)
