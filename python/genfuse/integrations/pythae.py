"""`patch()` for pythae: noise and divergence of VAE and BetaVAE, default networks, IAF by one sweep, RAE_GP's penalty.

`VAE.forward` and `BetaVAE.forward` take z and the KL divergence from `genfuse.ops.reparameterize_kl`, with the noise
that pythae would have drawn. The models whose objective is not a divergence times a number are left to pythae.
"""

from typing import Any

import torch
from torch import Tensor, nn

from genfuse import ops
from genfuse.integrations import _networks
from genfuse.integrations._patch import Left, Peer, inherits

_peer = Peer("pythae", "0.1.2")
patch = _peer.patch
unpatch = _peer.unpatch
report = _peer.report

from pythae import models
from pythae.models import normalizing_flows as flows
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import default_architectures as networks
from pythae.models.normalizing_flows.layers import MaskedLinear


def _default(network: Any, levels: Any, last: type[nn.Module] | None) -> list[nn.Linear]:
    """The linear layers of a default network that is called for its result alone."""
    ends = [nn.ReLU] if last is None else [nn.ReLU, last]
    found = [[type(module) for module in layer] for layer in network.layers]
    if levels is not None or found != [[nn.Linear, end] for end in ends]:
        raise Left("results of inner layers, or layers of somebody's own")
    _networks.check_plain(network, *network.modules())
    return [layer[0] for layer in network.layers]


@_peer.replaces(networks.Encoder_VAE_MLP, "forward")
def _encoder(self: Any, x: Tensor, output_layer_levels: Any = None) -> ModelOutput:
    (first,) = _default(self, output_layer_levels, None)
    x = x.reshape(-1, first.in_features)
    _networks.check_served(x)
    heads = self.embedding, self.log_var
    last = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
    both = ops.mlp(x, [first.weight, last[0]], [first.bias, last[1]])
    embedding, log_covariance = both.split([head.out_features for head in heads], 1)
    return ModelOutput(embedding=embedding, log_covariance=log_covariance)


@_peer.replaces(networks.Encoder_AE_MLP, "forward")
def _deterministic_encoder(self: Any, x: Tensor, output_layer_levels: Any = None) -> ModelOutput:
    (first,) = _default(self, output_layer_levels, None)
    return ModelOutput(embedding=_networks.mlp(x.reshape(-1, first.in_features), [first, self.embedding]))


@_peer.replaces(networks.Decoder_AE_MLP, "forward")
def _decoder(self: Any, z: Tensor, output_layer_levels: Any = None) -> ModelOutput:
    out = _networks.mlp(z, _default(self, output_layer_levels, nn.Sigmoid)).sigmoid()
    return ModelOutput(reconstruction=out.reshape((z.shape[0], *self.input_dim)))


def _elbo(self: Any, inputs: Any, kind: type, beta: float) -> ModelOutput:
    inherits(self, kind, "loss_function", "_sample_gauss")
    x = inputs["data"]
    encoded = self.encoder(x)
    mu, log_var = encoded.embedding, encoded.log_covariance
    z, kl = ops.reparameterize_kl(mu, log_var, noise=torch.randn_like(log_var))
    recon_x = self.decoder(z)["reconstruction"]
    none = mu[..., :0]  # of which the divergence is 0
    _, recon_loss, _ = self.loss_function(recon_x, x, none, none, z)
    reg_loss = kl.mean(dim=0)
    loss = recon_loss + beta * reg_loss
    return ModelOutput(recon_loss=recon_loss, reg_loss=reg_loss, loss=loss, recon_x=recon_x, z=z)


@_peer.replaces(models.VAE, "forward")
def _vae(self: Any, inputs: Any, **kwargs: Any) -> ModelOutput:
    return _elbo(self, inputs, models.VAE, 1.0)


@_peer.replaces(models.BetaVAE, "forward")
def _beta_vae(self: Any, inputs: Any, **kwargs: Any) -> ModelOutput:
    return _elbo(self, inputs, models.BetaVAE, self.beta)


def _sample_gauss(self: Any, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    raise Left(f"{type(self).__name__} asks for the sample alone")


for _kind in {value for value in vars(models).values() if isinstance(value, type) and "_sample_gauss" in vars(value)}:
    _peer.replaces(_kind, "_sample_gauss")(_sample_gauss)


@_peer.replaces(models.RAE_GP, "_compute_gp")
def _penalty(self: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(recon_x, x, torch.ones_like(recon_x), create_graph=True)
    return ops.gradient_norm_penalty(gradient.reshape(len(recon_x), -1), target=0.0, reduction="none")


@_peer.replaces(flows.IAF, "forward")
def _iaf(self: Any, x: Tensor, **kwargs: Any) -> ModelOutput:
    for made in self.net:
        if type(made) is flows.MADE and not all(
            type(layer) is (nn.ReLU if i % 2 else MaskedLinear) for i, layer in enumerate(made.net)
        ):
            raise Left("a network of somebody's own")
    x = x.reshape(len(x), -1)
    logdet = torch.zeros(len(x)).to(x.device)
    for layer in self.net:
        if type(layer) is flows.MADE:
            shifts = torch.arange(x.shape[1], device=x.device)
            rows = torch.stack([shifts + len(shifts), shifts], 1).flatten()
            x, more = _networks.inverse(x, layer.net, [*layer.net][::2], rows, scale="exp")
        else:
            out = layer(x)
            x, more = out.out, out.log_abs_det_jac
        logdet += more
        x = x.flip(dims=(1,))
    return ModelOutput(out=x, log_abs_det_jac=logdet)


_peer.leaves(flows.MAF, "inverse", why="it scales before it shifts, which no operator does")
