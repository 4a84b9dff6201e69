"""Samplers, schedules and likelihoods as functions of a denoiser that is known: that of data N(0, C2)."""

import inspect
import math
import pickle
from itertools import pairwise

import pytest
import torch

from genfuse.diffusion import likelihood, samplers, schedules
from genfuse.errors import SettingsError

C2 = 0.49
SCHEDULES = {
    "karras": lambda n: schedules.karras(n),
    "geometric": lambda n: schedules.geometric(n),
    "flow_matching": lambda n: schedules.flow_matching(n),
    "linear": lambda n: schedules.ddpm(n),
    "cosine": lambda n: schedules.ddpm(n, "cosine"),
}
every_sampler = pytest.mark.parametrize("name", samplers.SAMPLERS)


def denoiser(x, sigma):
    sigma = sigma[:, None] if isinstance(sigma, torch.Tensor) else sigma
    return x / (1 + sigma * sigma / C2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@every_sampler
def test_a_sampler_of_a_known_denoiser_draws_its_data(name):
    sigmas = schedules.karras(200)
    x = sigmas[0] * torch.randn(4000, 2, generator=seeded(1), dtype=torch.float64)
    x = samplers.SAMPLERS[name](denoiser, x, sigmas, generator=seeded())
    error = 4 * C2 * math.sqrt(2 / 4000) + 0.02 * C2  # four standard errors, and what 200 steps leave
    torch.testing.assert_close(x.T.cov(), C2 * torch.eye(2).double(), rtol=0, atol=error)


@every_sampler
def test_a_callback_sees_each_step_and_steps_gives_each_x(name):
    sampler, sigmas = samplers.SAMPLERS[name], schedules.karras(5)
    x, seen = 80 * torch.randn(3, 2, generator=seeded(1)), []
    final = sampler(denoiser, x, sigmas, generator=seeded(), callback=lambda *each: seen.append(each))
    path = list(sampler.steps(denoiser, x, torch.tensor(sigmas, dtype=torch.float64), generator=seeded()))
    assert torch.equal(final, path[-1])
    assert len(path) == 5
    for step, (found, begun) in enumerate(zip(seen, [x, *path], strict=False)):
        number, at, sigma, denoised = found
        assert number == step
        torch.testing.assert_close(denoised, denoiser(at, sigma))
        if name != "heun-stochastic":  # which puts noise back first
            assert torch.equal(at, begun)
            assert sigma == sigmas[step]


@every_sampler
def test_a_generator_decides_and_no_gradients_are_kept(name):
    sampler, sigmas = samplers.SAMPLERS[name], schedules.geometric(6)
    x = (50 * torch.randn(3, 2, generator=seeded(1))).requires_grad_()
    first, again = (sampler(denoiser, x, sigmas, generator=seeded(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not first.requires_grad
    deterministic = torch.equal(first, sampler(denoiser, x, sigmas, generator=seeded(8)))
    assert deterministic == (name in ("ddim", "heun", "dpm-solver++"))
    assert next(iter(sampler.steps(denoiser, x, sigmas))).requires_grad  # for who goes step by step


@every_sampler
def test_a_sampler_pickles_and_shows_its_options(name):
    sampler = samplers.SAMPLERS[name]
    assert pickle.loads(pickle.dumps(sampler)) is sampler
    assert list(inspect.signature(sampler).parameters)[:3] == ["denoiser", "x", "sigmas"]
    assert inspect.signature(sampler).return_annotation is torch.Tensor


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 1.0], [0.5, 1.0], [1.0, -0.1]])
@every_sampler
def test_noise_levels_that_do_not_fall_are_refused(name, sigmas):
    with pytest.raises(SettingsError, match="sigmas must be two or more noise levels that fall"):
        samplers.SAMPLERS[name](denoiser, torch.ones(1, 2), sigmas)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_to_zero(name):
    for n in (1, 2, 30):
        sigmas = SCHEDULES[name](n)
        assert len(sigmas) == n + 1
        assert sigmas[-1] == 0
        assert all(a > b for a, b in pairwise(sigmas))
    with pytest.raises(SettingsError, match="steps must be at least 1, got 0"):
        SCHEDULES[name](0)


def test_schedules_are_those_of_the_papers():
    karras, geometric, ddpm = schedules.karras(18), schedules.geometric(10, 0.01, 100.0), schedules.ddpm(1000)
    assert karras[:-1] == pytest.approx(
        [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    )
    assert all(b / a == pytest.approx(0.01 ** (4 / 9 / 2)) for a, b in pairwise(geometric[:-1]))
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert ddpm[:-1] == pytest.approx(((1 - bar) / bar).sqrt().flip(0).tolist())
    assert [s / (1 + s) for s in schedules.flow_matching(4, 0.2)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.karras(5, 3.0, 2.0), "must be above 0 and below the largest, got 3.0, 2.0"),
        (lambda: schedules.geometric(5, 0.0, 2.0), "above 0 and below the largest"),
        (lambda: schedules.flow_matching(5, 0.6), "above 0 and below the largest"),
        (lambda: schedules.ddpm(11, timesteps=10), "steps must be at most the 10 timesteps"),
        (lambda: schedules.ddpm(5, "sigmoid"), "betas must be one of linear, cosine, got 'sigmoid'"),
    ],
)
def test_schedules_that_do_not_exist_are_refused(call, message):
    with pytest.raises(SettingsError, match=message):
        call()


def gaussian(x):
    return torch.distributions.Normal(0.0, math.sqrt(C2)).log_prob(x).sum(1)


def test_the_density_of_a_known_denoiser_is_its_data_s():
    x = torch.randn(20, 2, generator=seeded(), dtype=torch.float64)
    data = torch.zeros(2).double(), torch.full((2,), math.sqrt(C2 + 80.0**2)).double()
    found, error = likelihood.log_prob(denoiser, x, prior=data)
    torch.testing.assert_close(found, gaussian(x), rtol=0, atol=1e-3)
    assert not error.any()
    about, error = likelihood.log_prob(denoiser, x, exact=False, draws=3, generator=seeded())
    torch.testing.assert_close(about, gaussian(x), rtol=0, atol=2e-3)  # the probes are exact for a multiple of I
    assert error.max() < 1e-6


def test_a_density_is_refused_of_a_denoiser_whose_derivative_would_be_missed():
    x = torch.randn(5, 2, generator=seeded())
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(SettingsError, match="must be differentiable in x: take it out of"):
        likelihood.log_prob(torch.no_grad()(denoiser), x)
    for exact in (True, False):
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            likelihood.log_prob(lambda x, sigma: weight * denoiser(x.detach(), sigma), x, exact=exact)


def test_the_variational_bound_of_a_known_denoiser_lies_below_its_density():
    x = math.sqrt(C2) * torch.randn(200, 2, generator=seeded(), dtype=torch.float64)
    options = {"strata": 400, "generator": seeded()}
    bound, error = likelihood.variational_bound(denoiser, x, schedules.ddpm(1000), **options)
    options["generator"] = seeded()
    again, _ = likelihood.variational_bound(denoiser, x, sorted(schedules.ddpm(1000)), **options)
    assert torch.equal(bound, again)
    gap, noise = (gaussian(x) - bound).mean(), ((error.square().mean() + 1) / 200).sqrt()  # 1: of the first term
    # In closed form for x of the data; the Gaussian steps are no exact posteriors, which costs about 1 nat.
    s2 = torch.tensor(schedules.ddpm(1000)[-2::-1], dtype=torch.float64).square()
    cost = 2 * (0.5 * (1 / s2[:-1] - 1 / s2[1:]) * C2 * s2[1:] / (C2 + s2[1:])).sum()  # two dimensions
    first = 2 * (-0.5 * C2 / (C2 + s2[0]) - 0.5 * (2 * math.pi * s2[0]).log())
    entropy = -2 * (0.5 + 0.5 * math.log(2 * math.pi * C2))
    torch.testing.assert_close(gap, entropy - (first - cost), rtol=0, atol=float(4 * noise))
    assert noise < 0.3


def test_the_bound_of_discrete_data_is_no_more_than_certainty():
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(50, 1)
    coin = lambda x, sigma: torch.tanh(x / sigma**2)  # of -1 and 1, as often  # noqa: E731
    bound, _ = likelihood.elbo(coin, x, 2, exact=True, draws=4, tolerance=1e-4, generator=seeded())
    assert float(bound.mean()) == pytest.approx(math.log(0.5), abs=0.03)
