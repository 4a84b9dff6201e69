"""The gradient of a critic in its input, and the penalty on its norm, without double backward where that can be."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.ops._gradient_norm_penalty import gradient_norm_penalty
from genfuse.ops._interpolate import interpolate

Pull = Callable[[Tensor], Tensor]  # from the gradient for a layer's output to that for its input
Where = Literal["interpolated", "real", "fake"]

_log = logging.getLogger("genfuse")
_noted: set[type] = set()  # layers that the log has named


class _NotPiecewiseLinearError(Exception):
    """Carries the layer whose Jacobian is not locally constant, as far as is known here."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def _itself(t: Tensor) -> Tensor:
    return t


def _linear(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Pull]:
    with torch.enable_grad():
        weight = layer.weight  # read once: with spectral normalisation each reading takes a step of its iteration
    return F.linear(x, weight, layer.bias), lambda g: (g @ weight).to(x.dtype)  # which autocast may have narrowed


def _conv(layer: Any, x: Tensor, dims: int) -> tuple[Tensor, Pull]:
    if type(layer)._conv_forward is not getattr(nn, f"Conv{dims}d")._conv_forward or layer.padding_mode != "zeros":
        raise _NotPiecewiseLinearError(layer)
    padding = layer.padding
    if isinstance(padding, str):
        extents = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        if any(extent % 2 for extent in extents):  # one more cell on one side than on the other
            raise _NotPiecewiseLinearError(layer)
        padding = tuple(extent // 2 for extent in extents)
    with torch.enable_grad():
        weight = layer.weight
    y = layer._conv_forward(x, weight, layer.bias)
    sizes = x.shape[-dims:], y.shape[-dims:], layer.kernel_size, layer.stride, padding, layer.dilation
    left_over = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in zip(*sizes, strict=True)]
    transposed = getattr(F, f"conv_transpose{dims}d")

    def pull(g: Tensor) -> Tensor:
        g = transposed(g, weight, None, layer.stride, padding, left_over, layer.groups, layer.dilation)
        return g.to(x.dtype)

    return y, pull


def _relu(layer: nn.ReLU, x: Tensor) -> tuple[Tensor, Pull]:
    y = layer(x)
    return y, lambda g: torch.ops.aten.threshold_backward(g, y, 0)


def _leaky_relu(layer: nn.LeakyReLU, x: Tensor) -> tuple[Tensor, Pull]:
    y = layer(x)
    kept = y if layer.inplace else x  # both have the sign that is asked for
    return y, lambda g: torch.ops.aten.leaky_relu_backward(g, kept, layer.negative_slope, layer.inplace)


def _average(layer: Any, x: Tensor, dims: int) -> tuple[Tensor, Pull]:
    """The gradient of an average pool is linear in what it is given; of x it takes the shape alone."""
    backward = getattr(torch.ops.aten, f"avg_pool{max(dims, 2)}d_backward")
    size, stride, padding = (
        (v,) * dims if isinstance(v, int) else tuple(v) for v in (layer.kernel_size, layer.stride, layer.padding)
    )
    if dims == 1:
        size, stride, padding = (1, *size), (1, *stride), (0, *padding)
    like = x.unsqueeze(-2) if dims == 1 else x
    like = like.new_empty(1).expand(like.shape)

    def pull(g: Tensor) -> Tensor:
        g = g.unsqueeze(-2) if dims == 1 else g
        g = backward(
            g,
            like,
            size,
            stride,
            padding,
            layer.ceil_mode,
            layer.count_include_pad,
            getattr(layer, "divisor_override", None),
        )
        return g.squeeze(-2) if dims == 1 else g

    return layer(x), pull


def _reshape(layer: nn.Module, x: Tensor) -> tuple[Tensor, Pull]:
    return layer(x), lambda g: g.reshape(x.shape)


def _dropout(layer: Any, x: Tensor) -> tuple[Tensor, Pull]:
    if layer.training and layer.p:
        raise _NotPiecewiseLinearError(layer)
    return x, _itself


def _sequential(layer: nn.Sequential, x: Tensor) -> tuple[Tensor, Pull]:
    pulls = []
    for child in layer:
        x, pull = trace(child, x)
        pulls.append(pull)

    def all_pulls(g: Tensor) -> Tensor:
        for pull in reversed(pulls):
            g = pull(g)
        return g

    return x, all_pulls


# By what is called, which a subclass may have replaced.
_LAYERS: dict[Any, Callable[[Any, Tensor], tuple[Tensor, Pull]]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: partial(_conv, dims=1),
    nn.Conv2d.forward: partial(_conv, dims=2),
    nn.Conv3d.forward: partial(_conv, dims=3),
    nn.AvgPool1d.forward: partial(_average, dims=1),
    nn.AvgPool2d.forward: partial(_average, dims=2),
    nn.AvgPool3d.forward: partial(_average, dims=3),
    nn.ReLU.forward: _relu,
    nn.LeakyReLU.forward: _leaky_relu,
    nn.Flatten.forward: _reshape,
    nn.Unflatten.forward: _reshape,
    nn.Identity.forward: lambda layer, x: (x, _itself),
    nn.Dropout.forward: _dropout,
    nn.Sequential.forward: _sequential,
}


def trace(layer: nn.Module, x: Tensor, *y: Tensor) -> tuple[Tensor, Pull]:
    """A layer's output at x, and its transposed Jacobian there, as a function that is differentiable in the weights.

    What a module's own method ``linearized(trace, x, *y)`` does, which composes those of its children; or what is known
    here. To be called without gradients.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise _NotPiecewiseLinearError(layer)
    if hasattr(layer, "linearized"):
        return layer.linearized(trace, x, *y)  # type: ignore[operator]
    known = _LAYERS.get(type(layer).forward)
    if known is None or y:
        raise _NotPiecewiseLinearError(layer)
    return known(layer, x)


def input_gradient(critic: Callable[..., Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""The gradient of a critic in its input, :math:`\nabla_x f(x)`, differentiable in the critic's parameters.

    A critic of linear, convolution, average-pool, flatten and dropout layers and ReLU or LeakyReLU, in nn.Sequential or
    in modules that say how they are put together (method ``linearized``, as `genfuse.nn.Residual` has it), is piecewise
    linear: its Jacobian is locally constant. Then the gradient is made by a chain of the transposed layers, whose
    backward pass is an ordinary one, and holds no graph of x. Any other critic, such as one with smooth activations,
    normalisation, hooks or code of its own, is differentiated twice by autograd; the log names the layer, once. Both
    have the same values, at the kinks of the activations too. Where the chain is used the result is not differentiable
    in x: that derivative is 0.

    Args:
        critic: f; ``critic(x)``, or ``critic(x, y)`` where labels are given, is (N,) or (N, 1), and treats each example
            by itself.
        x: (N, ...), of any floating dtype.
        y: labels (N,), or whatever the critic takes.

    Returns:
        The gradient, of x's shape.

    Raises:
        ValueError: where the critic does not return one number per example.
    """
    labels = () if y is None else (y,)
    x = x.detach()
    spared: Callable[[Tensor], Tensor] = _itself
    if isinstance(critic, nn.Module):
        if any(getattr(layer, "inplace", False) for layer in critic.modules()):
            spared = torch.clone
        try:
            with torch.no_grad():
                out, pull = trace(critic, spared(x), *labels)
            _complain_unless_scores(out, x)
            return pull(torch.ones_like(out))
        except _NotPiecewiseLinearError as found:
            _note(critic, found.layer)
    with torch.enable_grad():
        x.requires_grad_()
        out = critic(spared(x), *labels)
        _complain_unless_scores(out, x)
        return torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)[0]


def _note(critic: nn.Module, layer: nn.Module) -> None:
    if type(layer) not in _noted:
        _noted.add(type(layer))
        _log.warning(
            "gradient_penalty differentiates %s twice, which is slower than the chain of transposed layers that it "
            "uses for critics of linear layers, convolutions, average pools and ReLU or LeakyReLU: its %s is no such "
            "layer, or has hooks",
            type(critic).__name__,
            type(layer).__name__,
        )


def _complain_unless_scores(out: Tensor, x: Tensor) -> None:
    if tuple(out.shape) not in ((len(x),), (len(x), 1)):
        raise ValueError(
            f"critic must return one number per example, ({len(x)},) or ({len(x)}, 1), got shape {tuple(out.shape)}"
        )


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor | None = None,
    y: Tensor | None = None,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    at: Where = "interpolated",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""What a critic pays for the norm of its gradient, :math:`(\lVert\nabla_x f(x)\rVert_2 - t)^2`.

    WGAN-GP (arXiv 1704.00028, equation 3) at x = e real + (1 - e) fake with e ~ U(0, 1) for each example; with target
    0, R1 at real examples and R2 at fake ones (arXiv 1801.04406, equation 9). Multiply by lambda, or by gamma / 2. The
    gradient is that of `input_gradient`, which says of which critics it is made without double backward.

    Args:
        critic: f; ``critic(x)``, or ``critic(x, y)``, is (N,) or (N, 1).
        real, fake: examples (N, ...) of one shape, dtype and device, which get no gradient. "real" and "fake" need one.
        y: labels of both, (N,), or whatever the critic takes.
        target, one_sided, reduction: as in `gradient_norm_penalty`.
        at: the points at which the gradient is taken.
        generator: of the e.

    Returns:
        (), or (N,) for reduction "none".

    Raises:
        ValueError: where examples are missing, or of another shape, dtype or device; where the critic does not return
            one number per example; and for a setting outside its range.
    """
    if at not in ("interpolated", "real", "fake"):
        raise ValueError(f'at must be "interpolated", "real" or "fake", got {at!r}')
    if fake is None and at != "real":
        raise ValueError(f'fake must be given with at="{at}", got None')
    if at == "interpolated":
        assert fake is not None
        x = interpolate(real.detach(), fake.detach(), generator)
    else:
        x = real if fake is None or at == "real" else fake
    gradient = input_gradient(critic, x, y)
    return gradient_norm_penalty(gradient, target=target, one_sided=one_sided, reduction=reduction)
