"""Diffusion models: samplers and likelihoods with scores that are known, diffusers' steps, labels, whole runs."""

import copy
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils._python_dispatch import TorchDispatchMode

import genfuse
from genfuse.diffusion.likelihood import decoder_log_prob
from genfuse.diffusion.samplers import SAMPLERS
from genfuse.diffusion.schedules import alphas_cumprod
from genfuse.errors import DataError, SettingsError
from genfuse.metrics import evaluate
from genfuse.models import Batch
from genfuse.nn import EMA

MODELS = {
    "ddpm": ("ddpm", {}),
    "ddpm-x0-cosine": ("ddpm", {"prediction": "x0", "schedule": "cosine"}),
    "ddpm-v": ("ddpm", {"prediction": "v"}),
    "edm": ("edm", {"sigma_data": 0.7}),
    "score": ("score", {}),
    "flow-matching": ("flow-matching", {}),
}
SMALL = {"hidden": (16,), "channels": (8, 8)}
CLASSES = {"conditional": True, "classes": 3}
every_model = pytest.mark.parametrize("name", MODELS)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def create(name, shape=(2,), levels=None, **settings):
    plugin, own = MODELS[name]
    return genfuse.create(plugin, shape=shape, levels=levels, **{**SMALL, **own, **settings})


def scrambled(name, *args, **settings):
    """A small model in evaluation mode whose weights are not where they start."""
    torch.manual_seed(0)
    model = create(name, *args, **settings).eval()
    with torch.no_grad():
        for p in model.denoiser.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_network(model, network):
    """The model with another network, whose weights are no average."""
    if not model.averaged.updates:
        model.averaged.update(model.denoiser)  # else it would follow the weights that are trained
    model.averaged.module.network = network
    return model


class Mixture:
    """Gaussians (K, D) of covariances (K, D, D), and the denoiser of data that is drawn from them."""

    def __init__(self, means, covariances, weights):
        self.means, self.covariances, self.weights = (
            torch.as_tensor(t, dtype=torch.float64) for t in (means, covariances, weights)
        )

    def with_noise(self, level):
        """Covariances (K, D, D) at one noise level, (N, K, D, D) at one for each example."""
        square = torch.as_tensor(level, dtype=torch.float64).square()
        return self.covariances + square.view(*square.shape, 1, 1, 1) * torch.eye(self.means.shape[1]).double()

    def parts(self, x, level):
        """log weight_k N(x; k), (N, K)."""
        return MultivariateNormal(self.means, self.with_noise(level)).log_prob(x[:, None]) + self.weights.log()

    def log_prob(self, x, level=0.0):
        return self.parts(x.double(), level).logsumexp(1)

    def denoise(self, x, level):
        off = torch.linalg.solve(self.with_noise(level), (x[:, None] - self.means)[..., None])
        each = self.means + (self.covariances @ off).squeeze(-1)
        return (self.parts(x, level).softmax(1)[..., None] * each).sum(1)

    def sample(self, n):
        k = torch.multinomial(self.weights, n, replacement=True)
        return MultivariateNormal(self.means[k], self.covariances[k]).sample()

    def given_to(self, model):
        """The model in float64, with a network that predicts what this data's denoiser implies, as its paper has it."""
        model = copy.deepcopy(model).double().eval()
        denoiser = model.denoiser
        unit, target, alpha_of = denoiser.sigma_data, denoiser.predict, denoiser.alpha

        class Network(nn.Module):
            def forward(network, x_t, log_sigma, context=None):  # noqa: N805
                level = log_sigma[:, None].exp()  # of examples divided by the unit
                alpha, sigma = alpha_of(level), level * alpha_of(level)
                at = unit * (level[0, 0] if (level == level[0]).all() else level[:, 0])
                x0 = self.denoise(x_t * unit / alpha, at) / unit
                eps = (x_t - alpha * x0) / sigma
                return {"noise": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[target]

        return with_network(model, Network())


ROTATED = torch.tensor([[1.2, 0.7], [0.7, 0.6]], dtype=torch.float64)
GAUSSIAN = Mixture([[1.0, -2.0]], ROTATED[None], [1.0])
TWO = Mixture([[1.0, -1.0], [-1.5, 0.5]], torch.stack([0.3 * ROTATED, torch.eye(2).double() * 0.1]), [0.3, 0.7])


# Samplers.


@every_model
@every_sampler
def test_every_sampler_reaches_the_moments_of_a_gaussian_whose_score_is_known(name, sampler):
    model, n = GAUSSIAN.given_to(create(name)), 4000
    x = model.sample(n, sampler=sampler, steps=200, generator=seeded())
    covariance = x.T.cov()
    spread = ROTATED.diagonal()
    # four standard errors, and 2% for what 200 steps leave
    assert ((x.mean(0) - GAUSSIAN.means[0]).abs() < 4 * (spread / n).sqrt() + 0.02 * spread.sqrt()).all()
    error = ((ROTATED**2 + spread[:, None] * spread) / n).sqrt()
    assert ((covariance - ROTATED).abs() < 4 * error + 0.02 * spread.max()).all()


@every_model
def test_the_denoiser_and_score_of_a_model_are_those_that_its_network_implies(name):
    model = TWO.given_to(create(name))
    x = 3 * torch.randn(5, 2, dtype=torch.float64)
    for level in (0.02, 0.5, 30.0):
        torch.testing.assert_close(model.denoise(x, level), TWO.denoise(x, level))
        each = torch.full((5,), level, dtype=torch.float64)
        torch.testing.assert_close(model.denoise(x, each), TWO.denoise(x, level))
        at = x.clone().requires_grad_()
        score = torch.autograd.grad(TWO.log_prob(at, level).sum(), at)[0]
        torch.testing.assert_close(model.score(x, level), score)
        torch.testing.assert_close(model.score(x, each), score)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpm-solver++", 2)])
def test_the_order_of_a_deterministic_sampler_by_step_halving(sampler, order):
    model = GAUSSIAN.given_to(create("edm"))
    first, last = 80.0, 0.002
    start = first * torch.randn(50, 2, dtype=torch.float64)
    values, axes = torch.linalg.eigh(ROTATED)
    off = (start - GAUSSIAN.means) @ axes * ((values + last**2) / (values + first**2)).sqrt()
    exact = GAUSSIAN.means + off @ axes.T
    errors = []
    for steps in (40, 80, 160, 320):
        path = SAMPLERS[sampler].steps(model.denoise, start, model.sigma_schedule(steps))
        errors.append(float((list(path)[-2] - exact).abs().mean()))  # at the smallest level, before the step to 0
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.25), (errors, rates)


diffusers = pytest.mark.skipif(
    __import__("importlib").util.find_spec("diffusers") is None,
    reason="diffusers is not installed: pip install diffusers",
)
PREDICTIONS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler(kind, schedule, prediction="noise", **more):
    """In float64: 1 - alpha bar of the first steps has few digits in float32."""
    made = getattr(__import__("diffusers"), kind)(
        num_train_timesteps=1000,
        beta_schedule=SCHEDULES[schedule],
        prediction_type=PREDICTIONS[prediction],
        **more,
    )
    made.alphas = 1 - made.betas.double()
    made.alphas_cumprod = made.alphas.cumprod(0)
    return made


def fixed(model, output):
    """The model with a network that says ``output`` whatever it sees."""

    class Network(nn.Module):
        def forward(self, x_t, log_sigma, context=None):
            return output

    return with_network(model, Network())


@diffusers
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ancestral_steps_are_those_of_diffusers(schedule, prediction):
    theirs = scheduler("DDPMScheduler", schedule, prediction, clip_sample=False)
    ours = genfuse.create("ddpm", shape=(3,), levels=None, schedule=schedule, prediction=prediction)
    levels = ours.sigma_schedule(1000)
    for t in (999, 998, 600, 30, 1, 0):
        x, out = torch.randn(2, 4, 3, dtype=torch.float64)
        s, after = levels[999 - t], levels[1000 - t]
        expected = theirs.step(out, t, x, generator=seeded(t)).prev_sample

        def noise(x, sigma, t=t):
            return x + sigma * torch.randn(x.shape, generator=seeded(t), dtype=x.dtype)

        [found] = SAMPLERS["ancestral"].steps(fixed(ours, out).denoise, x * math.hypot(1, s), (s, after), noise=noise)
        torch.testing.assert_close(found / math.hypot(1, after), expected, rtol=1e-5, atol=1e-5)


@diffusers
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_steps_are_those_of_diffusers(schedule, prediction, eta):
    theirs = scheduler("DDIMScheduler", schedule, prediction, clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(50)
    ours = genfuse.create("ddpm", shape=(3,), levels=None, schedule=schedule, prediction=prediction)
    levels = ours.sigma_schedule(1000)[::-1]  # that of timestep t is levels[t + 1]
    for t in (980, 500, 20, 0):
        x, out, z = torch.randn(3, 4, 3, dtype=torch.float64)
        s, after = levels[t + 1], levels[max(0, t - 20 + 1)]
        expected = theirs.step(out, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        noisy = lambda x, sigma, z=z: x + sigma * z  # noqa: E731
        start = x * math.hypot(1, s)
        [found] = SAMPLERS["ddim"].steps(fixed(ours, out).denoise, start, (s, after), noise=noisy, eta=eta)
        torch.testing.assert_close(found / math.hypot(1, after), expected, rtol=1e-5, atol=1e-5)


@diffusers
def test_dpm_solver_is_that_of_diffusers():
    theirs = scheduler("DPMSolverMultistepScheduler", "linear", final_sigmas_type="zero")
    theirs.set_timesteps(20)
    ours = GAUSSIAN.given_to(genfuse.create("ddpm", shape=(2,), levels=None))
    table = ours.sigma_schedule(1000)[::-1]
    levels = [table[t + 1] for t in theirs.timesteps.tolist()] + [0.0]
    x = torch.randn(6, 2, dtype=torch.float64)
    path = SAMPLERS["dpm-solver++"].steps(ours.denoise, x * math.hypot(1, levels[0]), levels)
    for t, s, after, found in zip(theirs.timesteps, levels, levels[1:], path, strict=False):
        at = x * math.hypot(1, s)
        x = theirs.step((at - GAUSSIAN.denoise(at, s)) / s, t, x).prev_sample
        torch.testing.assert_close(found / math.hypot(1, after), x, rtol=1e-5, atol=1e-5)


@every_sampler
@pytest.mark.parametrize("settings", [{}, {**CLASSES, "shape": (1, 5, 4), "levels": 6}], ids=["vectors", "images"])
def test_one_seed_gives_one_example_whatever_the_batch(sampler, settings):
    model = scrambled("edm", **settings)

    def sample(n, **options):
        return model.sample(n, sampler=sampler, steps=4, generator=seeded(3), **options)

    whole = sample(11)
    for size in (1, 4, 11, 20):
        torch.testing.assert_close(sample(11, batch_size=size), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(5), whole[:5], rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(11), whole)
    assert not torch.allclose(model.sample(11, sampler=sampler, steps=4, generator=seeded(4)), whole)


class Counting(TorchDispatchMode):
    """Counts what makes the host wait for the device, or moves something between them."""

    WAITING = {"_local_scalar_dense", "_to_copy", "lift_fresh", "nonzero", "is_nonzero", "equal", "item"}

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return {name: n for name, n in self.found.items() if name in self.WAITING}


@every_sampler
def test_a_step_of_a_sampler_waits_for_no_device(sampler):
    model = scrambled("edm", **CLASSES, shape=(1, 5, 4), levels=6)
    found = []
    for steps in (2, 12):
        with Counting() as counting:
            model.sample(3, y=1, sampler=sampler, steps=steps, guidance=2.0)
        found.append(counting)
    assert found[0].waits == found[1].waits
    assert found[1].found["convolution"] > found[0].found["convolution"]
    with Counting() as counting:  # which sees such waits
        float(torch.ones(1))
    assert counting.waits == {"_local_scalar_dense": 1}


# Likelihoods.


@every_model
def test_the_flow_has_the_density_of_a_mixture_whose_score_is_known(name):
    model = TWO.given_to(create(name))
    x = TWO.sample(200)
    found, error = model.log_prob_and_error(x)
    assert torch.equal(error, torch.zeros_like(error))
    prior = 6 / model.sigma_max  # which leaves out the data's mean: an error of about mean / level * eps
    torch.testing.assert_close(found, TWO.log_prob(x, model.sigma_min), rtol=0, atol=prior + 0.01)


@every_model
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_example_that_is_not_finite_leaves_mean_and_variance_alone(name, bad):
    model, examples = create(name).train(), TWO.sample(200).float()
    spoilt = examples[:50].clone()
    spoilt[7] = bad
    for batch in (spoilt, torch.full((3, 2), bad), examples[50:]):
        model.loss(Batch(batch), "model")
    kept = examples[torch.arange(200) != 7]
    assert model.seen == 199
    torch.testing.assert_close(model.mean, kept.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.variance, kept.var(0, correction=0), rtol=1e-4, atol=0)


@every_model
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_flow_ends_at_the_mean_and_variance_of_the_examples_that_were_trained_on(name, shift):
    """Without them the density is off by up to 6 / level, 0.1 nat, and by more the farther the data is from 0."""
    data = Mixture(TWO.means + shift, TWO.covariances, TWO.weights)
    model, examples = create(name).train(), data.sample(4000).float()
    for batch in examples.split((100, 1, 1899, 2000)):
        model.loss(Batch(batch), "model")
    torch.testing.assert_close(model.mean, examples.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.variance, examples.var(0, correction=0), rtol=1e-4, atol=0)
    model.eval().loss(Batch(examples + 9), "model")
    assert model.seen == 4000
    x, known = data.sample(200), data.given_to(model)
    off = known.log_prob(x, tolerance=1e-6) - data.log_prob(x, model.sigma_min)
    assert off.abs().max() < 0.02 + (0.05 if name in ("ddpm", "ddpm-x0-cosine", "ddpm-v") else 0)
    start = known.sample(2000, sampler="ddim", steps=1, generator=seeded())  # one step ends at the mean, near enough
    torch.testing.assert_close(start.mean(0), examples.double().mean(0), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["ddpm", "edm", "score", "flow-matching"])
def test_the_density_of_the_flow_integrates_to_one(name):
    model = TWO.given_to(create(name))
    side = torch.linspace(-4, 4, 65, dtype=torch.float64)
    density = model.log_prob(torch.cartesian_prod(side, side), tolerance=1e-3).exp()
    assert float(density.sum() * (side[1] - side[0]) ** 2) == pytest.approx(1, abs=0.02)


def test_the_density_of_a_network_integrates_to_one_and_samples_follow_it():
    model = scrambled("edm", hidden=(16,)).double()
    x = model.sample(20_000, sampler="heun", steps=60, generator=seeded())
    low, high = x.amin(0) - 1, x.amax(0) + 1
    at = [torch.linspace(float(a), float(b), 121, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    cell = math.prod(float(t[1] - t[0]) for t in at)
    p = model.log_prob(torch.cartesian_prod(*at), tolerance=1e-4).exp() * cell
    assert float(p.sum()) == pytest.approx(1, abs=0.02)
    mean = p @ torch.cartesian_prod(*at)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=float(5 * x.std(0).max() / 20_000**0.5 + 0.02))


def test_hutchinson_s_estimate_is_right_within_its_standard_error():
    torch.manual_seed(1)
    root = torch.randn(12, 12, dtype=torch.float64) / 3
    data = Mixture(torch.zeros(1, 12), (root @ root.T + 0.1 * torch.eye(12))[None], [1.0])
    model = data.given_to(create("edm", (12,)))
    x = data.sample(60)
    exact, none = model.log_prob_and_error(x, exact=True, tolerance=1e-4)
    assert not none.any()
    found, error = model.log_prob_and_error(x, draws=16, tolerance=1e-4, generator=seeded())
    z = (found - exact) / error
    assert error.min() > 0
    assert 0.7 < z.std() < 1.6
    assert abs(z.mean()) < 4 * 1.2 / 60**0.5
    torch.testing.assert_close(exact, data.log_prob(x, 0.002), rtol=0, atol=0.02)
    once, unknown = model.log_prob_and_error(x, tolerance=1e-4)
    assert once.isfinite().all()
    assert unknown.isnan().all()


@pytest.mark.parametrize("name", ["ddpm", "ddpm-x0-cosine"])
def test_the_variational_bound_has_its_value_within_its_standard_error(name):
    """Of a Gaussian each term is known in closed form; D(x_t) = c^2 / (c^2 + s^2) x_t."""
    c2, d = 0.4, 3
    data = Mixture(torch.zeros(1, d), c2 * torch.eye(d)[None], [1.0])
    model = data.given_to(create(name, (d,), timesteps=100))
    x = data.sample(200)
    squares = alphas_cumprod(timesteps=100, betas=model.config.schedule)
    s2 = (1 - squares) / squares

    def off(s2):  # E |x - D(x + s eps)|^2, (N, T)
        shrink = c2 / (c2 + s2)
        return (1 - shrink) ** 2 * x.square().sum(1, keepdim=True) + shrink**2 * s2 * d

    steps = 0.5 * ((1 / s2[:-1] - 1 / s2[1:]) * off(s2[1:])).sum(1)
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(squares[-1].sqrt() * x, (1 - squares[-1]).sqrt()),
        torch.distributions.Normal(torch.zeros_like(x), 1.0),
    ).sum(1)
    first = -off(s2[:1])[:, 0] / (2 * s2[0]) - d / 2 * (2 * math.pi * s2[0]).log()
    exact = first - prior - steps
    draws = [model.elbo_and_error(x, generator=seeded(k)) for k in range(10)]
    errors = torch.stack([found - exact for found, _ in draws])
    stated = torch.stack([error for _, error in draws])
    noise_of_first = math.sqrt(d / 2)  # at most: that of one draw of |eps|^2 / 2
    whole = float((stated.square().mean() + noise_of_first**2).sqrt())
    assert abs(errors.mean()) < 4 * whole / errors.numel() ** 0.5
    assert 0.8 * float(stated.square().mean().sqrt()) < float(errors.std()) < 1.1 * whole
    assert exact.mean() < data.log_prob(x).mean()


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("level", [0.003, 0.1, 5.0])
def test_the_decoder_of_discrete_data_is_a_distribution(levels, level):
    for denoised in (-1.4, -1.0, -0.33, 0.0, 0.7, 1.0, 1.4):
        x = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]
        log_p = decoder_log_prob(x, torch.full_like(x, denoised), level, levels)
        assert not log_p.isnan().any()
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddpm", {"bound": "flow"}), ("edm", {}), ("score", {})])
def test_bounds_of_discrete_data_lie_at_its_probabilities_where_the_score_is_known(name, options):
    """Two levels, 0 and 1 with P = 0.3 and 0.7: points at -1 and 1 in the model's space."""
    data = Mixture([[-1.0], [1.0]], torch.full((2, 1, 1), 1e-12), [0.3, 0.7])
    model = data.given_to(create(name, (1,), levels=2))
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(300)[:, None]
    more = options if name == "ddpm" and not options else {**options, "exact": True, "draws": 2, "tolerance": 1e-4}
    bound, _ = model.elbo_and_error(x, generator=seeded(), **more)
    found, error = bound.view(2, 300).mean(1), bound.view(2, 300).std(1) / 300**0.5
    exact = torch.tensor([0.3, 0.7]).double().log()
    assert ((found - exact).abs() < 4 * error + 0.03).all(), (found, exact, error)
    bits = model.bits_per_dim(x, generator=seeded(), **more)
    torch.testing.assert_close(bits, -bound / math.log(2))


# Objectives.


def test_sliced_and_denoising_score_matching_agree_on_a_linear_score():
    """The same up to a constant, 1, and so of the same gradients; and least at the exact score, of a Gaussian."""
    level, x = 0.5, GAUSSIAN.sample(100_000).float()

    class Linear(nn.Linear):
        def forward(self, x_t, log_sigma, context=None):
            return super().forward(x_t)

    found = []
    for objective in ("denoising", "sliced"):
        torch.manual_seed(2)
        model = create("score", sigma_min=level, sigma_max=level * (1 + 1e-6), objective=objective).train()
        model.denoiser.network = Linear(2, 2)
        model.averaged = EMA(model.denoiser, 0.9)
        with torch.no_grad():
            model.denoiser.network.weight.copy_(torch.tensor([[0.5, 0.2], [-0.1, 0.4]]))
            model.denoiser.network.bias.copy_(torch.tensor([0.1, -0.2]))
        loss, _ = model.loss(Batch(x))
        loss.backward()
        found.append((loss.detach(), model.denoiser.network.weight.grad, model.denoiser.network.bias.grad))
    torch.testing.assert_close(found[0][0], found[1][0] + 1, rtol=0, atol=0.02)
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)
    precision = torch.linalg.inv(GAUSSIAN.with_noise(level)[0]).float()
    with torch.no_grad():  # score = -precision (x - mean) = -F / level, of x_t = alpha x
        model.denoiser.network.weight.copy_(level * precision / model.denoiser.alpha(level))
        model.denoiser.network.bias.copy_(-level * precision @ GAUSSIAN.means[0].float())
    model.zero_grad()
    model.loss(Batch(x))[0].backward()
    assert model.denoiser.network.weight.grad.abs().max() < 0.03
    assert model.denoiser.network.bias.grad.abs().max() < 0.03


@every_model
def test_the_loss_is_least_for_the_exact_network(name):
    exact = TWO.given_to(create(name))
    batch = Batch(TWO.sample(300))
    losses = []
    for change in (0.0, 0.3, -0.3):
        model = copy.deepcopy(exact)
        model.averaged.module.network.register_forward_hook(lambda module, inputs, out, change=change: out + change)
        torch.manual_seed(0)
        losses.append(float(model.loss(batch)[0]))
    assert losses[0] < min(losses[1:])
    assert sum(losses[1:]) / 2 - losses[0] == pytest.approx(0.09, rel=1e-3)  # its error has mean 0


@pytest.mark.parametrize("name", [*MODELS, "sliced"])
def test_every_weight_is_trained_and_averaged(name):
    torch.manual_seed(0)
    settings = {"objective": "sliced"} if name == "sliced" else {}
    model = create("score" if settings else name, dropout=0.1, **CLASSES, **settings).train()
    start = copy.deepcopy(model.averaged.module.network.state_dict())
    batch = Batch(torch.randn(64, 2), torch.arange(64) % 3)
    [player] = model.players()
    optimizer = player.optimizer(player.parameters)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
        model.after_step("model")
    for name_of, p in model.denoiser.network.named_parameters():
        assert p.grad is not None, name_of
        assert p.grad.any(), name_of
        assert not torch.equal(model.averaged.module.network.get_parameter(name_of), start[name_of]), name_of


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name, dtype):
    model = scrambled(name, (1, 5, 4), levels=6).train()
    x = torch.randint(6, (8, 1, 5, 4)) / 5
    losses = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss, _ = model.loss(Batch(x))
        losses.append(loss)
        assert loss.dtype is torch.float32
    losses[0].backward()
    assert all(p.grad.isfinite().all() for p in model.denoiser.network.parameters())
    torch.testing.assert_close(*losses, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", dtype=dtype):
        assert model.sample(3, steps=3).isfinite().all()
        assert model.elbo(x[:2]).isfinite().all()


# Labels.


@every_model
def test_labels_and_guidance(name):
    model = scrambled(name, **CLASSES)
    x, y = torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    context, none = torch.eye(3)[y], torch.zeros(6, 3)
    with torch.no_grad():
        free, bound = model.denoise(x, 0.7, none), model.denoise(x, 0.7, context)
        torch.testing.assert_close(model.denoise(x, 0.7, context, guidance=2.5), free + 2.5 * (bound - free))
        torch.testing.assert_close(model.denoise(x, 0.7, context, guidance=0.0), free)
    one = model.sample(4, y=1, steps=3, generator=seeded())
    assert not torch.allclose(one, model.sample(4, y=2, steps=3, generator=seeded()))
    assert not torch.allclose(one, model.sample(4, y=1, steps=3, guidance=3.0, generator=seeded()))
    torch.testing.assert_close(one, model.sample(4, y=torch.ones(4, dtype=torch.long), steps=3, generator=seeded()))
    assert model.sample(4, steps=3).shape == (4, 2)
    assert (model.log_prob(x, y) - model.log_prob(x, 2 - y)).abs()[y != 1].min() > 0


def test_some_labels_are_dropped_in_training_and_none_else():
    model = create("edm", **CLASSES, context_dropout=0.25)
    batch = Batch(torch.randn(4000, 2), torch.arange(4000) % 3)
    kept = model.train()._training_context(batch).sum(1)
    assert set(kept.tolist()) == {0.0, 1.0}
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.03)
    assert torch.equal(model.eval()._training_context(batch), torch.eye(3)[batch.y])


# What is refused.


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ddpm", {"prediction": "eps"}, "prediction must be one of noise, x0, v, got 'eps'"),
        ("ddpm", {"schedule": "sigmoid"}, "schedule must be one of linear, cosine"),
        ("ddpm", {"timesteps": 1}, "timesteps must be at least 2, got 1"),
        ("edm", {"sigma_min": 90.0}, "sigma_min must be below sigma_max"),
        ("edm", {"sigma_data": 0.0}, "sigma_data must be above 0"),
        ("score", {"sigmas": 1}, "sigmas must be at least 2"),
        ("score", {"objective": "implicit"}, "objective must be one of denoising, sliced"),
        ("score", {"objective": "sliced", "shape": (1, 4, 4)}, "objective 'sliced' is for vectors"),
        ("flow-matching", {"t_min": 0.0}, "t_min must be above 0 and below 0.5"),
        ("edm", {"network": "unet"}, r"network 'unet' needs images, shape \(C, H, W\), got \(2,\)"),
        ("edm", {"network": "conv"}, "network must be one of auto, mlp, unet"),
        ("edm", {"attention": (2,)}, "attention must name scales, 0..1 for 2 channels, got"),
        ("edm", {"channels": ()}, "channels must hold at least one width"),
        ("edm", {"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ("edm", {"ema": 1.0}, "ema must be at least 0 and below 1"),
        ("edm", {"hidden": (0,)}, "hidden must be above 0"),
        ("edm", {"hidden": (16, 8)}, r"hidden must hold one width for each residual block, all equal, got \(16, 8\)"),
        ("edm", {"hidden": ()}, "hidden must hold one width"),
        ("edm", {"conditional": True}, "conditional needs labels"),
    ],
)
def test_settings_that_make_no_model_are_refused(name, settings, message):
    config = type(create(name)).Config
    with pytest.raises(SettingsError, match=message):
        config(**{"shape": (2,), "levels": None, **SMALL, **settings})


def test_calls_that_a_model_cannot_answer_are_refused():
    model = create("ddpm")
    for options, message in [
        ({"sampler": "euler"}, "sampler must be one of ancestral, ddim, .*, got 'euler'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1001}, "steps must be at most the 1000 timesteps of the model, got 1001"),
        ({"sampler": "ddim", "s_churn": 3.0}, "the sampler 'ddim' has no option 's_churn'; it has: eta"),
        ({"sampler": "heun", "eta": 1.0}, "has no option 'eta'; it has: none"),
        ({"guidance": 2.0}, "guidance leads towards a label"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"y": 1}, "the model is not conditional, so it takes no labels"),
    ]:
        with pytest.raises(SettingsError, match=message):
            model.sample(3, **options)
    with pytest.raises(DataError, match=r"x must be \(N, 2\), as the setting `shape` says; got \(5, 3\)"):
        model.log_prob(torch.randn(5, 3))
    with pytest.raises(SettingsError, match="draws must be at least 1"):
        model.log_prob(torch.randn(5, 2), draws=0, exact=False)
    with pytest.raises(SettingsError, match=r"bound must be variational, .*, or flow"):
        model.elbo(torch.randn(5, 2), bound="tight")
    with pytest.raises(SettingsError, match="elbo is for discrete data"):
        create("edm").elbo(torch.randn(5, 2))
    with pytest.raises(SettingsError, match="log_prob is for real-valued data"):
        create("edm", levels=4).log_prob(torch.rand(5, 2))


@every_model
def test_zero_examples(name):
    model = scrambled(name)
    assert model.sample(0, steps=2).shape == (0, 2)
    assert model.log_prob(torch.empty(0, 2)).shape == (0,)


# Whole runs.


@pytest.mark.parametrize(
    ("name", "data", "settings", "numbers", "pictures"),
    [
        ("ddpm", "toy:moons", {"timesteps": 50}, {"log_prob", "elbo"}, {"samples.png", "density.png", "flow.png"}),
        ("score", "toy:moons", {"objective": "sliced"}, {"log_prob"}, {"density.png"}),
        ("edm", "digits", {"channels": (8, 8), "conditional": True}, {"elbo", "bits_per_dim"}, {"samples.png"}),
        ("flow-matching", "digits", {"network": "mlp", "dropout": 0.1}, {"elbo", "bits_per_dim"}, {"samples.png"}),
    ],
    ids=["ddpm", "score", "edm", "flow-matching"],
)
def test_a_run_resumes_bit_for_bit_and_is_measured_and_drawn(name, data, settings, numbers, pictures, tmp_path):
    data = genfuse.load_data(data)

    def train(out, **options):
        torch.manual_seed(0)
        model = genfuse.create(name, data, hidden=(8,), **settings)
        model.sampler = model.sampler[0], 5
        trainer = genfuse.Trainer(**{"steps": 12, "batch_size": 64, "device": "cpu", "out": out, **options})
        return trainer.fit(model, data)

    whole = train(tmp_path / "whole", pictures=name != "ddpm")
    train(tmp_path / "parts", steps=5, pictures=False)
    train(tmp_path / "parts", resume=True, pictures=False)
    for file in ("model.safetensors", "state.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    model = whole.model()
    assert int(model.averaged.updates) == 12
    found = evaluate(model, data, limit=20)["test"]
    assert numbers <= found.keys()
    assert all(math.isfinite(found[number]) for number in numbers)
    if name == "ddpm":
        genfuse.training.gallery.draw(tmp_path / "pictures", model, data, whole.metrics())
        assert pictures <= {path.name for path in (tmp_path / "pictures").iterdir()}
    else:
        assert pictures < {path.name for path in whole.path.rglob("*.png")}


def sliced_wasserstein(a, b, directions=200):
    """The root of the mean over directions of the squared Wasserstein-2 distance between projections."""
    along = nn.functional.normalize(torch.randn(2, directions, generator=seeded()), dim=0)
    return float(((a @ along).sort(0).values - (b @ along).sort(0).values).square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "edm", "score", "flow-matching"])
@pytest.mark.parametrize("toy", ["pinwheel", "moons"])
def test_samples_of_a_toy_are_about_as_near_as_two_real_samples(name, toy):
    data = genfuse.load_data(f"toy:{toy}")
    torch.manual_seed(0)
    model = genfuse.create(name, data)
    genfuse.Trainer(steps=4000, batch_size=512, schedule="cosine", device="cpu").fit(model, data)
    real, train = data.splits["test"].x, data.splits["train"].x
    floor = sum(sliced_wasserstein(part, real) for part in train.split(5000)) / 4
    # Draws of real data alone vary from 0.7 to 1.35 of the floor.
    samples = [model.sample(5000, generator=seeded(k)) for k in range(10)]
    assert sum(sliced_wasserstein(x, real) for x in samples) / 10 < 1.5 * floor


@pytest.mark.parametrize("labels", [{}, CLASSES], ids=["", "labels"])
@pytest.mark.parametrize(
    ("name", "shape", "levels", "settings"),
    [("edm", (2,), None, {}), ("edm", (1, 8, 8), 17, {}), ("score", (2,), None, {"objective": "sliced"})],
)
def test_likelihoods_and_losses_are_the_same_in_inference_mode(name, shape, levels, settings, labels):
    model = scrambled(name, shape, levels, **settings, **labels)

    def measured():
        torch.manual_seed(1)
        x, y = torch.rand(3, *shape), torch.arange(3) if labels else None  # inference tensors, within
        loss = model.loss(Batch(x, y))[0]
        return loss.detach(), (model.elbo if levels else model.log_prob)(x, y, tolerance=1e-3)

    wanted = measured()
    with torch.inference_mode():
        found = measured()
    torch.testing.assert_close(found, wanted)
