"""The gradient of a critic in its input, and the penalty on its norm, without double backward where that can be."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from genfuse.ops import _op
from genfuse.ops._gradient_norm_penalty import gradient_norm_penalty
from genfuse.ops._interpolate import interpolate

Pull = Callable[[Tensor], Tensor]  # from the gradient for a layer's output to that for its input
Where = Literal["interpolated", "real", "fake"]

_log = logging.getLogger("genfuse")
_noted: set[tuple[type, type]] = set()  # critics and layers that the log has named


def _weight(layer: Any) -> Tensor:
    """Read once a call: with spectral normalisation each reading takes a step of its iteration."""
    with torch.enable_grad():
        for hook in layer._forward_pre_hooks.values():  # of a normalisation: `_obstacle` lets no other pass
            hook(layer, ())
        return layer.weight


def _linear(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Pull]:
    weight, dtype = _weight(layer), x.dtype  # which autocast may narrow
    return F.linear(x, weight, layer.bias), lambda g: (g @ weight).to(dtype)


def _padding(layer: Any) -> tuple[int, ...] | None:
    """Cells of zeros that a convolution adds on both sides of each axis; None where it adds anything else."""
    after, before = layer._reversed_padding_repeated_twice[::-2], layer._reversed_padding_repeated_twice[-2::-2]
    return tuple(before) if layer.padding_mode == "zeros" and [*before] == [*after] else None


def _conv(layer: Any, x: Tensor, dims: int) -> tuple[Tensor, Pull]:
    weight, padding, dtype = _weight(layer), _padding(layer), x.dtype
    assert padding is not None, "`_obstacle` lets no other pass"
    y = layer._conv_forward(x, weight, layer.bias)
    sizes = x.shape[-dims:], y.shape[-dims:], layer.kernel_size, layer.stride, padding, layer.dilation
    left_over = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in zip(*sizes, strict=True)]
    transposed = getattr(F, f"conv_transpose{dims}d")
    settings = None, layer.stride, padding, left_over, layer.groups, layer.dilation
    return y, lambda g: transposed(g, weight, *settings).to(dtype)


def _relu(layer: nn.ReLU, x: Tensor) -> tuple[Tensor, Pull]:
    y = F.relu(x)
    return y, lambda g: torch.ops.aten.threshold_backward(g, y, 0)


def _leaky_relu(layer: nn.LeakyReLU, x: Tensor) -> tuple[Tensor, Pull]:
    slope = layer.negative_slope
    return F.leaky_relu(x, slope), lambda g: torch.ops.aten.leaky_relu_backward(g, x, slope, False)


def _dropout(layer: Any, x: Tensor) -> tuple[Tensor, Pull]:
    if not (layer.training and layer.p):
        return _reshape(layer, x)
    noise = layer(torch.ones_like(x))
    return x * noise, lambda g: g * noise


def _reshape(layer: nn.Module, x: Tensor) -> tuple[Tensor, Pull]:
    shape = x.shape
    return layer(x), lambda g: g.reshape(shape)


def _pool(layer: nn.Module, x: Tensor) -> tuple[Tensor, Pull]:
    y, pull = torch.func.vjp(layer, x)  # type: ignore[misc]  # linear in g, and has no weights
    return y, lambda g: pull(g)[0]


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
    nn.ReLU.forward: _relu,
    nn.LeakyReLU.forward: _leaky_relu,
    nn.Dropout.forward: _dropout,
    nn.Dropout2d.forward: _dropout,
    nn.Flatten.forward: _reshape,
    nn.Unflatten.forward: _reshape,
    nn.Identity.forward: _reshape,
    nn.AvgPool1d.forward: _pool,
    nn.AvgPool2d.forward: _pool,
    nn.AvgPool3d.forward: _pool,
    nn.AdaptiveAvgPool1d.forward: _pool,
    nn.AdaptiveAvgPool2d.forward: _pool,
    nn.AdaptiveAvgPool3d.forward: _pool,
    nn.MaxPool1d.forward: _pool,
    nn.MaxPool2d.forward: _pool,
    nn.MaxPool3d.forward: _pool,
    nn.Sequential.forward: _sequential,
}


def _says_how(layer: nn.Module) -> bool:
    """Whether it has ``linearized``, of the class that its ``forward`` is of."""
    for kind in type(layer).__mro__:
        if "linearized" in kind.__dict__ or "forward" in kind.__dict__:
            return "linearized" in kind.__dict__
    return False


def _obstacle(layer: nn.Module) -> nn.Module | None:
    """The first layer in it whose Jacobian is not locally constant, as far as is known here. Runs nothing: a layer that
    draws noise or keeps count of its calls must not run twice."""
    hooks = [hook for hook in layer._forward_pre_hooks.values() if not isinstance(hook, SpectralNorm | WeightNorm)]
    if hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return layer
    if "forward" in layer.__dict__:  # of this one alone
        return layer
    if type(layer).forward is nn.Sequential.forward or _says_how(layer):
        return next(filter(None, map(_obstacle, layer.children())), None)
    known = type(layer).forward in _LAYERS
    if known and isinstance(layer, _ConvNd):
        standard = getattr(nn, f"Conv{len(layer.kernel_size)}d")
        known = type(layer)._conv_forward is standard._conv_forward and _padding(layer) is not None
    return None if known else layer


def trace(layer: nn.Module, x: Tensor, *y: Tensor) -> tuple[Tensor, Pull]:
    """A layer's output at x, and its transposed Jacobian there, as a function that is differentiable in the weights.

    What a module's own method ``linearized(trace, x, *y)`` does, which composes those of its children; or what is known
    here. To be called without gradients. Activations overwrite nothing, even those that are set to.
    """
    if _says_how(layer):
        return layer.linearized(trace, x, *y)  # type: ignore[operator]
    if y:
        raise ValueError(
            f"y must be None for a critic that takes no labels, {type(layer).__name__}, got shape {tuple(y[0].shape)}"
        )
    return _LAYERS[type(layer).forward](layer, x)


@_disable_dynamo  # which cannot do this; torch.compiler.disable would import all of it here, for seconds
def _differentiated_twice(critic: Callable[..., Tensor], x: Tensor, *y: Tensor) -> Tensor:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = critic(x.clone(), *y)  # the first layer may overwrite what it is given
        _complain_unless_scores(out, x)
        return torch.autograd.grad(out, x, torch.ones_like(out), create_graph=create_graph)[0]


def input_gradient(critic: Callable[..., Tensor], x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""The gradient of a critic in its input, :math:`\nabla_x f(x)`, differentiable in the critic's parameters.

    A critic of linear and convolution layers (zero padding), ReLU or LeakyReLU, pools, dropout, Flatten and Unflatten,
    in nn.Sequential or in modules that say how they are put together (method ``linearized``, as `genfuse.nn.Residual`
    has it), is piecewise linear: its Jacobian is locally constant. Then the gradient is made by a chain of the
    transposed layers, whose backward pass is an ordinary one, and holds no graph of x. Weights may have spectral or
    weight normalisation. Any other critic, such as one with smooth activations, normalisation of features, hooks or
    code of its own, is differentiated twice by autograd; the log names the layer, once. Both have the same values, at
    the kinks of the activations too. The result is not differentiable in x.

    Args:
        critic: f; ``critic(x)``, or ``critic(x, y)`` where labels are given, is (N,) or (N, 1), and treats each example
            by itself. It is called once, or as if it were. Of a critic that torch.compile made, the original is taken.
        x: (N, ...), float32, float64, float16 or bfloat16.
        y: labels (N,), or whatever the critic takes, with N rows.

    Returns:
        The gradient, of x's shape and dtype.

    Raises:
        ValueError: for x of another dtype or y of another length, and where the critic does not return one number per
            example.
    """
    _op.complain_unless_like(x, "x")
    if y is not None and y.shape[:1] != x.shape[:1]:
        raise ValueError(f"y must have a row for each of the {len(x)} examples, got shape {tuple(y.shape)}")
    critic, labels = getattr(critic, "_orig_mod", critic), () if y is None else (y,)
    obstacle = _obstacle(critic) if isinstance(critic, nn.Module) else critic
    if obstacle is not None:
        _note(critic, obstacle)
        return _differentiated_twice(critic, x, *labels)
    with torch.no_grad():
        out, pull = trace(critic, x.detach(), *labels)  # type: ignore[arg-type]
    _complain_unless_scores(out, x)
    return pull(torch.ones_like(out))


def _note(critic: Callable[..., Tensor], obstacle: Callable[..., Tensor]) -> None:
    names = type(critic), type(obstacle)
    if names in _noted:
        return
    _noted.add(names)
    batch_norm = isinstance(critic, nn.Module) and any(isinstance(layer, _BatchNorm) for layer in critic.modules())
    _log.warning(
        "gradient_penalty differentiates %s twice, which is slower than the chain of transposed layers that it uses "
        "for critics of linear layers, convolutions, pools and ReLU or LeakyReLU: its %s is no such layer, or has hooks"
        "%s",
        *(kind.__name__ for kind in names),
        "; its batch norm couples the examples, so that no gradient is that of one example alone" * batch_norm,
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
        _op.complain_unless_like(x, at)
    gradient = input_gradient(critic, x, y)
    return gradient_norm_penalty(gradient, target=target, one_sided=one_sided, reduction=reduction)
