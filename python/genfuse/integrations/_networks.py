"""Networks of peers as operators take them: multilayer perceptrons, and the inverse of masked ones by one sweep."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.nn import functional as F
from torch.nn.modules import module as everywhere

from genfuse import ops
from genfuse.integrations._patch import Left


class _Order(NamedTuple):
    inputs: Tensor  # as each comes after those that it depends on
    back: Tensor
    units: list[Tensor]  # of each hidden layer, by how many inputs they see
    bounds: list[list[int]]  # as autoregressive_inverse takes them
    passes: int  # of the whole network that an inverse by repetition takes


class _Sorted(NamedTuple):
    """Masked layers with units in the order of how many inputs they see: what a unit does not see comes last."""

    units: list[Tensor]  # of each hidden layer
    cells: list[Tensor]  # where the weights of each layer come from
    counts: Tensor  # of each unit of all layers, how many it sees, the first ones
    whole: list[bool]  # of each layer, whether that is all that its mask says


ROWS = 128  # fewer do not pay for the sorting of weights
LISTENERS = (  # to all modules
    everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks, everywhere._global_backward_hooks,
    everywhere._global_backward_pre_hooks,
)  # fmt: skip

_masks: WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = WeakKeyDictionary()
_sortings: WeakKeyDictionary[nn.Module, tuple[tuple, _Sorted | None]] = WeakKeyDictionary()
_orders: WeakKeyDictionary[nn.Module, tuple[tuple, _Order]] = WeakKeyDictionary()


def _is_read(*masks: Any) -> bool:
    """Whether masks can be looked at: they are there, are not traced, and stand for no others, as under vmap."""
    if torch.compiler.is_compiling() or any(type(mask) is not Tensor or mask.is_meta for mask in masks):
        return False
    if _len_torch_dispatch_stack():  # by which they may be traced
        return False
    try:
        return all(mask.data_ptr() is not None for mask in masks)
    except RuntimeError:  # without memory
        return False


def _kept(kept: WeakKeyDictionary[nn.Module, tuple[tuple, Any]], module: nn.Module, key: tuple, make: Callable) -> Any:
    """What ``make`` gives for a module, anew if the key changes; fit for training even if made in inference mode."""
    known = kept.get(module)
    if known is None or known[0] != key:
        with torch.inference_mode(False):
            known = kept[module] = key, make()
    return known[1]


def writes(t: Tensor) -> int:
    """How often a tensor was written to, which PyTorch does not count in inference mode."""
    return 0 if t.is_inference() else t._version


def _state(mask: Tensor) -> tuple[int, int]:
    """What changes if the mask does."""
    return mask.data_ptr(), writes(mask)


def masked_weight(layer: Any) -> Tensor:
    """A masked linear layer's weight times its mask, which is converted to numbers once."""
    mask, weight = layer.mask, layer.weight
    if mask.dtype is weight.dtype or not _is_read(mask):
        return mask * weight
    return _kept(_masks, layer, (*_state(mask), weight.dtype), lambda: mask.to(weight.dtype)) * weight


def check_plain(*modules: Any) -> None:
    """Leave modules that somebody listens to, or whose forward somebody has replaced; functions may be among them."""
    if any(LISTENERS):
        raise Left("all modules have hooks")
    for module in modules:
        if not isinstance(module, nn.Module):
            continue
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


def mlp(x: Tensor, layers: Sequence[Any], *, residual: bool = False, **options: Any) -> Tensor:
    """`ops.mlp` of linear layers, which may have masks."""
    check_served(x, *layers)
    if any(layer.bias is None or layer.weight.dim() != 2 for layer in layers):
        raise Left("layers without biases, or stacked")
    masks, biases = [layer._buffers.get("mask") for layer in layers], [layer.bias for layer in layers]
    large = x.numel() >= ROWS * x.shape[-1] and len(layers) > 1
    by: _Sorted | None = None
    if large and _is_read(*masks):
        by = _kept(_sortings, layers[0], (residual, *map(_state, masks)), lambda: _sorting(masks, residual))
    whole = [mask is None for mask in masks] if by is None else by.whole
    weights = [layer.weight if each else masked_weight(layer) for each, layer in zip(whole, layers, strict=True)]
    if by is not None:
        weights = [w.flatten().index_select(0, c).view_as(w) for w, c in zip(weights, by.cells, strict=True)]
        biases = [*(b.index_select(0, u) for b, u in zip(biases, by.units, strict=False)), biases[-1]]
        if options.get("added") is not None:
            options["added"] = options["added"].index_select(-1, by.units[0])
        options["counts"] = by.counts
    return ops.mlp(x, weights, biases, residual=residual, **options)


def _sorting(masks: Sequence[Any], residual: bool) -> _Sorted | None:
    """How layers with these masks are sorted; None if that leaves out less than a fifth of their weights."""
    before = torch.arange(masks[0].shape[1])
    sees = torch.eye(len(before), dtype=torch.float32)
    every, cells, counts = list[Tensor](), list[Tensor](), list[Tensor]()
    for i, mask in enumerate(masks):
        sees = (((mask != 0).float() @ sees) > 0).float()  # of what the inputs are
        if i == len(masks) - 1:
            units = torch.arange(len(mask))
        elif residual and i > 0 and i % 2 == 0:  # what blocks add has the order of what they add to
            units = every[0]
        else:
            units = sees.sum(1).argsort(stable=True)
        cells.append((units[:, None] * mask.shape[1] + before).flatten())
        counts.append(((mask != 0)[units][:, before] * torch.arange(1, mask.shape[1] + 1)).amax(1))
        every.append(units)
        before = units
    if sum(int(c.sum()) for c in counts) > 0.8 * sum(mask.numel() for mask in masks):
        return None
    whole = [int(c.sum()) == int((mask == 1).sum()) for c, mask in zip(counts, masks, strict=True)]
    return _Sorted(every[:-1], cells, torch.cat(counts), whole)


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
    features, masks = y.shape[1], [layer.mask for layer in layers]
    if not _is_read(y, *masks):
        raise Left("masks without values of their own, as under vmap, or torch.compile")
    if torch.is_autocast_enabled(y.device.type):
        raise Left("autocast")
    check_plain(*net.modules())
    if len(layers) < 2:
        raise Left("no hidden layers")
    if (given := masks[0].shape[1] - features) and (context is None or context.shape[1] != given):
        raise Left("other numbers of features, or of a context, than the network takes")

    def ordered() -> _Order:
        last = masks[-1] if rows is None else masks[-1][rows]
        return _order([masks[0][:, :features], *masks[1:-1], last], residual)

    order = _kept(_orders, net, (residual, *map(_state, masks)), ordered)
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
