"""pythae patched is pythae: every option of what is replaced, in both dtypes, with gradients."""

import pytest
import torch

models = pytest.importorskip("pythae.models", reason="pythae is not installed")

from pythae.models import normalizing_flows as flows

from genfuse.integrations import pythae as peer

SIZES = {"input_dim": (3, 4), "latent_dim": 2}


def loss(model, x):
    def run():
        found = model({"data": x.clone()})
        return tuple(t for t in found.values() if isinstance(t, torch.Tensor))

    return run


@pytest.mark.parametrize("reconstruction_loss", ["mse", "bce"])
@pytest.mark.parametrize("rows", [7, 1])
@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (models.VAE, models.VAEConfig, {}),
        (models.BetaVAE, models.BetaVAEConfig, {"beta": 1.0}),
        (models.BetaVAE, models.BetaVAEConfig, {"beta": 7.5}),
    ],
)
def test_elbos(kind, config, options, rows, reconstruction_loss, same):
    model = kind(config(**SIZES, reconstruction_loss=reconstruction_loss, **options))
    report = same(peer, loss(model, torch.rand(rows, 3, 4)), model)
    networks = {"Encoder_VAE_MLP.forward": 1, "Decoder_AE_MLP.forward": 1}
    assert report.served == {f"{kind.__name__}.forward": 1, **networks}
    assert not report.left


@pytest.mark.parametrize(
    "name", ["DisentangledBetaVAE", "IWAE", "FactorVAE", "BetaTCVAE", "VAE_IAF", "VAE_LinNF", "VAMP", "INFOVAE_MMD"]
)
def test_other_objectives_are_left(name, same):
    config = getattr(models, name + "Config", None) or getattr(models, name + "_Config")
    options = {"dataset_size": 9} if name == "BetaTCVAE" else {}
    model = getattr(models, name)(config(**SIZES, **options))
    report = same(peer, loss(model, torch.rand(8, 3, 4)), model)
    assert sum(report.left[f"{name}._sample_gauss"].values())


def test_a_model_with_a_loss_of_its_own_keeps_it(same):
    class Own(models.VAE):
        def loss_function(self, recon_x, x, mu, log_var, z):
            loss, recon_loss, kld = super().loss_function(recon_x, x, mu, log_var, z)
            return loss + mu.square().mean(), recon_loss, kld

    model = Own(models.VAEConfig(**SIZES))
    report = same(peer, loss(model, torch.rand(8, 3, 4)), model)
    assert report.left["VAE.forward"] == {"Own has a method of its own": 1}


def test_the_gradient_penalty_of_rae(same):
    model = models.RAE_GP(models.RAE_GP_Config(**SIZES))
    assert same(peer, loss(model, torch.rand(8, 3, 4)), model).served["RAE_GP._compute_gp"] == 1


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("features", [2, 5])
def test_inverse_autoregressive_flows(features, layers, batch_norm, same):
    options = {"input_dim": (features,), "hidden_size": 12, "n_hidden_in_made": layers}
    flow = flows.IAF(flows.IAFConfig(**options, include_batch_norm=batch_norm)).eval()
    x = torch.randn(9, features).requires_grad_()

    def run(verb):
        return lambda: (getattr(flow, verb)(x).out, getattr(flow, verb)(x).log_abs_det_jac)

    assert same(peer, run("forward"), x, flow).served["IAF.forward"] == 2
    same(peer, run("inverse"), x, flow)


def test_masked_autoregressive_flows_are_left(same):
    flow, x = flows.MAF(flows.MAFConfig(input_dim=(4,), hidden_size=12)).eval(), torch.randn(9, 4)
    report = same(peer, lambda: flow.inverse(x).out, flow)
    assert report.left == {"MAF.inverse": {"it scales before it shifts, which no operator does": 1}}


@pytest.mark.parametrize("levels", [None, [1], [-1]])
def test_default_networks(levels, same):
    vae, ae = models.VAE(models.VAEConfig(**SIZES)), models.AE(models.AEConfig(**SIZES))
    x, z = torch.rand(5, 3, 4).requires_grad_(), torch.randn(5, 2).requires_grad_()
    for network, given in ((vae.encoder, x), (ae.encoder, x), (vae.decoder, z)):
        report = same(peer, lambda network=network, given=given: tuple(network(given, levels).values()), given, network)
        assert bool(report.left) == (levels is not None)
