"""Networks that make a layer's raw parameters of what they are shown: (inputs, context) -> raw parameters.

Vectors are (N, D) and their context (N, C); images are (N, C, H, W), and their context is (N, C) or an image of the
same height and width. The last layer of each starts near 0, so that a flow starts near the identity.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.nn._mlp import mlp
from genfuse.ops._rational_quadratic_spline import Settings

START = 1e-3  # largest weight that a last layer starts with


def last_layer(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer, started near 0."""
    nn.init.uniform_(layer.weight, -START, START)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class MLPConditioner(nn.Module):
    """Linear layers with ReLU between them; the context is a part of the input."""

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (256, 256), context: int = 0) -> None:
        super().__init__()
        widths = [inputs + context, *hidden]
        self.layers = nn.Sequential(mlp(widths), nn.ReLU(inplace=True)) if hidden else nn.Identity()
        self.last = last_layer(nn.Linear(widths[-1], outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.layers(x if context is None else torch.cat([x, context.to(x.dtype)], -1)))


class ResidualMLP(nn.Module):
    """Residual blocks of two linear layers, activation first (arXiv 1603.05027), as neural spline flows use them.

    The context is a part of the input, and gates each block (arXiv 1906.04032, appendix B).
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int = 128, blocks: int = 2, context: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.first = nn.Linear(inputs + context, hidden)
        self.blocks = nn.ModuleList()
        self.gates = nn.ModuleList()
        for _ in range(blocks):
            second = nn.Linear(hidden, hidden)
            nn.init.uniform_(second.weight, -START, START)
            nn.init.uniform_(second.bias, -START, START)
            self.blocks.append(nn.ModuleList([nn.Linear(hidden, hidden), second]))
            if context:
                self.gates.append(nn.Linear(context, hidden))
        self.last = last_layer(nn.Linear(hidden, outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            context = context.to(x.dtype)
        h = self.first(x if context is None else torch.cat([x, context], -1))
        for i, block in enumerate(self.blocks):
            inner = F.relu(block[0](F.relu(h)), inplace=True)  # type: ignore[index]
            if self.dropout:
                inner = F.dropout(inner, self.dropout, self.training)
            inner = block[1](inner)  # type: ignore[index]
            if context is not None:
                inner = inner * torch.sigmoid(self.gates[i](context))
            h = h + inner
        return self.last(h)


class ConvConditioner(nn.Module):
    """Convolutions of stride 1: one of 3x3, then as many residual blocks, then one of 3x3.

    A block is 3x3, ReLU, 3x3 (RealNVP's residual network, arXiv 1605.08803, without its batch normalisation); with no
    blocks there is one 1x1 convolution in their place (Glow's network, arXiv 1807.03039).
    """

    def __init__(self, inputs: int, outputs: int, width: int = 64, blocks: int = 0, context: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.context = nn.Conv2d(context, width, 1, bias=False) if context else None
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(blocks)
        )
        self.middle = None if blocks else nn.Conv2d(width, width, 1)
        self.last = last_layer(nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if context is not None:
            assert self.context is not None
            h = h + self.context((context if context.dim() == 4 else context[:, :, None, None]).to(x.dtype))
        for block in self.blocks:
            h = h + block(h)
        if self.middle is not None:
            h = self.middle(F.relu(h))
        return self.last(F.relu(h))


def start_spline(last: nn.Linear | nn.Conv2d, settings: Settings) -> None:
    """Start a last layer whose outputs are, coordinate by coordinate, a spline's raw parameters: biases that make the
    identity, bins of one size and derivatives of 1; and PyTorch's usual weights."""
    assert last.bias is not None
    last.reset_parameters()
    with torch.no_grad():
        bias = last.bias.view(-1, settings.params)
        bias[:, : 2 * settings.bins] = 0
        bias[:, 2 * settings.bins :] = settings.unit_derivative
