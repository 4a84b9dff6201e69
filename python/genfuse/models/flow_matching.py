"""Flow matching (arXiv 2210.02747) along straight paths between examples and noise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genfuse.diffusion import Denoiser, schedules, straight
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
    """x_t = (1 - t) x0 + t eps, of which the network learns the velocity eps - x0: noise level sigma = t / (1 - t).

    The paper's time runs from noise to data, ours from data to noise.
    """

    Config = FlowMatchingConfig
    sampler = ("dpm-solver++", 50)

    def __init__(self, network: nn.Module, *, t_min: float = 1e-3, **parts: Any) -> None:
        """Flow matching by any network, as `genfuse.diffusion.Denoiser` takes it; ``parts`` are those of
        `DiffusionModel`."""
        super().__init__(Denoiser(network, "velocity", sigma_data=1.0, alpha=straight), **parts)
        self.t_min = t_min
        self.sigma_min, self.sigma_max = t_min / (1 - t_min), (1 - t_min) / t_min

    def draw_sigmas(self, n: int) -> Tensor:
        """t / (1 - t) for t uniform in [t_min, 1 - t_min], (n,)."""
        uniform = torch.rand(n, device=self.device, dtype=next(self.parameters()).dtype)
        t = self.t_min + (1 - 2 * self.t_min) * uniform
        return t / (1 - t)

    def sigma_schedule(self, steps: int) -> list[float]:
        """t falls evenly from 1 - t_min to 0."""
        return schedules.flow_matching(steps, self.t_min)
