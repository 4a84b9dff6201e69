"""A variational autoencoder (arXiv 1312.6114) of examples of any shape: change it into a model of your own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from genfuse.errors import SettingsError
from genfuse.models import Batch, GenerativeModel
from genfuse.nn import mlp
from genfuse.ops import reparameterize_kl


@dataclass(frozen=True)
class MyModelConfig:
    """Settings: options --model.NAME of `genfuse train`, and keywords of genfuse.create."""

    shape: tuple[int, ...] = (1, 28, 28)  # of one example; taken from the data
    levels: int | None = 256  # of discrete data, which lies in [0, 1]; None: real-valued; taken from the data
    latent_dim: int = 10
    hidden: tuple[int, ...] = (256,)  # widths of the encoder's layers; the decoder has them in reverse

    def __post_init__(self) -> None:
        if min(self.latent_dim, *self.hidden) < 1:
            raise SettingsError(f"latent_dim and hidden must be at least 1, got {self.latent_dim} and {self.hidden}")


class MyModel(GenerativeModel):
    """q(z | x) is a Gaussian, and p(x | z) one of a learned variance, the same for all cells."""

    Config = MyModelConfig

    def __init__(self, config: MyModelConfig) -> None:
        super().__init__(config)
        cells, hidden = math.prod(config.shape), config.hidden
        self.encoder = nn.Sequential(nn.Flatten(), mlp([cells, *hidden, 2 * config.latent_dim]))
        self.decoder = nn.Sequential(
            mlp([config.latent_dim, *hidden[::-1], cells]),
            nn.Identity() if config.levels is None else nn.Sigmoid(),
            nn.Unflatten(1, config.shape),
        )
        self.log_sigma = nn.Parameter(torch.tensor(-1.5))

    def posterior(self, x: Tensor) -> Independent:
        """q(z | x), of batch shape (N,)."""
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        return Independent(Normal(mu, (logvar / 2).exp()), 1)

    def encode(self, x: Tensor) -> Tensor:
        """z (N, latent_dim): the mean of q(z | x)."""
        return self.encoder(x).chunk(2, dim=-1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """The mean (N, *shape) of p(x | z)."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """The negative ELBO in nats, a mean per example, and its two terms."""
        z, kl = reparameterize_kl(*self.encoder(batch.x).chunk(2, dim=-1))
        error = (self.decode(z) - batch.x).flatten(1)
        gaussian = 0.5 * (error / self.log_sigma.exp()).square() + self.log_sigma + 0.5 * math.log(2 * math.pi)
        reconstruction = gaussian.sum(1).mean()
        return reconstruction + kl.mean(), {"reconstruction": reconstruction, "kl": kl.mean()}

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Means (n, *shape) of p(x | z) with z from the prior."""
        z = torch.randn(n, self.config.latent_dim, device=self.device, generator=generator)
        return self.decode(z)
