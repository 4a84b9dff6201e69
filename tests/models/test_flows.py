"""Flows as models: exact densities, samples that follow them, discrete data, labels, odd input, and whole runs."""

import copy
import dataclasses
import json
import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sklearn.datasets import load_breast_cancer
from torch.distributions import MultivariateNormal, Normal

import genfuse
from benchmarks._measure import Side, peak_memory
from genfuse import flows, plugins
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, SettingsError, TrainingWarning
from genfuse.flows import Flow, StandardNormal
from genfuse.metrics import evaluate
from genfuse.models import Batch, FlowModel, configure
from genfuse.nn import ActNorm, AffineCoupling, Flatten, LULinear, Planar, Transform
from genfuse.training.run import differences

SMALL = {
    "realnvp": {"layers": 4, "hidden": (16, 16)},
    "glow": {"steps": 3, "hidden": (16,)},
    "maf": {"layers": 3, "hidden": (16,)},
    "iaf": {"layers": 3, "hidden": (16,)},
    "nsf": {"layers": 2, "bins": 4, "hidden": (16,)},
    "nsf-ar": {"layers": 2, "bins": 4, "hidden": (16,)},
    "planar": {"layers": 5},
    "radial": {"layers": 5},
}
IMAGES = {
    "realnvp-images": {"shape": (1, 4, 4), "network": "conv", "channels": (4,)},
    "glow-images": {"shape": (2, 4, 4), "channels": (4,), "steps": 2},
}
every_model = pytest.mark.parametrize("name", SMALL)
every_model_and_images = pytest.mark.parametrize("name", [*SMALL, *IMAGES])
COUPLINGS = ("realnvp", "glow", "nsf")
CLASSES = {"conditional": True, "classes": 3}


def create(name, shape=(2,), levels=None, **settings):
    own = {"shape": shape, **SMALL[name]} if name in SMALL else IMAGES[name]
    return genfuse.create(name.removesuffix("-images"), **{**own, "levels": levels, **settings})


def scrambled(name, shape=(2,), dtype=torch.float64, size=0.2, **settings):
    """In evaluation mode, with noise on all parameters, so that none is where it starts."""
    torch.manual_seed(0)
    model = create(name, shape, **settings).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn_like(p)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(model, n, dtype=torch.float64):
    return torch.randn(n, *model.config.shape, dtype=dtype)


@every_model_and_images
@pytest.mark.parametrize("conditional", [{}, CLASSES], ids=["plain", "conditional"])
def test_log_prob_is_that_of_the_autograd_jacobian(name, conditional):
    model = scrambled(name, (3,), **conditional)
    x, labels = points(model, 2), torch.tensor([2, 0])
    given = {"y": labels} if conditional else {}
    found = model.log_prob(x, **given)
    z = model.encode(x, **given)
    for i in range(2):
        own = {key: y[i : i + 1] for key, y in given.items()}
        jacobian = torch.autograd.functional.jacobian(lambda x, own=own: model.encode(x, **own).flatten(), x[i : i + 1])
        logdet = torch.linalg.slogdet(jacobian.view(z.shape[1], -1)).logabsdet
        torch.testing.assert_close(found[i], Normal(0, 1).log_prob(z[i]).sum() + logdet, rtol=0, atol=1e-9)


# In float32 the limit is the conditioning of the scrambled layers together: splines with slopes of 1e-3 among them.
@every_model_and_images
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_decode_undoes_encode(name, dtype, tolerance):
    if name == "nsf" and dtype is torch.float32:
        tolerance *= 10
    model = scrambled(name, (3,), dtype, **CLASSES)
    x, y = points(model, 100, dtype), torch.arange(100) % 3
    z = model.encode(x, y)
    assert z.shape == (100, model.config.dimensions)
    torch.testing.assert_close(model.decode(z, y), x, rtol=0, atol=tolerance)
    *_, last = steps = model.trajectory(z, y)
    torch.testing.assert_close(last, model.decode(z, y))
    assert torch.equal(steps[0], z)
    assert len(steps) == 1 + len(model.flow.transform.transforms)


CELLS, FINE = 24, 35  # cells along each side, and points along each side of a cell


@pytest.fixture(scope="module")
def grid():
    """A model, cells that cover nearly all of it, and z and the log-determinant at the middle of parts of each."""
    made = {}

    @torch.no_grad()
    def grid(name):
        if name not in made:
            model = scrambled(name)
            x = model.sample(50_000, generator=seeded(1))
            low, high = x.amin(0), x.amax(0)
            low, high = low - 0.3 * (high - low), high + 0.3 * (high - low)
            n = CELLS * FINE
            at = low + (torch.arange(n).double()[:, None] + 0.5) / n * (high - low)
            z, logdet = model.flow.transform(torch.cartesian_prod(at[:, 0], at[:, 1]))
            made[name] = model, low, high, z, logdet
        return made[name]

    return grid


def probabilities(low, high, z, logdet, temperature):
    """Of each cell, by the density of latents with this standard deviation."""
    log_density = Normal(0, torch.tensor(temperature, dtype=torch.float64)).log_prob(z).sum(1) + logdet
    parts = (log_density.exp() * (high - low).prod() / len(z)).view(CELLS, FINE, CELLS, FINE)
    return parts.sum((1, 3))


@every_model
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_density_integrates_to_one_and_samples_follow_it(name, temperature, grid):
    model, low, high, z, logdet = grid(name)
    p = probabilities(low, high, z, logdet, temperature)
    assert abs(p.sum() - 1) < 1e-3
    n = 20_000
    x = model.sample(n, temperature=temperature, generator=seeded(2))
    edges = [torch.linspace(a, b, CELLS + 1).numpy() for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    counts = np.histogram2d(*x.T.numpy(), edges)[0].ravel()
    expected = n * p.numpy().ravel()
    large = expected > 10
    rest = n - counts[large].sum(), n - expected[large].sum()
    observed, wanted = np.append(counts[large], rest[0]), np.append(expected[large], rest[1])
    assert large.sum() > 8
    assert chisquare(observed, wanted).pvalue > 1e-3


@every_model
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sample_and_log_prob_agree_with_sample_and_log_prob(name, temperature):
    model = scrambled(name, (3,), **CLASSES)
    y = torch.arange(50) % 3
    x, log_prob = model.sample_and_log_prob(50, y=y, temperature=temperature, generator=seeded())
    torch.testing.assert_close(x, model.sample(50, y=y, temperature=temperature, generator=seeded()))
    z, logdet = model.flow.transform(x, torch.nn.functional.one_hot(y, 3).double())
    torch.testing.assert_close(
        log_prob,
        Normal(0, torch.tensor(temperature, dtype=torch.float64)).log_prob(z).sum(1) + logdet,
        rtol=0,
        atol=1e-8,
    )
    if temperature == 1:
        torch.testing.assert_close(log_prob, model.log_prob(x, y), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in COUPLINGS])
def test_a_density_of_one_dimension(name):
    model = scrambled(name, (1,))
    x = model.sample(5000, generator=seeded())
    at = torch.linspace(float(x.min()) - 5, float(x.max()) + 5, 40_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        assert abs(torch.trapezoid(model.log_prob(at).exp(), at[:, 0]) - 1) < 1e-3
        torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=0, atol=1e-10)


@every_model_and_images
def test_zero_rows_and_strides(name):
    model = scrambled(name, (3,))
    x = points(model, 4)
    strided = x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not strided.is_contiguous()
    torch.testing.assert_close(model.log_prob(strided), model.log_prob(x), rtol=0, atol=1e-12)
    assert model.sample(0).shape == (0, *model.config.shape)
    assert model.decode(x.new_zeros(0, model.config.dimensions)).shape == (0, *model.config.shape)
    if name != "nsf-ar":  # whose layer cannot be viewed where there are no rows
        assert model.log_prob(x[:0]).shape == (0,)
        assert model.encode(x[:0]).shape == (0, model.config.dimensions)


@every_model_and_images
def test_a_row_of_nan_stays_the_only_one(name):
    model = scrambled(name, (3,))
    x = points(model, 5)
    for function in (model.log_prob, model.encode, lambda x: model.decode(x.flatten(1))):
        clean, broken = function(x), x.clone()
        broken[2].view(-1)[0] = math.nan
        found = function(broken)
        torch.testing.assert_close(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]], rtol=0, atol=1e-12)
        assert found[2].isnan().any()


@every_model_and_images
def test_training_under_autocast(name):
    model = scrambled(name, (3,), torch.float32, size=0.05)
    x = points(model, 20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(Batch(x))
        narrow = model.log_prob(x)
    loss.backward()
    assert narrow.dtype is torch.float32
    torch.testing.assert_close(narrow, model.log_prob(x), rtol=0.05, atol=0.2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


DEEP = {name: {"steps" if name.startswith("glow") else "layers": 100} for name in SMALL} | {
    "glow-images": {"steps": 100, "scales": 1}
}


@pytest.mark.parametrize("name", DEEP)
def test_a_hundred_layers_stay_finite(name):
    torch.manual_seed(0)
    model = create(name, **({"shape": (4,)} if name in SMALL else {}), **DEEP[name])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    x = points(model, 30, torch.float32)
    loss, _ = model.loss(Batch(x))  # in training mode: activations are normalised from the first batch on
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(20, generator=seeded()).isfinite().all()


@pytest.mark.parametrize("name", ["realnvp", "glow", "nsf", "maf", "iaf", "planar", *IMAGES])
@pytest.mark.parametrize("conditional", [{}, CLASSES], ids=["plain", "conditional"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_reversible_gradients_are_the_ordinary_ones(name, conditional, dtype, tolerance):
    plain = scrambled(name, (4,), dtype, size=0.05, **conditional)
    config = dataclasses.replace(plain.config, reversible=True)
    memory_free = type(plain).from_config(config).to(dtype).eval()
    memory_free.load_state_dict(plain.state_dict())
    x = points(plain, 30, dtype)
    context = torch.randn(30, 3, dtype=dtype) if conditional else None
    found = []
    for model in (plain, memory_free):
        leaves = [t.clone().requires_grad_() for t in (x, context) if t is not None]
        z, logdet = model.flow.transform(*leaves)
        (z.square().sum() / 2 - logdet.sum()).backward()
        found.append([t.grad for t in (*leaves, *model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(a)


def test_reversible_memory_does_not_grow_with_depth_at_several_scales():
    def peak(steps, reversible):
        model = create("glow-images", steps=steps, reversible=reversible)
        x = points(model, 512, torch.float32)
        return peak_memory(Side(lambda: model.loss(Batch(x))[0].backward()), "cpu")

    assert peak(12, True) < 1.3 * peak(4, True)
    assert peak(12, False) > 2 * peak(4, False)


# Discrete data.


class Probit(Transform):
    """Uniform numbers to standard normal ones."""

    def forward(self, x, context=None):
        z = math.sqrt(2) * torch.erfinv(2 * x)
        return z, -Normal(0, 1).log_prob(z).sum(1)


def uniform(levels):
    """The density of v is 1 on [0, 1]^D."""
    probit = Probit()
    probit.nothing = torch.nn.Parameter(torch.zeros(()))
    return FlowModel(Flow([Flatten((1, 3, 4)), probit], StandardNormal(12)), levels=levels, logit=0.0)


@pytest.mark.parametrize("levels", [2, 3, 256])
def test_a_uniform_density_costs_the_bits_of_the_levels(levels):
    model = uniform(levels)
    x = torch.randint(levels, (20, 1, 3, 4)).double() / (levels - 1)
    torch.testing.assert_close(model.bits_per_dim(x), torch.full((20,), math.log2(levels)).double())
    torch.testing.assert_close(model.elbo(x), torch.full((20,), -12 * math.log(levels)).double())
    total, terms = model.loss(Batch(x))
    assert total.item() == pytest.approx(12 * math.log(levels))
    assert terms["bits_per_dim"].item() == pytest.approx(math.log2(levels))


@every_model
def test_the_bound_lies_just_below_the_probability_of_a_trained_models_levels(name):
    model = scrambled(name, (2,), size=0.05, levels=3, logit=0.05)
    k = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double()
    unit = (torch.arange(40).double() + 0.5) / 40
    within = torch.cartesian_prod(unit, unit)
    with torch.no_grad():
        inside = model.log_prob(((k[:, None] + within) / 3).view(-1, 2)).view(9, -1)
        exact = (inside.exp().mean(1) / 9).log()  # P(x), the integral over the bin
        bound = model.elbo((k / 2).repeat_interleave(4000, 0), generator=seeded()).view(9, -1)
    # uniform noise weights without bias
    error = bound.exp().std(1) / 4000**0.5
    assert ((bound.exp().mean(1) - exact.exp()).abs() < 4 * error + 1e-4).all()
    assert (bound.mean(1) < exact).all()
    assert 0.5 < bound.mean(1).exp().sum() < exact.exp().sum() < 1


@every_model_and_images
@pytest.mark.parametrize("settings", [{"logit": 0.05}, {"logit": 0.0}, CLASSES], ids=["logit", "centred", "labels"])
def test_discrete_examples_come_back_and_samples_lie_on_the_levels(name, settings):
    model = scrambled(name, (4,), size=0.05, levels=6, **settings)
    x = torch.randint(6, (200, *model.config.shape)).double() / 5
    given = {"y": torch.arange(200) % 3} if settings is CLASSES else {}
    assert torch.equal(model.decode(model.encode(x, **given), **given), x)
    samples = model.sample(200, generator=seeded())
    assert torch.equal((samples * 5).round() / 5, samples)
    assert 0 <= samples.min() < samples.max() <= 1
    assert model.likelihoods == ("elbo", "bits_per_dim")


def test_variational_noise_is_trained():
    model = create("realnvp-images", levels=6, dequantization="variational")
    x = torch.randint(6, (20, 1, 4, 4)) / 5
    model.loss(Batch(x))[0].backward()
    assert all(p.grad.any() for name, p in model.dequantize.named_parameters() if "last" in name)
    assert torch.equal(model.elbo(x, generator=seeded()), model.elbo(x, generator=seeded()))


# Labels, and what is refused.


@every_model_and_images
def test_the_density_and_samples_depend_on_the_label(name):
    model = scrambled(name, (3,), **CLASSES)
    x = points(model, 10)
    first, second = (model.log_prob(x, torch.full((10,), label)) for label in (0, 1))
    assert (first - second).abs().min() > 0
    one = model.sample(5, y=1, generator=seeded())
    torch.testing.assert_close(one, model.sample(5, y=torch.ones(5, dtype=torch.long), generator=seeded()))
    assert not torch.allclose(one, model.sample(5, y=2, generator=seeded()))
    loss, _ = model.loss(Batch(x, torch.ones(10, dtype=torch.long)))
    torch.testing.assert_close(loss, -second.mean())


def test_labels_that_do_not_fit_are_refused():
    model, x = create("maf", **CLASSES), torch.randn(4, 2)
    with pytest.raises(SettingsError, match=r"the model is of p\(x \| label\): give labels y, \(4,\), each in 0..2"):
        model.log_prob(x)
    for wrong in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, -1])):
        with pytest.raises(DataError, match=r"labels y must be in 0..2; got "):
            model.log_prob(x, wrong)
    for wrong in (torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.zeros(4, 1, dtype=torch.long)):
        with pytest.raises(DataError, match=r"labels y must be integers \(4,\)"):
            model.log_prob(x, wrong)
    for wrong in (7, torch.zeros(5, dtype=torch.long)):
        with pytest.raises(DataError, match="labels y"):
            model.sample(4, y=wrong)
    bare = create("maf")
    for call in (lambda y: bare.log_prob(x, y), lambda y: bare.sample(4, y=y), lambda y: bare.sample(4, y=1)):
        with pytest.raises(SettingsError, match="the model is not conditional, so it takes no labels"):
            call(torch.zeros(4, dtype=torch.long))


def test_calls_that_a_model_cannot_answer_are_refused():
    model = create("maf")
    with pytest.raises(DataError, match=r"x must be \(N, 2\), as the setting `shape` says; got \(5, 3\)"):
        model.log_prob(torch.randn(5, 3))
    with pytest.raises(SettingsError, match="elbo is for discrete data"):
        model.elbo(torch.randn(5, 2))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SettingsError, match="temperature must be above 0 and finite"):
            model.sample(3, temperature=temperature)
    with pytest.raises(SettingsError, match="sample_and_log_prob is for real-valued data"):
        create("maf", levels=4).sample_and_log_prob(3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *[(name, {"shape": (1,)}, "a coupling needs at least 2 features, or channels, got 1") for name in COUPLINGS],
        ("maf", {"shape": ()}, "shape must hold sizes of at least 1"),
        ("maf", {"levels": 1}, "levels must be at least 2, or None for real-valued data, got 1"),
        ("maf", {"conditional": True}, "conditional needs labels"),
        ("maf", {"logit": 0.5}, "logit must be at least 0 and below 0.5"),
        ("maf", {"levels": 4, "dequantization": "variational"}, "dequantization 'variational' is for images"),
        ("maf", {"dequantization": "none"}, "dequantization"),
        ("maf", {"scale": "softplus"}, "scale"),
        ("maf", {"layers": 0}, "layers must be above 0"),
        ("iaf", {"hidden": (16, 0)}, "hidden must be above 0"),
        ("realnvp", {"scale": "linear"}, "scale"),
        ("realnvp", {"network": "conv"}, r"network 'conv' needs images, shape \(C, H, W\), got \(2,\)"),
        (
            "realnvp",
            {"shape": (1, 6, 6), "network": "conv", "scales": 3},
            "scales would halve height and width 2 times",
        ),
        ("glow", {"shape": (1, 6, 5), "scales": 1}, "scales would halve height and width 1 times"),
        ("glow", {"coupling": "spline"}, "coupling"),
        ("nsf", {"dropout": 0.1, "reversible": True}, "reversible computes each layer twice"),
        ("nsf", {"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ("nsf", {"bins": 1}, "bins must be at least 2"),
        ("nsf", {"bins": 1001}, "bins must be at most 1000"),
        ("nsf-ar", {"bound": math.inf}, "bound must be above 0 and finite"),
        ("planar", {"layers": -1}, "layers must be above 0"),
    ],
)
def test_settings_that_make_no_model_are_refused(name, settings, message):
    with pytest.raises(SettingsError, match=message):
        create(name, **settings)


def test_data_that_the_model_was_not_made_for_is_refused():
    moons, digits = genfuse.load_data("toy:moons"), genfuse.load_data("digits")
    with pytest.raises(SettingsError, match="has real numbers, but the model was made for 4 levels"):
        create("maf", levels=4).check_data(moons)
    with pytest.raises(SettingsError, match="has examples of shape"):
        create("maf").check_data(digits)


def test_shape_levels_and_classes_come_from_the_data():
    config = configure(type(create("glow")), {}, genfuse.load_data("digits"))
    assert (config.shape, config.levels, config.classes) == ((1, 8, 8), 17, 10)


# What is learned of a table, with every setting as it is offered.

OFFERED = {
    "realnvp": [
        *({"scale": scale} for scale in ("softclip", "tanh", "exp", "sigmoid")),
        {"linear": False}, {"squash": False}, {"layers": 4}, {"reversible": True},
    ],
    "maf": [
        *({"scale": scale} for scale in ("softclip", "tanh", "exp", "sigmoid")),
        {"actnorm": False}, {"squash": False}, {"layers": 2}, {"hidden": (64,)}, {"reversible": True},
    ],
    "iaf": [{}, {"scale": "sigmoid"}, {"squash": False}],
    "nsf": [
        {}, {"damped": 1.0}, {"damped": 0.0}, {"squash": False}, {"bins": 2}, {"bins": 32}, {"bound": 1.0},
        {"bound": 6.0}, {"dropout": 0.5}, {"reversible": True},
    ],
    "nsf-ar": [{}, {"damped": 1.0}, {"squash": False}, {"bins": 2}, {"bins": 32}, {"bound": 1.0}, {"bound": 6.0}],
    "glow": [{}, {"coupling": "additive"}, {"squash": False}, {"steps": 2}, {"reversible": True}],
    "planar": [{}], "radial": [{}],
}  # fmt: skip


@pytest.fixture(scope="module")
def cells():
    """30 measurements of 569 tumours, real and strongly correlated: rows to train on, and others."""
    x = torch.tensor(load_breast_cancer().data, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=seeded())]
    return ((x - x[:400].mean(0)) / x[:400].std(0)).split([400, 169])


def trained(name, x, updates=60, **settings):
    torch.manual_seed(0)
    network = {} if name in ("planar", "radial") else {"hidden": (32, 32)}
    model = genfuse.create(name, shape=tuple(x.shape[1:]), levels=None, **{**network, **settings})
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        model.loss(Batch(x[torch.randint(len(x), (100,))]))[0].backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("name", "settings"), [(name, each) for name, offered in OFFERED.items() for each in offered], ids=str
)
def test_every_setting_that_is_offered_learns(name, settings, cells):
    train, test = cells
    model = trained(name, train, 150 if name == "iaf" else 60, **settings)
    with torch.no_grad():
        gain = model.log_prob(test).mean() - Normal(0, 1).log_prob(test).sum(1).mean()
    assert gain > (0.3 if name == "radial" else 5)
    assert model.sample(100, generator=seeded()).isfinite().all()


@pytest.mark.parametrize("name", ["realnvp", "maf", "nsf", "nsf-ar", "glow"])
def test_no_row_explodes_however_far_outside(name):
    torch.manual_seed(0)
    a, noise = torch.randn(2000, 2), 0.05 * torch.randn(2000, 4)
    x = torch.cat([a, a.square() + noise[:, :2], (3 * a).sin() + noise[:, 2:]], 1)
    x = (x - x.mean(0)) / x.std(0)
    model = trained(name, x, 150)
    with torch.no_grad():
        for far in (30 * torch.eye(6), -30 * torch.eye(6), torch.full((1, 6), 30.0)):
            assert model.log_prob(far).min() > -1e8  # of a standard normal -450; with zuko's bounds below -1e10
        assert model.log_prob(x).min() > -200


def test_what_flows_learn_with_by_default():
    for name, damped in (("nsf", 0.25), ("nsf-ar", 0)):
        assert {"damped": damped, "squash": True}.items() <= asdict(genfuse.create(name).config).items()
    for name in ("realnvp", "maf", "iaf"):
        assert {"scale": "softclip", "squash": True}.items() <= asdict(genfuse.create(name).config).items()
    first = genfuse.create("realnvp", shape=(4,), levels=None).flow.transform.transforms[:3]
    assert [type(layer) for layer in first] == [ActNorm, LULinear, AffineCoupling]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("nsf", {}, 64**-0.125), ("nsf", {"damped": 0}, 1), ("nsf", {"damped": False}, 1),  # as former runs have it
        ("nsf", {"damped": True}, 64**-0.5), ("nsf-ar", {}, 1), ("nsf-ar", {"damped": 0.5}, 64**-0.25),
    ],
)  # fmt: skip
def test_raw_widths_and_heights_are_divided_by_a_power_of_the_networks_width(name, settings, expected):
    flow = genfuse.create(name, shape=(4,), hidden=(64,), **settings).flow
    assert {layer.settings["damping"] for layer in flow.modules() if hasattr(layer, "settings")} == {expected}


@pytest.mark.parametrize("damped", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["nsf", "nsf-ar"])
def test_bins_are_damped_by_no_more_than_the_root_of_the_width(name, damped):
    with pytest.raises(SettingsError, match=r"damped must be in \[0, 1\], got"):
        genfuse.create(name, shape=(4,), damped=damped)
    with pytest.raises(ValueError, match=r"damped must be in \[0, 1\], got"):
        {"nsf": flows.NSF, "nsf-ar": flows.NSFAR}[name](4, damped=damped)


# Whole runs.


@pytest.mark.parametrize(
    ("name", "data", "settings", "numbers", "pictures"),
    [
        ("nsf", "toy:pinwheel", SMALL["nsf"], {"log_prob"}, {"samples.png", "density.png", "flow.png"}),
        ("maf", "toy:moons", {**SMALL["maf"], "conditional": True, "reversible": True}, {"log_prob"}, {"density.png"}),
        ("glow", "digits", {"steps": 2, "channels": (8,)}, {"elbo", "bits_per_dim"}, {"samples.png"}),
    ],
    ids=["nsf", "maf", "glow"],
)
def test_a_run_resumes_bit_for_bit_and_is_measured_and_drawn(name, data, settings, numbers, pictures, tmp_path):
    data = genfuse.load_data(data)

    def train(out, **options):
        torch.manual_seed(0)
        model = genfuse.create(name, data, **settings)
        trainer = genfuse.Trainer(**{"steps": 12, "batch_size": 64, "device": "cpu", "out": out, **options})
        return trainer.fit(model, data)

    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", steps=5, pictures=False)
    train(tmp_path / "parts", resume=True, pictures=False)
    for file in ("model.safetensors", "state.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert pictures < {path.name for path in whole.path.rglob("*.png")}
    model = whole.model()
    assert model.config.shape == data.shape
    found = evaluate(model, data, limit=100)["test"]
    assert numbers <= found.keys()
    assert all(math.isfinite(found[number]) for number in numbers)
    if "bits_per_dim" in numbers:
        assert found["bits_per_dim"] == pytest.approx(-found["elbo"] / (64 * math.log(2)), rel=1e-5)


# Flows of the user's own as models.


def rings(conditional=False):
    """Points, and with each the radius that it was drawn with."""
    generator = seeded(7)
    radius = 1 + torch.rand(1200, 1, generator=generator)
    angle = 2 * math.pi * torch.rand(1200, generator=generator)
    x = radius * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(1200, 2, generator=generator)
    y = radius if conditional else None
    parts = {"train": slice(0, 1000), "test": slice(1000, None)}
    return Dataset("rings", {part: Split(x[rows], y if y is None else y[rows]) for part, rows in parts.items()})


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

    def forward(self, y):
        return self.layers(y)


@pytest.mark.parametrize(
    ("make", "conditional"),
    [
        (lambda: flows.NSF(2, transforms=2, hidden=(32,)), False),
        (lambda: flows.NSF(2, 1, transforms=2, hidden=(32,)), True),
        (lambda: flows.NSF(2, 4, transforms=2, hidden=(32,), embedding=Features()), True),
        (lambda: Flow([LULinear(2), Planar(2)], MultivariateNormal(2 * torch.ones(2), torch.eye(2))), False),
    ],
    ids=["plain", "context", "embedding", "own base"],
)
def test_a_flow_of_ones_own_is_a_model_that_is_trained_in_memory(make, conditional):
    data = rings(conditional)
    torch.manual_seed(0)
    model = FlowModel(make())
    assert (model.config, model.shape, model.levels, model.conditional) == (None, (2,), None, conditional)
    x, y = data.batch("test", slice(None))
    before = model.log_prob(x, y).mean()
    genfuse.Trainer(steps=60, lr=5e-3, device="cpu").fit(model, data)
    after = model.log_prob(x, y)
    assert after.mean() > before + 0.1
    assert math.isfinite(evaluate(model, data, limit=100)["test"]["log_prob"])
    assert torch.equal(after, model.flow.log_prob(x, y))
    torch.testing.assert_close(after, model.flow(y).log_prob(x))
    given = {"y": y[:50]} if conditional else {}
    new, density = model.sample_and_log_prob(50, generator=seeded(), **given)
    assert torch.equal(new, model.sample(50, generator=seeded(), **given))
    torch.testing.assert_close(density, model.log_prob(new, **given), rtol=0, atol=1e-3)
    torch.testing.assert_close(model.decode(model.encode(x, y), y), x, rtol=0, atol=1e-3)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.log_prob(x, y), after)
    with pytest.raises(SettingsError, match="has examples of shape"):
        model.check_data(genfuse.load_data("digits"))


def test_a_flow_of_images_of_ones_own_is_a_model_of_their_levels():
    digits = genfuse.load_data("digits")
    torch.manual_seed(0)
    labels = torch.nn.Embedding(10, 4)
    model = FlowModel(flows.Glow((1, 8, 8), 4, transforms=1, channels=(8,), embedding=labels), levels=17, logit=0.0)
    genfuse.Trainer(steps=60, lr=5e-3, device="cpu").fit(model, digits)
    x, y = digits.batch("test", slice(0, 50))
    assert model.bits_per_dim(x, y, generator=seeded()).mean() < math.log2(17)
    assert torch.equal(model.decode(model.encode(x, y), y), x)
    assert model.sample(3, y=torch.tensor([1, 2, 3])).shape == (3, 1, 8, 8)


def test_temperature_is_for_a_standard_normal_base():
    base = MultivariateNormal(torch.ones(2), torch.eye(2))
    model = FlowModel(Flow([LULinear(2)], base))
    assert torch.equal(model.sample(3, generator=seeded()), model.sample(3, generator=seeded()))
    with pytest.raises(SettingsError, match=r"temperature is for flows whose base is N\(0, I\); got 0.5"):
        model.sample(3, temperature=0.5)


def test_the_flow_of_a_conditional_model_takes_labels():
    model = scrambled("nsf", **CLASSES)
    x, y = points(model, 3), torch.tensor([0, 2, 1])
    torch.testing.assert_close(model.flow(y).log_prob(x), model.log_prob(x, y))


# Runs of former versions: {plugin: (settings as they were, some of the tensors' names as they were)}.

FORMER = {
    "nsf": (
        {"shape": [5], "levels": None, "layers": 2, "bins": 4, "hidden": 16, "blocks": 1},
        ["flow.transforms.0.triangles", "flow.transforms.3.conditioner.blocks.0.1.weight"],
    ),
    "maf": (
        {"shape": [5], "levels": 7, "layers": 2, "hidden": [16]},
        ["flow.transforms.1.made.layers.0.weight", "flow.transforms.4.made.layers.1.bias"],
    ),
    "realnvp": (
        {"shape": [1, 4, 4], "levels": 7, "channels": 4, "blocks": 2},
        ["flow.transforms.1.log_scale", "flow.transforms.2.conditioner.blocks.1.3.weight"],
    ),
    "glow": (
        {"shape": [2, 4, 4], "levels": 7, "steps": 2, "channels": 4, "dequantization": "variational"},
        ["flow.transforms.2.started", "flow.transforms.8.rest.transforms.3.conditioner.middle.bias"],
    ),
}


@pytest.mark.parametrize("name", FORMER)
def test_settings_and_weights_of_former_versions_are_read(name):
    settings, names = FORMER[name]
    cls = plugins.load("models", name)
    now = json.loads(json.dumps(cls.current(settings)))
    assert differences({"model": {"name": name, **settings}}, {"model": {"name": name, **now}}) == []
    assert differences({"model": {"name": name, **now}}, {"model": {"name": name, **settings}}) == []
    made, other = (cls.from_config(configure(cls, now)).eval() for _ in range(2))
    first = int(settings["levels"] is not None)
    former = {}
    for key, value in made.state_dict().items():
        if key.startswith("flow.transform.transforms."):
            index, _, rest = key.removeprefix("flow.transform.transforms.").partition(".")
            key = f"flow.transforms.{int(index) + first}.{rest}"
        former[key] = value
    assert set(names) < former.keys()
    other.load_state_dict(former)
    x = torch.rand(3, *settings["shape"])
    assert torch.equal(other.log_prob(x), made.log_prob(x))


@pytest.mark.parametrize("name", ["nsf", "nsf-ar", "maf", "realnvp", "glow"])
def test_a_run_of_before_networks_saw_features_squashed_has_its_densities(name):
    made = {
        "nsf": lambda: flows.NSF(3, damped=True, squash=False, hidden=(16,)),
        "nsf-ar": lambda: flows.NSFAR(3, damped=True, squash=False, hidden=(16,)),
        "maf": lambda: flows.MAF(3, scale="tanh", squash=False, hidden=(16,)),
        "realnvp": lambda: flows.RealNVP(3, scale="tanh", linear=False, squash=False, hidden=(16,)),
        "glow": lambda: flows.Glow(3, squash=False, hidden=(16,)),
    }[name]()
    cls = plugins.load("models", name)
    settings = {"shape": [3], "levels": None, "hidden": [16], **({"scale": "tanh"} if name == "realnvp" else {})}
    now = cls.from_config(configure(cls, cls.current(settings))).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn_like(weight)
    now.flow.load_state_dict(made.state_dict())
    x = 9 * torch.randn(20, 3)  # where squashed features would be others
    assert torch.equal(now.log_prob(x), made.eval().log_prob(x))


def test_a_width_without_a_number_of_blocks_means_as_many_as_there_were():
    assert plugins.load("models", "nsf").current({"hidden": 64})["hidden"] == [64, 64]
    assert plugins.load("models", "realnvp").current({"blocks": 3})["channels"] == [64] * 3
    assert plugins.load("models", "glow").current({"channels": 32})["channels"] == [32]
    assert plugins.load("models", "nsf").current({"hidden": [64]}) == {"hidden": [64]}
    assert plugins.load("models", "nsf").current({"bins": 4}) == {"bins": 4}


def test_what_a_flow_is_not_made_for_is_told_before_it_is_trained(tmp_path):
    digits = genfuse.load_data("digits")
    few = genfuse.Trainer(steps=1, pictures=False, device="cpu")
    for name in ("planar", "radial"):
        with pytest.warns(TrainingWarning, match=f"a {name} flow is made for a few dimensions"):
            few.fit(genfuse.create(name, digits), digits)
        columns = genfuse.load_data(np.random.default_rng(0).normal(size=(50, 6)))
        with pytest.warns(
            TrainingWarning, match=f"a {name} flow is made for a few dimensions.* has 6, so nsf will fit"
        ):
            few.fit(genfuse.create(name, columns), columns)
    large = genfuse.load_data(np.random.default_rng(0).integers(0, 256, (200, 20, 20), dtype=np.uint8))
    for name in ("realnvp", "maf"):
        with pytest.warns(TrainingWarning, match=f"networks of this {name} see the 400 cells of a picture as a vector"):
            few.fit(genfuse.create(name, large, layers=1, hidden=(8,)), large)
    larger = genfuse.load_data(np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8))
    with pytest.warns(TrainingWarning, match="a glow of pictures of 784 cells takes hours to draw whole ones"):
        few.fit(genfuse.create("glow", larger, steps=1, channels=(8,)), larger)
    with pytest.warns(TrainingWarning, match="an idf is made to compress: what it draws of pictures of 784 cells"):
        few.fit(genfuse.create("idf", larger, channels=(8,)), larger)
    rows = np.random.default_rng(0).normal(size=(500, 3))
    rows[:50, 1] = 0.5
    np.savetxt(tmp_path / "a.csv", rows, delimiter=",", header="a,b,c", comments="")
    data = genfuse.load_data(f"csv:{tmp_path / 'a.csv'}")
    with pytest.warns(
        TrainingWarning, match=r"1\d% of the examples have one value in column b: a density has no bound"
    ):
        few.fit(genfuse.create("nsf", data), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        few.fit(genfuse.create("glow", large, steps=1, channels=(8,)), large)
        few.fit(genfuse.create("vae", data), data)  # has a learned but common variance
        few.fit(genfuse.create("nsf", genfuse.load_data("toy:moons")), genfuse.load_data("toy:moons"))
