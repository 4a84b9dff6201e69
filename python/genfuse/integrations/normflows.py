"""`patch()` for normflows: rational-quadratic splines, affine couplings, and the inverse of autoregressive layers.

The functions of `normflows.utils.splines` are replaced in all modules that have imported them, and couplings and
autoregressive layers of splines take a shorter way to the same operator, models made before the patch too. The inverse
of autoregressive layers, which normflows takes for densities, is one sweep in place of a pass of the network for each
feature.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genfuse.integrations import _networks, _nsf
from genfuse.integrations._patch import Left, Peer, affine, check_large, inherits

_peer = Peer("normflows", "1.7.3")
patch = _peer.patch
unpatch = _peer.unpatch
report = _peer.report

from normflows.flows import mixing
from normflows.flows.affine import autoregressive, coupling
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from normflows.nets import made, mlp, resnet
from normflows.utils import splines


def _scales(layer: Any) -> dict[str, Any]:
    kind = autoregressive.MaskedAffineAutoregressive
    inherits(layer, kind, "_elementwise_inverse", "_unconstrained_scale_and_shift")
    return {"scale": "sigmoid", "slope": 1e-3}


_nsf.replace_splines(_peer, splines, circular=True)
_nsf.replace_layers(
    _peer, PiecewiseRationalQuadraticCoupling, MaskedPiecewiseRationalQuadraticAutoregressive,
    autoregressive.Autoregressive, mixing._LULinear, resnet, made, _scales,
)  # fmt: skip
_peer.leaves(
    coupling.MaskedAffineFlow, "forward", "inverse", why="its mask multiplies, so that an operator would save nothing"
)


def _affine(self: Any, z: list[Tensor], *, inverse: bool) -> tuple[list[Tensor], Tensor]:
    """normflows' "sigmoid" divides by the sigmoid, and its "sigmoid_inv" multiplies by it."""
    if not self.scale or self.scale_map not in ("exp", "sigmoid", "sigmoid_inv"):
        raise Left("a coupling without scales")
    z1, z2 = z
    check_large(z2)
    params = self.param_map(z1)
    shift, scale = params[:, 0::2], params[:, 1::2]
    if self.scale_map != "exp":
        scale = F.logsigmoid(scale + 2)
    scale = -scale if self.scale_map == "sigmoid" else scale
    try:
        y, logdet = affine(z2, scale, shift, inverse=inverse)
    except ValueError:  # of other shapes or dtypes; a second call of the network may draw other noise
        scale = -scale if inverse else scale
        y = (z2 - shift) * scale.exp() if inverse else z2 * scale.exp() + shift
        logdet = scale.flatten(1).sum(1)
    return [z1, y], logdet


_peer.replaces(coupling.AffineCoupling, "forward")(partial(_affine, inverse=False))
_peer.replaces(coupling.AffineCoupling, "inverse")(partial(_affine, inverse=True))


def _elements(self: Any, inputs: Tensor, autoregressive_params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    check_large(inputs)
    scale, shift = self._unconstrained_scale_and_shift(autoregressive_params)
    return affine(inputs, (torch.sigmoid(scale + 2) + 1e-3).log(), shift, inverse=inverse)


_peer.replaces(autoregressive.MaskedAffineAutoregressive, "_elementwise_forward")(partial(_elements, inverse=False))
_peer.replaces(autoregressive.MaskedAffineAutoregressive, "_elementwise_inverse")(partial(_elements, inverse=True))


@_peer.replaces(mlp.MLP, "forward")
def _mlp(self: Any, x: Tensor) -> Tensor:
    if type(self.net) is not nn.Sequential:
        raise Left("a network of somebody's own")
    _networks.check_plain(self.net)
    return _networks.sequential(x, list(self.net))
