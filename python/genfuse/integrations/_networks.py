"""Networks of peers as operators take them: multilayer perceptrons, and the inverse of masked ones by one sweep."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genfuse import ops
from genfuse.integrations._patch import Left


class _Order(NamedTuple):
    inputs: Tensor  # as each comes after those that it depends on
    back: Tensor
    units: list[Tensor]  # of each hidden layer, by how many inputs they see
    bounds: list[list[int]]  # as autoregressive_inverse takes them
    passes: int  # of the whole network that an inverse by repetition takes


_masks: WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = WeakKeyDictionary()
_orders: WeakKeyDictionary[nn.Module, tuple[tuple, _Order]] = WeakKeyDictionary()


def _state(mask: Tensor) -> tuple[int, int]:
    """What changes if the mask does."""
    return mask.data_ptr(), 0 if mask.is_inference() else mask._version


def masked_weight(layer: Any) -> Tensor:
    """A masked linear layer's weight times its mask, which is converted to numbers once."""
    mask, weight = layer.mask, layer.weight
    if mask.dtype is weight.dtype or torch.compiler.is_compiling():
        return mask * weight
    key = *_state(mask), weight.dtype
    known = _masks.get(layer)
    if known is None or known[0] != key:
        known = _masks[layer] = key, mask.to(weight.dtype)
    return known[1] * weight


def check_plain(*modules: nn.Module) -> None:
    """Leave modules that somebody listens to, or whose forward somebody has replaced."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Left("the network has hooks")
        if "forward" in module.__dict__:
            raise Left("a network of somebody's own")


def is_relu(activation: Any) -> bool:
    return activation in (F.relu, torch.relu) or type(activation) is nn.ReLU


def check_served(x: Tensor, *modules: nn.Module) -> None:
    """Leave what `ops.mlp` has no kernel for, and modules that somebody listens to."""
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        raise Left("other than float32 and float64 on a CPU")
    check_plain(*modules)


def mlp(x: Tensor, layers: Sequence[Any], **options: Any) -> Tensor:
    """`ops.mlp` of linear layers, which may have masks."""
    check_served(x, *layers)
    weights = [masked_weight(layer) if "mask" in layer._buffers else layer.weight for layer in layers]
    if any(layer.bias is None or w.dim() != 2 for w, layer in zip(weights, layers, strict=True)):
        raise Left("layers without biases, or stacked")
    return ops.mlp(x, weights, [layer.bias for layer in layers], **options)


def sequential(x: Tensor, modules: Sequence[nn.Module], kind: type = nn.Linear) -> Tensor:
    """Linear layers of this kind with ReLU or LeakyReLU between them."""
    layers, activations = modules[::2], modules[1::2]
    slopes = {getattr(each, "negative_slope", 0.0) for each in activations}
    if any(type(each) not in (nn.ReLU, nn.LeakyReLU) for each in activations) or len(slopes) > 1:
        raise Left("activations that are not ReLU, or normalised ones")
    if len(modules) % 2 == 0 or any(type(layer) is not kind for layer in layers):
        raise Left("a network of somebody's own")
    check_plain(*activations)
    return mlp(x, layers, slope=slopes.pop() if slopes else 0.0)


def _order(masks: Sequence[Tensor], residual: bool) -> _Order:
    *hidden, last = [(mask != 0).float().cpu() for mask in masks]
    features = hidden[0].shape[1]
    sees, stream, seen = torch.eye(features, dtype=torch.float32), None, []
    for i, mask in enumerate(hidden):
        sees = mask @ sees
        if residual and i % 2 == 0:
            stream = sees = sees if stream is None else sees + stream
        sees = (sees > 0).float()
        seen.append(sees)
    after = ((last @ sees).reshape(features, -1, features).sum(1) > 0).float()  # feature by feature
    direct = after
    while not torch.equal(further := ((after + after @ after) > 0).float(), after):
        after = further
    if after.diagonal().any():
        raise Left("the network is not autoregressive")
    inputs = after.sum(1).argsort(stable=True)
    passes = torch.zeros(features, dtype=torch.float32)
    for i in inputs.tolist():
        passes[i] = 1 + (passes * direct[i]).max()
    rank = inputs.argsort()
    degrees = [(each * (rank + 1)).amax(1).long() for each in seen]
    if max(int(degree.max()) for degree in degrees) >= features:
        raise Left("units of the network see all inputs")
    if residual and any(not torch.equal(degree, degrees[0]) for degree in degrees[2::2]):
        raise Left("units of residual blocks that see different inputs")
    units = [degree.argsort(stable=True) for degree in degrees]
    starts = torch.arange(features)
    bounds = [[*torch.searchsorted(d[u], starts).tolist(), len(u)] for d, u in zip(degrees, units, strict=True)]
    device = masks[0].device
    return _Order(inputs.to(device), rank.to(device), [u.to(device) for u in units], bounds, int(passes.max()))


def inverse(
    y: Tensor,
    net: nn.Module,
    layers: Sequence[Any],
    rows: Tensor | None = None,
    *,
    context: Tensor | None = None,
    passes: int | None = None,
    residual: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """x and the log-determinant of the inverse, for y (N, D).

    Args:
        net: the network of which the layers are, whose masks hold for as long as they are not written to.
        layers: masked linear layers, each with ``weight``, ``bias`` and ``mask``; what the first one's has beyond the
            inputs is multiplied by the context.
        rows: the last layer's rows in the order of the features; of an affine transform, scale and shift.
        context: (N, C), a part of the first layer's input; or with as many columns as the first layer has units, and
            none of its inputs left, what is added to it.
        passes: how many the peer makes, if it may be too few.
        options: of `ops.autoregressive_inverse`.
    """
    if torch.is_autocast_enabled(y.device.type) or torch.compiler.is_compiling():
        raise Left("autocast, or torch.compile")
    check_plain(*net.modules())
    features = y.shape[1]
    masks = [layer.mask for layer in layers]
    key = (residual, *map(_state, masks))
    known = _orders.get(net)
    if known is None or known[0] != key:
        last = masks[-1] if rows is None else masks[-1][rows]
        known = _orders[net] = key, _order([masks[0][:, :features], *masks[1:-1], last], residual)
    order = known[1]
    if passes is not None and passes < order.passes:
        raise Left("fewer passes than the inverse takes")
    weights, biases, before = [], [], order.inputs
    for i, layer in enumerate(layers):
        weight = masked_weight(layer)
        if i == 0 and weight.shape[1] > features:
            if context is None:
                raise Left("a network of a context is called without one")
            context, weight = F.linear(context, weight[:, features:]), weight[:, :features]
        if i < len(order.units):
            own = order.units[i]
        else:
            own = torch.arange(len(weight), device=weight.device) if rows is None else rows
            own = own.view(features, -1)[order.inputs]
            own = (own if options.get("bins") else own.t()).flatten()
        weights.append(weight[own][:, before])
        biases.append(layer.bias[own])
        before = own
    if context is not None:
        context = context[:, order.units[0]]
    x, logdet = ops.autoregressive_inverse(
        y[:, order.inputs], weights, biases, order.bounds, context=context, residual=residual, **options
    )
    return x[:, order.back], logdet
