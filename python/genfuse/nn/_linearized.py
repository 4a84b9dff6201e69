"""Modules of critics that say what their transposed Jacobian is: see `genfuse.ops.input_gradient`.

``linearized(trace, x, ...)`` does what ``forward(x, ...)`` does, with ``trace(child, x)`` in the place of ``child(x)``,
which gives the output and a function from the gradient for that output to the gradient for x; and returns such a pair.
All children must be layers that can be traced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """branch(x) + shortcut(x); the identity for no shortcut.

    Raises ValueError where one of them would overwrite the x that the other reads.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, nn.Identity() if shortcut is None else shortcut
        for name, part in self.named_children():
            first = next(layer for layer in part.modules() if not [*layer.children()])
            if getattr(first, "inplace", False):
                raise ValueError(f"{name} must not overwrite its input: it begins with {first}")

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)

    def linearized(self, trace: Callable[..., Any], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        shortcut, pull_shortcut = trace(self.shortcut, x)
        branch, pull_branch = trace(self.branch, x)
        dtypes = shortcut.dtype, branch.dtype  # under autocast they may differ
        return shortcut + branch, lambda g: pull_shortcut(g.to(dtypes[0])) + pull_branch(g.to(dtypes[1]))


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
        shape, features = x.shape, x.shape[1] if self.planes else x.shape[1:].numel()
        return out, lambda g: pull(g)[:, :features].reshape(shape)
