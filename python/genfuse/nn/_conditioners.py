"""Networks that make a layer's raw parameters of what they are shown: (x, context) -> raw parameters.

Vectors are (N, D) and their context (N, C); images are (N, C, H, W), and their context is (N, C) or an image of the
same height and width. All are made by (inputs, outputs, context, ...), which are numbers of features or channels. The
last layer of each starts near 0, so that a flow starts near the identity.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from genfuse import ops
from genfuse.errors import SettingsError
from genfuse.nn._mlp import MLP, fuses, mlp, run_of, untouched

Tails = Literal["linear", "none", "circular"]
START = 1e-3  # largest weight that a last layer starts with, and of plain MLPs, which learn faster so, 10 times as much


def last_layer(layer: nn.Linear | nn.Conv2d, start: float = START) -> nn.Linear | nn.Conv2d:
    """The layer, started near 0."""
    nn.init.uniform_(layer.weight, -start, start)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def soft_slope(scale: ops.Scale, largest: float) -> float | None:
    """The least scale of a soft clip whose log-scales end at ``largest``. With the operator's 1e-3, as in zuko, ten
    layers stretch what is far outside by e^69."""
    return math.exp(-largest) if scale == "softclip" else None


def _one_width(name: str, widths: Sequence[int]) -> int:
    """The width of residual blocks, which are as many as ``widths``."""
    if not isinstance(widths, Sequence) or len(set(widths)) != 1 or widths[0] < 1:
        raise SettingsError(
            f"{name} must be one positive width for each block, all the same, as (64, 64); got {widths}"
        )
    return widths[0]


class MLPConditioner(nn.Module):
    """Linear layers with ReLU between them, of widths ``hidden``; the context is a part of the input.

    If ``squash``, they see asinh(x) of x: a row far outside of what the network was trained on, where it is a linear
    function, then does not get parameters that are as far from all others, whose exponential explodes.
    """

    def __init__(
        self, inputs: int, outputs: int, context: int = 0, hidden: Sequence[int] = (256, 256), squash: bool = False
    ) -> None:
        super().__init__()
        self.squash = squash
        widths = [inputs + context, *hidden]
        self.layers = nn.Sequential(mlp(widths), nn.ReLU(inplace=True)) if hidden else nn.Identity()
        self.last = last_layer(nn.Linear(widths[-1], outputs), 10 * START)

    def network(self, context: Tensor | None) -> ops.Network | None:
        """The network as a layer of a flow takes it; None if its layers were changed, or have hooks."""
        layers: list[Any] = [self.last]
        hidden: list[Any] = [*self.layers._modules.values()]
        if hidden and not (untouched(self.layers, nn.Sequential) and untouched(hidden[0], MLP)):
            return None
        for part in reversed(hidden):
            layers[:0] = part if isinstance(part, nn.Sequential) else [part]
        if run_of(layers, 0) != (len(layers), 0.0):
            return None
        return _network(layers[::2], self.squash, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if network := self.network(context):
            return _run(network, x)
        return self.last(self.layers(_seen(x, self.squash, context)))


class ResidualMLP(nn.Module):
    """Residual blocks of two linear layers, activation first (arXiv 1603.05027), as neural spline flows use them.

    ``hidden`` is the width of each block, all the same; ``dropout`` the share of units that each block drops while it
    is trained. The context is a part of the input, and gates each block (arXiv 1906.04032, appendix B). ``squash``
    is as in `MLPConditioner`.

    Raises SettingsError for no blocks, or blocks of several widths.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        context: int = 0,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        squash: bool = False,
    ) -> None:
        super().__init__()
        width = _one_width("hidden", hidden)
        self.dropout, self.squash = dropout, squash
        self.first = nn.Linear(inputs + context, width)
        self.blocks = nn.ModuleList()
        self.gates = nn.ModuleList()
        for _ in hidden:
            second = nn.Linear(width, width)
            nn.init.uniform_(second.weight, -START, START)
            nn.init.uniform_(second.bias, -START, START)
            self.blocks.append(nn.ModuleList([nn.Linear(width, width), second]))
            if context:
                self.gates.append(nn.Linear(context, width))
        self.last = last_layer(nn.Linear(width, outputs))

    def network(self, context: Tensor | None) -> ops.Network | None:
        """The network as a layer of a flow takes it; None if it drops units, its layers were changed or have hooks."""
        blocks: Any = self.blocks
        layers = [self.first, *(layer for block in blocks for layer in block), self.last]
        if (self.dropout and self.training) or not all(map(fuses, layers)):
            return None
        return _network(layers, self.squash, context, self.gates, residual=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if network := self.network(context):
            return _run(network, x)
        h = self.first(_seen(x, self.squash, context))  # (N, width)
        for i, block in enumerate(self.blocks):
            inner = F.relu(block[0](F.relu(h)), inplace=True)  # type: ignore[index]
            inner = block[1](F.dropout(inner, self.dropout, self.training))  # type: ignore[index]
            if context is not None:
                inner = inner * torch.sigmoid(self.gates[i](context.to(inner.dtype)))
            h = h + inner
        return self.last(h)


def _network(
    layers: Sequence[Any], squash: bool, context: Tensor | None, gates: Iterable[nn.Module] = (), residual: bool = False
) -> ops.Network:
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    context = None if context is None else context.to(weights[0].dtype)
    made = [] if context is None else [torch.sigmoid(gate(context)) for gate in gates]
    return ops.Network(weights, biases, residual, gates=made, context=context, limit=0.0 if squash else None)


def _seen(x: Tensor, squash: bool, context: Tensor | None) -> Tensor:
    x = x.asinh() if squash else x
    return x if context is None else torch.cat([x, context.to(x.dtype)], -1)


def _run(network: ops.Network, x: Tensor) -> Tensor:
    x = _seen(x, network.limit is not None, network.context)
    return ops.mlp(x, network.weights, network.biases, residual=network.residual, gates=network.gates)


class ConvConditioner(nn.Module):
    """Convolutions of stride 1 between one of 3x3 at the start and one of 3x3 at the end.

    Between them stands one of 1x1, of one width ``channels`` (Glow's network, arXiv 1807.03039); or, if it is
    ``residual``, a block of 3x3, ReLU and 3x3 for each of ``channels``, all the same (RealNVP's residual network, arXiv
    1605.08803, without its batch normalisation).

    Raises SettingsError for no channels, several widths, or several layers of 1x1.
    """

    def __init__(
        self, inputs: int, outputs: int, context: int = 0, channels: Sequence[int] = (64,), *, residual: bool = False
    ) -> None:
        super().__init__()
        width = _one_width("channels", channels)
        if not residual and len(channels) > 1:
            raise SettingsError(f"channels must be one width unless the network is residual; got {channels}")
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.context = nn.Conv2d(context, width, 1, bias=False) if context else None
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in (channels if residual else ())
        )
        self.middle = None if residual else nn.Conv2d(width, width, 1)
        self.last = last_layer(nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        # A CPU's convolutions take less time if channels lie side by side, which vmap knows nothing of.
        if x.is_cpu and not ops.transformed():
            x = x.clone(memory_format=torch.channels_last)
        h = self.first(x)  # (N, width, H, W)
        if context is not None:
            assert self.context is not None
            h = h + self.context((context if context.dim() == 4 else context[:, :, None, None]).to(x.dtype))
        for block in self.blocks:
            h = h + block(h)
        if self.middle is not None:
            h = self.middle(F.relu(h))
        return self.last(F.relu(h)).contiguous()


def output_layer(network: nn.Module, multiple: int) -> nn.Linear | nn.Conv2d | None:
    """The network's last linear or convolutional layer; None unless it has a bias of a multiple of so many numbers."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers or layers[-1].bias is None or is_lazy(layers[-1].bias) or len(layers[-1].bias) % multiple:
        return None
    return layers[-1]


def spline_settings(bins: int, bound: float, tails: Tails = "linear") -> ops.SplineSettings:
    """The settings of splines as flows have them. Raises ValueError for settings that make no spline."""
    if tails not in get_args(Tails):
        raise ValueError(f"tails must be one of {', '.join(get_args(Tails))}, got {tails!r}")
    settings = ops.SplineSettings(bins, float(bound), tails, False, 1e-3, 1e-3, 1e-3)
    params = torch.zeros(0, 1, max(0, settings.params))
    ops.rational_quadratic_spline(torch.zeros(0, 1), params, bins=bins, bound=float(bound), tails=tails)  # refuses them
    return settings


def damping_of(width: int, damped: float) -> float:
    """The factor of raw widths and heights that a layer makes of ``width`` inputs: 1 if ``damped`` is 0, one over the
    square root of the width, as in the paper's code, if it is 1. Raises ValueError unless it is in [0, 1]."""
    if not 0 <= damped <= 1:
        raise ValueError(f"damped must be in [0, 1], got {damped}")
    return float(width ** (-damped / 2))


def start_spline(network: nn.Module, settings: ops.SplineSettings, damped: float) -> float:
    """Start a network whose outputs are, coordinate by coordinate, a spline's raw parameters: the biases of its output
    layer make the identity, bins of one size and slopes of 1, and its weights are small.

    Returns the damping of raw widths and heights, `damping_of` the layer's inputs; 1 if there is no such layer, and the
    network stays as it is.
    """
    last = output_layer(network, settings.params)
    damping = damping_of(1 if last is None else last.weight[0].numel(), damped)
    if last is None:
        return damping
    with torch.no_grad():
        if not isinstance(network, MLPConditioner | ResidualMLP | ConvConditioner):
            last.weight.mul_(last.weight[0].numel() ** -0.5 / damping)  # of ours they are small already
        bias = last.bias.view(-1, settings.params)  # type: ignore[union-attr]
        bias[:, : 2 * settings.bins] = 0
        bias[:, 2 * settings.bins :] = settings.unit_derivative
    return damping
