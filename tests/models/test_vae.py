import itertools
import math
from dataclasses import asdict

import pytest
import sklearn.decomposition
import torch
from torch import distributions

import genfuse
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, SettingsError
from genfuse.models import Batch
from genfuse.models._base import configure
from genfuse.models.vae import VAE, VAEConfig
from genfuse.ops import kl_per_dimension, reparameterize_kl

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
    return VAE(VAEConfig(**{**SMALL, **settings}))


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
    sizes = [tuple(p.shape) for p in VAE(VAEConfig()).parameters() if p.ndim == 2]
    assert sizes == [(256, 784), (256, 256), (40, 256), (256, 20), (256, 256), (784, 256)]


def test_mu_and_logvar_are_views_of_one_output():
    mu, logvar = vae().encode(examples())
    assert mu.untyped_storage().data_ptr() == logvar.untyped_storage().data_ptr()
    assert mu.stride() == logvar.stride() == (6, 1)


def test_loss_is_the_negative_elbo_of_the_textbook():
    model, x = vae(), examples()
    torch.manual_seed(3)
    total, terms = model.loss(Batch(x), "model")
    mu, logvar = model.encode(x)
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
        weights.append(float(model.beta()))
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
    assert float(other.beta()) == 0.5
    assert torch.equal(other.elbo(examples(), generator=seeded()), model.elbo(examples(), generator=seeded()))


def test_free_bits_are_a_floor_per_dimension_of_the_batch_mean():
    x = examples()
    free, paid = vae(free_bits=100.0), vae(free_bits=0.01)
    total, terms = free.loss(Batch(x), "model")
    torch.testing.assert_close(total.detach(), terms["reconstruction"] + 3 * 100)
    assert terms["kl"] < 1
    total, terms = paid.loss(Batch(x), "model")
    per_dimension = kl_per_dimension(*paid.encode(x)).mean(0)
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
    middle = (model.encode(x[:3])[0] + model.encode(x[3:])[0]) / 2
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
        mu, _ = model.encode(x)
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
        ({"decoder": "logistic"}, "decoder must be one of bernoulli, "),
        ({"variance": "learned"}, "variance must be one of fixed, shared, per-cell"),
        ({"shape": ()}, "shape must have at least one axis"),
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
        model = VAE(VAEConfig(shape=shape, levels=None, decoder="gaussian", sigma=3.0, variance="fixed", hidden=()))
        drawn, mean = (model.sample(2000, generator=torch.Generator().manual_seed(0), mean=m) for m in (None, True))
        return float((drawn - mean).std())

    assert spread((1, 2, 2)) == 0.0
    assert 2.8 < spread((4,)) < 3.2


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
        z0, logdet = model.posterior.inverse(z, context.expand(len(z), -1))
        log_q = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(z0).sum(-1) + logdet
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        cell = float(side[1] - side[0]) ** 2
        assert abs(float(log_q.exp().sum() * cell) - 1) < 1e-3
        exact = float((log_q.exp() * (log_q - log_p)).sum() * cell)
        many = [t.expand(40_000, -1) for t in (mu, logvar, context)]
        _, kl = model._draw(*many)
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
