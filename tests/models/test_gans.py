import copy
import math
import pickle
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
from genfuse.metrics import evaluate_samples
from genfuse.models import Batch
from genfuse.models._adversarial import STALLED, STARTED, Objective, diversity
from genfuse.models._base import configure
from genfuse.models.gan import GAN, OBJECTIVES, GANConfig
from genfuse.models.wgan import WGAN, WGANGP, WGANConfig
from genfuse.nn import OneHot, WithContext, slerp
from genfuse.training import Trainer
from genfuse.training.run import differences

MODELS = "gan", "wgan", "wgan-gp"
NETWORKS = "mlp", "dcgan", "resnet"
SMALL = {"hidden": (16, 8), "channels": (4,), "latent_dim": 5}
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
        cancels = name == "gan" and player.name == "discriminator"  # its last bias, in differences
        assert sum(grad.abs().sum() > 0 for grad in grads) >= len(grads) - (network == "dcgan") - cancels


@each_model
def test_the_critic_goes_first_and_as_often_as_it_is_told(name):
    critic, generator = made(name, n_critic=3).players()
    assert (critic.steps, generator.steps) == (3, 1)
    assert (critic.name, generator.name) == ("discriminator" if name == "gan" else "critic", "generator")


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("gan", torch.optim.Adam, {"lr": 2e-4, "betas": (0.5, 0.999)}),
        ("wgan", torch.optim.RMSprop, {"lr": 1e-4}),
        ("wgan-gp", torch.optim.Adam, {"lr": 1e-4, "betas": (0.0, 0.9)}),
    ],
)
def test_the_optimizers_are_those_of_the_papers_but_for_a_quicker_wgan(name, kind, expected):
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
        "relativistic": (bce(ones), zeros, bce(ones)),  # of differences
    }
    assert OBJECTIVES.keys() == expected.keys()
    for name, values in expected.items():
        for part, value in zip(OBJECTIVES[name][:3], values, strict=True):
            torch.testing.assert_close(part(out), value)


@pytest.mark.parametrize("loss", ["non-saturating", "minimax"])
def test_the_losses_are_finite_where_probabilities_round_to_0_and_1(loss):
    for part in OBJECTIVES[loss][:3]:
        out = torch.tensor([-1e4, 1e4], requires_grad=True)
        part(out).sum().backward()
        assert part(out).isfinite().all()
        assert out.grad.isfinite().all()


@pytest.mark.parametrize("loss", [name for name, objective in OBJECTIVES.items() if not objective.relativistic])
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


@pytest.mark.parametrize("pac", [1, 2])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("penalty", ["none", "r1", "r1r2"])
def test_the_relativistic_loss_and_its_penalties_are_those_of_r3gan_by_double_backward(pac, conditional, penalty):
    settings = {"loss": "relativistic", "penalty": penalty, "penalty_weight": 3.0, "pac": pac}
    model = made("gan", **settings, conditional=conditional, classes=3).double()
    batch = batch_of(model)._replace(x=batch_of(model).x.double())
    torch.manual_seed(3)
    one_hot = F.one_hot(batch.y, 3).double()
    fake = model.generator(torch.randn(6, 5, dtype=torch.float64), *[one_hot] * conditional).tanh()
    given = [one_hot.view(6 // pac, -1)] * conditional
    real_x, fake_x = (x.reshape(6 // pac, -1) if pac > 1 else x for x in (2 * batch.x - 1, fake))
    for player in players_of(model):
        torch.manual_seed(3)
        found, terms = model.loss(batch, player)
        points = [x.detach().requires_grad_() if player == "discriminator" else x for x in (real_x, fake_x)]
        real, generated = (model.critic(x, *given).view(-1) for x in points)
        sign = 1 if player == "discriminator" else -1
        expected = F.softplus(sign * (generated - real)).mean()
        if player == "discriminator":
            torch.testing.assert_close(terms["real"], real.mean())
            for x, out in list(zip(points, (real, generated), strict=True))[: {"none": 0, "r1": 1, "r1r2": 2}[penalty]]:
                (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
                expected = expected + 1.5 * gradient.flatten(1).square().sum(1).mean()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        weights = list((model.critic if player == "discriminator" else model.generator).parameters())
        both = (torch.autograd.grad(loss, weights, materialize_grads=True, retain_graph=True, allow_unused=True)
                for loss in (found, expected))  # fmt: skip
        for ours, truth in zip(*both, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize("penalty", ["gradient", "r1", "r1r2"])
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
            model.penalty_weight = grown
        optimizer.zero_grad()
        model.loss(Batch(real(torch.randn(256, 1))), critic)[0].backward()
        optimizer.step()
        schedule.step()
        model.after_step(critic)
    return model


def test_a_trained_discriminator_is_p_over_p_plus_q():
    p, q = Normal(0.0, 1.0), Normal(1.5, 0.6)
    model = trained_critic("gan", lambda z: z, lambda z: 1.5 + 0.6 * z, 1500, 3e-3, loss="non-saturating")
    x = torch.linspace(-3, 3, 200)[:, None]
    densities = p.log_prob(x).exp(), q.log_prob(x).exp()
    D = model.critic(x).sigmoid()
    weights = sum(densities)
    error = ((D - densities[0] / weights).abs() * weights).sum() / weights.sum()
    assert error < 0.015


def test_where_model_and_data_agree_the_value_is_minus_log_4_and_d_one_half():
    model = trained_critic("gan", lambda z: z, lambda z: z, 800, 3e-3, loss="non-saturating")
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
    dcgan = made("gan", shape=(3, 64, 64), network="dcgan", channels=(64,), latent_dim=100)
    assert [shape[1] for shape in widths(dcgan.generator)[1:]] == [256, 128, 64, 3]
    assert [shape[0] for shape in widths(dcgan.critic)] == [64, 128, 256, 512, 1]


def test_real_valued_data_are_not_bounded():
    model = made("gan", shape=(2,), levels=None)
    nn.init.constant_(model.generator[-2].bias, 7.0)
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
    images = model.interpolate_latents(a, b, 7)
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
        model.interpolate_latents(a, b, 1)


def test_a_conditional_gan_learns_what_each_label_means():
    y = torch.arange(2000) % 2
    x = torch.randn(2000, 1, generator=seeded()) * 0.3 + 4.0 * y[:, None] - 2.0
    data = Dataset("two", {"train": Split(x, y), "test": Split(x[:10], y[:10])})
    torch.manual_seed(0)
    model = genfuse.create("gan", data, conditional=True, hidden=(32, 32), latent_dim=2, ema=0.9)
    genfuse.Trainer(steps=1200, lr=2e-3, device="cpu").fit(model, data)
    for label, mean in ((0, -2.0), (1, 2.0)):
        assert model.sample(500, y=label, generator=seeded()).mean().item() == pytest.approx(mean, abs=0.5)


# GANs of any networks, and own loops: nobody has to call `after_step`.


class Flat(nn.Module):
    """A critic that returns (N,)."""

    def __init__(self, features=2, hidden=32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))

    def forward(self, x):
        return self.layers(x).squeeze(1)


def hand_made(cls=GAN, hidden=32, **settings):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    return cls(generator, Flat(hidden=hidden), latent_dim=3, **settings)


def quickly(parameters):
    return torch.optim.Adam(parameters, 4e-3, betas=(0.5, 0.99))


def train(model, x, rounds, told=None, parts=1, optimizer=quickly, loss=None):
    """The loop that anybody would write, on random batches of x; it calls nothing but the loss."""
    optimizers = {player.name: optimizer(player.parameters) for player in model.players()}
    loss = model if loss is None else loss
    for _ in range(rounds):
        for player in model.players():
            for _ in range(player.steps):
                for _ in range(parts):  # gradients of several batches may be added up
                    batch = x[torch.randint(len(x), (64,))]
                    loss(batch, player=player.name).backward()
                optimizers[player.name].step()
                model.zero_grad()
                if told:
                    getattr(model, told)(player.name)


@pytest.mark.parametrize("settings", [{}, {"penalty": "r1", "penalty_weight": 0.1, "objective": OBJECTIVES["hinge"]}])
def test_a_gan_of_own_networks_learns_a_mixture_in_a_loop_of_its_own(settings):
    side = torch.arange(2000) % 2 * 4.0 - 2
    x = torch.stack([side, side / 2], 1) + 0.2 * torch.randn(2000, 2, generator=seeded())
    model = hand_made(hidden=64, ema=0.98, **settings)
    train(model, x, 800)
    drawn = model.sample(2000, generator=seeded())
    near = torch.cdist(drawn, torch.tensor([[-2.0, -1.0], [2.0, 1.0]])).min(1)
    # The rest are on the way between the modes, which a continuous map of z cannot jump over.
    assert (near.values < 0.8).float().mean() > 0.85
    assert 0.35 < near.indices.float().mean() < 0.65
    assert int(model.averaged.updates) == 800


@pytest.mark.parametrize("cls", [GAN, WGAN, WGANGP])
@pytest.mark.parametrize("parts", [1, 3])
def test_an_own_loop_ends_in_the_same_bits_whether_or_not_it_calls_after_step(cls, parts):
    x, states = torch.randn(500, 2, generator=seeded()), []
    for told in (None, "after_step", "stepped"):
        model = hand_made(cls, hidden=8, ema=0.8)
        torch.manual_seed(1)
        train(model, x, 6, told, parts)
        if told is None:
            assert torch.equal(copy.deepcopy(model).sample(4, generator=seeded()), model.sample(4, generator=seeded()))
        states.append(model.state_dict())
    assert int(states[0]["averaged.updates"]) == 6
    for state in states[1:]:
        assert all(map(torch.equal, states[0].values(), state.values()))


def test_a_model_takes_networks_as_they_are_and_its_average_learns_nothing_of_samples():
    generator = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    model = GAN(generator, Flat(), latent_dim=3)
    assert not generator.training
    statistics = model.averaged.module[1].running_mean.clone()
    model.train().sample(50)
    assert generator.training
    assert torch.equal(statistics, model.averaged.module[1].running_mean)
    assert torch.equal(statistics, generator[1].running_mean)


def test_clipping_is_not_forgotten_by_an_own_loop():
    model = hand_made(WGAN, clip=0.03)
    x = torch.randn(500, 2, generator=seeded())
    seen = []
    model.critic.register_forward_pre_hook(
        lambda module, inputs: seen.append(max(weight.abs().max().item() for weight in module.parameters()))
    )
    model.loss(Batch(x), "critic")
    seen.clear()
    train(model, x, 3, optimizer=lambda weights: torch.optim.RMSprop(weights, 0.05))
    assert max(seen[1:]) <= 0.03 + 1e-9
    assert all(weight.abs().max() <= 0.03 + 1e-9 for weight in copy.deepcopy(model).critic.parameters())


@pytest.mark.parametrize("part", ["critic", "critic.layers"])
def test_a_critic_that_is_put_in_place_of_another_is_clipped(part):
    model, x = hand_made(WGAN, clip=0.03), torch.randn(500, 2, generator=seeded())
    train(model, x, 1)
    owner, _, name = part.rpartition(".")
    setattr(model.get_submodule(owner), name, copy.deepcopy(model.get_submodule(part)))
    train(model, x, 2, optimizer=lambda weights: torch.optim.RMSprop(weights, 0.05))
    model.settle()
    assert max(weight.abs().max() for weight in model.critic.parameters()) <= 0.03 + 1e-9


def test_a_loop_over_a_compiled_loss_samples_the_present_weights_and_clips():
    model = hand_made(WGAN, hidden=8, clip=0.02)
    x = torch.randn(500, 2, generator=seeded())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(model, x, 3, loss=compiled, optimizer=lambda weights: torch.optim.RMSprop(weights, 0.05))
    assert max(weight.abs().max() for weight in model.critic.parameters()) <= 0.02 + 1e-9  # before the generator's step
    z = model.latents(5, generator=seeded())
    assert int(model.averaged.updates) == 0
    assert torch.equal(model.decode(z), model.generator(z))


def test_an_own_embedding_is_trained_by_the_generator_and_averaged_with_it():
    def made(ema):
        torch.manual_seed(0)
        generator = WithContext(nn.Sequential(nn.Linear(3 + 4, 16), nn.ReLU(), nn.Linear(16, 2)), planes=False)
        critic = WithContext(nn.Sequential(nn.Linear(2 + 4, 16), nn.ReLU(), nn.Linear(16, 1)), planes=False)
        return GAN(generator, critic, latent_dim=3, ema=ema, embedding=nn.Embedding(3, 4))

    model = made(0.5)
    critic, generator = model.players()
    weight = model.embedding.weight
    assert any(each is weight for each in generator.parameters)
    assert not any(each is weight for each in critic.parameters)
    batch = Batch(torch.randn(30, 2), torch.arange(30) % 3)
    model.loss(batch, "discriminator")[0].backward()
    assert weight.grad is None
    model.loss(batch, "generator")[0].backward()
    assert weight.grad.abs().sum(1).gt(0).all()
    before = weight.detach().clone()
    quickly(generator.parameters).step()
    model.settle()
    average = model.averaged_embedding.module.weight
    torch.testing.assert_close(average, before + (1 - 2 / 11) * (weight.detach() - before))
    z, y = model.latents(3, generator=seeded()), torch.tensor([0, 1, 2])
    torch.testing.assert_close(model.decode(z, y), model.averaged(z, average[y]))
    torch.testing.assert_close(model.sample(3, y=y, generator=seeded()), model.decode(z, y))
    assert made(0.0).averaged_embedding is None


@pytest.mark.parametrize("embedding", [nn.Embedding(10, 3), OneHot(10)])
def test_the_trainer_and_its_measures_take_a_hand_made_conditional_gan(embedding, digits):
    torch.manual_seed(0)
    width = 3 if isinstance(embedding, nn.Embedding) else 10
    generator = WithContext(nn.Sequential(nn.Linear(5 + width, 64), nn.Unflatten(1, (1, 8, 8))), planes=False)
    critic = WithContext(nn.Linear(64 + width, 1), planes=False)
    model = GAN(generator, critic, latent_dim=5, shape=(1, 8, 8), levels=17, embedding=embedding)
    genfuse.Trainer(steps=4, device="cpu").fit(model, digits)
    found = evaluate_samples(model, digits, features="pixels", n=100)
    assert math.isfinite(found["samples"]["frechet_distance"])
    assert model.sample(3, y=2).shape == (3, 1, 8, 8)
    if isinstance(embedding, OneHot):
        assert model.sample(3).shape == (3, 1, 8, 8)
    else:
        with pytest.raises(SettingsError, match="the model is conditional: give"):
            model.sample(3)


@each_model
@each_network
def test_a_context_of_numbers_is_given_to_both_networks(name, network):
    model = made(name, network=network, condition=2, ema=0.0)
    batch = batch_of(model)._replace(y=torch.randn(6, 2))
    for player in players_of(model):
        loss, _ = model.loss(batch, player)
        torch.manual_seed(2)
        first = model.loss(batch, player)[0]
        torch.manual_seed(2)
        assert not torch.equal(first, model.loss(batch._replace(y=-batch.y), player)[0])
        assert loss.isfinite()
    model.eval()
    z = model.latents(2, generator=seeded())
    assert not torch.allclose(model.decode(z, batch.y[:2]), model.decode(z, batch.y[2:4]))
    row = torch.tensor([0.3, -2.0])
    torch.testing.assert_close(
        model.sample(2, y=row, generator=seeded()), model.decode(z, row.expand(2, 2)), rtol=1e-4, atol=1e-5
    )


def test_the_trainer_trains_hand_made_gans_of_discrete_data(digits):
    for cls in (GAN, WGAN, WGANGP):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8)))
        critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
        model = cls(generator, critic, latent_dim=5, shape=(1, 8, 8), levels=17, n_critic=2)
        genfuse.Trainer(steps=9, device="cpu").fit(model, digits)
        x = model.sample(5)
        assert x.shape == (5, 1, 8, 8)
        assert 0 <= x.min() < x.max() <= 1
        assert int(model.averaged.updates) == 3
    with pytest.raises(SettingsError, match="examples of shape"):
        genfuse.Trainer(steps=1, device="cpu").fit(model, genfuse.load_data("toy:moons"))


@pytest.mark.parametrize("make", [hand_made, lambda: hand_made(WGANGP), lambda: made("gan", network="dcgan")])
def test_copies_and_what_is_compiled_or_exported_are_the_same(make):
    model = make().eval()
    x = torch.rand(6, 2) if model.shape is None else batch_of(model).x
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.sample(3, generator=seeded()), model.sample(3, generator=seeded()))
        assert other.objective == model.objective
    for player in players_of(model):
        torch.manual_seed(3)
        loss = model(x, player=player)
        torch.manual_seed(3)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x, player=player), loss)

    class Decoding(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, z):
            return self.model.decode(z)

    z = model.latents(4, generator=seeded())
    torch.testing.assert_close(torch.export.export(Decoding(), (z,)).module()(z), model.decode(z))


def test_own_parts_that_do_not_fit_are_told():
    with pytest.raises(SettingsError, match=r"objective must be an Objective or one of non-saturating, .* got 'wasser"):
        hand_made(objective="wasserstein")
    with pytest.raises(SettingsError, match="ema must be at least 0 and below 1"):
        hand_made(ema=1.0)
    with pytest.raises(SettingsError, match="penalty must be one of none, gradient, r1, r1r2, got 'r2'"):
        hand_made(penalty="r2")
    with pytest.raises(SettingsError, match="clip must be above 0"):
        hand_made(WGAN, clip=0.0)
    with pytest.raises(SettingsError, match="n_critic must be at least 1 update"):
        hand_made(WGANGP, n_critic=0)
    model = GAN(nn.Linear(3, 2), nn.Linear(2, 5), latent_dim=3)
    with pytest.raises(SettingsError, match=r"critic must return one number for each of 8 .* got \(8, 5\)"):
        model(torch.randn(4, 2))


def test_an_own_objective_is_minimised():
    model = hand_made(objective=Objective(torch.neg, torch.abs, torch.square))
    x = torch.randn(20, 2)
    torch.manual_seed(1)
    loss, terms = model.loss(Batch(x), "generator")
    torch.manual_seed(1)
    fake = model.generator(torch.randn(20, 3))
    torch.testing.assert_close(loss, model.critic(fake).square().mean())
    _, terms = model.loss(Batch(x), "discriminator")
    torch.testing.assert_close(terms["real"], model.critic(x).mean())  # no probability, as nobody knows of one


@pytest.mark.parametrize("network", ["dcgan", "resnet"])
def test_each_resolution_has_a_width_of_its_own_if_so_told(network):
    doubled = made("gan", network=network, shape=(1, 32, 32), channels=(4,))
    count = 3 if network == "dcgan" else 4
    named = made("gan", network=network, shape=(1, 32, 32), channels=(4, 8, 16, 32)[:count])
    other = made("gan", network=network, shape=(1, 32, 32), channels=(5, 3, 7, 2)[:count])
    for a, b in zip(doubled.state_dict().values(), named.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert other.critic(other.sample(2)).shape == (2, 1)
    for wrong in ((4, 8), (4, 8, 16, 32, 64)):
        with pytest.raises(SettingsError, match=rf"channels must be one width, or {count}: one for each resolution"):
            made("gan", network=network, shape=(1, 32, 32), channels=wrong)
    with pytest.raises(SettingsError, match="channels must hold at least one width"):
        made("gan", channels=())


@each_model
def test_settings_of_former_versions_are_read(name):
    cls = type(made(name))
    former = {"channels": 16, "network": "dcgan", "latent_dim": 3}
    assert configure(cls, cls.current(former)) == configure(cls, {**former, "channels": (16,)})
    assert cls.current({"channels": [16, 32]}) == {"channels": [16, 32]}
    was, now = ({"model": {"name": name, **former, "channels": channels}} for channels in (16, (16,)))
    assert differences(was, now) == differences(now, was) == differences(was, was) == []
    assert differences(was, {"model": {**now["model"], "channels": (8,)}}) == ["model channels: was [16], now [8]"]


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


def test_weights_of_a_critic_of_vectors_are_clipped_less_and_learn_faster():
    found = {}
    for name, shape, levels in (("vectors", (2,), None), ("images", (1, 8, 8), 17)):
        model = WGAN.from_config(WGANConfig(shape=shape, levels=levels))
        optimizer = model.optimizer(model.critic.parameters())
        found[name] = model.clip, optimizer.param_groups[0]["lr"]
    assert found == {"vectors": (0.1, 1e-3), "images": (0.01, 1e-4)}
    assert WGAN.from_config(WGANConfig(shape=(2,), clip=0.02)).clip == 0.02


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"shape": (2,), "levels": None}, ("relativistic", "r1r2")),
        ({"shape": (1, 8, 8), "levels": 17}, ("relativistic", "r1r2")),
        ({"shape": (4, 2), "levels": None}, ("non-saturating", "none")),
        ({"shape": (2,), "levels": None, "loss": "hinge"}, ("hinge", "none")),
    ],
)
def test_the_usual_objective_is_r3gans_for_images_and_vectors(settings, found):
    config = GANConfig(**settings)
    assert (config.loss, config.penalty) == found


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
