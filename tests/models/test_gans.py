import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.distributions import Normal

import genfuse
from genfuse.cli import main
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, SettingsError, TrainingWarning
from genfuse.models import Batch
from genfuse.models._adversarial import STALLED, STARTED, diversity, slerp
from genfuse.models.gan import OBJECTIVES
from genfuse.training import Trainer

MODELS = "gan", "wgan", "wgan-gp"
NETWORKS = "mlp", "dcgan", "resnet"
SMALL = {"hidden": (16, 8), "channels": 4, "latent_dim": 5}
each_model = pytest.mark.parametrize("name", MODELS)
each_network = pytest.mark.parametrize("network", NETWORKS)


def made(name, **settings):
    torch.manual_seed(0)
    return genfuse.create(name, **{"shape": (2, 8, 9), **SMALL, **settings})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(model, n=6, classes=3):
    torch.manual_seed(1)
    return Batch(torch.rand(n, *model.config.shape), torch.arange(n) % classes)


def players_of(model):
    return [player.name for player in model.players()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return genfuse.load_data("digits")


@each_model
@each_network
@pytest.mark.parametrize("conditional", [False, True])
def test_the_players_own_every_weight_once_and_train_each_of_theirs_alone(name, network, conditional):
    model = made(name, network=network, conditional=conditional, classes=3)
    owned = [weight for player in model.players() for weight in player.parameters]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len({id(weight) for weight in owned}) == len(owned) == len(trained)
    assert {id(weight) for weight in owned} == {id(weight) for weight in trained}
    for player in model.players():
        for other in model.players():
            for weight in other.parameters:
                weight.requires_grad_(other.name == player.name)
        loss, terms = model.loss(batch_of(model), player.name)
        assert loss.shape == ()
        assert all(term.shape == () and not term.requires_grad for term in terms.values())
        grads = torch.autograd.grad(loss, player.parameters)
        assert sum(grad.abs().sum() > 0 for grad in grads) >= len(grads) - (network == "dcgan")


@each_model
def test_the_critic_goes_first_and_as_often_as_it_is_told(name):
    critic, generator = made(name, n_critic=3).players()
    assert (critic.steps, generator.steps) == (3, 1)
    assert (critic.name, generator.name) == ("discriminator" if name == "gan" else "critic", "generator")


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("gan", torch.optim.Adam, {"lr": 2e-4, "betas": (0.5, 0.999)}),
        ("wgan", torch.optim.RMSprop, {"lr": 5e-5}),
        ("wgan-gp", torch.optim.Adam, {"lr": 1e-4, "betas": (0.0, 0.9)}),
    ],
)
def test_the_optimizers_are_those_of_the_papers(name, kind, expected):
    for player in made(name).players():
        optimizer = player.optimizer(player.parameters)
        assert type(optimizer) is kind
        assert {key: optimizer.defaults[key] for key in expected} == expected


# Objectives


def test_the_losses_are_what_the_papers_define():
    out = torch.linspace(-8, 8, 33, dtype=torch.float64)
    D, ones, zeros = out.sigmoid(), torch.ones_like(out), torch.zeros_like(out)
    bce = lambda target: F.binary_cross_entropy_with_logits(out, target, reduction="none")  # noqa: E731
    expected = {
        "non-saturating": (bce(ones), bce(zeros), -D.log()),
        "minimax": (bce(ones), bce(zeros), (1 - D).log()),
        "hinge": (torch.maximum(1 - out, zeros), torch.maximum(1 + out, zeros), -out),
        "least-squares": ((out - 1) ** 2 / 2, out**2 / 2, (out - 1) ** 2 / 2),
    }
    assert OBJECTIVES.keys() == expected.keys()
    for name, values in expected.items():
        for part, value in zip(OBJECTIVES[name], values, strict=True):
            torch.testing.assert_close(part(out), value)


@pytest.mark.parametrize("loss", ["non-saturating", "minimax"])
def test_the_losses_are_finite_where_probabilities_round_to_0_and_1(loss):
    for part in OBJECTIVES[loss]:
        out = torch.tensor([-1e4, 1e4], requires_grad=True)
        part(out).sum().backward()
        assert part(out).isfinite().all()
        assert out.grad.isfinite().all()


@pytest.mark.parametrize("loss", list(OBJECTIVES))
def test_the_loss_of_a_gan_is_its_objective(loss):
    model, batch = made("gan", loss=loss), batch_of(made("gan"))
    for player in players_of(model):
        torch.manual_seed(3)
        found, terms = model.loss(batch, player)
        torch.manual_seed(3)
        fake = model.generator(torch.randn(6, 5)).tanh()
        real_out, fake_out = model.critic(2 * batch.x - 1), model.critic(fake)
        if player == "generator":
            torch.testing.assert_close(found, model.objective.generator(fake_out).mean())
            continue
        expected = model.objective.real(real_out).mean() + model.objective.fake(fake_out).mean()
        torch.testing.assert_close(found, expected)
        on_logits = loss in ("non-saturating", "minimax")
        torch.testing.assert_close(terms["real"], (real_out.sigmoid() if on_logits else real_out).mean())
        torch.testing.assert_close(terms["fake"], (fake_out.sigmoid() if on_logits else fake_out).mean())


def test_the_wasserstein_term_is_the_difference_of_the_means():
    model = made("wgan")
    loss, terms = model.loss(batch_of(model), "critic")
    torch.testing.assert_close(terms["wasserstein"], terms["real"] - terms["fake"])
    torch.testing.assert_close(loss.detach(), -terms["wasserstein"])


@pytest.mark.parametrize("name", ["gan", "wgan-gp"])
@each_network
@pytest.mark.parametrize("conditional", [False, True])
def test_r1_is_half_gamma_times_the_squared_gradient_at_real_examples(name, network, conditional):
    settings = {"network": network, "conditional": conditional, "classes": 3, "penalty_weight": 3.0}
    model = made(name, penalty="r1", **settings)
    batch = batch_of(model)
    _, terms = model.loss(batch, players_of(model)[0])
    x = (2 * batch.x - 1).requires_grad_(True)
    given = [F.one_hot(batch.y, 3).float()] if conditional else []
    (gradient,) = torch.autograd.grad(model.critic(x, *given).sum(), x)
    torch.testing.assert_close(terms["penalty"], 1.5 * gradient.square().flatten(1).sum(1).mean())


@pytest.mark.parametrize("penalty", ["gradient", "r1"])
def test_a_penalty_of_weight_0_changes_nothing(penalty):
    results = []
    for settings in ({"penalty": "none"}, {"penalty": penalty, "penalty_weight": 0.0}):
        model = made("wgan-gp", **settings)
        batch = batch_of(model)
        torch.manual_seed(2)
        loss, _ = model.loss(batch, "critic")
        results.append([loss, *torch.autograd.grad(loss, list(model.critic.parameters()))])
    assert all(map(torch.equal, *results))


def test_one_sided_lets_flat_critics_be():
    flat = {"penalty": "gradient", "penalty_weight": 1.0}
    for one_sided, expected in ((False, 1.0), (True, 0.0)):
        model = made("wgan-gp", one_sided=one_sided, **flat)
        nn.init.zeros_(model.critic[-1].weight)
        _, terms = model.loss(batch_of(model), "critic")
        assert terms["penalty"].item() == pytest.approx(expected, abs=1e-5)


# Theory, on fixed densities in one dimension


class Fixed(nn.Module):
    """A generator that no one trains."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, z):
        return self.make(z)


def trained_critic(name, real, fake, steps, lr, penalty_weight=None, **settings):
    """A critic trained between ``real`` and ``fake``, functions of standard normal noise (N, 1)."""
    model = made(
        name, shape=(1,), levels=None, **{**SMALL, "hidden": (64, 64), "latent_dim": 1, "ema": 0.0, **settings}
    )
    model.generator = Fixed(fake)
    critic = players_of(model)[0]
    optimizer = torch.optim.Adam(model.critic.parameters(), lr=lr, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if penalty_weight is not None:
            # In one dimension a slope of -1 can only become 1 through 0, which is dear: signs are to be found first.
            grown = penalty_weight * min(1, 2 * step / steps)
            model.config = dataclasses.replace(model.config, penalty_weight=grown)
        optimizer.zero_grad()
        model.loss(Batch(real(torch.randn(256, 1))), critic)[0].backward()
        optimizer.step()
        schedule.step()
        model.after_step(critic)
    return model


def test_a_trained_discriminator_is_p_over_p_plus_q():
    p, q = Normal(0.0, 1.0), Normal(1.5, 0.6)
    model = trained_critic("gan", lambda z: z, lambda z: 1.5 + 0.6 * z, 1500, 3e-3)
    x = torch.linspace(-3, 3, 200)[:, None]
    densities = p.log_prob(x).exp(), q.log_prob(x).exp()
    D = model.critic(x).sigmoid()
    weights = sum(densities)
    error = ((D - densities[0] / weights).abs() * weights).sum() / weights.sum()
    assert error < 0.015


def test_where_model_and_data_agree_the_value_is_minus_log_4_and_d_one_half():
    model = trained_critic("gan", lambda z: z, lambda z: z, 800, 3e-3)
    torch.manual_seed(9)
    with torch.no_grad():
        loss, terms = model.loss(Batch(torch.randn(20_000, 1)), "discriminator")
        D = model.critic(torch.linspace(-2, 2, 50)[:, None]).sigmoid()
    assert -loss.item() == pytest.approx(-math.log(4), abs=0.01)
    assert terms["real"].item() == pytest.approx(0.5, abs=0.02)
    assert terms["fake"].item() == pytest.approx(0.5, abs=0.02)
    assert (D - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("real", "fake", "one_sided"),
    [
        (lambda z: z, lambda z: z + 0.5, False),
        (lambda z: z, lambda z: 1.6 * z, False),
        (lambda z: z, lambda z: 0.7 * z - 0.6, False),
        (lambda z: z, lambda z: 1.6 * z, True),
        (lambda z: z.sign() + 0.2 * z, lambda z: 0.5 * z + 0.5, True),
    ],
    ids=["shifted", "scaled", "both", "scaled-one-sided", "two-modes-one-sided"],
)
def test_the_critic_of_wgan_gp_estimates_the_wasserstein_distance(real, fake, one_sided):
    model = trained_critic("wgan-gp", real, fake, 700, 5e-3, penalty_weight=30.0, one_sided=one_sided)
    z = torch.randn(2, 20_000, 1, generator=seeded())
    x, generated = real(z[0]), fake(z[1])
    with torch.no_grad():
        estimate = (model.critic(x).mean() - model.critic(generated).mean()).item()
    assert estimate == pytest.approx(wasserstein_distance(x[:, 0], generated[:, 0]), rel=0.05)


def test_clipping_bounds_every_weight_after_every_step(digits, monkeypatch):
    model = genfuse.create("wgan", digits, clip=0.02, **SMALL)
    largest = []

    def after_step(player, then=model.after_step):
        then(player)
        largest.append((player, max(weight.abs().max().item() for weight in model.critic.parameters())))

    monkeypatch.setattr(model, "after_step", after_step)
    genfuse.Trainer(steps=24, lr=1e-2, device="cpu").fit(model, digits)
    assert [player for player, _ in largest] == (["critic"] * 5 + ["generator"]) * 4
    assert all(weight <= 0.02 for _, weight in largest)
    assert max(weight for _, weight in largest) == pytest.approx(0.02)


# Networks


@each_network
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 9, 30), (1, 64, 16)])
@pytest.mark.parametrize("conditional", [False, True])
def test_images_of_any_size_are_made_in_their_range(network, shape, conditional):
    model = made("wgan-gp", network=network, shape=shape, conditional=conditional, classes=3)
    y = torch.tensor([0, 1, 2, 2]) if conditional else None
    x = model.sample(4, y=y, generator=seeded())
    assert x.shape == (4, *shape)
    assert 0 <= x.min() < x.max() <= 1
    given = [F.one_hot(y, 3).float()] if conditional else []
    assert model.critic(x, *given).shape == (4, 1)
    if conditional:
        assert not torch.allclose(x, model.sample(4, y=torch.tensor([1, 2, 0, 0]), generator=seeded()))
        assert not torch.allclose(model.critic(x, *given), model.critic(x, given[0].roll(1, 1)))


@each_network
@pytest.mark.parametrize("layer_norm", [False, True])
def test_what_a_critic_says_of_an_example_depends_on_no_other(network, layer_norm):
    model = made("gan", network=network, layer_norm=layer_norm)
    x = batch_of(model).x
    together = model.critic(x)
    alone = torch.cat([model.critic(example[None]) for example in x])
    torch.testing.assert_close(together, alone)


def test_the_networks_have_the_papers_widths():
    def widths(network):
        return [m.weight.shape for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]

    mlp = made("wgan-gp", shape=(1, 28, 28), latent_dim=100, hidden=(256, 256))
    assert widths(mlp.generator) == [(b, a) for a, b in pairwise([100, 256, 256, 784])]
    assert widths(mlp.critic) == [(b, a) for a, b in pairwise([784, 256, 256, 1])]
    dcgan = made("gan", shape=(3, 64, 64), network="dcgan", channels=64, latent_dim=100)
    assert [shape[1] for shape in widths(dcgan.generator)[1:]] == [256, 128, 64, 3]
    assert [shape[0] for shape in widths(dcgan.critic)] == [64, 128, 256, 512, 1]


def test_real_valued_data_are_not_bounded():
    model = made("gan", shape=(2,), levels=None)
    nn.init.constant_(model.averaged.module[-2].bias, 7.0)
    assert (model.sample(10) > 2).all()


@each_network
def test_spectral_norm_makes_each_layers_largest_singular_value_1(network):
    model = made("gan", network=network, spectral_norm=True)
    batch = batch_of(model)
    for _ in range(60):  # each estimate improves on the last
        model.loss(batch, "discriminator")
    for module in model.critic.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.03)


# Averaged weights, sampling, interpolation


def test_samples_are_of_the_averaged_weights():
    model = made("gan", ema=0.5)
    (weight, average) = (next(net.parameters()) for net in (model.generator, model.averaged))
    expected = average.clone()
    for updates in range(1, 6):
        with torch.no_grad():
            weight.add_(1.0)
        model.after_step("discriminator")
        model.after_step("generator")
        decay = min(0.5, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average, expected.detach())
    z = model.latents(3, generator=seeded())
    assert torch.equal(model.sample(3, generator=seeded()), model.decode(z))
    torch.testing.assert_close(model.decode(z), model.averaged(z).tanh() / 2 + 0.5)
    assert not torch.allclose(model.decode(z), model.generator(z).tanh() / 2 + 0.5)


def test_without_averaging_samples_are_of_the_last_weights():
    model = made("gan", ema=0.0)
    z = model.latents(3, generator=seeded())
    torch.testing.assert_close(model.sample(3, generator=seeded()), model.generator(z).tanh() / 2 + 0.5)
    assert not any("averaged" in name for name in model.state_dict())


def test_statistics_of_batch_norm_are_averaged_and_sampling_leaves_them(digits):
    model = made("gan", shape=(1, 8, 8), network="dcgan")
    genfuse.Trainer(steps=20, device="cpu").fit(model, digits)
    mean = model.averaged.module[2].running_mean
    assert mean.abs().max() > 0
    before = mean.clone()
    model.train().sample(10)
    assert torch.equal(before, model.averaged.module[2].running_mean)


def test_an_interpolation_runs_along_arcs_between_its_ends():
    model = made("wgan-gp", latent_dim=50)
    a, b = (model.latents(4, generator=seeded(seed)) for seed in (0, 1))
    images = model.interpolate(a, b, 7)
    assert images.shape == (7, 4, 2, 8, 9)
    torch.testing.assert_close(images[0], model.decode(a))
    torch.testing.assert_close(images[-1], model.decode(b))
    unit = F.normalize(torch.stack([a, b]), dim=-1)
    arc = slerp(*unit, torch.linspace(0, 1, 7))
    torch.testing.assert_close(arc.norm(dim=-1), torch.ones(7, 4))
    angles = torch.acos((arc[1:] * arc[:-1]).sum(-1))
    torch.testing.assert_close(angles, angles[:1].expand(6, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(slerp(a, a, torch.linspace(0, 1, 3)), a.expand(3, 4, 50))
    with pytest.raises(SettingsError, match="at least 2 steps"):
        model.interpolate(a, b, 1)


def test_a_conditional_gan_learns_what_each_label_means():
    y = torch.arange(2000) % 2
    x = torch.randn(2000, 1, generator=seeded()) * 0.3 + 4.0 * y[:, None] - 2.0
    data = Dataset("two", {"train": Split(x, y), "test": Split(x[:10], y[:10])})
    torch.manual_seed(0)
    model = genfuse.create("gan", data, conditional=True, hidden=(32, 32), latent_dim=2, ema=0.9)
    genfuse.Trainer(steps=1200, lr=2e-3, device="cpu").fit(model, data)
    for label, mean in ((0, -2.0), (1, 2.0)):
        assert model.sample(500, y=label, generator=seeded()).mean().item() == pytest.approx(mean, abs=0.5)


# Training


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gan", {"network": "dcgan", "spectral_norm": True, "conditional": True}),
        ("wgan", {}),
        ("wgan-gp", {"network": "resnet", "layer_norm": True}),
        ("wgan-gp", {"penalty": "r1", "conditional": True}),
    ],
)
def test_a_resumed_run_ends_in_the_same_bytes(name, settings, digits, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return genfuse.create(name, digits, **SMALL, **settings)

    options = {"device": "cpu", "batch_size": 250, "log_every": 4, "pictures": False}
    whole = genfuse.Trainer(steps=16, out=tmp_path / "whole", **options).fit(fresh(), digits)
    part = genfuse.Trainer(steps=9, checkpoint_every=9, out=tmp_path / "part", **options).fit(fresh(), digits)
    torch.manual_seed(99)
    Trainer.resuming(part, steps=16).fit(part.model(), digits)
    for file in ("model.safetensors", "state.safetensors"):
        assert (whole.path / file).read_bytes() == (part.path / file).read_bytes()


@each_model
def test_the_curves_hold_the_gradients_of_both_players(name, digits, tmp_path):
    model = genfuse.create(name, digits, **SMALL)
    run = genfuse.Trainer(steps=12, device="cpu", out=tmp_path / "run").fit(model, digits)
    lines = {entry["player"]: entry for entry in run.metrics() if entry["split"] == "train"}
    assert lines.keys() == set(players_of(model))
    assert all(line["gradient_norm"] > 0 for line in lines.values())
    assert {"real", "fake"} <= lines[players_of(model)[0]].keys()
    assert "diversity" in lines["generator"]
    names = {"samples.png", "interpolation.png", "curves.png", "progress.png"}
    assert {path.name for path in (run.path / "pictures").iterdir()} == names


def test_a_batch_of_one_example_is_trained(digits):
    genfuse.Trainer(steps=12, batch_size=1, device="cpu").fit(genfuse.create("wgan-gp", digits, **SMALL), digits)


def test_diversity_compares_the_distances_to_nearest_neighbours():
    x, real = torch.randn(40, 3, 2, generator=seeded()), torch.randn(40, 3, 2, generator=seeded(1)) * 3

    def nearest(points):
        return NearestNeighbors(n_neighbors=1).fit(points.flatten(1)).kneighbors()[0].mean()

    assert diversity(x, real).item() == pytest.approx(nearest(x) / nearest(real), rel=1e-4)
    assert diversity(real[:1].expand(40, 3, 2), real).item() == pytest.approx(0, abs=2e-3)
    assert diversity(real[[0, 0, 1, 1, 2, 2]], real).item() == pytest.approx(0, abs=2e-3)


def test_what_goes_wrong_is_seen():
    model = made("wgan-gp", bound=100.0)
    late = 6 * STARTED
    fine = {"loss": 3.0, "gradient_norm": 0.1, "diversity": 0.8}
    assert model.watch("critic", late, fine) == model.watch("generator", late, fine) == {}
    assert model.watch("critic", 1, {**fine, "loss": -101.0}).keys() == {"divergence"}
    assert model.watch("generator", 1, {**fine, "gradient_norm": STALLED / 2}).keys() == {"vanishing"}
    assert model.watch("generator", late, {**fine, "diversity": 0.01}).keys() == {"collapse"}
    assert model.watch("generator", late - 1, {**fine, "diversity": 0.01}) == {}


@pytest.mark.filterwarnings("error")  # of the second training
def test_a_critic_without_a_bound_is_noticed_once_and_the_run_remembers(digits, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return genfuse.create("wgan-gp", digits, penalty_weight=0.0, bound=5.0, **SMALL)

    options = {"device": "cpu", "lr": 0.05, "log_every": 5, "pictures": False}
    with pytest.warns(TrainingWarning, match=r"step \d+: the loss of the critic is -.*Try") as seen:
        run = genfuse.Trainer(steps=60, out=tmp_path / "run", **options).fit(fresh(), digits)
    Trainer.resuming(run, steps=120).fit(run.model(), digits)
    assert len(seen) == 1
    (kept,) = [entry for entry in run.metrics() if entry["split"] == "warning"]
    assert (kept["player"], kept["name"]) == ("critic", "divergence")
    assert f"step {kept['step']}: {kept['message']}" == str(seen[0].message)


def test_a_generator_that_draws_one_image_is_noticed(digits, monkeypatch):
    monkeypatch.setattr("genfuse.models._adversarial.STARTED", 2)
    model = genfuse.create("gan", digits, **SMALL)
    nn.init.zeros_(model.generator[0].weight)
    with pytest.warns(TrainingWarning, match="samples repeat: they are .* as far from each other"):
        genfuse.Trainer(steps=6, lr=1e-9, device="cpu").fit(model, digits)


def test_a_generator_that_learns_nothing_is_noticed(digits):
    model = genfuse.create("gan", digits, loss="minimax", **SMALL)
    nn.init.constant_(model.critic[-1].bias, -40.0)
    with pytest.warns(TrainingWarning, match="the discriminator is so sure that the generator learns nothing"):
        genfuse.Trainer(steps=2, lr=1e-9, device="cpu").fit(model, digits)


# Errors, all before a training starts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_critic": 0}, "n_critic must be at least 1 update of the critic per round, got 0"),
        (
            {"network": "dcgan", "shape": (1, 4, 32)},
            r"at least 8 x 8, and cannot make .* \(1, 4, 32\): use network 'mlp'",
        ),
        ({"network": "resnet", "shape": (5,)}, r"'resnet' makes images .* shape \(5,\): use network 'mlp'"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"latent_dim": 0}, "latent_dim must be above 0"),
        ({"hidden": (0,)}, "hidden must be above 0"),
        ({"conditional": True}, "conditional needs labels"),
        ({"network": "vgg"}, "network"),
        ({"penalty": "r2"}, "penalty"),
        ({"penalty_weight": -1.0}, "penalty_weight must be at least 0"),
        ({"one_sided": True, "penalty": "r1"}, "one_sided is of penalty 'gradient'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        made("wgan-gp", **settings)


def test_clip_and_loss_are_checked():
    with pytest.raises(SettingsError, match="clip must be above 0"):
        made("wgan", clip=0.0)
    with pytest.raises(SettingsError, match="loss"):
        made("gan", loss="wasserstein")


def test_other_data_than_the_model_was_made_for_are_refused_before_training(digits, tmp_path):
    trainer = genfuse.Trainer(device="cpu", out=tmp_path / "run")
    with pytest.raises(SettingsError, match=r"examples of shape \(1, 8, 8\), but the model was made for \(3, 8, 8\)"):
        trainer.fit(made("wgan-gp", shape=(3, 8, 8)), digits)
    with pytest.raises(SettingsError, match=r"labels up to 9, but the model was made for labels 0\.\.4: pass the data"):
        trainer.fit(made("wgan-gp", shape=(1, 8, 8), conditional=True, classes=5), digits)
    with pytest.raises(DataError, match="not empty"):
        Dataset("none", {"train": Split(torch.zeros(0, 2)), "test": Split(torch.zeros(1, 2))})
    assert list(tmp_path.iterdir()) == []


def test_labels_outside_their_range_are_refused_where_they_are_used():
    model = made("gan", conditional=True, classes=3)
    with pytest.raises(DataError, match=r"labels y must be in 0\.\.2; got 0\.\.3"):
        model.sample(4, y=torch.arange(4))
    with pytest.raises(SettingsError, match="takes no labels"):
        made("gan").sample(4, y=1)
    with pytest.raises(DataError, match=r"x must be \(N, 2, 8, 9\)"):
        made("gan").loss(Batch(torch.rand(4, 1, 8, 9)), "discriminator")


def test_the_command_line_trains_samples_and_evaluates(tmp_path, capsys):
    run = str(tmp_path / "run")
    options = ["--steps", "12", "--model.conditional", "--model.hidden", "16", "--device", "cpu"]
    assert main(["train", "wgan-gp", "--data", "digits", "--out", run, *options]) == 0
    assert "critic: loss" in capsys.readouterr().out
    assert main(["sample", run, "--label", "3", "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 0
    assert main(["evaluate", run, "--device", "cpu"]) == 0
    assert main(["sample", run, "--label", "10", "--out", str(tmp_path / "y.png"), "--device", "cpu"]) == 2
    assert "0..9" in capsys.readouterr().err
