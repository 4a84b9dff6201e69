"""The Wasserstein GAN, with clipped weights (arXiv 1701.07875) or with a gradient penalty (arXiv 1704.00028)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from genfuse.models._adversarial import AdversarialConfig, AdversarialModel, Objective, Penalty, PenaltyConfig
from genfuse.models._base import adam


@dataclass(frozen=True)
class WGANConfig(AdversarialConfig):
    """Settings of a WGAN. Raises SettingsError for values outside their range."""

    n_critic: int = 5  # updates of the critic for one of the generator
    clip: float = 0.01  # largest absolute weight of the critic

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("clip")


@dataclass(frozen=True)
class WGANGPConfig(PenaltyConfig):
    """Settings of a WGAN-GP. Raises SettingsError for values outside their range."""

    n_critic: int = 5  # updates of the critic for one of the generator
    penalty: Penalty = "gradient"  # on |grad D|: (|.| - 1)^2 between real and generated examples; r1: |.|^2 / 2 at real


class _Wasserstein(AdversarialModel):
    """Trains on E D(x) - E D(G(z)), which of the best D with slopes of at most 1 is the Wasserstein-1 distance."""

    objective = Objective(torch.neg, lambda out: out, torch.neg)

    def critic_terms(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """``wasserstein``, the critic's estimate of the distance (of discrete data x, of 2x - 1), and its means."""
        terms = super().critic_terms(real, fake)
        return {"wasserstein": terms["real"] - terms["fake"], **terms}


class WGAN(_Wasserstein):
    """Wasserstein GAN whose critic has weights of at most ``clip``.

    These bound its slope by some constant, so ``wasserstein`` is the distance times a factor that is not known.
    """

    Config = WGANConfig
    config: WGANConfig
    optimizer = staticmethod(partial(torch.optim.RMSprop, lr=5e-5))

    @torch.no_grad()
    def after_step(self, player: str) -> None:
        super().after_step(player)
        if player == self.critic_name:
            clip = self.config.clip
            weights: list[Tensor] = list(self.critic.parameters())
            torch._foreach_clamp_max_(weights, clip)
            torch._foreach_clamp_min_(weights, -clip)


class WGANGP(_Wasserstein):
    """Wasserstein GAN whose critic pays for slopes other than 1."""

    Config = WGANGPConfig
    config: WGANGPConfig
    optimizer = staticmethod(adam(1e-4, betas=(0.0, 0.9)))
