"""Denoising diffusion probabilistic models (arXiv 2006.11239)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genfuse.diffusion import Denoiser, likelihood, schedules
from genfuse.errors import SettingsError
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel

Prediction = Literal["noise", "x0", "v"]
Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True)
class DDPMConfig(DiffusionConfig):
    """Settings of a DDPM. Raises SettingsError for values outside their range."""

    prediction: Prediction = "noise"  # what the network predicts: eps, x0, or v = alpha eps - sigma x0
    schedule: Schedule = "linear"  # of the betas (2006.11239), or a cosine of alpha^2 (2102.09672)
    timesteps: int = 1000  # T

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps < 2:
            raise SettingsError(f"timesteps must be at least 2, got {self.timesteps}")


class DDPM(DiffusionModel):
    """T noise levels from data to noise; training draws one of them an example, the variational bound sums over all.

    x_t     = sqrt(alpha bar_t) x0 + sqrt(1 - alpha bar_t) eps
    sigma_t = sqrt((1 - alpha bar_t) / alpha bar_t)         of x_t / sqrt(alpha bar_t) = x0 + sigma_t eps
    """

    Config = DDPMConfig
    sigma_of: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        prediction: Prediction = "noise",
        schedule: Schedule = "linear",
        timesteps: int = 1000,
        **parts: Any,
    ) -> None:
        """A DDPM of any network, as `genfuse.diffusion.Denoiser` takes it; ``parts`` are those of `DiffusionModel`."""
        super().__init__(Denoiser(network, prediction, sigma_data=1.0), **parts)
        self.schedule, self.timesteps = schedule, timesteps
        self.sampler = "ancestral", min(250, timesteps)
        *falling, _ = schedules.ddpm(timesteps, schedule, timesteps)
        self.sigmas = falling[::-1]  # sigma_t of t = 1 .. T, for the host
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]
        self.register_buffer("sigma_of", torch.tensor(self.sigmas), persistent=False)  # the same for the device

    @property
    def likelihoods(self) -> tuple[str, ...]:
        if self.columns is not None:
            return ()
        return ("log_prob", "elbo") if self.levels is None else ("elbo", "bits_per_dim")

    def draw_sigmas(self, n: int) -> Tensor:
        """sigma_t of t uniform over 1 .. T, (n,)."""
        return self.sigma_of[torch.randint(self.timesteps, (n,), device=self.sigma_of.device)]

    def sigma_schedule(self, steps: int) -> list[float]:
        """sigma_t of ``steps`` timesteps that fall evenly from T to 1, and 0; at most T of them."""
        return schedules.ddpm(steps, self.schedule, self.timesteps)

    def elbo_and_error(
        self, x: Tensor, y: Tensor | None = None, *, bound: str = "variational", **options: Any
    ) -> tuple[Tensor, Tensor]:
        """A lower bound of log p(x), of discrete x log P(x), and the standard error of its estimate, (N,) nats each.

        The variational bound of `genfuse.diffusion.likelihood.variational_bound` over all T timesteps (arXiv
        2006.11239, equation 5), by 2 ``strata`` + 1 evaluations of the network. ``bound`` "flow", of discrete x, is
        that of the other models, by the probability-flow ODE, with its options. p(x_T) is the Gaussian that samples
        start from: N(0, I), with the mean and variances of the training examples. Raises SettingsError for others.
        """
        self._check_density()
        if bound == "flow":
            return super().elbo_and_error(x, y, **options)
        if bound != "variational" or options.keys() - {"strata", "generator"} or options.get("strata", 1) < 1:
            raise SettingsError(
                "bound must be variational, with strata of at least 1, or flow, with its options; got "
                f"{bound!r} and {options}"
            )
        known = {"levels": self.levels, "prior": self._prior(self.sigma_max), **options}
        return likelihood.variational_bound(self._given(y, len(x)), self._inward(x), self.sigmas, **known)
