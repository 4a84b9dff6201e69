"""What nflows and normflows share, which are both made of the code of Neural Spline Flows (arXiv 1906.04032)."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from genfuse import ops
from genfuse.integrations import _networks
from genfuse.integrations._patch import Left, Peer, inherits, joined


def replace_splines(peer: Peer, splines: Any, *, circular: bool) -> None:
    """Both functions of a module of splines, which may know circular tails and bounds of each coordinate."""

    def spline(x: Tensor, *raw: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if raw[0].shape != raw[1].shape or raw[0].shape[:-1] != raw[2].shape[:-1]:
            raise Left("widths, heights and derivatives of different shapes")
        if x.dtype not in (torch.float32, torch.float64):
            raise Left("other than float32 and float64")
        return ops.rational_quadratic_spline(x, joined(*raw), bins=raw[0].shape[-1], by_element=True, **options)

    @peer.replaces(splines, "unconstrained_rational_quadratic_spline")
    def unconstrained(
        inputs: Tensor, unnormalized_widths: Tensor, unnormalized_heights: Tensor, unnormalized_derivatives: Tensor,
        inverse: bool = False, tails: Any = "linear", tail_bound: Any = 1.0,
        min_bin_width: float = splines.DEFAULT_MIN_BIN_WIDTH, min_bin_height: float = splines.DEFAULT_MIN_BIN_HEIGHT,
        min_derivative: float = splines.DEFAULT_MIN_DERIVATIVE,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        of_each, is_tensor = isinstance(tails, list | tuple), isinstance(tail_bound, Tensor)
        if not {*(tails if of_each else [tails])} <= {"linear", "circular"}:
            raise Left("tails that are neither linear nor circular")
        if (not circular and (tails != "linear" or is_tensor)) or (is_tensor and tail_bound.requires_grad):
            raise Left("tails that are not linear, or a bound in a tensor")
        x, inside = inputs, None
        if tails != "linear":
            # Outside, normflows leaves circular coordinates as they are; where each has tails of its own, it returns 0.
            inside = (inputs >= -tail_bound) & (inputs <= tail_bound)
            x = torch.where(inside, inputs, 0.0)  # whose gradients are finite, as times 0 they have to be
        y, logdet = spline(
            x, unnormalized_widths, unnormalized_heights, unnormalized_derivatives, inverse=inverse, tails=tails,
            bound=tail_bound, min_width=min_bin_width, min_height=min_bin_height, min_derivative=min_derivative,
        )  # fmt: skip
        if inside is None:
            return y, logdet
        return torch.where(inside, y, 0.0 if of_each else inputs), torch.where(inside, logdet, 0.0)

    @peer.replaces(splines, "rational_quadratic_spline")
    def constrained(
        inputs: Tensor, unnormalized_widths: Tensor, unnormalized_heights: Tensor, unnormalized_derivatives: Tensor,
        inverse: bool = False, left: Any = 0.0, right: Any = 1.0, bottom: Any = 0.0, top: Any = 1.0,
        min_bin_width: float = splines.DEFAULT_MIN_BIN_WIDTH, min_bin_height: float = splines.DEFAULT_MIN_BIN_HEIGHT,
        min_derivative: float = splines.DEFAULT_MIN_DERIVATIVE,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if any(isinstance(side, Tensor) and side.requires_grad for side in (left, right, bottom, top)):
            raise Left("a box that is learned")
        if not circular and not (inputs.numel() and inputs.min() >= left and inputs.max() <= right):
            raise Left("inputs outside of the box, or none")  # nflows looks at left and right of the inverse too
        return spline(
            inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives, inverse=inverse, tails="none",
            box=(left, right, bottom, top),
            min_width=min_bin_width, min_height=min_bin_height, min_derivative=min_derivative,
        )  # fmt: skip


def _settings(layer: Any, width: float) -> dict[str, Any]:
    """Of the splines of a layer, as an operator takes them; raw widths and heights are over the root of the width."""
    if layer.tails != "linear" or not isinstance(layer.tail_bound, int | float):
        raise Left("tails that are not linear, or a bound of each coordinate")
    return {
        "bins": layer.num_bins, "bound": layer.tail_bound, "damping": 1 / math.sqrt(width),
        "min_width": layer.min_bin_width, "min_height": layer.min_bin_height, "min_derivative": layer.min_derivative,
    }  # fmt: skip


def _elementwise(layer: Any, width: float, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """All of a layer's splines from what its network returned, with the log-determinant of each example."""
    options = _settings(layer, width)
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        raise Left("images, other dtypes than float32 and float64, or no elements")
    return ops.rational_quadratic_spline(x, params.reshape(*x.shape, -1), inverse=inverse, **options)


@cache
def _places(features: int, device: torch.device) -> tuple[Tensor, ...]:
    """Where the entries of L, and those of U and then its diagonal, lie in a matrix; and the identity."""
    with torch.inference_mode(False):  # as they are kept, for training as well
        lower, upper = torch.tril_indices(features, features, -1), torch.triu_indices(features, features, 1)
        diagonal = torch.arange(features).expand(2, -1)
        flat = [i * features + j for i, j in (lower, torch.cat([upper, diagonal], 1))]
        return *(each.to(device) for each in flat), torch.eye(features).flatten().to(device)


def _triangles(self: Any) -> tuple[Tensor, Tensor]:
    """`_create_lower_upper` of LU-linear layers, in a write a matrix."""
    places = _places if ops.has_values(self.lower_entries) else _places.__wrapped__  # what is traced is not kept
    lower, upper, identity = places(self.features, self.lower_entries.device)
    identity = identity.to(self.lower_entries.dtype)
    ours = (
        identity.index_copy(0, lower, self.lower_entries),
        torch.zeros_like(identity).index_copy(0, upper, torch.cat([self.upper_entries, self.upper_diag])),
    )
    return ours[0].view(self.features, -1), ours[1].view(self.features, -1)


def _check_blocks(blocks: Sequence[Any], kind: type) -> None:
    """Leave networks of other blocks than linear layers and ReLU."""
    if any(type(block) is not kind for block in blocks):
        raise Left("a network of somebody's own")
    if any(getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) for block in blocks):
        raise Left("batch norm")
    if any(type(block.dropout) is not nn.Dropout or (block.dropout.p and block.dropout.training) for block in blocks):
        raise Left("dropout")
    if not all(_networks.is_relu(block.activation) for block in blocks):
        raise Left("activations that are not ReLU")
    if any(hasattr(block, "linear_layers") and getattr(block.activation, "inplace", False) for block in blocks):
        raise Left("residual blocks that overwrite what they add to")
    _networks.check_plain(*blocks)
    _check_parts(*blocks)


def _check_parts(*networks: nn.Module) -> None:
    """Leave networks of which somebody listens to what is not a layer of `_networks.mlp`."""
    parts = "activation", "dropout", "context_layer", "preprocessing"
    _networks.check_plain(*(getattr(each, part, None) for each in networks for part in parts))


def _layers(net: Any, context: Tensor | None, made: Any) -> tuple[list[Any], bool, Tensor | None]:
    """Of a MADE: its layers, whether the hidden ones are residual, and what is added to the first one."""
    blocks = list(getattr(net, "blocks", ()))
    # nflows' MADE says it. That of normflows does not: it has no activation but those of its blocks.
    residual = getattr(net, "use_residual_blocks", not blocks or type(blocks[0]) is made.MaskedResidualBlock)
    if type(net) is not made.MADE or type(getattr(net, "preprocessing", None)) not in (type(None), nn.Identity):
        raise Left("a network of somebody's own, or preprocessed features")
    _check_blocks(blocks, made.MaskedResidualBlock if residual else made.MaskedFeedforwardBlock)
    if residual and context is not None:
        raise Left("a context in every block")
    if not residual and not _networks.is_relu(getattr(net, "activation", None)):
        raise Left("no ReLU after the first layer")
    hidden = [each for block in blocks for each in (block.linear_layers if residual else [block.linear])]
    layers = [net.initial_layer, *hidden, net.final_layer]
    if any(type(each) is not made.MaskedLinear for each in layers):
        raise Left("a network of somebody's own")
    _check_parts(net)
    return layers, residual, None if context is None else net.activation(net.context_layer(context))


def replace_layers(
    peer: Peer, coupling: type, autoregressive: type, base: type, lu: type, resnet: Any, made: Any, affine: Callable
) -> None:
    """Couplings and autoregressive layers of splines, their networks, and the triangles of LU-linear layers.

    ``affine(layer)`` gives the options of `ops.autoregressive_inverse` for another layer of the same base.
    """
    peer.replaces(lu, "_create_lower_upper")(_triangles)

    @peer.replaces(coupling, "_coupling_transform", quick=True)
    def couple(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        inherits(self, coupling, "_piecewise_cdf")
        net = self.transform_net
        width = getattr(net, "hidden_features", getattr(net, "hidden_channels", None))
        if width is None:
            raise Left("a network whose width is unknown, of which the peer warns")
        return _elementwise(self, width, inputs, transform_params, inverse)

    @peer.replaces(autoregressive, "_elementwise", quick=True)
    def elementwise(self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Any:
        if hasattr(self.autoregressive_net, "hidden_features"):
            raise Left("a network of somebody's own")
        return _elementwise(self, 1.0, inputs, autoregressive_params, inverse)

    @peer.replaces(base, "inverse")
    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(self, autoregressive):
            inherits(self, autoregressive, "_elementwise", "_elementwise_inverse")
            options = _settings(self, 1.0)
        else:
            options = affine(self)
        net = self.autoregressive_net
        if isinstance(self, autoregressive) and hasattr(net, "hidden_features"):
            raise Left("a network of somebody's own")
        if inputs.dim() != 2 or not inputs.numel():
            raise Left("images, or no elements")
        layers, residual, added = _layers(net, context, made)
        return _networks.inverse(inputs, net, layers, context=added, residual=residual, **options)

    @peer.replaces(made.MADE, "forward")
    def masked(self: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        layers, residual, added = _layers(self, context, made)
        return _networks.mlp(inputs, layers, residual=residual, added=added)

    @peer.replaces(resnet.ResidualNet, "forward")
    def residual_net(self: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        _check_blocks(self.blocks, resnet.ResidualBlock)
        if getattr(self, "preprocessing", None) is not None or inputs.dim() != 2:
            raise Left("preprocessed features, or more axes than two")
        hidden = [each for block in self.blocks for each in block.linear_layers]
        layers = [self.initial_layer, *hidden, self.final_layer]
        if any(type(layer) is not nn.Linear for layer in layers):
            raise Left("a network of somebody's own")
        if context is None:
            return _networks.mlp(inputs, layers, residual=True)
        inputs = torch.cat((inputs, context), dim=1)
        if inputs.shape[1] != self.initial_layer.in_features:
            raise Left("a context that the network does not take")
        gates = [block.context_layer(context).sigmoid() for block in self.blocks]
        return _networks.mlp(inputs, layers, residual=True, gates=gates)
