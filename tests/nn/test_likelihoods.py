import math
from functools import partial

import pytest
import scipy.stats
import torch
from torch import distributions

from genfuse.nn.likelihoods import Bernoulli, Categorical, DiscretizedLogistic, Gaussian

SHAPE = (2, 3, 4)
LIKELIHOODS = {
    "bernoulli": (Bernoulli(), 2),
    "gaussian-fixed": (Gaussian(0.3), None),
    "gaussian-shared": (Gaussian(0.3, "shared"), None),
    "gaussian-per-cell": (Gaussian(0.3, "per-cell"), None),
    "categorical": (Categorical(17), 17),
    "discretized-logistic": (DiscretizedLogistic(17), 17),
    "mixture-of-logistics": (DiscretizedLogistic(17, 3), 17),
}
each = pytest.mark.parametrize(("likelihood", "levels"), LIKELIHOODS.values(), ids=LIKELIHOODS)


def data(levels: int | None, n: int = 5) -> torch.Tensor:
    return torch.randn(n, *SHAPE) if levels is None else torch.randint(levels, (n, *SHAPE)) / (levels - 1)


def test_bernoulli_is_torchs():
    x, logits = data(2), 3 * torch.randn(5, *SHAPE, 1)
    expected = distributions.Bernoulli(logits=logits.squeeze(-1)).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli().log_prob(logits, x), expected)


def test_bernoulli_on_intensities_is_the_mean_over_binarizations():
    x, logits = torch.rand(5, 3), torch.randn(5, 3, 1)
    p = logits.squeeze(-1).sigmoid()
    torch.testing.assert_close(Bernoulli().log_prob(logits, x), (x * p.log() + (1 - x) * (1 - p).log()).sum(1))


def test_bernoulli_stays_finite_at_extreme_logits():
    logits = torch.tensor([[[200.0], [-200.0]]], requires_grad=True)
    log_prob = Bernoulli().log_prob(logits, torch.tensor([[0.0, 0.0]]))
    log_prob.sum().backward()
    assert log_prob.item() == -200
    assert torch.equal(logits.grad, torch.tensor([[[-1.0], [0.0]]]))


@pytest.mark.parametrize("variance", ["fixed", "shared"])
def test_gaussian_with_one_variance_is_scipys(variance):
    likelihood = Gaussian(0.3, variance)
    x, mean = data(None), torch.randn(5, *SHAPE, 1)
    expected = scipy.stats.norm(mean.squeeze(-1).numpy(), 0.3).logpdf(x.numpy()).sum((1, 2, 3))
    torch.testing.assert_close(
        likelihood.log_prob(mean, x).double().detach(), torch.tensor(expected), rtol=1e-5, atol=0
    )


def test_gaussian_with_a_variance_per_cell_is_torchs():
    x, params = data(None), torch.randn(5, *SHAPE, 2)
    std = 0.3 * torch.exp(6 * torch.tanh(params[..., 1] / 12))
    expected = distributions.Normal(params[..., 0], std).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Gaussian(0.3, "per-cell").log_prob(params, x), expected)


def test_learned_log_variance_cannot_run_away():
    likelihood = Gaussian(1.0, "per-cell")
    params = torch.tensor([[[0.0, -1e6], [0.0, 1e6]]], requires_grad=True)
    likelihood.log_prob(params, torch.zeros(1, 2)).sum().backward()
    _, logvar = likelihood.mean_and_logvar(params)
    assert logvar.flatten().tolist() == [-12, 12]
    assert params.grad.isfinite().all()


def test_categorical_is_torchs():
    x, logits = data(17), torch.randn(5, *SHAPE, 17)
    expected = distributions.Categorical(logits=logits).log_prob((x * 16).round()).sum((1, 2, 3))
    torch.testing.assert_close(Categorical(17).log_prob(logits, x), expected)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("likelihood", [Categorical, DiscretizedLogistic, partial(DiscretizedLogistic, components=3)])
def test_probabilities_of_all_levels_sum_to_one(likelihood, levels):
    p = likelihood(levels)
    params = 3 * torch.randn(6, p.parameters_per_cell, dtype=torch.float64)
    x = (torch.arange(levels, dtype=torch.float64) / (levels - 1))[:, None].expand(levels, 6)
    cells = -p.cell_nll(params.expand(levels, *params.shape), x)
    torch.testing.assert_close(cells.exp().sum(0), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("levels", [4, 16, 255, 256])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("rounded", [lambda k, top: k * (1 / top), lambda k, top: (k / top).half().float()])
def test_levels_next_to_the_ends_stay_theirs_however_they_were_rounded(levels, components, rounded):
    p = DiscretizedLogistic(levels, components)
    params = torch.randn(6, p.parameters_per_cell)
    x = rounded(torch.arange(levels, dtype=torch.float32), levels - 1)[:, None].expand(levels, 6)
    cells = -p.cell_nll(params.expand(levels, *params.shape), x)
    torch.testing.assert_close(cells.exp().sum(0), torch.ones(6), rtol=0.02, atol=0)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(), Categorical(4), DiscretizedLogistic(4)])
def test_cells_of_another_shape_are_refused(likelihood):
    params = torch.zeros(2, 3, 5, likelihood.parameters_per_cell)
    params = params[..., 0] if isinstance(likelihood, Bernoulli) else params
    for shape in ((2, 1, 5), (1, 3, 5)):
        with pytest.raises((ValueError, RuntimeError), match=r"x must be|expanded size"):
            likelihood.log_prob(params, torch.zeros(shape))


def test_discretized_logistic_is_the_difference_of_scipys_cdf():
    levels, location, scale = 256, 0.1, 0.05
    x = torch.arange(levels, dtype=torch.float64)[:, None] / (levels - 1)
    params = torch.tensor([location, 7 * math.atanh(math.log(scale) / 7)], dtype=torch.float64).expand(levels, 1, 2)
    edges = (2 * torch.arange(1, levels, dtype=torch.float64) - 1) / (levels - 1) - 1
    cdf = torch.tensor([0.0, *scipy.stats.logistic(location, scale).cdf(edges.numpy()), 1.0], dtype=torch.float64)
    probability = DiscretizedLogistic(levels).log_prob(params, x).exp()
    torch.testing.assert_close(probability, cdf.diff(), rtol=1e-9, atol=1e-14)


def test_a_mixture_of_discretized_logistics_is_the_weighted_sum_of_its_parts():
    mixture, one = DiscretizedLogistic(17, 3), DiscretizedLogistic(17)
    x, params = data(17).double(), torch.randn(5, *SHAPE, 9, dtype=torch.float64)
    weights = params[..., :3].softmax(-1).unbind(-1)
    parts = [torch.stack([params[..., 3 + k] + k - 1, params[..., 6 + k]], -1) for k in range(3)]
    expected = sum(w * one.cell_nll(part, x).neg().exp() for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(mixture.cell_nll(params, x), -expected.log())
    mean = sum(w * one.mean(part) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(mixture.mean(params), mean)


def test_discretized_logistic_stays_finite_far_from_its_location():
    params = torch.tensor([[[50.0, -100.0], [-50.0, -100.0], [0.0, 100.0]]], requires_grad=True)
    log_prob = DiscretizedLogistic(256).log_prob(params, torch.tensor([[0.2, 0.2, 0.2]]))
    log_prob.sum().backward()
    assert log_prob.isfinite()
    assert params.grad.isfinite().all()


@each
def test_a_leading_axis_of_samples_is_kept(likelihood, levels):
    x, params = data(levels), torch.randn(7, 5, *SHAPE, likelihood.parameters_per_cell)
    expected = torch.stack([likelihood.log_prob(p, x) for p in params])
    torch.testing.assert_close(likelihood.log_prob(params, x), expected)
    assert expected.shape == (7, 5)


@each
def test_samples_have_the_mean_and_the_grid_of_the_data(likelihood, levels):
    params = torch.randn(*SHAPE, likelihood.parameters_per_cell)
    draws = likelihood.sample(params.expand(20_000, *params.shape), torch.Generator().manual_seed(0))
    # A cell that is almost certain may have been drawn alike every time.
    error = (draws.std(0) / math.sqrt(len(draws))).clamp(min=1 / len(draws))
    assert ((draws.mean(0) - likelihood.mean(params)).abs() < 5 * error).all()
    if levels is not None:
        assert set(draws.unique().tolist()) <= set((torch.arange(levels) / (levels - 1)).tolist())


@each
def test_samples_follow_the_generator(likelihood, levels):
    params = torch.randn(4, *SHAPE, likelihood.parameters_per_cell)
    a, b, c = (likelihood.sample(params, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@each
def test_half_precision_parameters_are_computed_with_in_float32(likelihood, levels):
    x, params = data(levels), torch.randn(5, *SHAPE, likelihood.parameters_per_cell, dtype=torch.bfloat16)
    assert torch.equal(likelihood.log_prob(params, x), likelihood.log_prob(params.float(), x))
    assert likelihood.mean(params).dtype == torch.float32
