import copy
import itertools
import math
import pickle
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import sklearn.decomposition
import torch
from torch import distributions, nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

import genfuse
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, SettingsError
from genfuse.flows import NSF
from genfuse.metrics import evaluate
from genfuse.models import Batch
from genfuse.models._base import configure
from genfuse.models.vae import VAE, VAEConfig, decomposed
from genfuse.nn import Planar, WithContext
from genfuse.nn.likelihoods import Bernoulli, Gaussian
from genfuse.ops import kl_per_dimension, reparameterize_kl
from genfuse.training.run import differences

SMALL = {"shape": (2, 5, 7), "levels": 6, "hidden": (16,), "channels": (4, 8), "latent_dim": 3}
KINDS = [
    {"network": network, "decoder": decoder, **extra}
    for network, (decoder, extra) in itertools.product(
        ("mlp", "conv"),
        [
            ("bernoulli", {}),
            ("gaussian", {"variance": "fixed"}),
            ("gaussian", {"variance": "shared"}),
            ("gaussian", {"variance": "per-cell"}),
            ("categorical", {}),
            ("discretized-logistic", {}),
        ],
    )
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))


def vae(**settings) -> VAE:
    torch.manual_seed(0)
    return VAE.from_config(VAEConfig(**{**SMALL, **settings}))


def examples(n: int = 6) -> torch.Tensor:
    return torch.randint(6, (n, 2, 5, 7), generator=torch.Generator().manual_seed(1)) / 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LINEAR = {"shape": (6,), "levels": None, "hidden": (), "decoder": "gaussian", "variance": "fixed", "sigma": 0.5}


def linear_gaussian(*, latent_dim: int = 2, **settings) -> VAE:
    """A linear VAE in float64 whose log p(x) is known, with q(z | x) near the posterior and not equal to it."""
    model = vae(**LINEAR, latent_dim=latent_dim, **settings).double()
    W = model.decoder[0][0].weight.detach()
    precision = W.T @ W / 0.25 + torch.eye(latent_dim)
    with torch.no_grad():
        encoder = model.encoder[1][0]
        encoder.weight.zero_()
        encoder.weight[:latent_dim] = torch.linalg.solve(precision, W.T) / 0.25
        encoder.bias[:latent_dim] = -encoder.weight[:latent_dim] @ model.decoder[0][0].bias
        encoder.bias[latent_dim:] = -precision.diagonal().log() + 0.3
    return model


def exact_log_prob(model: VAE, x: torch.Tensor) -> torch.Tensor:
    """log N(x; b, W W^T + sigma^2 I) of a linear VAE."""
    W, b = model.decoder[0][0].weight.detach(), model.decoder[0][0].bias.detach()
    _, logvar = model.likelihood.mean_and_logvar(x[..., None])
    return distributions.MultivariateNormal(b, W @ W.T + logvar.detach().exp() * torch.eye(len(b))).log_prob(x)


def exact_data(model: VAE, n: int) -> torch.Tensor:
    torch.manual_seed(5)
    return model.sample(n, mean=False)


@each_kind
def test_every_kind_trains_all_its_parameters_and_gives_examples_back(kind):
    model, x = vae(**kind), examples()
    total, terms = model.loss(Batch(x), "model")
    total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
    torch.testing.assert_close(terms["reconstruction"] + terms["kl"], total.detach())
    assert model.decode(torch.randn(4, 6, 3)).shape == (4, 6, 2, 5, 7)
    assert model.reconstruct(x).shape == x.shape
    assert model.sample(3).shape == model.sample(3, mean=False).shape == (3, 2, 5, 7)
    assert model.elbo(x).shape == model.iwae_bound(x, 3).shape == model.anomaly_score(x, 3).shape == (6,)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 9, 6), (1, 1, 11), (2, 1, 1)], ids=str)
def test_images_of_any_size(network, shape):
    model = vae(shape=shape, network=network)
    x = torch.rand(2, *shape)
    model.loss(Batch(x), "model")[0].backward()
    assert model.reconstruct(x).shape == (2, *shape)


def test_the_default_is_the_architecture_of_the_paper():
    sizes = [tuple(p.shape) for p in VAE.from_config(VAEConfig()).parameters() if p.ndim == 2]
    assert sizes == [(256, 784), (256, 256), (40, 256), (256, 20), (256, 256), (784, 256)]


def test_mu_and_logvar_are_views_of_one_output():
    mu, logvar, _ = vae()._encoded(examples())
    assert mu.untyped_storage().data_ptr() == logvar.untyped_storage().data_ptr()
    assert mu.stride() == logvar.stride() == (6, 1)


def test_loss_is_the_negative_elbo_of_the_textbook():
    model, x = vae(), examples()
    torch.manual_seed(3)
    total, terms = model.loss(Batch(x), "model")
    mu, logvar, _ = model._encoded(x)
    torch.manual_seed(3)
    z, _ = reparameterize_kl(mu, logvar)
    q, prior = distributions.Normal(mu, (logvar / 2).exp()), distributions.Normal(0, 1)
    kl = distributions.kl_divergence(q, prior).sum(1)
    log_likelihood = distributions.Bernoulli(logits=model.decoder(z).squeeze(-1), validate_args=False).log_prob(x)
    elbo = log_likelihood.sum((1, 2, 3)) - kl
    torch.testing.assert_close(total, -elbo.mean())
    torch.testing.assert_close(terms, {"reconstruction": -log_likelihood.sum((1, 2, 3)).mean(), "kl": kl.mean()})
    torch.manual_seed(3)
    torch.testing.assert_close(model.elbo(x), elbo)


def test_the_seed_rules_the_loss_and_the_generator_rules_the_verbs():
    model, x = vae(), examples()
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(model.loss(Batch(x), "model")[0].item())
    assert losses[0] == losses[1] != losses[2]
    for verb in (
        lambda g: model.sample(4, generator=g),
        lambda g: model.sample(4, generator=g, mean=False),
        lambda g: model.elbo(x, generator=g),
        lambda g: model.iwae_bound(x, 4, generator=g),
        lambda g: model.anomaly_score(x, 4, generator=g),
    ):
        assert torch.equal(verb(seeded()), verb(seeded()))
        assert not torch.equal(verb(seeded()), verb(seeded(1)))


def test_bounds_rise_from_the_elbo_to_log_p():
    model = linear_gaussian()
    x = exact_data(model, 2000)
    exact = exact_log_prob(model, x).mean().item()
    elbo = torch.stack([model.elbo(x, generator=seeded(k)).mean() for k in range(20)]).mean().item()
    k2, k10, k500 = (model.iwae_bound(x, k, generator=seeded()).mean().item() for k in (2, 10, 500))
    assert elbo < k2 < k10 < k500 < exact + 1e-3
    assert exact - k500 < 0.01 < 0.05 < exact - elbo


def test_samples_come_from_the_model():
    model = linear_gaussian()
    x = exact_data(model, 50_000)
    W, b = model.decoder[0][0].weight.detach(), model.decoder[0][0].bias.detach()
    torch.testing.assert_close(x.mean(0), b, atol=0.02, rtol=0)
    torch.testing.assert_close(x.T.cov(), W @ W.T + 0.25 * torch.eye(6), atol=0.02, rtol=0)


def test_the_bound_is_exact_where_q_is_the_posterior():
    model = linear_gaussian(latent_dim=1)
    x = exact_data(model, 10)
    model.encoder[1][0].bias.data[1] -= 0.3
    torch.testing.assert_close(model.iwae_bound(x, 7), exact_log_prob(model, x))
    torch.testing.assert_close(model.iwae_bound(x, 1), exact_log_prob(model, x))


@pytest.mark.parametrize("decoder", ["bernoulli", "categorical"])
def test_the_chunk_changes_memory_and_not_the_bound(decoder):
    model, x = vae(decoder=decoder), examples()
    whole = model.iwae_bound(x, 9, generator=seeded())
    for chunk in (1, 4, 6, 7, 13, 1000):
        torch.testing.assert_close(model.iwae_bound(x, 9, chunk=chunk, generator=seeded()), whole)


def test_at_most_chunk_latents_are_decoded_at_a_time():
    model, x = vae(), examples()
    decoded = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0].shape[:-1].numel()))
    for chunk in (4, 13):
        decoded.clear()
        model.iwae_bound(x, 9, chunk=chunk)
        assert sum(decoded) == 9 * len(x)
        assert max(decoded) <= chunk


def test_verbs_take_no_examples():
    model = vae()
    assert model.iwae_bound(examples(0)).shape == model.elbo(examples(0)).shape == (0,)
    assert model.sample(0).shape == (0, 2, 5, 7)


def test_iwae_objective_is_the_bound_and_has_its_gradient():
    model = linear_gaussian(iwae_samples=10)
    x = exact_data(model, 4000)
    total, terms = model.loss(Batch(x), "model")
    assert terms.keys() == {"iwae"}
    assert -total.item() == pytest.approx(model.iwae_bound(x, 10).mean().item(), abs=0.02)
    total.backward()
    # Close to the gradient of the exact log-likelihood, as the bound is tight with this many samples
    W = model.decoder[0][0].weight.detach().clone().requires_grad_()
    covariance = W @ W.T + 0.25 * torch.eye(6)
    distributions.MultivariateNormal(model.decoder[0][0].bias.detach(), covariance).log_prob(x).mean().neg().backward()
    torch.testing.assert_close(model.decoder[0][0].weight.grad, W.grad, atol=0.05, rtol=0)


def test_beta_warms_up_linearly_with_the_updates():
    model = vae(beta=4.0, beta_warmup=8)
    weights = []
    for _ in range(11):
        weights.append(float(model.kl_weight()))
        model.after_step("model")
    assert weights == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4, 4]
    assert model.updates.dtype == torch.int64


def test_beta_weighs_the_kl_and_leaves_the_terms():
    model, x = vae(beta=4.0), examples()
    total, terms = model.loss(Batch(x), "model")
    torch.testing.assert_close(total.detach(), terms["reconstruction"] + 4 * terms["kl"])


def test_warm_up_continues_after_loading():
    model = vae(beta_warmup=10)
    for _ in range(5):
        model.after_step("model")
    other = vae(beta_warmup=10)
    other.load_state_dict(model.state_dict())
    assert float(other.kl_weight()) == 0.5
    assert torch.equal(other.elbo(examples(), generator=seeded()), model.elbo(examples(), generator=seeded()))


def test_free_bits_are_a_floor_per_dimension_of_the_batch_mean():
    x = examples()
    free, paid = vae(free_bits=100.0), vae(free_bits=0.01)
    total, terms = free.loss(Batch(x), "model")
    torch.testing.assert_close(total.detach(), terms["reconstruction"] + 3 * 100)
    assert terms["kl"] < 1
    total, terms = paid.loss(Batch(x), "model")
    per_dimension = kl_per_dimension(*paid._encoded(x)[:2]).mean(0)
    floor = per_dimension.clamp(min=0.01).sum()
    assert (per_dimension < 0.01).any()
    torch.testing.assert_close((total - terms["reconstruction"]).detach(), floor.detach())
    torch.testing.assert_close(terms["kl"], per_dimension.sum().detach())


def test_free_bits_give_the_kl_no_gradient_below_the_floor():
    free, reconstruction_alone = vae(free_bits=100.0), vae(beta=0.0)
    for model in (free, reconstruction_alone):
        torch.manual_seed(3)
        model.loss(Batch(examples()), "model")[0].backward()
    for a, b in zip(free.parameters(), reconstruction_alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_interpolation_ends_in_the_reconstructions():
    model, x = vae(), examples()
    path = model.interpolate(x[:3], x[3:], 5)
    assert path.shape == (5, 3, 2, 5, 7)
    torch.testing.assert_close(path[0], model.reconstruct(x[:3]))
    torch.testing.assert_close(path[-1], model.reconstruct(x[3:]))
    middle = (model.encode(x[:3]) + model.encode(x[3:])) / 2
    torch.testing.assert_close(path[2], model.decode(middle))
    torch.testing.assert_close(model.interpolate(x[0], x[3], 5), path[:, 0])
    with pytest.raises(SettingsError, match="at least 2 steps, got 1"):
        model.interpolate(x[0], x[1], 1)


def test_anomalies_score_higher():
    model = linear_gaussian()
    x = exact_data(model, 100)
    assert model.anomaly_score(x + 5).min() > model.anomaly_score(x).max()


def test_bfloat16_autocast_computes_densities_in_float32():
    model, x = vae(iwae_samples=4), examples()
    with torch.autocast("cpu", torch.bfloat16):
        mu = model.encode(x)
        total, _ = model.loss(Batch(x), "model")
        bound = model.iwae_bound(x, 50, generator=seeded())
    total.backward()
    assert mu.dtype == total.dtype == bound.dtype == torch.float32
    torch.testing.assert_close(bound, model.iwae_bound(x, 50, generator=seeded()), atol=0.3, rtol=0)


def test_settings_survive_json():
    config = VAEConfig(**SMALL, decoder="categorical", beta=2.0)
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    assert configure(VAE, settings) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1 and finite, got 0"),
        ({"iwae_samples": 0}, "iwae_samples must be at least 1"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"beta": math.nan}, "beta must be at least 0 and finite, got nan"),
        ({"beta_warmup": -1}, "beta_warmup must be at least 0"),
        ({"free_bits": -0.1}, "free_bits must be at least 0"),
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"hidden": (16, 0)}, "hidden must hold sizes of at least 1"),
        ({"network": "cnn"}, "network must be one of mlp, conv, got 'cnn'"),
        ({"decoder": "logistic"}, "decoder must be one of auto, bernoulli, "),
        ({"variance": "learned"}, "variance must be one of fixed, shared, per-cell"),
        ({"shape": ()}, "shape must hold sizes of at least 1"),
        ({"shape": (12,), "network": "conv"}, "network 'conv' needs images"),
        ({"channels": (), "network": "conv"}, "at least one entry of channels"),
        ({"levels": None, "decoder": "categorical"}, "use decoder 'gaussian'"),
        ({"levels": None, "decoder": "discretized-logistic"}, "use decoder 'gaussian'"),
        ({"iwae_samples": 5, "beta": 2.0}, "no KL term"),
        ({"iwae_samples": 5, "free_bits": 0.1}, "no KL term"),
    ],
    ids=str,
)
def test_an_unusable_setting_is_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        VAEConfig(**{**SMALL, **settings})


@pytest.mark.parametrize("verb", ["elbo", "iwae_bound", "reconstruct"])
def test_examples_of_another_shape_are_refused(verb):
    for shape in ((6, 70), (6, 5, 7), (2, 5, 7)):
        with pytest.raises(DataError, match=r"x must be \(N, 2, 5, 7\)"):
            getattr(vae(decoder="gaussian"), verb)(torch.rand(shape))


def test_samples_and_chunk_below_one_are_refused():
    for settings in ({"samples": 0}, {"samples": 5, "chunk": 0}):
        with pytest.raises(SettingsError, match="must be at least 1"):
            vae().iwae_bound(examples(), **settings)


def test_data_that_the_decoder_cannot_describe_is_refused():
    table = Dataset("csv:x", {part: Split(torch.randn(4, 3)) for part in ("train", "test")})
    with pytest.raises(SettingsError, match=r"--model\.decoder gaussian"):
        vae(shape=(3,)).check_data(table)
    vae(shape=(3,), decoder="gaussian").check_data(table)
    binary = Dataset("b", {part: Split(torch.ones(4, 3, dtype=torch.uint8)) for part in ("train", "test")}, levels=2)
    with pytest.raises(SettingsError, match="has 2 levels, but the decoder was made for 6"):
        vae(shape=(3,), decoder="categorical").check_data(binary)
    with pytest.raises(SettingsError, match="examples of shape"):
        vae(shape=(4,)).check_data(binary)


def test_a_linear_vae_reaches_the_maximum_likelihood_of_probabilistic_pca():
    torch.manual_seed(0)
    W, scale = torch.randn(10, 3), 0.5
    x = torch.randn(500, 3) @ W.T + scale * torch.randn(500, 10) + torch.randn(10)
    best = sklearn.decomposition.PCA(3).fit(x.numpy()).score(x.numpy())

    model = vae(shape=(10,), levels=None, hidden=(), latent_dim=3, decoder="gaussian", variance="shared")
    optimizer = torch.optim.Adam(model.parameters(), 0.03, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1200)
    for _ in range(1200):
        optimizer.zero_grad()
        model.loss(Batch(x), "model")[0].backward()
        optimizer.step()
        schedule.step()
    exact = exact_log_prob(model, x).mean().item()
    elbo = torch.stack([model.elbo(x).mean().detach() for _ in range(20)]).mean().item()
    assert best - 0.01 * abs(best) < elbo < exact < best + 1e-3
    assert model.likelihood.mean_and_logvar(x[..., None])[1].exp().sqrt().item() == pytest.approx(scale, rel=0.05)


def test_samples_of_images_are_means_and_those_of_tables_are_draws():
    def spread(shape):
        settings = {"decoder": "gaussian", "sigma": 3.0, "variance": "fixed", "hidden": ()}
        model = VAE.from_config(VAEConfig(shape=shape, levels=None, **settings))
        drawn, mean = (model.sample(2000, generator=torch.Generator().manual_seed(0), mean=m) for m in (None, True))
        return float((drawn - mean).std())

    assert spread((1, 2, 2)) == 0.0
    assert 2.8 < spread((4,)) < 3.2


# Conditional models: p(x | y).


GIVEN = {"labels": {"conditional": True, "classes": 3}, "context": {"condition": 2}}
each_given = pytest.mark.parametrize("given", GIVEN)


def ys(given, n: int = 6) -> torch.Tensor:
    return torch.arange(n) % 3 if given == "labels" else torch.randn(n, 2, generator=seeded(2))


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("posterior", ["gaussian", "iaf"])
@each_given
def test_every_verb_of_a_conditional_vae_sees_what_is_given(network, posterior, given):
    settings = {"posterior": posterior, "posterior_hidden": (8,), "decoder": "gaussian", **GIVEN[given]}
    model = vae(network=network, **settings).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    x, y = examples(), ys(given)
    z = model.latents(6, generator=seeded())
    verbs = {
        "encode": lambda y: model.encode(x, y),
        "decode": lambda y: model.decode(z, y),
        "reconstruct": lambda y: model.reconstruct(x, y),
        "posterior": lambda y: model.posterior(x, y).log_prob(z),
        "interpolate": lambda y: model.interpolate(x, x.flip(0), 3, y),
        "interpolate_latents": lambda y: model.interpolate_latents(z, z.flip(0), 3, y),
        "sample": lambda y: model.sample(6, y=y, generator=seeded()),
        "draw": lambda y: model.sample(6, y=y, generator=seeded(), mean=False),
        "elbo": lambda y: model.elbo(x, y, generator=seeded()),
        "iwae_bound": lambda y: model.iwae_bound(x, 3, y=y, generator=seeded()),
        "anomaly_score": lambda y: model.anomaly_score(x, 3, y=y, generator=seeded()),
    }
    for name, verb in verbs.items():
        found, other, again = verb(y), verb(y.roll(1, 0)), verb(y)
        assert 6 in found.shape[:2], name
        assert torch.equal(found, again), name
        assert not torch.allclose(found, other), name
    for name in set(verbs) - {"sample", "draw"}:
        with pytest.raises(SettingsError, match="give labels y" if given == "labels" else "give a context y"):
            verbs[name](None)
    with pytest.raises(SettingsError, match="takes no labels"):
        vae().elbo(x, torch.arange(6))


@each_given
def test_the_loss_of_a_conditional_vae_is_the_negative_elbo(given):
    model, x, y = vae(**GIVEN[given]), examples(), ys(given)
    torch.manual_seed(3)
    loss = model(x, y)
    torch.manual_seed(3)
    torch.testing.assert_close(loss, -model.elbo(x, y).mean())
    loss.backward()
    assert all(weight.grad.any() for weight in model.parameters())


def test_one_label_or_row_is_for_all_samples_and_for_the_ends_of_a_way():
    model = vae(**GIVEN["labels"]).eval()
    assert torch.equal(
        model.sample(4, y=2, generator=seeded()), model.sample(4, y=torch.full((4,), 2), generator=seeded())
    )
    x = examples()
    torch.testing.assert_close(
        model.interpolate(x[0], x[1], 3, 2), model.interpolate(x[:1], x[1:2], 3, torch.tensor([2]))[:, 0]
    )
    model = vae(**GIVEN["context"]).eval()
    row = torch.tensor([0.5, -1.0])
    assert torch.equal(
        model.sample(4, y=row, generator=seeded()), model.sample(4, y=row.expand(4, 2), generator=seeded())
    )
    with pytest.raises(SettingsError, match="give a context y"):
        model.sample(4)


@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_the_chunk_does_not_mix_what_is_given(chunk):
    model, x, y = vae(posterior="planar", **GIVEN["labels"]), examples(), ys("labels")
    whole = model.iwae_bound(x, 9, y=y, generator=seeded())
    torch.testing.assert_close(model.iwae_bound(x, 9, y=y, chunk=chunk, generator=seeded()), whole)


def test_a_conditional_vae_learns_what_a_context_means():
    torch.manual_seed(0)
    y = torch.rand(2000, 1) * 4 - 2
    x = torch.cat([y + 0.3 * torch.randn(2000, 1), 0.3 * torch.randn(2000, 1) - y], 1)
    model = VAE.from_config(
        VAEConfig(shape=(2,), levels=None, decoder="gaussian", hidden=(16,), latent_dim=1, condition=1)
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for i in range(400):
        rows = slice(i % 10 * 200, i % 10 * 200 + 200)
        optimizer.zero_grad()
        model(x[rows], y[rows]).backward()
        optimizer.step()
    for value in (-1.5, 0.5):
        drawn = model.sample(2000, y=torch.tensor([value]), generator=seeded())
        torch.testing.assert_close(drawn.mean(0), torch.tensor([value, -value]), atol=0.1, rtol=0)
        torch.testing.assert_close(drawn.std(0), torch.tensor([0.3, 0.3]), atol=0.1, rtol=0)


# VAEs of any networks, likelihood and prior.


class Noise:
    """An own likelihood, no module: N(raw, 0.5^2) of each cell. It knows of no axis before that of the examples."""

    def log_prob(self, raw, x):
        assert raw.shape == x.shape
        return Normal(raw, 0.5).log_prob(x).flatten(1).sum(1)

    def mean(self, raw):
        return raw

    def sample(self, raw, generator):
        return raw + 0.5 * torch.randn(raw.shape, generator=generator, dtype=raw.dtype)


def pca(mean=0.0, std=1.0, likelihood=None, exact=True, **settings) -> VAE:
    """A hand-made linear VAE in float64: z ~ N(mean, std^2), x ~ N(W z + b, 0.25). The columns of W are orthogonal, so
    that the posterior is a diagonal Gaussian, which its q(z | x) is, or if not ``exact`` nearly is."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 4).double(), nn.Linear(2, 6).double()
    with torch.no_grad():
        W = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7])
        decoder.weight.copy_(W)
        precision = (W.T @ W).diagonal() / 0.25 + std**-2
        encoder.weight.zero_()
        encoder.weight[:2] = (W / precision).T / 0.25
        encoder.bias[:2] = mean * std**-2 / precision - encoder.weight[:2] @ decoder.bias
        encoder.bias[2:] = -precision.log() + (0.0 if exact else 0.5)
    return VAE(encoder, decoder, likelihood or Noise(), latent_dim=2, **settings).double()


def density(model, mean=0.0, std=1.0):
    W, b = model.decoder.weight.detach(), model.decoder.bias.detach()
    mean = torch.full((2,), mean, dtype=torch.float64)
    return MultivariateNormal(W @ mean + b, std**2 * W @ W.T + 0.25 * torch.eye(6))


def diagonal(mean, std):
    return Independent(Normal(torch.full((2,), mean).double(), torch.full((2,), std).double()), 1)


def moved(mean, std):  # as a class of distributions whose KL from an Independent nobody registers
    moves = AffineTransform(torch.full((2,), mean).double(), torch.full((2,), std).double(), event_dim=1)
    return TransformedDistribution(diagonal(0.0, 1.0), [moves])


def test_a_hand_made_vae_with_the_exact_posterior_has_the_exact_likelihood():
    model = pca()
    x = density(model).sample((20,))
    exact = density(model).log_prob(x)
    for samples in (1, 7):
        torch.testing.assert_close(model.iwae_bound(x, samples), exact)
    torch.testing.assert_close(model.iwae_bound(x, 7, chunk=3), exact)
    many = torch.stack([model.elbo(x).detach() for _ in range(400)])
    torch.testing.assert_close(many.mean(0), exact, atol=0.3, rtol=0)
    loose = pca(exact=False)
    bounds = [loose.iwae_bound(x, k, generator=seeded()).mean() for k in (1, 3, 300)]
    assert bounds[0] < bounds[1] < bounds[2] < exact.mean() + 0.01
    assert exact.mean() - bounds[2] < 0.01


@pytest.mark.parametrize("make", [diagonal, moved])
def test_another_prior_is_in_the_bound_the_samples_and_the_kl(make):
    model = pca(1.5, 0.6, prior=make(1.5, 0.6))
    x = density(model, 1.5, 0.6).sample((20,))
    exact = density(model, 1.5, 0.6).log_prob(x)
    torch.testing.assert_close(model.iwae_bound(x, 5), exact)
    if make is moved:  # the KL by the draw of z cancels its noise
        torch.testing.assert_close(model.elbo(x), exact)
    torch.manual_seed(3)
    _, terms = model.loss(Batch(x))
    expected = distributions.kl_divergence(model.posterior(x), diagonal(1.5, 0.6)).mean()
    torch.testing.assert_close(terms["kl"], expected, rtol=0, atol=1e-9 if make is diagonal else 0.5)
    z = model.latents(20_000, generator=seeded())
    torch.testing.assert_close(z.mean(0), torch.full((2,), 1.5).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), torch.full((2,), 0.6).double(), atol=0.02, rtol=0)
    drawn = model.sample(20_000, generator=seeded(), mean=False)
    torch.testing.assert_close(drawn.T.cov(), density(model, 1.5, 0.6).covariance_matrix, atol=0.02, rtol=0)
    halfway = model.interpolate_latents(z[:3], z[3:6], 3)[1]
    torch.testing.assert_close(halfway, model.decode((z[:3] + z[3:6]) / 2))


class Mixture(nn.Module):
    """A learned prior: a mixture of Gaussians."""

    def __init__(self, means):
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means))
        self.logits = nn.Parameter(torch.zeros(len(means)))

    def forward(self):
        parts = Independent(Normal(self.means, 0.5 * torch.ones_like(self.means)), 1)
        return MixtureSameFamily(Categorical(logits=self.logits), parts)


def test_a_mixture_as_the_prior_has_the_likelihood_of_a_mixture():
    means = [[-2.0, 0.0], [2.0, 1.0]]
    model = pca(0.0, 2.0, exact=False, prior=Mixture(means))
    W, b = model.decoder.weight.detach(), model.decoder.bias.detach()
    covariance = (0.25 * W @ W.T + 0.25 * torch.eye(6)).expand(2, 6, 6)
    exact = MixtureSameFamily(
        Categorical(torch.ones(2).double()), MultivariateNormal(torch.tensor(means).double() @ W.T + b, covariance)
    )
    x = exact.sample((50,))
    bound = model.iwae_bound(x, 3000, generator=seeded())
    torch.testing.assert_close(bound, exact.log_prob(x), atol=0.1, rtol=0)
    assert model.elbo(x).mean() < exact.log_prob(x).mean()
    model(x).backward()
    assert all(weight.grad.any() for weight in model.prior.parameters())
    z, state = model.latents(4000, generator=seeded()), torch.get_rng_state()
    assert torch.equal(z, model.latents(4000, generator=seeded()))
    assert torch.equal(state, torch.get_rng_state())
    assert abs((z[:, 0] > 0).double().mean() - 0.5) < 0.03
    torch.testing.assert_close(z[z[:, 0] > 0].mean(0), torch.tensor(means[1]).double(), atol=0.05, rtol=0)


def test_a_prior_may_be_given_the_context():
    class Shifted(nn.Module):
        def forward(self, context):
            return Independent(Normal(3 * context, torch.ones_like(context)), 1)

    torch.manual_seed(0)
    encoder, decoder = WithContext(nn.Linear(8, 4), planes=False), WithContext(nn.Linear(4, 6), planes=False)
    model = VAE(encoder, decoder, Noise(), latent_dim=2, prior=Shifted(), embedding=nn.Linear(1, 2))
    y = torch.tensor([[-1.0], [1.0]]).repeat(500, 1)
    z = model.latents(1000, y=y, generator=seeded())
    means = torch.stack([z[::2].mean(0), z[1::2].mean(0)])
    torch.testing.assert_close(means, 3 * model.embedding(y[:2]).detach(), atol=0.2, rtol=0)
    x = torch.randn(1000, 6)
    assert model.iwae_bound(x, 2, y=y).shape == model.elbo(x, y).shape == (1000,)
    model(x, y).backward()
    assert model.embedding.weight.grad.any()
    assert model.sample(5, y=torch.tensor([1.0]), mean=False).shape == (5, 6)


@pytest.mark.parametrize("context", [0, 2])
def test_a_flow_may_be_the_prior(context):
    torch.manual_seed(0)
    networks = nn.Linear(6, 4), nn.Linear(2, 6)
    given, y = {}, None
    if context:
        networks = tuple(WithContext(nn.Linear(before + 2, after), planes=False) for before, after in ((6, 4), (2, 6)))
        given, y = {"embedding": nn.Embedding(3, 2)}, torch.arange(50) % 3
    model = VAE(*networks, Noise(), latent_dim=2, prior=NSF(2, context=context, hidden=(8,)), **given)
    x = torch.randn(50, 6)
    model(x, y).backward()
    assert all(weight.grad is not None for weight in model.prior.parameters())
    z = model.latents(50, y=y, generator=seeded())
    assert torch.equal(z, model.latents(50, y=y, generator=seeded()))
    with torch.no_grad():  # log 1/K sum p(x, z) / q(z | x) of one draw, in the words of torch.distributions
        q, prior = model.posterior(x, y), model.prior(None if y is None else model.embedding(y))
        torch.manual_seed(3)
        z = reparameterize_kl(*model._encoded(x, model.context_of(y, 50))[:2])[0]
        expected = model._log_likelihood(x, z, model.context_of(y, 50)) + prior.log_prob(z) - q.log_prob(z)
        torch.manual_seed(3)
        torch.testing.assert_close(model.iwae_bound(x, 1, y=y), expected)


def test_an_own_flow_as_the_posterior_needs_no_features():
    torch.manual_seed(0)
    model = pca(exact=False, posterior_flow=Planar(2).double())
    x = density(model).sample((30,))
    torch.testing.assert_close(
        model.iwae_bound(x, 3000, generator=seeded()), density(model).log_prob(x), atol=0.1, rtol=0
    )
    model(x).backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("posterior", ["gaussian", "planar", "radial", "iaf"])
def test_the_posterior_is_a_distribution_whose_draws_have_its_density(posterior):
    model = with_posterior(posterior)
    x = torch.randn(2, 2, dtype=torch.float64)
    q = model.posterior(x)
    assert (q.batch_shape, q.event_shape) == ((2,), (2,))
    z = q.rsample((3,))
    assert z.shape == (3, 2, 2)
    assert z.requires_grad
    assert not q.sample().requires_grad
    assert torch.equal(q.log_prob(z)[1], q.log_prob(z[1]))
    side = torch.linspace(-12, 12, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)[:, None].expand(-1, 2, -1)
    with torch.no_grad():
        mass = q.log_prob(grid).exp() * float(side[1] - side[0]) ** 2
        torch.testing.assert_close(mass.sum(0), torch.ones(2).double(), atol=2e-3, rtol=0)
        mean = (mass[..., None] * grid).sum(0)
        torch.testing.assert_close(q.sample((20_000,)).mean(0), mean, atol=0.15, rtol=0)
        weights = torch.stack([model.iwae_bound(x, 1) for _ in range(5)])  # which are as finite as log q is
        assert weights.isfinite().all()
    if posterior == "gaussian":
        torch.testing.assert_close(q.mean, model.encode(x))


def test_latents_are_draws_of_the_prior_and_lie_on_arcs():
    model = vae(latent_dim=8)
    z = model.latents(2000, generator=seeded())
    assert z.shape == (2000, 8)
    torch.testing.assert_close(z.T.cov(), torch.eye(8), atol=0.15, rtol=0)
    way = model.interpolate_latents(z[:2], z[2:4], 5, None)
    assert way.shape == (5, 2, 2, 5, 7)
    torch.testing.assert_close(way[0], model.decode(z[:2]))
    torch.testing.assert_close(way[4], model.decode(z[2:4]))
    ends = z[:2] / z[:2].norm(dim=1, keepdim=True), z[2:4] / z[2:4].norm(dim=1, keepdim=True)
    middle = (ends[0] + ends[1]) / (ends[0] + ends[1]).norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.interpolate_latents(*ends, 3)[1], model.decode(middle))
    with pytest.raises(SettingsError, match="at least 2 steps, got 1"):
        model.interpolate_latents(z[:2], z[2:4], 1)


def hand_made(**settings):
    """A VAE of own networks and an own likelihood, of images that the trainer takes."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 6))
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8)))
    return VAE(encoder, decoder, Noise(), latent_dim=3, shape=(1, 8, 8), levels=17, **settings)


def test_the_trainer_trains_a_hand_made_vae_and_evaluate_measures_it():
    data = genfuse.load_data("digits")
    model = hand_made(prior=Mixture([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    before = model.elbo(data.batch("test", slice(None)).x).mean()
    genfuse.Trainer(steps=60, lr=0.01, device="cpu").fit(model, data)
    assert model.elbo(data.batch("test", slice(None)).x).mean() > before + 1
    assert int(model.updates) == 60
    found = evaluate(model, data, samples=2, limit=50)["test"]
    assert {"elbo", "iwae_bound_2", "reconstruction_error", "active_units"} <= found.keys()
    assert "kl_per_dimension" not in found  # of which only N(0, I) has one
    assert "kl_per_dimension" in evaluate(hand_made(), data, samples=2, limit=50)["test"]


@pytest.mark.parametrize("make", [hand_made, vae, lambda: hand_made(prior=Mixture([[0.0, 0.0, 1.0]]))])
def test_copies_and_what_is_compiled_or_exported_are_the_same(make):
    model = make().eval()
    x = examples() if make is vae else torch.rand(6, 1, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.elbo(x, generator=seeded()), model.elbo(x, generator=seeded()))
        assert torch.equal(other.sample(3, generator=seeded()), model.sample(3, generator=seeded()))
    torch.manual_seed(3)
    loss = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), loss)

    class Reconstructing(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.reconstruct(x)

    exported = torch.export.export(Reconstructing(), (x,)).module()
    torch.testing.assert_close(exported(x), model.reconstruct(x))


# Own loops: nobody has to call `after_step`.


@pytest.mark.parametrize("told", [None, "after_step", "stepped"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_warm_up_counts_each_update_of_an_own_loop_once(told, compiled):
    model, x = hand_made(beta=2.0, beta_warmup=8), torch.rand(6, 1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss = torch.compile(model, backend="eager") if compiled else model
    seen = []
    for _ in range(6):
        seen.append(float(model.kl_weight()))
        for _ in range(2):  # gradients of two batches are added up
            loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        if told:
            getattr(model, told)("model")
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1.25]
    other = hand_made(beta=2.0, beta_warmup=8)
    other.load_state_dict(model.state_dict())
    assert float(other.kl_weight()) == 1.5


def test_a_compiled_loop_alone_warms_up():
    model, x = hand_made(beta=2.0, beta_warmup=4), torch.rand(6, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    loss = torch.compile(model, backend="eager")
    for _ in range(4):
        loss(x).backward()
        optimizer.step()
    torch.manual_seed(0)
    total, terms = model.loss(Batch(x))
    torch.testing.assert_close(total.detach(), terms["reconstruction"] + 2 * terms["kl"])


# What can go wrong with own parts, and runs of former versions.


def test_parts_that_do_not_fit_are_told():
    networks = nn.Linear(6, 4), nn.Linear(2, 6)
    x = torch.randn(3, 6)
    with pytest.raises(SettingsError, match=r"encoder must return \(N, 6\), mu and logvar of 3 latent .* got \(3, 4\)"):
        VAE(*networks, Noise(), latent_dim=3)(x)
    with pytest.raises(SettingsError, match=r"encoder must return \(N, 2\)"):
        VAE(*networks, Noise(), latent_dim=1)(x)
    per_cell = Noise()
    per_cell.log_prob = lambda raw, x: -(raw - x).square()
    with pytest.raises(SettingsError, match=r"one number for each of 3 examples, \(3,\); got \(3, 6\): sum over the"):
        VAE(*networks, per_cell, latent_dim=2)(x)
    loose = Normal(torch.zeros(2), 1.0)
    for prior, got in ((loose, r"event shape \(\)"), (diagonal(0.0, 1.0).expand((3,)), None), (nn.Identity(), None)):
        if got:
            with pytest.raises(SettingsError, match=rf"prior must be a Distribution of event shape \(2,\), .* {got}"):
                VAE(*networks, Noise(), latent_dim=2, prior=prior)

    class Loose(nn.Module):
        def forward(self):
            return loose

    with pytest.raises(SettingsError, match="prior must be a Distribution of event shape"):
        VAE(*networks, Noise(), latent_dim=2, prior=Loose())(x)
    for settings, message in (
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"latent_dim": 2, "beta": -1.0}, "beta must be at least 0"),
        ({"latent_dim": 2, "free_bits": 1.0, "prior": diagonal(0.0, 1.0)}, "free_bits act on the KL of each latent"),
        ({"latent_dim": 2, "iwae_samples": 3, "beta": 2.0}, "no KL term"),
    ):
        with pytest.raises(SettingsError, match=message):
            VAE(*networks, Noise(), **settings)


def test_a_bernoulli_has_no_likelihood_of_grey_values():
    assert vae(decoder="bernoulli").likelihoods == ()
    assert vae(decoder="bernoulli", levels=2).likelihoods == vae(decoder="categorical").likelihoods == ("elbo",)
    networks = nn.Linear(6, 4), nn.Linear(2, 6)
    assert VAE(*networks, Bernoulli(), latent_dim=2, levels=17).likelihoods == ()
    assert VAE(*networks, Gaussian(), latent_dim=2, levels=17).likelihoods == ("elbo",)


def test_weights_and_settings_of_former_versions_are_read():
    model = vae(posterior="iaf", posterior_hidden=(8,))
    old = {name.replace("posterior_flow.", "posterior."): value for name, value in model.state_dict().items()}
    assert any(name.startswith("posterior.") for name in old)
    other = VAE.from_config(model.config)
    other.load_state_dict(old)
    assert torch.equal(other.elbo(examples(), generator=seeded()), model.elbo(examples(), generator=seeded()))
    former = asdict(model.config)
    for name in ("classes", "conditional", "seen_labels", "condition"):
        del former[name]
    assert configure(VAE, VAE.current(former)) == model.config
    now = asdict(configure(VAE, {**former, "classes": 10, "seen_labels": (0, 1)}))  # which data with labels decide
    was, now = ({"model": {"name": "vae", **settings}} for settings in (former, now))
    assert differences(was, now) == []
    assert differences(was, {"model": {**now["model"], "conditional": True}}) != []


FLOWS = ["planar", "radial", "iaf"]


def with_posterior(posterior, **settings):
    """A VAE of pairs with a posterior far from a Gaussian's shape, and wide, so that importance weights are bounded."""
    torch.manual_seed(3)
    settings = {"shape": (2,), "levels": None, "decoder": "gaussian", "latent_dim": 2, "hidden": (8,), **settings}
    model = genfuse.create("vae", posterior=posterior, posterior_hidden=(8,), posterior_context=3, **settings).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
        model.encoder[1][-1].bias[2:4] += 1.5
    return model


@pytest.mark.parametrize("posterior", FLOWS)
def test_the_kl_of_a_flow_posterior_is_the_integral_over_its_density(posterior):
    model = with_posterior(posterior)
    x = torch.randn(1, 2, dtype=torch.float64)
    mu, logvar, context = model._encoded(x)
    side = torch.linspace(-12, 12, 500, dtype=torch.float64)
    z = torch.cartesian_prod(side, side)
    with torch.no_grad():
        z0, logdet = model.posterior_flow.inverse(z, context.expand(len(z), -1))
        log_q = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(z0).sum(-1) + logdet
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        cell = float(side[1] - side[0]) ** 2
        assert abs(float(log_q.exp().sum() * cell) - 1) < 1e-3
        exact = float((log_q.exp() * (log_q - log_p)).sum() * cell)
        many = [t.expand(40_000, -1) for t in (mu, logvar, context)]
        _, kl = model._draw(many)
    assert abs(float(kl.mean()) - exact) < 5 * float(kl.std()) / len(kl) ** 0.5 + 1e-3


@pytest.mark.parametrize("posterior", FLOWS)
def test_bounds_with_a_flow_posterior_approach_the_likelihood(posterior):
    """p(x) by numeric integration over z: above the ELBO, and where the importance-weighted bound ends."""
    model = with_posterior(posterior)
    x = torch.randn(3, 2, dtype=torch.float64)
    side = torch.linspace(-8, 8, 400, dtype=torch.float64)
    z = torch.cartesian_prod(side, side)
    with torch.no_grad():
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        joint = torch.stack([model._log_likelihood(row.expand(len(z), -1), z) + prior for row in x])
        log_p = joint.logsumexp(1) + 2 * math.log(float(side[1] - side[0]))
        elbo = torch.stack([model.elbo(x) for _ in range(200)]).mean(0)
        bound = model.iwae_bound(x, samples=5_000)
    assert (elbo < log_p).all()
    torch.testing.assert_close(bound, log_p, rtol=0, atol=0.1)


@pytest.mark.parametrize("posterior", FLOWS)
def test_a_flow_posterior_trains_all_its_weights_and_has_all_verbs(posterior):
    data = genfuse.load_data("digits")
    model = genfuse.create("vae", data, posterior=posterior, latent_dim=3, hidden=(8,)).train()
    batch = data.batch("train", slice(0, 6))
    loss, terms = model.loss(batch)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert set(terms) == {"reconstruction", "kl"}
    assert model.encode(batch.x).shape == (6, 3)
    assert model.reconstruct(batch.x).shape == batch.x.shape
    assert model.interpolate(batch.x[0], batch.x[1], 3).shape == (3, 1, 8, 8)
    assert model.iwae_bound(batch.x, samples=3).shape == (6,)
    several = genfuse.create("vae", data, posterior=posterior, latent_dim=3, hidden=(8,), iwae_samples=2)
    assert several.loss(batch)[0].isfinite()


def test_settings_of_a_flow_posterior_are_checked():
    for settings, message in [
        ({"posterior": "glow"}, "posterior must be one of gaussian, planar, radial, iaf"),
        ({"posterior": "iaf", "posterior_hidden": ()}, "needs at least one entry of posterior_hidden"),
        ({"posterior": "iaf", "posterior_layers": 0}, "posterior_layers must be at least 1"),
        ({"posterior": "planar", "free_bits": 0.5}, "free_bits act on the KL of each latent dimension"),
    ]:
        with pytest.raises(SettingsError, match=message):
            VAEConfig(**settings)


def test_a_decoder_left_to_itself_is_one_for_the_data():
    assert genfuse.create("vae", shape=(2,), levels=None).config.decoder == "gaussian"
    assert genfuse.create("vae", shape=(1, 8, 8), levels=17).config.decoder == "bernoulli"
    assert genfuse.create("vae", shape=(2,), levels=None, decoder="auto").config.decoder == "gaussian"


def test_a_collapsed_posterior_is_told_once_it_had_time():
    model = genfuse.create("vae", shape=(2,), levels=None)
    assert not model.watch("model", 100, {"kl": 0.01})
    assert not model.watch("model", 1000, {"kl": 1.0})
    assert "q(z | x) is 0.01 nats from the prior" in model.watch("model", 1000, {"kl": 0.01})["collapse"]
    still = genfuse.create("vae", shape=(2,), levels=None, beta_warmup=2000)
    assert not still.watch("model", 1000, {"kl": 0.01})


# Objectives that weigh the total correlation

SPRITES = {"shape": (1, 4, 4), "levels": 2, "hidden": (16,), "latent_dim": 3}


def disentangling(**settings):
    torch.manual_seed(0)
    return VAE.from_config(VAEConfig(**SPRITES, **settings))


def black_and_white(n):
    return torch.randint(0, 2, (n, 1, 4, 4), generator=torch.Generator().manual_seed(n)).float()


def test_the_total_correlation_of_all_examples_at_once_is_exact():
    mu, logvar, noise = (torch.randn(40, 3, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    z = mu + (logvar / 2).exp() * noise
    each = Normal(mu, (logvar / 2).exp())
    log_q = each.log_prob(z[:, None])  # (40, 40, 3)
    joint, marginals = (log_q.sum(-1).logsumexp(1) - math.log(40), log_q.logsumexp(1) - math.log(40))
    information, correlation = decomposed(z, mu, logvar, examples=40)
    assert correlation.item() == pytest.approx((joint - marginals.sum(-1)).mean().item())
    assert information.item() == pytest.approx((each.log_prob(z).sum(-1) - joint).mean().item())


def test_the_density_of_all_codes_is_estimated_without_bias_from_a_batch():
    """In the mean over every batch of three that the example of a code z may be in."""
    mu, logvar = (torch.randn(20, 1, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    z = mu[:1] + 0.3
    exact = Normal(mu, (logvar / 2).exp()).log_prob(z).exp().mean()
    weights = torch.full((3, 3), 19 / 20 / 2, dtype=torch.double).fill_diagonal_(1 / 20)
    found = []
    for others in itertools.combinations(range(1, 20), 2):
        rows = [0, *others]
        log_q = Normal(mu[rows], (logvar[rows] / 2).exp()).log_prob(z)[:, 0]
        information, _ = decomposed(z.expand(3, 1), mu[rows], logvar[rows], 20)
        by_weights = log_q - (weights * log_q.exp()).sum(1).log()
        assert information.item() == pytest.approx(by_weights.mean().item())
        found.append((weights[0] * log_q.exp()).sum().item())
    assert np.mean(found) == pytest.approx(exact.item())


def test_beta_tcvae_with_beta_1_is_the_vae_and_its_parts_add_up_to_the_kl():
    batch = Batch(black_and_white(8))
    torch.manual_seed(1)
    plain, _ = disentangling().loss(batch)
    torch.manual_seed(1)
    loss, terms = disentangling(objective="tc", beta=1.0, examples=100).loss(batch)
    torch.testing.assert_close(loss, plain)
    parts = terms["mutual_information"] + terms["total_correlation"] + terms["dimension_kl"]
    torch.testing.assert_close(parts, terms["kl"])
    torch.manual_seed(1)
    heavy, _ = disentangling(objective="tc", beta=5.0, examples=100).loss(batch)
    torch.testing.assert_close(heavy, plain + 4 * terms["total_correlation"])
    one, terms = disentangling(objective="tc", beta=5.0, examples=100).loss(Batch(black_and_white(1)))
    assert one.isfinite()
    assert terms["total_correlation"].abs() < 1e-5


def test_factor_vae_trains_a_discriminator_of_codes_whose_dimensions_are_permuted():
    model = disentangling(objective="factor", gamma=3.0, discriminator=(8,))
    own, critic = model.players()
    assert {id(p) for p in own.parameters}.isdisjoint(map(id, critic.parameters))
    assert len([*own.parameters]) + len([*critic.parameters]) == len([*model.parameters()])
    batch = Batch(black_and_white(16))
    loss, terms = model.loss(batch, "discriminator")
    assert 0 <= terms["accuracy"] <= 1
    grads = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    assert {n for n, g in zip(names, grads, strict=True) if g is not None} == {
        n for n in names if n.startswith("discriminator.")
    }
    with torch.no_grad():  # a discriminator that knows no better: log D / (1 - D) is its constant
        model.discriminator[-1].weight.zero_()
        model.discriminator[-1].bias.fill_(0.5)
    other = disentangling()
    torch.manual_seed(1)
    plain, _ = other.loss(batch)
    torch.manual_seed(1)
    loss, terms = model.loss(batch)
    assert terms["total_correlation"] == 0.5
    torch.testing.assert_close(loss, plain + 3 * 0.5)


def test_the_discriminator_learns_the_total_correlation_of_a_gaussian():
    """The density-ratio trick: E[log D / (1 - D)] tends to TC = -log(1 - r^2) / 2."""
    r, n = 0.8, 512
    model = disentangling(objective="factor", discriminator=(32, 32))
    shared = torch.linalg.cholesky(torch.tensor([[1, r, 0], [r, 1, 0], [0, 0, 1.0]]))
    model._encoded = lambda x, context=None: (torch.randn(n, 3) @ shared.T, torch.full((n, 3), -20.0), None)
    optimizer = torch.optim.Adam(model.discriminator.parameters(), 3e-3)
    batch = Batch(black_and_white(n))
    for _ in range(500):
        optimizer.zero_grad()
        model.loss(batch, "discriminator")[0].backward()
        optimizer.step()
    with torch.no_grad():
        found = np.mean([model.loss(batch)[1]["total_correlation"].item() for _ in range(20)])
    assert found == pytest.approx(-0.5 * math.log(1 - r**2), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "tcvae"}, "objective must be one of elbo, tc, factor"),
        ({"objective": "tc", "examples": 10, "free_bits": 0.5}, "'tc' weighs parts .* free_bits at 0"),
        ({"objective": "factor", "iwae_samples": 5}, "'factor' weighs .* iwae_samples at 1"),
        ({"objective": "factor", "beta": 4.0}, "'factor' has gamma in place of beta"),
        ({"gamma": 4.0}, "'elbo' has beta in place of gamma: leave gamma out, got 4.0"),
        ({"objective": "tc", "gamma": 4.0}, "'tc' has beta in place of gamma"),
        ({"objective": "factor", "gamma": -1.0}, "gamma must be at least 0"),
        ({"objective": "factor", "discriminator": (0,)}, "discriminator must hold sizes of at least 1"),
        ({"objective": "tc", "examples": 10, "posterior": "iaf"}, "'tc' needs q.* a flow .* at a high cost"),
        ({"objective": "tc"}, "for 'tc' examples, the size of the training split"),
    ],
)
def test_objectives_refuse_what_does_not_go_with_them(settings, words):
    with pytest.raises(SettingsError, match=words):
        disentangling(**settings)


@pytest.mark.parametrize("settings", [{"objective": "tc", "beta": 4.0}, {"objective": "factor"}])
def test_runs_of_both_objectives_resume_bit_for_bit(settings, tmp_path):
    x = black_and_white(64).to(torch.uint8)
    data = Dataset("mine", {"train": Split(x), "test": Split(x[:8])}, levels=2)

    def train(out, steps, **how):
        torch.manual_seed(0)
        model = genfuse.create("vae", data, hidden=(8,), latent_dim=2, beta_warmup=4, **settings)
        genfuse.Trainer(steps=steps, batch_size=16, device="cpu", pictures=False, out=out, **how).fit(model, data)
        return model.state_dict()

    train(tmp_path / "run", 7)
    resumed, whole = train(tmp_path / "run", 12, resume=True), train(tmp_path / "whole", 12)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert whole["updates"] == (12 if settings["objective"] == "tc" else 6)


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "numbers"])
def test_a_value_far_out_has_a_low_density_and_not_none(mixed):
    r = np.random.default_rng(0)
    frame = pd.DataFrame({"a": r.normal(size=300), "b": r.normal(size=300), "c": r.choice(["x", "y"], 300)})
    data = genfuse.load_data(frame if mixed else frame[["a", "b"]])
    model = genfuse.create("vae", data, latent_dim=2)
    genfuse.Trainer(steps=30).fit(model, data)
    rows = data.batch("test", slice(4)).x.repeat(4, 1)
    rows[:, 0] = torch.tensor([0.0, 1e3, 1e6, 1e12]).repeat_interleave(4)
    bounds = model.iwae_bound(rows, 5).view(4, 4)
    assert bounds.isfinite().all()
    assert (bounds.diff(dim=0) < -10).all(), "further out is rarer"
