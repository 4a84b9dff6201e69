"""Likelihoods of any denoiser, ``denoiser(x, sigma) -> D(x, sigma) = E[x0 | x0 + sigma eps = x]``, in nats.

x (N, *shape) is in the denoiser's space. `log_prob` and `elbo` follow the probability flow, and call the denoiser with
one number for sigma; `variational_bound` is DDPM's, and calls it with (N,) of them. Each returns an estimate and its
standard error, (N,) both. All randomness follows from one number that is drawn from ``generator``, by default torch's
own of x's device; the noise of example i follows from it and i.

``prior`` is the Gaussian that x = x0 + sigma eps is taken for at the largest noise level, as its mean and its standard
deviations, (*shape) each; left out it is N(0, sigma_max^2 I).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genfuse.diffusion.samplers import noise_keys, noisy
from genfuse.errors import SettingsError
from genfuse.ops import philox, standard_normal_log_prob

Denoise = Callable[[Tensor, Any], Tensor]
Prior = tuple[Tensor, Tensor]

EXACT = 8  # dimensions up to which the trace of a Jacobian is computed and not estimated


@torch.inference_mode(False)  # within which there are no gradients in x
@torch.no_grad()
def log_prob(
    denoiser: Denoise,
    x: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    prior: Prior | None = None,
    exact: bool | None = None,
    draws: int = 1,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(x; sigma_min) of real-valued x and its standard error, (N,) nats each, by the probability-flow ODE, arXiv
    2011.13456, section 4.3: the density of what the deterministic samplers draw, at the smallest noise level. With the
    data's own mean and variances in ``prior`` the error is of the order of (spread of the data / sigma_max)^3.

    ``exact`` computes the trace of each Jacobian, by default up to 8 dimensions, and the error is 0 but for that of the
    solver, torchdiffeq's dopri5 with ``tolerance``. Else the result is the mean over ``draws`` of Hutchinson's
    estimate, free of bias, with this mean's standard error, NaN for one draw. The solver chooses its steps for all
    examples together: a part of them alone gives the same to within its tolerance. Raises SettingsError for draws below
    1, and a denoiser that gives no gradient in x.
    """
    exact = x.shape[1:].numel() <= EXACT if exact is None else exact
    keys = noise_keys(x, generator)
    values = [
        _flow_log_prob(denoiser, x, (sigma_min, sigma_max), prior, None if exact else next(keys), tolerance)
        for _ in range(1 if exact else _at_least_one(draws))
    ]
    value, error = _mean_and_error(values)
    return value, torch.zeros_like(value) if exact else error


@torch.inference_mode(False)
@torch.no_grad()
def elbo(
    denoiser: Denoise,
    x: Tensor,
    levels: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    prior: Prior | None = None,
    exact: bool = False,
    draws: int = 1,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A lower bound of log P(x) of discrete x and the standard error of its estimate, (N,) nats each.

    x has ``levels`` values from -1 to 1. The density at a small noise level s, by the probability-flow ODE, and the
    decoder of `decoder_log_prob` from there bound it by E_q [log p(x_s) + log P(x | x_s) - log q(x_s | x)] with q =
    N(x, s^2). The result is the mean over ``draws`` of x_s; the rest is as for `log_prob`.
    """
    # Below a third of half a bin nothing is gained, and a network would have to know each level as a spike.
    s = max(sigma_min, 1 / (3 * (levels - 1)))
    keys = noise_keys(x, generator)
    values = []
    for _ in range(_at_least_one(draws)):
        x_s, eps = noisy(x, s, next(keys))
        log_q = standard_normal_log_prob(eps.flatten(1)) - x.shape[1:].numel() * math.log(s)
        log_p = _flow_log_prob(denoiser, x_s, (s, sigma_max), prior, None if exact else next(keys), tolerance)
        values.append(log_p + decoder_log_prob(x, denoiser(x_s, s), s, levels) - log_q)
    return _mean_and_error(values)


@torch.no_grad()
def variational_bound(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    levels: int | None = None,
    prior: Prior | None = None,
    strata: int = 25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A lower bound of log p(x), of discrete x log P(x), and the standard error of its estimate, (N,) nats each.

    The variational bound of arXiv 2006.11239, equation 5, with the posteriors' variances, at the noise levels
    ``sigmas``, of t = 1 .. T in any order, 0 left out:

        log p(x | x_1) - KL(q(x_T | x) || p(x_T)) - sum_{t=2..T} L_{t-1}
        L_{t-1} = (1 / sigma_{t-1}^2 - 1 / sigma_t^2) |x - D(x_t, sigma_t)|^2 / 2,    x_t = x + sigma_t eps

    The sum is estimated from two draws of t and x_t in each of ``strata`` equally long parts, and the error is this
    estimate's; the first term is taken at one draw of x_1. In all the network is evaluated 2 strata + 1 times.
    ``levels`` of discrete x are values from -1 to 1; None is real-valued x.
    """
    n, keys = len(x), noise_keys(x, generator)
    sigma = torch.tensor([math.nan, *sorted(s for s in sigmas if s)], dtype=torch.float64)  # sigma[t] for t = 1 .. T
    T = len(sigma) - 1
    weight = sigma.new_zeros(T + 1)
    weight[2:] = (1 / sigma[1:-1] ** 2 - 1 / sigma[2:] ** 2) / 2  # weight[t] of L_{t-1} for t = 2 .. T
    sigma_1, sigma_T = float(sigma[1]), float(sigma[T])
    sigma, weight = sigma.to(x), weight.to(x)

    L, variance = x.new_zeros(n), x.new_zeros(n)
    ends = (2 + torch.linspace(0, T - 1, min(strata, T - 1) + 1).round().long()).tolist()
    for low, high in pairwise(ends):  # a part of t = 2 .. T
        pair = []
        for _ in range(2):
            t = low + (philox.uniform(next(keys), (n,)) * (high - low)).long().clamp(max=high - low - 1)  # (N,)
            x_t = noisy(x, sigma[t], next(keys))[0]
            off = x - denoiser(x_t, sigma[t])
            pair.append((high - low) * weight[t] * off.flatten(1).square().sum(1))  # (N,)
        L += (pair[0] + pair[1]) / 2
        variance += (pair[0] - pair[1]).square() / 4

    x_1 = noisy(x, sigma_1, next(keys))[0]
    log_p = decoder_log_prob(x, denoiser(x_1, sigma[1].expand(n)), sigma_1, levels)
    mean, std = _prior(x, sigma_T, prior)
    ratio = (sigma_T / std).square()  # of the variances of q(x_T | x) and of p(x_T)
    kl = 0.5 * (((x - mean) / std).square() + ratio - 1 - ratio.log()).flatten(1).sum(1)
    return log_p - kl - L, variance.sqrt()


def decoder_log_prob(x: Tensor, denoised: Tensor, sigma: float, levels: int | None = None) -> Tensor:
    """log p(x | x_s), (N,) nats, by N(D(x_s), sigma^2), where ``denoised`` is D(x_s): if x has ``levels`` values from
    -1 to 1, integrated over the bins of these, the outermost open-ended (arXiv 2006.11239, equation 13)."""
    off = (x - denoised).flatten(1) / sigma  # (N, D)
    if levels is None:
        return standard_normal_log_prob(off) - off.shape[1] * math.log(sigma)
    half = 1 / (levels - 1)
    x, half_bin = x.flatten(1), half / sigma
    lower = torch.where(x < half - 1, -math.inf, off - half_bin)
    upper = torch.where(x > 1 - half, math.inf, off + half_bin)
    # In the upper half the mass is taken from above, where the distribution function does not round to 1.
    lower, upper = torch.where(off > 0, -upper, lower), torch.where(off > 0, -lower, upper)
    above, below = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return (above + torch.log(-torch.expm1(below - above))).sum(1)


def _flow_log_prob(
    denoiser: Denoise, x: Tensor, sigmas: tuple[float, float], prior: Prior | None, key: Tensor | None, tolerance: float
) -> Tensor:
    """log p(x; sigma_min), (N,), with the exact trace or Hutchinson's estimate under a key.

    Integrated is y = x / sqrt(1 + sigma^2) over the logarithm of sigma, along which it is of one size and smooth.
    """
    from torchdiffeq import odeint

    if not len(x):  # of which the solver has no error to choose its steps by
        return x.new_zeros(0)
    known = x.isfinite().flatten(1).all(1)  # the solver would find no step for the other rows
    x = x.where(known.view(-1, *[1] * (x.dim() - 1)), 0.0)
    sigma_min, sigma_max = sigmas
    probe = None if key is None else noisy(x, 1.0, key)[1].sign()

    def change(log_sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sigma = min(float(log_sigma.exp()), 1e30)  # the solver's first step may go far beyond the end
        scale = math.hypot(1, sigma)
        # Roundings to 16 bits would make the solver's steps ever smaller.
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = state[0].detach().requires_grad_()
            if not (denoised := denoiser(y * scale, sigma)).requires_grad:
                raise SettingsError(
                    "the denoiser must be differentiable in x: take it out of torch.no_grad, inference_mode and detach"
                )
            divergence = y[0].numel() / (scale * scale) - _divergence(denoised, y, probe) / scale
        return (y / (scale * scale) - denoised / scale).detach(), divergence  # dy / dlog sigma, (N, *shape)

    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64, device=x.device).log().to(x.dtype)
    start = x / math.hypot(1, sigma_min), x.new_zeros(len(x))
    solved = odeint(change, start, ends, rtol=tolerance, atol=tolerance, method="dopri5")
    y, divergence = (states[-1] for states in solved)
    mean, std = _prior(x, sigma_max, prior)
    scale = math.hypot(1, sigma_max)
    end = standard_normal_log_prob(((y * scale - mean) / std).flatten(1)) - std.log().sum()
    log_prob = end + divergence + x.shape[1:].numel() * math.log(scale / math.hypot(1, sigma_min))
    return log_prob.masked_fill(~known, math.nan)


def _prior(x: Tensor, sigma_max: float, prior: Prior | None) -> Prior:
    return prior or (x.new_zeros(x.shape[1:]), x.new_full(x.shape[1:], sigma_max))


def _divergence(f: Tensor, y: Tensor, probe: Tensor | None) -> Tensor:
    """The trace of df/dy, (N,), exactly, or with a probe v of mean 0 and covariance I as v^T (df/dy) v."""
    if probe is not None:
        return (torch.autograd.grad((f * probe).sum(), y)[0] * probe).flatten(1).sum(1)
    cells = f.flatten(1).unbind(1)
    rows = [torch.autograd.grad(cell.sum(), y, retain_graph=True)[0].flatten(1)[:, i] for i, cell in enumerate(cells)]
    return torch.stack(rows).sum(0)


def _mean_and_error(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of independent estimates (N,), and its standard error: NaN if there is only one."""
    stacked = torch.stack(values)
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(values)) if len(values) > 1 else stacked[0] * math.nan


def _at_least_one(draws: int) -> int:
    if draws < 1:
        raise SettingsError(f"draws must be at least 1, got {draws}")
    return draws
