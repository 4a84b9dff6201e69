"""Multilayer perceptrons."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module

from genfuse import ops

EVERYWHERE = (  # hooks of all modules
    module._global_forward_hooks, module._global_forward_pre_hooks, module._global_backward_hooks,
    module._global_backward_pre_hooks,
)  # fmt: skip


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
        first = int(flat and untouched(layers[0], nn.Flatten))
        end, slope = run_of(layers, first) if first < len(layers) else (first, 0.0)
        if end == first or end < len(layers) or not untouched(self, MLP) or (x.dim() != 2 and not first):
            return None
        run: list[Any] = layers[first::2]
        return [layer.weight for layer in run], [layer.bias for layer in run], slope

    def forward(self, x: Tensor) -> Tensor:
        layers, i = list(self), 0
        while i < len(layers):
            end, slope = run_of(layers, i)
            if end > i:
                run: list[Any] = layers[i:end:2]
                x = ops.mlp(x, [layer.weight for layer in run], [layer.bias for layer in run], slope=slope)
            else:
                x = layers[i](x)
            i = max(end, i + 1)
        return x


def run_of(layers: Sequence[nn.Module], start: int) -> tuple[int, float]:
    """Where linear layers with one activation between them end that begin at start, and the activation's slope."""
    if not fuses(layers[start]):
        return start, 0.0
    end, slope = start + 1, None
    while end + 1 < len(layers) and fuses(layers[end + 1]):
        own = _slope(layers[end])
        if own is None or slope not in (None, own):
            break
        end, slope = end + 2, own
    return end, slope or 0.0


def fuses(layer: nn.Module) -> bool:
    """Whether the weight and bias of a linear layer are all that a call of it uses."""
    return layer._parameters.get("bias") is not None and untouched(layer, nn.Linear)


def _slope(layer: nn.Module) -> float | None:
    """Of an activation that `ops.mlp` knows."""
    if untouched(layer, nn.ReLU):
        return 0.0
    slope: Any = layer.negative_slope if untouched(layer, nn.LeakyReLU) else None
    return slope if slope is not None and 0 <= slope < 1 else None


def untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the layer does what one of ``kind`` does and nobody listens to it: hooks may also make its
    weight, as those of pruning do. Only then may what it holds be used without a call."""
    return (
        type(layer).forward is kind.forward
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not any(EVERYWHERE)
    )


def mlp(sizes: Sequence[int]) -> MLP:
    """Linear layers (..., sizes[0]) -> (..., sizes[-1]) with ReLU between them; two sizes make one linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return MLP(*layers[:-1])
