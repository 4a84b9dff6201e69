"""Exponential moving averages of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """A network whose weights are the moving average of another's: w <- d w + (1 - d) w', once per `update`.

    The decay d grows from 2/11 as (1 + n) / (10 + n) with the number n of updates up to ``decay``, so that the first
    weights are soon forgotten. The average and n are part of the state_dict; an update waits for no device.
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
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(module.parameters())
        changes = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(changes, step)
        torch._foreach_add_(averages, changes)
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self.module(*inputs)
