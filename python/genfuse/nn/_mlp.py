"""Multilayer perceptrons."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from genfuse import ops


class MLP(nn.Sequential):
    """Layers one after the other, of which linear ones with ReLU or LeakyReLU between them are one `ops.mlp`.

    Layers that have hooks of their own, or no bias, run by themselves.
    """

    one_node = True  # of autograd's graph, for `ops.input_gradient`

    def linear_chain(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], float] | None:
        """Weights, biases and the activation's slope, if all that happens to x, (N, ...), is that `torch.nn.Flatten`
        makes it (N, D), and linear layers follow with ReLU or LeakyReLU between them; else None, and where hooks
        listen."""
        layers = list(self)
        flat = bool(layers) and type(layers[0]) is nn.Flatten and (layers[0].start_dim, layers[0].end_dim) == (1, -1)
        first = int(flat and not hooks(layers[0]))
        end, slope = _run_of(layers, first) if first < len(layers) else (first, 0.0)
        if end == first or end < len(layers) or hooks(self) or (x.dim() != 2 and not first):
            return None
        run: list[Any] = layers[first::2]
        return [layer.weight for layer in run], [layer.bias for layer in run], slope

    def forward(self, x: Tensor) -> Tensor:
        layers, i = list(self), 0
        while i < len(layers):
            end, slope = _run_of(layers, i)
            if end > i:
                run: list[Any] = layers[i:end:2]
                x = ops.mlp(x, [layer.weight for layer in run], [layer.bias for layer in run], slope=slope)
            else:
                x = layers[i](x)
            i = max(end, i + 1)
        return x


def _run_of(layers: Sequence[nn.Module], start: int) -> tuple[int, float]:
    """Where linear layers with one activation between them end that begin at start, and the activation's slope."""
    if not _fuses(layers[start]):
        return start, 0.0
    end, slope = start + 1, None
    while end + 1 < len(layers) and _fuses(layers[end + 1]):
        own = _slope(layers[end])
        if own is None or slope not in (None, own):
            break
        end, slope = end + 2, own
    return end, slope or 0.0


def _fuses(layer: nn.Module) -> bool:
    forward = getattr(type(layer), "forward", None)
    return forward is nn.Linear.forward and layer.bias is not None and not hooks(layer)


def _slope(layer: nn.Module) -> float | None:
    """Of an activation that `ops.mlp` knows."""
    if hooks(layer):
        return None
    if type(layer) is nn.LeakyReLU:
        return layer.negative_slope if 0 <= layer.negative_slope < 1 else None
    return 0.0 if type(layer) is nn.ReLU else None


def hooks(layer: nn.Module) -> bool:
    """Whether somebody listens to a layer's calls."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def mlp(sizes: Sequence[int]) -> MLP:
    """Linear layers (..., sizes[0]) -> (..., sizes[-1]) with ReLU between them; two sizes make one linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return MLP(*layers[:-1])
