"""`patch()` for zuko: univariate transforms of flows, and the inverse of masked autoregressive ones in one sweep.

MonotonicRQSTransform and MonotonicAffineTransform call `genfuse.ops`, and with them the flows that are made of them
(NSF, NCSF, MAF, NICE, RealNVP), made before the patch or after; so does sampling of MAF and NSF, for which zuko takes a
pass of the network for each feature.
"""

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from genfuse import ops
from genfuse.integrations import _networks
from genfuse.integrations._patch import Left, Peer, joined

_peer = Peer("zuko", "1.6.0")
patch = _peer.patch
unpatch = _peer.unpatch
report = _peer.report

from zuko import transforms
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.nn import MLP, Linear, MaskedLinear, MaskedMLP


class _Fused:
    """What zuko's transform becomes if it is made under the patch. It stays so, and an instance of zuko's class."""

    _kind: type  # zuko's class
    _init: Any  # its __init__
    _kept = 0  # how many of its parameters zuko reads when it is called; it computes from the others when it is made
    _given: tuple[tuple[Tensor, ...], dict[str, Any]]  # its arguments
    _writes: list[int]  # to each of these others, until it was made; none while they cannot be counted

    @property
    def _raw(self) -> tuple[Tensor, ...]:
        """The parameters, which have to be as they were when it was made."""
        raw = self._given[0]
        counted = self._writes and not torch.compiler.is_compiling()
        if counted and self._writes != [_networks.writes(t) for t in raw[self._kept :]]:
            raise RuntimeError(
                f"parameters of {self._kind.__name__} were written to after it was made, when zuko computes from "
                "them: make the transform anew, or of copies of them"
            )
        return raw

    @cached_property
    def _theirs(self) -> Any:
        made: Any = object.__new__(self._kind)
        with torch.inference_mode(False):  # and with gradients, whoever is the first to ask
            self._init(made, *self._raw, **self._given[1], cache_size=self._cache_size)
        return made

    def __getattr__(self, name: str) -> Any:  # knots, scales and the like, computed if they are asked for
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._theirs, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:  # of which our operators know nothing: from now on it is zuko's own, with the cache that it has
            theirs = vars(self._theirs)
            self.__dict__ = theirs | {each: old for each, old in vars(self).items() if each in theirs}
            self.__class__ = self._kind
            setattr(self, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:  # to what is zuko's own wherever it is loaded
        return self._theirs.__reduce_ex__(1)  # pickle refuses those from 2 on, which name another class than ours

    def _fused(self, x: Tensor, raw: Any, *, inverse: bool, **options: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _ours(self, x: Tensor, verb: str) -> tuple[Tensor, Tensor]:
        y, ladj = self._fused(x, self._raw, inverse=verb == "_inverse", **self._given[1])
        return y, ladj.to(x.dtype)  # which operators give in float32 for 16-bit x

    def _left(self, x: Tensor, verb: str) -> Any:
        result = getattr(self._theirs, verb)(x)
        return result if verb == "call_and_ladj" else (result, None)

    def _call(self, x: Tensor) -> Tensor:
        return _peer.serve(self._kind.__name__, self._ours, self._left, x, "_call")[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return _peer.serve(self._kind.__name__, self._ours, self._left, y, "_inverse")[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _peer.serve(self._kind.__name__, self._ours, self._left, x, "call_and_ladj")

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


def _expanded(t: Tensor, shape: torch.Size) -> Tensor:
    """Parameters of all elements of x."""
    if t.shape == shape:
        return t
    try:
        return t.expand(shape)
    except RuntimeError:
        raise Left("parameters of more elements than the tensor has") from None


class _Affine(_Fused, transforms.MonotonicAffineTransform):
    _kept = 1  # the shift

    def _fused(self, x: Tensor, raw: Any, **options: Any) -> tuple[Tensor, Tensor]:
        shift, scale = raw
        params = _expanded(scale, x.shape), _expanded(shift, x.shape)
        return ops.affine_coupling(x, params, scale="softclip", by_element=True, **options)


class _Spline(_Fused, transforms.MonotonicRQSTransform):
    def _fused(self, x: Tensor, raw: Any, **options: Any) -> tuple[Tensor, Tensor]:
        widths, heights, derivatives = raw
        bins = widths.shape[-1]
        if heights.shape != widths.shape or derivatives.shape != (*widths.shape[:-1], bins - 1):
            raise Left("widths, heights and derivatives of different shapes")
        params = _expanded(joined(*raw), torch.Size((*x.shape, 3 * bins - 1)))
        return ops.rational_quadratic_spline(x, params, bins=bins, by_element=True, **options)


def _as_made(t: Tensor) -> Tensor:
    """A parameter as zuko knows it from when a transform is made. Copied is what somebody has, to write to, but not
    what a network returned: a view, or in inference mode, which knows of no views, a part of a storage."""
    if t.is_leaf and t._base is None and not (t.is_inference() and t.nbytes < t.untyped_storage().nbytes()):
        return t.clone()
    return t.detach() if t.requires_grad and not torch.is_grad_enabled() else t


def _fuse(fused: Any, self: Any, *raw: Tensor, cache: dict[str, Any], **options: Any) -> None:
    if type(self) is not fused._kind or not all(isinstance(value, int | float) for value in options.values()):
        _peer.leave(f"transforms.{fused._kind.__name__}", "a class of somebody's own, or a bound in a tensor")
        fused._init(self, *raw, **options, **cache)
        return
    Transform.__init__(self, **cache)
    counted = not torch.compiler.is_compiling() and not ops.transformed()
    made = [_as_made(t) for t in raw[fused._kept :]] if counted else raw[fused._kept :]
    self._given = (*raw[: fused._kept], *made), options
    self._writes = [_networks.writes(t) for t in made] if counted else []
    self.__class__ = fused


for _class, _of in ((_Affine, transforms.MonotonicAffineTransform), (_Spline, transforms.MonotonicRQSTransform)):
    _class.__name__ = _class.__qualname__ = _of.__name__
    _class._kind, _class._init = _of, staticmethod(_of.__init__)


@_peer.puts(transforms.MonotonicAffineTransform, "__init__")
def _affine(self: Any, shift: Tensor, scale: Tensor, slope: float = 1e-3, **cache: Any) -> None:
    _fuse(_Affine, self, shift, scale, slope=slope, cache=cache)


@_peer.puts(transforms.MonotonicRQSTransform, "__init__")
def _spline(
    self: Any, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float = 5.0, slope: float = 1e-3,
    **cache: Any,
) -> None:  # fmt: skip
    _fuse(_Spline, self, widths, heights, derivatives, bound=bound, slope=slope, cache=cache)


for _net, _layer in ((MLP, Linear), (MaskedMLP, MaskedLinear)):

    @_peer.replaces(_net, "forward")
    def _mlp(self: Any, input: Tensor, kind: type = _layer) -> Tensor:
        return _networks.sequential(input, list(self), kind)


@_peer.replaces(transforms.AutoregressiveTransform, "_inverse")
def _inverse(self: Any, y: Tensor) -> Tensor:
    meta: Any = getattr(self.meta, "func", None)
    if getattr(meta, "__func__", None) is not MaskedAutoregressiveTransform.meta:
        raise Left("a function of somebody's own makes the parameters")
    lazy, (context,), features = meta.__self__, self.meta.args, y.shape[-1]
    univariate: Any = lazy.univariate
    args, options = (), {}
    if isinstance(univariate, partial):
        univariate, args, options = univariate.func, univariate.args, univariate.keywords
    shapes = [tuple(shape) for shape in lazy.shapes]
    if univariate is transforms.MonotonicAffineTransform and shapes == [(), ()]:
        options = {"scale": "softclip", "slope": 1e-3, **options}
        rows = torch.arange(2 * features, device=y.device).view(-1, 2).flip(1).flatten()  # the scale comes first
    elif univariate is transforms.MonotonicRQSTransform and len(shapes) == 3 and lazy.total == 3 * shapes[0][0] - 1:
        options, rows = {"bins": shapes[0][0], "bound": 5.0, "slope": 1e-3, **options}, None
    else:
        raise Left(f"a masked network of {getattr(univariate, '__name__', univariate)}")
    layers, activations = list(lazy.hyper)[::2], list(lazy.hyper)[1::2]
    if args or type(lazy.hyper) is not MaskedMLP or not all(type(layer) is MaskedLinear for layer in layers):
        raise Left("residual blocks, or a network of somebody's own")
    if not all(type(activation) is nn.ReLU for activation in activations):
        raise Left("activations that are not ReLU")
    batch = y.shape[:-1]
    if context is not None:
        batch = torch.broadcast_shapes(batch, context.shape[:-1])
        context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
    if not features * batch.numel():
        raise Left("no elements")
    flat = y.expand(*batch, -1).reshape(-1, features)
    x, _ = _networks.inverse(flat, lazy.hyper, layers, rows, context=context, passes=self.passes, **options)
    return x.reshape(*batch, -1)
