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


def _no_operator(layer: Any) -> dict[str, Any]:
    raise Left(f"{type(layer).__name__}, which has no operator")


_nsf.replace_splines(_peer, splines, circular=False)
_nsf.replace_layers(
    _peer, coupling.PiecewiseRationalQuadraticCouplingTransform,
    autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, autoregressive.AutoregressiveTransform,
    lu.LULinear, resnet, made, _no_operator,
)  # fmt: skip
_peer.leaves(
    autoregressive.MaskedAffineAutoregressiveTransform, "_elementwise_forward",
    why="its scale is a softplus, which no operator has",
)  # fmt: skip


def _affine(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    check_large(inputs)
    inherits(self, coupling.AffineCouplingTransform, "_scale_and_shift")
    scale, shift = self._scale_and_shift(transform_params)
    return affine(inputs, scale.log(), shift, inverse=inverse)


_peer.replaces(coupling.AffineCouplingTransform, "_coupling_transform_forward")(partial(_affine, inverse=False))
_peer.replaces(coupling.AffineCouplingTransform, "_coupling_transform_inverse")(partial(_affine, inverse=True))
