"""Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genfuse.diffusion import Denoiser, schedules
from genfuse.errors import SettingsError
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel

# For discrete data, and for real-valued data.
DEFAULTS = {"sigma_data": (0.5, 1.0), "P_mean": (-1.2, -0.5), "P_std": (1.2, 1.6)}


@dataclass(frozen=True)
class EDMConfig(DiffusionConfig):
    """Settings of an EDM. Raises SettingsError for values outside their range."""

    sigma_data: float | None = None  # standard deviation of the data; None: 0.5 for discrete data, 1 for real-valued
    P_mean: float | None = None  # mean of the logarithm of a training noise level; None: -1.2, or -0.5
    P_std: float | None = None  # standard deviation of the same; None: 1.2, or 1.6
    sigma_min: float = 0.002  # smallest noise level of a sampler
    sigma_max: float = 80.0  # largest one
    rho: float = 7.0  # how much more densely a sampler's noise levels lie near the smallest

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("sigma_data", "P_std") if getattr(self, name) is not None]
        self.check_positive("sigma_min", "sigma_max", "rho", *given)
        if self.sigma_min >= self.sigma_max:
            raise SettingsError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def parts(self) -> dict[str, Any]:
        """With the paper's defaults for discrete data, and for real-valued data such as suit points."""
        unset = {name: each[self.levels is None] for name, each in DEFAULTS.items() if getattr(self, name) is None}
        return {**super().parts(), **unset}


class EDM(DiffusionModel):
    """The paper's preconditioning (see `genfuse.diffusion.Denoiser`), loss weights, training noise, schedule and
    sampler (its table 1).

        log sigma   ~ N(P_mean, P_std^2)               in training
        loss        = E |D - x0|^2 / c_out^2

    F has the other sign than in the paper, as it predicts v = alpha eps - sigma x0 (arXiv 2202.00512) of examples and
    noise levels divided by sigma_data; and the paper's c_noise is log(sigma) / 4.
    """

    Config = EDMConfig
    renamed = {"log_mean": "P_mean", "log_std": "P_std"}

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 0.5,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        **parts: Any,
    ) -> None:
        """An EDM of any network, as `genfuse.diffusion.Denoiser` takes it; ``parts`` are those of `DiffusionModel`."""
        super().__init__(Denoiser(network, "v", sigma_data), **parts)
        self.P_mean, self.P_std = P_mean, P_std
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.sampler = "heun", 18 if self.levels is not None else 40  # networks for points are quick

    def draw_sigmas(self, n: int) -> Tensor:
        """Log-normal ones, (n,)."""
        normal = torch.randn(n, device=self.device, dtype=next(self.parameters()).dtype)
        return torch.exp(self.P_mean + self.P_std * normal)

    def sigma_schedule(self, steps: int) -> list[float]:
        """Equation 5."""
        return schedules.karras(steps, self.sigma_min, self.sigma_max, self.rho)
