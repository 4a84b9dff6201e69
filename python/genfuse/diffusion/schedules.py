"""Noise levels of samplers: ``n`` of them, falling from the largest, and 0 at the end, as Python numbers.

Samplers make their coefficients of them on the host, in float64, so that nothing waits for the device. All raise
SettingsError for an n below 1, or ends that do not fall.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from genfuse.errors import SettingsError

Betas = Literal["linear", "cosine"]


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """EDM's (arXiv 2206.00364, equation 5): evenly spaced in sigma^(1 / rho), the more densely near sigma_min."""
    _check(n, sigma_min, sigma_max)
    last, first = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(first + k / max(1, n - 1) * (last - first)) ** rho for k in range(n)] + [0.0]


def geometric(n: int, sigma_min: float = 0.01, sigma_max: float = 50.0) -> list[float]:
    """A geometric sequence, the variance-exploding schedule (arXiv 1907.05600; 2011.13456, appendix C)."""
    _check(n, sigma_min, sigma_max)
    return [sigma_max * (sigma_min / sigma_max) ** (k / max(1, n - 1)) for k in range(n)] + [0.0]


def flow_matching(n: int, t_min: float = 1e-3) -> list[float]:
    """sigma = t / (1 - t) for times t that fall evenly from 1 - t_min to 0 (arXiv 2210.02747, with t = 1 the noise)."""
    _check(n, t_min, 1 - t_min)
    times = [(1 - t_min) * (1 - k / n) for k in range(n)]
    return [t / (1 - t) for t in times] + [0.0]


def ddpm(n: int, betas: Betas = "linear", timesteps: int = 1000) -> list[float]:
    """n of DDPM's noise levels sigma_t = sqrt((1 - alpha bar_t) / alpha bar_t), t = T .. 1, evenly spaced in t.

    Raises SettingsError for more than there are ``timesteps``.
    """
    _check(n)
    if n > timesteps:
        raise SettingsError(f"steps must be at most the {timesteps} timesteps of the model, got {n}")
    squares = alphas_cumprod(betas, timesteps)
    sigmas = ((1 - squares) / squares).sqrt()  # (T,), rising
    return [*sigmas[torch.linspace(timesteps - 1, 0, n).round().long()].tolist(), 0.0]


# For torch.export, which cannot make a list of a tensor. torch.compiler.assume_constant_result does the same, but
# imports all of the compiler here, for seconds.
ddpm._dynamo_marked_constant = True  # type: ignore[attr-defined]


def alphas_cumprod(betas: Betas = "linear", timesteps: int = 1000) -> Tensor:
    """alpha bar_t of t = 1 .. T, (T,) float64, falling: alpha^2 of x_t = alpha x0 + sqrt(1 - alpha^2) eps.

    ``betas`` rise linearly (arXiv 2006.11239), or alpha bar is a squared cosine (arXiv 2102.09672, equation 17).
    """
    if betas not in get_args(Betas):
        raise SettingsError(f"betas must be one of {', '.join(get_args(Betas))}, got {betas!r}")
    if betas == "linear":  # of T = 1,000, and for other T of the same total
        each = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
    else:
        at = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        squares = ((at + 0.008) / 1.008 * math.pi / 2).cos().square()
        each = 1 - squares[1:] / squares[:-1]
    return (1 - each.clamp(max=0.999)).cumprod(0)


def _check(n: int, smallest: float = 0.5, largest: float = 1.0) -> None:
    if n < 1:
        raise SettingsError(f"steps must be at least 1, got {n}")
    if not 0 < smallest < largest < math.inf:
        raise SettingsError(
            f"the smallest noise level must be above 0 and below the largest, got {smallest}, {largest}"
        )
