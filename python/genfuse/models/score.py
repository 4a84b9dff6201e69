"""Score matching over a ladder of noise levels: denoising (arXiv 1907.05600) or sliced (arXiv 1905.07088)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.models._base import Batch
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel
from genfuse.nn.likelihoods import at_least_float32

Objective = Literal["denoising", "sliced"]


@dataclass(frozen=True)
class ScoreConfig(DiffusionConfig):
    """Settings of a score model. Raises SettingsError for values outside their range."""

    objective: Objective = "denoising"  # what trains the score; sliced is for vectors
    ladder: int = 200  # noise levels, in a geometric sequence
    sigma_min: float = 0.01  # the smallest
    sigma_max: float = 50.0  # the largest; some times the distances between examples

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(objective=Objective)
        self.check_positive("sigma_min", "sigma_max")
        if self.ladder < 2:
            raise SettingsError(f"ladder must be at least 2, got {self.ladder}")
        if self.sigma_min >= self.sigma_max:
            raise SettingsError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.objective == "sliced" and len(self.shape) != 1:
            raise SettingsError(f"objective 'sliced' is for vectors, shape (D,), got {self.shape}: use 'denoising'")


class ScoreModel(DiffusionModel):
    """The score of examples with noise at each of the levels, s(x) = -F(x) / level, sampled by Langevin dynamics.

    Both objectives weigh a level by its square. The network's input is scaled to variance 1 (arXiv 2206.00364).
    """

    Config = ScoreConfig
    config: ScoreConfig
    sampler = ("langevin", 200)

    def __init__(self, config: ScoreConfig) -> None:
        super().__init__(config)
        self.limits = config.sigma_min, config.sigma_max

    def draw_levels(self, n: int) -> Tensor:
        c = self.config
        rung = torch.randint(c.ladder, (n,), device=self.device).to(next(self.parameters()).dtype)
        return c.sigma_min * (c.sigma_max / c.sigma_min) ** (rung / (c.ladder - 1))

    def noise_levels(self, steps: int) -> list[float]:
        c = self.config
        return [c.sigma_max * (c.sigma_min / c.sigma_max) ** (k / max(1, steps - 1)) for k in range(steps)] + [0.0]

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising: the mean over examples and cells of (F - eps)^2. Sliced: that of F^2 + 2 level^2 v^T (ds/dx) v for
        random signs v (arXiv 1905.07088, equation 8), which is the same less 1 in expectation."""
        if self.config.objective == "denoising":
            return super().loss(batch, player)
        x0, context = self._trained_on(batch.x), self._training_context(batch)
        level = self.draw_levels(len(x0))[:, None]
        with torch.enable_grad():  # also where the loss is only measured
            x = torch.addcmul(x0, level, torch.randn_like(x0)).requires_grad_()
            v = torch.randn_like(x).sign()
            f = at_least_float32(self._present(x * self.alpha(level), level[:, 0].log(), context))
            slope = torch.autograd.grad((f * v).sum(), x, create_graph=self.training)[0]
        return (f.square() - 2 * level * v * slope).mean(), {}
