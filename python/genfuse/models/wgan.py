"""The Wasserstein GAN, with clipped weights (arXiv 1701.07875) or with a gradient penalty (arXiv 1704.00028)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genfuse.errors import SettingsError
from genfuse.models._adversarial import AdversarialConfig, AdversarialModel, Objective, Penalty, PenaltyConfig
from genfuse.models._base import Batch, adam


@dataclass(frozen=True)
class WGANConfig(AdversarialConfig):
    """Settings of a WGAN. Raises SettingsError for values outside their range."""

    n_critic: int = 5  # updates of the critic for one of the generator
    # largest absolute weight of the critic; None: 0.01, or 0.1 for vectors and tables, for which 0.01 is too blunt
    clip: float | None = None
    _positive = ("clip",)

    def __post_init__(self) -> None:
        if self.clip is None:
            object.__setattr__(self, "clip", 0.1 if self.vectors else 0.01)
        super().__post_init__()


@dataclass(frozen=True)
class WGANGPConfig(PenaltyConfig):
    """Settings of a WGAN-GP. Raises SettingsError for values outside their range."""

    n_critic: int = 5  # updates of the critic for one of the generator
    penalty: Penalty = "gradient"  # on |grad D|: (|.| - 1)^2 between real and generated examples; r1: |.|^2 / 2 at real
    # lambda; r1, r1r2: gamma; None: 10, or 1 for vectors and tables, whose critic 10 holds flat for too long
    penalty_weight: float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.penalty_weight is None:
            object.__setattr__(self, "penalty_weight", 1.0 if self.vectors else 10.0)
        super().__post_init__()


WASSERSTEIN = Objective(torch.neg, torch.positive, torch.neg)  # arXiv 1701.07875, equation 2


class _Wasserstein(AdversarialModel):
    """Trains on E D(x) - E D(G(z)), which of the best D with slopes of at most 1 is the Wasserstein-1 distance."""

    usual_steps = 12000

    def critic_terms(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """``wasserstein``, the critic's estimate of the distance (of discrete data x, of 2x - 1; of tables,
        of their normal scores and one-hot categories), and its means."""
        terms = super().critic_terms(real, fake)
        return {"wasserstein": terms["real"] - terms["fake"], **terms}


class WGAN(_Wasserstein):
    """Wasserstein GAN (arXiv 1701.07875) whose critic has weights of at most ``clip``, above or below 0.

    These bound its slope by some constant, so ``wasserstein`` is the distance times a factor that is not known. The
    other arguments are those of `AdversarialModel`. Raises SettingsError for values outside their range.
    """

    Config = WGANConfig

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """RMSprop at twice the paper's rate, at which many samples are blobs still after the usual steps; at twenty
        times it for vectors of real numbers and tables."""
        return torch.optim.RMSprop(parameters, lr=1e-3 if getattr(self.config, "vectors", False) else 1e-4)

    def __init__(self, generator: nn.Module, critic: nn.Module, *, clip: float = 0.01, **options: Any) -> None:
        super().__init__(generator, critic, WASSERSTEIN, **{"n_critic": 5, **options})
        if not 0 < clip < math.inf:
            raise SettingsError(f"clip must be above 0 and finite, got {clip}")
        self.clip = clip

    def loss(self, batch: Batch, player: str) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.compiler.is_compiling():  # where no step is noticed: see `settle`
            self.clip_weights()
        return super().loss(batch, player)

    @torch.no_grad()
    def clip_weights(self) -> None:
        """Bring each weight of the critic into [-clip, clip]. Nobody has to call it: each update is followed by it."""
        compiling = torch.compiler.is_compiling()
        weights = self.critic.parameters() if compiling else self._weights_of().of[self.critic_name].merged()
        for each in weights:
            each.clamp_(-self.clip, self.clip)

    def after_step(self, player: str) -> None:
        if player == self.critic_name:
            self.clip_weights()
        super().after_step(player)


class WGANGP(_Wasserstein):
    """Wasserstein GAN (arXiv 1704.00028) whose critic pays for slopes other than 1.

    The arguments are those of `AdversarialModel`; ``penalty`` is ``gradient`` by default, and ``n_critic`` 5. Raises
    SettingsError for values outside their range.
    """

    Config = WGANGPConfig

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Adam at the paper's rate, at which samples of vectors are one blob: at five times it for these and tables."""
        return adam(5e-4 if getattr(self.config, "vectors", False) else 1e-4, betas=(0.0, 0.9))(parameters)

    def __init__(self, generator: nn.Module, critic: nn.Module, **options: Any) -> None:
        super().__init__(generator, critic, WASSERSTEIN, **{"n_critic": 5, "penalty": "gradient", **options})
