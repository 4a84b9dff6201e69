"""Exponential moving averages of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """A network whose weights are the moving average of another's: w <- d w + (1 - d) w', once per `update`.

    The decay d grows from 2/11 as (1 + n) / (10 + n) with the number n of updates up to ``decay``, so that the first
    weights are soon forgotten. Floating buffers, such as the statistics of batch norm, are averaged as the weights that
    they belong to. The average and n are part of the state_dict; an update waits for no device.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the present weights of ``module``."""
        self.updates.add_(1)
        step = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        weights = _averageable(module)
        torch._foreach_lerp_(_averageable(self.module), weights, [step.to(weight.dtype) for weight in weights])

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self.module(*inputs)


def _averageable(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
