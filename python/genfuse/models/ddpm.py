"""Denoising diffusion probabilistic models (arXiv 2006.11239)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel, noisy
from genfuse.ops import _philox

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
        self.check_choices(prediction=Prediction, schedule=Schedule)
        if self.timesteps < 2:
            raise SettingsError(f"timesteps must be at least 2, got {self.timesteps}")

    def alphas_squared(self) -> Tensor:
        """alpha_t^2, the papers' alpha bar_t, for t = 1 .. T: (T,), float64."""
        t = self.timesteps
        if self.schedule == "linear":  # of T = 1,000, and for other T of the same total
            betas = torch.linspace(0.1 / t, 20 / t, t, dtype=torch.float64)
        else:
            at = torch.linspace(0, 1, t + 1, dtype=torch.float64)
            squares = ((at + 0.008) / 1.008 * math.pi / 2).cos().square()
            betas = 1 - squares[1:] / squares[:-1]
        return (1 - betas.clamp(max=0.999)).cumprod(0)


class DDPM(DiffusionModel):
    """T noise levels from data to noise; training draws one of them an example, the variational bound sums over all."""

    Config = DDPMConfig
    config: DDPMConfig
    table: Tensor

    def __init__(self, config: DDPMConfig) -> None:
        super().__init__(config)
        self.target = config.prediction
        self.sampler = "ancestral", min(250, config.timesteps)
        squares = config.alphas_squared()
        levels = ((1 - squares) / squares).sqrt()
        self.ladder: list[float] = levels.tolist()  # the noise levels of t = 1 .. T, for the host
        self.limits = self.ladder[0], self.ladder[-1]
        self.register_buffer("table", levels.float(), persistent=False)

    @property
    def likelihoods(self) -> tuple[str, ...]:
        return ("log_prob", "elbo") if self.config.levels is None else ("elbo", "bits_per_dim")

    def draw_levels(self, n: int) -> Tensor:
        return self.table[torch.randint(self.config.timesteps, (n,), device=self.table.device)]

    def noise_levels(self, steps: int) -> list[float]:
        if steps > self.config.timesteps:
            raise SettingsError(
                f"steps must be at most the {self.config.timesteps} timesteps of the model, got {steps}"
            )
        chosen = torch.linspace(self.config.timesteps - 1, 0, steps).round().long()
        return [*(self.ladder[t] for t in chosen.tolist()), 0.0]

    @torch.no_grad()
    def elbo_and_error(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        bound: Literal["variational", "flow"] = "variational",
        strata: int = 25,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """A lower bound of log p(x), of discrete x log P(x), and the standard error of its estimate, (N,) nats each.

        The variational bound of arXiv 2006.11239, equation 5, with the posteriors' variances:

            log p(x | x_1) - KL(q(x_T | x) || p(x_T)) - sum_t (1/s_{t-1}^2 - 1/s_t^2) |x - D(x_t, s_t)|^2 / 2

        The sum over t = 2 .. T is estimated from two draws of t and x_t in each of ``strata`` equally long parts, and
        the error is this estimate's; the first term is taken at one draw of x_1. In all the network is evaluated
        2 strata + 1 times. ``bound`` "flow", of discrete x, is that of the other models, by the probability-flow ODE,
        with its options. p(x_T) is the Gaussian that samples start from: N(0, I), with the mean and variances of the
        training examples.
        """
        if bound == "flow":
            return super().elbo_and_error(x, y, generator=generator, **options)
        if bound != "variational" or options or strata < 1:
            raise SettingsError(
                f"bound must be variational, with strata of at least 1, or flow, with its options; got {bound!r}, "
                f"strata {strata} and {options}"
            )
        keys, x, context = self._keys(generator), self._inward(x), self.context_of(y, len(x))
        n, levels = len(x), torch.tensor(self.ladder, dtype=torch.float64)
        weights = ((1 / levels[:-1] ** 2 - 1 / levels[1:] ** 2) / 2).to(x)  # of t = 2 .. T
        edges = torch.linspace(0, len(weights), min(strata, len(weights)) + 1).round().long().tolist()
        total, variance = x.new_zeros(n), x.new_zeros(n)
        for low, high in pairwise(edges):
            pair = []
            for _ in range(2):
                at = low + (_philox.uniform(next(keys), (n,)) * (high - low)).long().clamp(max=high - low - 1)
                level = self.table[at + 1].to(x)
                off = x - self.denoise(noisy(x, level, next(keys))[0], level, context)
                pair.append((high - low) * weights[at] * off.flatten(1).square().sum(1))
            total += (pair[0] + pair[1]) / 2
            variance += (pair[0] - pair[1]).square() / 4
        first, (mean, spread) = self.ladder[0], self._end(self.ladder[-1])
        share = (self.ladder[-1] / spread).square()  # of the variance of x_T that is noise
        decoded = self.decoder_log_prob(x, noisy(x, first, next(keys))[0], first, context)
        prior = 0.5 * (((x - mean) / spread).square() + share - 1 - share.log()).flatten(1).sum(1)
        return decoded - prior - total, variance.sqrt()
