"""Samplers of any denoiser: from noise to examples along falling noise levels.

Each is a function of a denoiser, ``denoiser(x, sigma) -> D(x, sigma) = E[x0 | x0 + sigma eps = x]``, of x (N, ...) at
the first of the noise levels ``sigmas`` (pure noise is sigmas[0] eps), and of these levels, which fall, to 0 as a rule.
It returns x at the last. Any process x_t = alpha x0 + sigma_t eps is of this form in x = x_t / alpha, sigma = sigma_t /
alpha (arXiv 2206.00364, appendix B), so that each sampler serves every model.

>>> x = samplers.heun(denoiser, 80 * torch.randn(16, 2), schedules.karras(18))

``denoiser`` is called with one Python number for sigma. Wrap it to change what is denoised: to clamp it, to keep the
known pixels of a picture, or for a context (`Denoiser.given`). All samplers take:

    callback   called as callback(step, x, sigma, denoised) in each step, with x and sigma before it and D(x, sigma)
    generator  torch.Generator of x's device that noise is drawn from; left out, torch's own
    noise      a function (x, sigma) -> x + sigma eps in place of it

No gradients are kept. ``samplers.heun.steps(...)``, of the same arguments, is an iterator of x at each further level.
Raises SettingsError if the noise levels do not fall.
"""

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import ParamSpec, Protocol, TypedDict, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from genfuse.errors import SettingsError
from genfuse.ops import diffuse, philox

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor, float, Tensor], object]
Sigmas = Sequence[float] | Tensor
P = ParamSpec("P")


class _How(TypedDict, total=False):
    """What all samplers take."""

    callback: Callback | None
    generator: torch.Generator | None
    noise: Noise | None


def _taken(
    callback: Callback | None = None, generator: torch.Generator | None = None, noise: Noise | None = None
) -> tuple[Callback | None, Noise]:
    """The callback, and what adds noise, of `_How`."""
    return callback, noise or (lambda x, sigma: diffuse(x, 1, sigma, generator=generator)[0])


class Sampler(Protocol[P]):
    """Runs to the last noise level, and returns x there, (N, *shape); ``steps`` is an iterator of x at each."""

    steps: Callable[P, Iterator[Tensor]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor: ...


def _sampler(steps: Callable[P, Iterator[Tensor]]) -> Sampler[P]:
    @functools.wraps(steps)
    @torch.no_grad()
    def sample(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return deque(steps(*args, **kwargs), maxlen=1)[0]

    *own, _ = inspect.signature(steps).parameters.values()
    shared = [each.replace(kind=each.KEYWORD_ONLY) for each in inspect.signature(_taken).parameters.values()]
    sample.__signature__ = inspect.Signature([*own, *shared], return_annotation=Tensor)  # type: ignore[attr-defined]
    sample.steps = steps  # type: ignore[attr-defined]
    return cast(Sampler[P], sample)


@_sampler
def ddim(denoiser: Denoise, x: Tensor, sigmas: Sigmas, *, eta: float = 0.0, **how: Unpack[_How]) -> Iterator[Tensor]:
    """DDIM, arXiv 2010.02502, equation 12: deterministic with eta 0, the ancestral sampler with eta 1."""
    callback, noise = _taken(**how)
    for step, (s, t) in enumerate(_falling(sigmas)):
        x0 = _denoised(denoiser, x, s, step, callback)
        x = _ddim_step(x, x0, s, t, eta, noise)
        yield x


def _ddim_step(x: Tensor, x0: Tensor, s: float, t: float, eta: float, noise: Noise) -> Tensor:
    variance = (eta * t) ** 2 * (1 - (t / s) ** 2)
    x = torch.lerp(x0, x, math.sqrt(t**2 - variance) / s)
    return noise(x, math.sqrt(variance)) if variance else x


@_sampler
def ancestral(denoiser: Denoise, x: Tensor, sigmas: Sigmas, **how: Unpack[_How]) -> Iterator[Tensor]:
    """DDPM's sampler, arXiv 2006.11239, algorithm 2, with the posterior's variance (sigma_t^2 = beta tilde_t)."""
    return ddim.steps(denoiser, x, sigmas, eta=1.0, **how)


@_sampler
def heun(denoiser: Denoise, x: Tensor, sigmas: Sigmas, **how: Unpack[_How]) -> Iterator[Tensor]:
    """EDM's deterministic sampler, arXiv 2206.00364, algorithm 1: Heun's second-order steps of dx/dsigma = (x - D) /
    sigma, of two evaluations each but for a last one to 0."""
    return heun_stochastic.steps(denoiser, x, sigmas, s_churn=0.0, **how)


@_sampler
def heun_stochastic(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
    **how: Unpack[_How],
) -> Iterator[Tensor]:
    """EDM's stochastic sampler, arXiv 2206.00364, algorithm 2, which puts noise back before each step; ``callback``
    sees x and sigma after that."""
    callback, noise = _taken(**how)
    steps = _falling(sigmas)
    gamma = min(s_churn / len(steps), math.sqrt(2) - 1)
    for step, (s, t) in enumerate(steps):
        if gamma and s_tmin <= s <= s_tmax:
            s_hat = s * (1 + gamma)
            x = noise(x, s_noise * math.sqrt(s_hat**2 - s**2))
            s = s_hat
        slope = (x - _denoised(denoiser, x, s, step, callback)) / s
        there = x.add(slope, alpha=t - s)
        if t:
            slope = (slope + (there - denoiser(there, t)) / t) / 2
            there = x.add(slope, alpha=t - s)
        yield (x := there)


@_sampler
def langevin(
    denoiser: Denoise, x: Tensor, sigmas: Sigmas, *, corrector_steps: int = 1, snr: float = 0.16, **how: Unpack[_How]
) -> Iterator[Tensor]:
    """Predictor-corrector, arXiv 2011.13456, algorithm 2: an ancestral step, then ``corrector_steps`` of Langevin's.

    The corrector's step size is 2 (snr t)^2 at noise level t: the paper's, algorithm 4, with t in place of the norm of
    the noise over that of the score, which it is near, so that no example's path depends on the others in its batch.
    """
    callback, noise = _taken(**how)
    for step, (s, t) in enumerate(_falling(sigmas)):
        x = _ddim_step(x, _denoised(denoiser, x, s, step, callback), s, t, 1.0, noise)
        for _ in range(corrector_steps if t else 0):
            x = noise(torch.lerp(x, denoiser(x, t), 2 * snr**2), 2 * snr * t)
        yield x


@_sampler
def dpm_solver(denoiser: Denoise, x: Tensor, sigmas: Sigmas, **how: Unpack[_How]) -> Iterator[Tensor]:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: deterministic, second order with one evaluation a step."""
    callback, _ = _taken(**how)
    x0, r = x, 0.0  # D of the step before, and where that was
    for step, (s, t) in enumerate(_falling(sigmas)):
        before, x0 = x0, _denoised(denoiser, x, s, step, callback)
        ahead = x0
        if step and t:  # the first step has nothing to go by, and the last, to 0, goes to the denoised x
            ahead = torch.lerp(before, x0, 1 + math.log(s / t) / (2 * math.log(r / s)))
        x, r = torch.lerp(ahead, x, t / s), s
        yield x


SAMPLERS: dict[str, Sampler] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
    "heun-stochastic": heun_stochastic,
    "langevin": langevin,
    "dpm-solver++": dpm_solver,
}


def _falling(sigmas: Sigmas) -> list[tuple[float, float]]:
    """The levels that each step begins and ends at."""
    levels = sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
    if len(levels) < 2 or levels[-1] < 0 or any(s <= t for s, t in pairwise(levels)):
        raise SettingsError(f"sigmas must be two or more noise levels that fall, to 0 or above, got {levels}")
    return list(pairwise(levels))


def _denoised(denoiser: Denoise, x: Tensor, sigma: float, step: int, callback: Callback | None) -> Tensor:
    denoised = denoiser(x, sigma)
    if callback is not None:
        callback(step, x, sigma, denoised)
    return denoised


def noisy(x: Tensor, sigma: float | Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """x + sigma eps and eps, both (N, *shape), for sigma a number or (N,). Each element of eps, a standard normal,
    follows from the key and its place: it is the same in a larger batch."""
    return diffuse(x, 1, sigma, seed=key)


def noise_keys(like: Tensor, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Keys for `noisy`, () int64 on the device of ``like``, without end, from one number that is drawn now.

    A generator of another device than ``like``'s draws it there: so a generator of the CPU gives the same noise on any.
    """
    seed = philox.seed(like if generator is None else torch.empty(0, device=generator.device), generator)
    return _keys(seed.to(like.device))


def _keys(seed: Tensor) -> Iterator[Tensor]:
    start = 0
    while True:
        words = philox.philox(torch.arange(start, start := start + 1024, device=seed.device), seed)
        yield from ((words[0] << 32) | words[1]).unbind()
