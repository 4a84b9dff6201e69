"""Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel

# For discrete data, and for real-valued data.
DEFAULTS = {"sigma_data": (0.5, 1.0), "log_mean": (-1.2, -0.5), "log_std": (1.2, 1.6)}


@dataclass(frozen=True)
class EDMConfig(DiffusionConfig):
    """Settings of an EDM. Raises SettingsError for values outside their range."""

    sigma_data: float | None = None  # standard deviation of the data; None: 0.5 for discrete data, 1 for real-valued
    log_mean: float | None = None  # of the logarithm of a training noise level (P_mean); None: -1.2, or -0.5
    log_std: float | None = None  # of the same (P_std); None: 1.2, or 1.6
    sigma_min: float = 0.002  # smallest noise level of a sampler
    sigma_max: float = 80.0  # largest one
    rho: float = 7.0  # how much more densely a sampler's noise levels lie near the smallest

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("sigma_data", "log_std") if getattr(self, name) is not None]
        self.check_positive("sigma_min", "sigma_max", "rho", *given)
        if self.sigma_min >= self.sigma_max:
            raise SettingsError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def noise(self, name: str) -> float:
        """A setting whose default is the paper's for discrete data, and for real-valued data one that suits points."""
        value = getattr(self, name)
        return DEFAULTS[name][self.levels is None] if value is None else value


class EDM(DiffusionModel):
    """The paper's preconditioning, D = c_skip x + c_out F(c_in x), with its log-normal noise levels.

    Its c's (table 1) are those of predicting v from alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, of examples and
    noise levels divided by sigma_data; its loss weights make the loss a plain square of F's error.
    """

    Config = EDMConfig
    config: EDMConfig
    target = "v"

    def __init__(self, config: EDMConfig) -> None:
        super().__init__(config)
        self.sampler = "heun", 18 if config.levels is not None else 40  # networks for points are quick
        self.unit = config.noise("sigma_data")
        self.limits = config.sigma_min, config.sigma_max

    def draw_levels(self, n: int) -> Tensor:
        normal = torch.randn(n, device=self.device, dtype=next(self.parameters()).dtype)
        return torch.exp(self.config.noise("log_mean") + self.config.noise("log_std") * normal)

    def noise_levels(self, steps: int) -> list[float]:
        """Equation 5."""
        rho = self.config.rho
        last, first = (level ** (1 / rho) for level in self.limits)
        return [(first + k / max(1, steps - 1) * (last - first)) ** rho for k in range(steps)] + [0.0]
