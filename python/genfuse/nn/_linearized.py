"""Modules of critics that say what their transposed Jacobian is: see `genfuse.ops.input_gradient`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """branch(x) + shortcut(x)."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)  # first, as a branch may begin with a layer that overwrites x
        return shortcut + self.branch(x)

    def linearized(self, trace: Callable[..., Any], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        shortcut, pull_shortcut = trace(self.shortcut, x)
        branch, pull_branch = trace(self.branch, x)
        return shortcut + branch, lambda g: pull_shortcut(g) + pull_branch(g)


class WithContext(nn.Module):
    """A network that is shown (x, context), the context (N, C) as more features of vectors, or channels of images.

    Of examples (N, ...) that are neither, or with ``planes`` false, it sees all cells as features.
    """

    def __init__(self, network: nn.Module, planes: bool) -> None:
        super().__init__()
        self.network, self.planes = network, planes

    def together(self, x: Tensor, context: Tensor) -> Tensor:
        if not self.planes:
            return torch.cat([x.flatten(1), context.to(x.dtype)], 1)
        return torch.cat([x, context.to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.network(self.together(x, context))

    def linearized(
        self, trace: Callable[..., Any], x: Tensor, context: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        out, pull = trace(self.network, self.together(x, context))
        features = x.shape[1] if self.planes else x[0].numel()
        return out, lambda g: pull(g)[:, :features].reshape(x.shape)
