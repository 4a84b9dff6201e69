"""Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel


@dataclass(frozen=True)
class EDMConfig(DiffusionConfig):
    """Settings of an EDM. Raises SettingsError for values outside their range."""

    sigma_data: float | None = None  # standard deviation of the data; None: 0.5 for discrete data, 1 for real-valued
    log_mean: float = -1.2  # of the logarithm of a training noise level (P_mean)
    log_std: float = 1.2  # of the same (P_std)
    sigma_min: float = 0.002  # smallest noise level of a sampler
    sigma_max: float = 80.0  # largest one
    rho: float = 7.0  # how much more densely a sampler's noise levels lie near the smallest

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "log_std", "sigma_min", "sigma_max", "rho", *(["sigma_data"] if self.sigma_data is not None else [])
        )
        if self.sigma_min >= self.sigma_max:
            raise SettingsError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")


class EDM(DiffusionModel):
    """The paper's preconditioning, D = c_skip x + c_out F(c_in x), with its log-normal noise levels.

    Its c's (table 1) are those of predicting v from alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, of examples and
    noise levels divided by sigma_data; its loss weights make the loss a plain square of F's error.
    """

    Config = EDMConfig
    config: EDMConfig
    target = "v"
    sampler = ("heun", 18)

    def __init__(self, config: EDMConfig) -> None:
        super().__init__(config)
        self.unit = config.sigma_data or (1.0 if config.levels is None else 0.5)
        self.limits = config.sigma_min, config.sigma_max

    def draw_levels(self, n: int) -> Tensor:
        normal = torch.randn(n, device=self.device, dtype=next(self.parameters()).dtype)
        return torch.exp(self.config.log_mean + self.config.log_std * normal)

    def noise_levels(self, steps: int) -> list[float]:
        """Equation 5."""
        c = self.config
        last, first = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
        return [(first + k / max(1, steps - 1) * (last - first)) ** c.rho for k in range(steps)] + [0.0]
