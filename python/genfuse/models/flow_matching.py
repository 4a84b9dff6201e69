"""Flow matching (arXiv 2210.02747) along straight paths between examples and noise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel


@dataclass(frozen=True)
class FlowMatchingConfig(DiffusionConfig):
    """Settings of flow matching. Raises SettingsError for values outside their range."""

    t_min: float = 1e-3  # t is kept within [t_min, 1 - t_min], as its ends are noise levels of 0 and infinity

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.t_min < 0.5:
            raise SettingsError(f"t_min must be above 0 and below 0.5, got {self.t_min}")


class FlowMatching(DiffusionModel):
    """x_t = (1 - t) x0 + t eps, of which the network learns the velocity eps - x0: noise level t / (1 - t).

    The paper's time runs from noise to data, ours from data to noise.
    """

    Config = FlowMatchingConfig
    config: FlowMatchingConfig
    target = "velocity"
    sampler = ("dpm-solver++", 50)

    def __init__(self, config: FlowMatchingConfig) -> None:
        super().__init__(config)
        self.limits = config.t_min / (1 - config.t_min), (1 - config.t_min) / config.t_min

    def alpha(self, level: Any) -> Any:
        return 1 / (1 + level)

    def draw_levels(self, n: int) -> Tensor:
        low = self.config.t_min
        t = low + (1 - 2 * low) * torch.rand(n, device=self.device, dtype=next(self.parameters()).dtype)
        return t / (1 - t)

    def noise_levels(self, steps: int) -> list[float]:
        """t falls evenly from 1 - t_min to 0."""
        t = [(1 - self.config.t_min) * (1 - k / steps) for k in range(steps)]
        return [each / (1 - each) for each in t] + [0.0]
