"""Samplers of diffusion models: from noise to examples along falling noise levels.

All see a model as its denoiser alone, D(x, s) = E[x0 | x0 + s eps = x], at noise level s; the score is
(D(x, s) - x) / s^2. Any process x_t = alpha x0 + sigma eps is of this form in x = x_t / alpha, with s = sigma / alpha
(arXiv 2206.00364, appendix B), so that each sampler serves every model.

A sampler is called with the denoiser, x at the first of the noise levels, these levels, which fall to 0 at the last,
and a function (x, sigma) -> x + sigma eps that draws eps; it yields x at each further level. Levels are Python numbers:
coefficients are made of them on the host, in float64, and nothing waits for the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[Tensor, float], Tensor]


def ddim(denoise: Denoise, x: Tensor, levels: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Iterator[Tensor]:
    """DDIM, arXiv 2010.02502, equation 12: deterministic with eta 0, the ancestral sampler with eta 1."""
    for s, t in pairwise(levels):
        x0 = denoise(x, s)
        variance = (eta * t) ** 2 * (1 - (t / s) ** 2)
        x = torch.lerp(x0, x, math.sqrt(t**2 - variance) / s)
        if variance:
            x = noise(x, math.sqrt(variance))
        yield x


def ancestral(denoise: Denoise, x: Tensor, levels: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DDPM's sampler, arXiv 2006.11239, algorithm 2, with the posterior's variance (sigma_t^2 = beta tilde_t)."""
    return ddim(denoise, x, levels, noise, eta=1.0)


def heun(denoise: Denoise, x: Tensor, levels: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """EDM's deterministic sampler, arXiv 2206.00364, algorithm 1: Heun's second-order steps of dx/ds = (x - D) / s."""
    return heun_stochastic(denoise, x, levels, noise, churn=0.0)


def heun_stochastic(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[float],
    noise: Noise,
    *,
    churn: float = 40.0,
    churn_from: float = 0.05,
    churn_to: float = 50.0,
    inflation: float = 1.003,
) -> Iterator[Tensor]:
    """EDM's stochastic sampler, arXiv 2206.00364, algorithm 2: S_churn, S_tmin, S_tmax and S_noise of the paper."""
    more = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for s, t in pairwise(levels):
        if more and churn_from <= s <= churn_to:
            raised = s * (1 + more)
            x = noise(x, inflation * math.sqrt(raised**2 - s**2))
            s = raised
        slope = (x - denoise(x, s)) / s
        there = x.add(slope, alpha=t - s)
        if t:
            slope = (slope + (there - denoise(there, t)) / t) / 2
            there = x.add(slope, alpha=t - s)
        yield (x := there)


def langevin(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[float],
    noise: Noise,
    *,
    corrections: int = 1,
    snr: float = 0.16,
) -> Iterator[Tensor]:
    """Predictor-corrector, arXiv 2011.13456, algorithm 2: an ancestral step, then ``corrections`` Langevin steps.

    The corrector's step size is 2 (snr t)^2 at noise level t: the paper's, algorithm 4, with t in place of the norm of
    the noise over that of the score, which it is near, so that no example's path depends on the others in its batch.
    """
    for s, t in pairwise(levels):
        [x] = ancestral(denoise, x, (s, t), noise)
        for _ in range(corrections if t else 0):
            x = noise(torch.lerp(x, denoise(x, t), 2 * snr**2), 2 * snr * t)
        yield x


def dpm_solver(denoise: Denoise, x: Tensor, levels: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: second order with one evaluation a step."""
    before = x0 = x
    for k, (s, t) in enumerate(pairwise(levels)):
        before, x0 = x0, denoise(x, s)
        ahead = x0
        if k and t:  # the first step has nothing to go by, and the last, to 0, goes to the denoised x
            ahead = torch.lerp(before, x0, 1 + math.log(s / t) / (2 * math.log(levels[k - 1] / s)))
        x = torch.lerp(ahead, x, t / s)
        yield x


SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
    "heun-stochastic": heun_stochastic,
    "langevin": langevin,
    "dpm-solver++": dpm_solver,
}
