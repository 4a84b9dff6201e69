"""`patch()` for nflows: rational-quadratic splines, affine couplings, and the inverse of autoregressive splines.

The functions of `nflows.transforms.splines.rational_quadratic` are replaced in all modules that have imported them, and
couplings and autoregressive layers of splines take a shorter way to the same operator, models made before the patch
too. The inverse of `MaskedPiecewiseRationalQuadraticAutoregressiveTransform` is one sweep, where nflows takes a pass of
the network for each feature.
"""

from functools import partial
from typing import Any

from torch import Tensor

from genfuse.integrations import _nsf
from genfuse.integrations._patch import Left, Peer, affine, check_large, inherits

_peer = Peer("nflows", "0.14")
patch = _peer.patch
unpatch = _peer.unpatch
report = _peer.report

from nflows.nn.nets import resnet
from nflows.transforms import autoregressive, coupling, lu, made
from nflows.transforms.splines import rational_quadratic as splines

_COUPLING = coupling.PiecewiseRationalQuadraticCouplingTransform
_AUTOREGRESSIVE = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform

_peer.replaces(_COUPLING, "_coupling_transform", quick=True)(_nsf.coupling(_COUPLING))
_peer.replaces(resnet.ResidualNet, "forward")(_nsf.residual_net(resnet))
_peer.replaces(made.MADE, "forward")(_nsf.made_net(made))
_peer.replaces(lu.LULinear, "_create_lower_upper")(_nsf.triangles)
_nsf.replace_splines(_peer, splines, circular=False)


def _affine(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    check_large(inputs)
    inherits(self, coupling.AffineCouplingTransform, "_scale_and_shift")
    scale, shift = self._scale_and_shift(transform_params)
    return affine(inputs, scale.log(), shift, inverse=inverse)


_peer.replaces(coupling.AffineCouplingTransform, "_coupling_transform_forward")(partial(_affine, inverse=False))
_peer.replaces(coupling.AffineCouplingTransform, "_coupling_transform_inverse")(partial(_affine, inverse=True))


@_peer.replaces(_AUTOREGRESSIVE, "_elementwise", quick=True)
def _elementwise(self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Any:
    if hasattr(self.autoregressive_net, "hidden_features"):
        raise Left("a network of somebody's own")
    return _nsf.elementwise(self, 1.0, inputs, autoregressive_params, inverse=inverse)


@_peer.replaces(autoregressive.AutoregressiveTransform, "inverse")
def _inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if not isinstance(self, _AUTOREGRESSIVE):
        raise Left(f"{type(self).__name__}, which has no operator")
    inherits(self, _AUTOREGRESSIVE, "_elementwise", "_elementwise_inverse")
    options = _nsf.settings(self, 1.0)
    return _nsf.autoregressive(self, inputs, context, made, **options)


@_peer.replaces(autoregressive.MaskedAffineAutoregressiveTransform, "_elementwise_forward")
def _softplus(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
    raise Left("its scale is a softplus, which no operator has")
