"""Score matching at a sequence of noise levels: denoising (arXiv 1907.05600) or sliced (arXiv 1905.07088)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genfuse.data import Batch
from genfuse.diffusion import Denoiser, schedules
from genfuse.errors import SettingsError
from genfuse.models._base import check_at_least
from genfuse.models._diffusion import DiffusionConfig, DiffusionModel
from genfuse.nn.likelihoods import at_least_float32

Objective = Literal["denoising", "sliced"]


@dataclass(frozen=True)
class ScoreConfig(DiffusionConfig):
    """Settings of a score model. Raises SettingsError for values outside their range."""

    objective: Objective = "denoising"  # what trains the score; sliced is for vectors
    sigmas: int = 200  # noise levels in training, in a geometric sequence
    sigma_min: float = 0.01  # the smallest
    sigma_max: float = 50.0  # the largest; some times the distances between examples
    _positive = ("sigma_min", "sigma_max")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, sigmas=2)
        if self.sigma_min >= self.sigma_max:
            raise SettingsError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.objective == "sliced" and len(self.shape) != 1:
            raise SettingsError(f"objective 'sliced' is for vectors, shape (D,), got {self.shape}: use 'denoising'")


class ScoreModel(DiffusionModel):
    """The score of examples with noise at each of the levels, s(x) = -F(x) / sigma, sampled by Langevin dynamics.

    Both objectives weigh a level by its square. The network's input is scaled to variance 1 (arXiv 2206.00364).
    """

    Config = ScoreConfig
    renamed = {"ladder": "sigmas"}
    sampler = ("langevin", 200)

    def __init__(
        self,
        network: nn.Module,
        *,
        objective: Objective = "denoising",
        sigmas: int = 200,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        **parts: Any,
    ) -> None:
        """A score model of any network, as `genfuse.diffusion.Denoiser` takes it, which predicts -sigma times the
        score; ``parts`` are those of `DiffusionModel`."""
        super().__init__(Denoiser(network, "noise", sigma_data=1.0), **parts)
        self.objective, self.sigmas, self.sigma_min, self.sigma_max = objective, sigmas, sigma_min, sigma_max

    def draw_sigmas(self, n: int) -> Tensor:
        """Uniformly of the geometric sequence, (n,)."""
        k = torch.randint(self.sigmas, (n,), device=self.device).to(next(self.parameters()).dtype)
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** (k / (self.sigmas - 1))

    def sigma_schedule(self, steps: int) -> list[float]:
        """A geometric sequence, and 0."""
        return schedules.geometric(steps, self.sigma_min, self.sigma_max)

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising: the mean over examples and cells of (F - eps)^2. Sliced: that of F^2 + 2 sigma^2 v^T (ds/dx) v for
        random signs v (arXiv 1905.07088, section 3), which is the same less 1 in expectation."""
        if self.objective == "denoising":
            return super().loss(batch, player)
        return self._sliced(batch), {}

    @torch.inference_mode(False)
    def _sliced(self, batch: Batch) -> Tensor:
        denoiser = self._present()
        x0, context = self._trained_on(batch.x), self._training_context(batch)
        sigma = self.draw_sigmas(len(x0))
        with torch.enable_grad():  # also if the loss is only measured
            x = torch.addcmul(x0, sigma[:, None], torch.randn_like(x0)).requires_grad_()  # (N, D)
            v = torch.randn_like(x).sign()
            f = at_least_float32(denoiser.prediction(x, sigma, context))
            slope = torch.autograd.grad((f * v).sum(), x, create_graph=self.training)[0]
        return (f.square() - 2 * sigma[:, None] * v * slope).mean()
