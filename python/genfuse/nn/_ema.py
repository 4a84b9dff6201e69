"""Exponential moving averages of a network's weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from genfuse.nn._flat import Together, flatten


class EMA(nn.Module):
    """A network whose weights are the moving average of another's: w <- d w + (1 - d) w', once per `update`.

    The decay d grows from 2/11 as (1 + n) / (10 + n) with the number n of updates up to ``decay``, so that the first
    weights are soon forgotten. Floating buffers, such as the statistics of batch norm, are averaged as the weights that
    they belong to. The average and n are part of the state_dict; an update waits for no device. The network is in
    evaluation mode whatever mode the rest of a model is in, as it is never trained.
    """

    updates: Tensor
    _found: tuple[Together, Together] | None = None  # the averages, and what they were last averages of

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._updated: bool | None = False  # whether `updates` is above 0; None: not known, as it was loaded
        self.train()

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the present weights of ``module``."""
        self._updated = True
        self.updates.add_(1)
        step = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        averages, weights = self._both(module)
        torch._foreach_lerp_(averages, weights, [step.to(weight.dtype) for weight in weights])

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Take the present weights of ``module`` as long as there was no `update`: the average of none is these."""
        if self._updated is None:
            self._updated = bool(self.updates)
        if not self._updated:
            torch._foreach_copy_(*self._both(module))

    def _both(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The averages, and what they are averages of: in one tensor each, if `flatten` laid out the weights."""
        now = _averageable(module)  # others, if layers were replaced, or in a `functional_call`
        if self._found is None or list(map(id, self._found[1].tensors)) != list(map(id, now)):
            flatten(self.module.parameters())
            self._found = Together(_averageable(self.module)), Together(now)
        averages, weights = (each.merged() for each in self._found)
        if [each.shape for each in averages] == [each.shape for each in weights]:
            return averages, weights
        return self._found[0].tensors, self._found[1].tensors

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the network with the averaged weights makes of its inputs."""
        return self.module(*inputs, **named)

    def train(self, mode: bool = True) -> Self:
        self._found = None
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._found = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._updated = self._found = None


def _averageable(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
