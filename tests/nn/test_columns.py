"""Columns of several kinds: what networks see of them, and the likelihood of all at once."""

import numpy as np
import pytest
import torch
from scipy import stats

from genfuse.nn import Columns

SCORES = [-2.0, -1.0, 0.0, 1.0, 2.0]
NUMBER = {"kind": "number", "mean": 5.0, "std": 2.0, "missing": False, "low": -3.0, "high": 9.0, "shares": [],
          "knots": [-1.5, -1.0, 0.0, 0.5, 4.0], "scores": SCORES}  # fmt: skip
SPARSE = {**NUMBER, "missing": True, "shares": [0.9, 0.1]}
INTEGER = {**NUMBER, "kind": "integer", "mean": 3.0, "std": 2.0, "low": -1.5, "high": 3.5}
CATEGORY = {"kind": "category", "mean": 0.7, "std": 0.6, "missing": False, "low": 0.0, "high": 0.0, "knots": [],
            "scores": [], "shares": [0.2, 0.5, 0.3]}  # fmt: skip
WITH_GAPS = {**CATEGORY, "missing": True, "shares": [0.2, 0.4, 0.3, 0.1]}
ALL = [NUMBER, CATEGORY, INTEGER, SPARSE, WITH_GAPS]


def rows(n: int = 400) -> torch.Tensor:
    r = np.random.default_rng(0)
    code, gappy = r.integers(0, 3, n), r.integers(0, 3, n).astype(float)
    number, sparse = r.normal(size=(2, n)).clip(-2.9, 2.9)
    gappy[::7], sparse[::5] = np.nan, np.nan
    integer = (r.integers(0, 11, n) - 3) / 2
    return torch.tensor(np.c_[number, (code - 0.7) / 0.6, integer, sparse, (gappy - 0.7) / 0.6]).float()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4, equal_nan=True)


def test_what_is_encoded_is_decoded():
    columns, x = Columns(ALL), rows()
    v = columns.encode(x)
    assert v.shape == (400, columns.width) == (400, 3 + 3 + 2 + 4)
    assert v.isfinite().all()
    assert same(columns.decode(v), x)
    assert same(columns.decode(columns.encode(x, noise=True)), x)
    assert same(columns.quantize(columns.dequantize(x)[0]), x)


def test_cells_that_follow_the_columns_are_passed_on():
    columns, x = Columns(ALL), rows()
    seen = columns(torch.cat([x, x[:, :1]], 1))
    assert same(seen, torch.cat([columns.encode(x), x[:, :1]], 1))


def test_scores_are_what_the_knots_say_and_go_on_beyond_them():
    x = torch.tensor([[-1.5], [-0.5], [0.5], [-2.0], [7.5]])
    assert Columns([NUMBER]).encode(x).squeeze(1).tolist() == pytest.approx([-2, -0.5, 1, -3, 3])


def test_the_density_of_a_number_integrates_to_one():
    columns = Columns([NUMBER])
    raw = torch.randn(3, columns.outputs, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(-60, 200, 26_001)[:, None]
    for each in raw:
        density = columns.log_prob(each.expand(len(grid), -1), grid).exp().double()
        assert float(density.sum() * 0.01) == pytest.approx(1, abs=5e-3)


def test_the_density_of_a_number_is_that_of_a_mixture_of_logistics():
    columns, x = Columns([NUMBER], mixtures=2), rows()[:, :1]
    raw = torch.randn(len(x), columns.outputs, generator=torch.Generator().manual_seed(1))
    weights, mu = raw[:, :2].softmax(1).numpy(), raw[:, 2:4].numpy()
    scale = np.exp(7 * np.tanh((raw[:, 4:].numpy() - 1) / 7))
    score = np.interp(x[:, 0], NUMBER["knots"], SCORES)
    inside = (
        (x[:, 0] > -1.5) & (x[:, 0] < 4) & ((x[:, 0] - torch.tensor(NUMBER["knots"])[:, None]).abs().amin(0) > 0.01)
    )
    slope = np.array([2, 1, 2, 1 / 3.5])[np.searchsorted(NUMBER["knots"], x[:, 0]).clip(1, 4) - 1]
    density = (weights * stats.logistic.pdf(score[:, None], mu, scale)).sum(1) * slope
    assert np.allclose(columns.log_prob(raw, x)[inside], np.log(density)[inside], atol=1e-3)


def test_the_probabilities_of_integers_add_up_to_one():
    columns = Columns([INTEGER])
    raw = torch.randn(1, columns.outputs, generator=torch.Generator().manual_seed(0))
    x = ((torch.arange(-400, 400) - 3) / 2)[:, None]
    assert float(columns.log_prob(raw.expand(len(x), -1), x).exp().sum()) == pytest.approx(1, abs=1e-4)


def test_categories_and_missing_cells_have_the_probabilities_of_a_softmax():
    columns = Columns([CATEGORY, WITH_GAPS])
    raw = torch.randn(400, columns.outputs, generator=torch.Generator().manual_seed(0))
    x = rows()[:, [1, 4]]
    of = [torch.distributions.Categorical(logits=logits) for logits in raw.split([3, 4], 1)]
    codes = (x * 0.6 + 0.7).round().nan_to_num(3)
    expected = of[0].log_prob(codes[:, 0]) + of[1].log_prob(codes[:, 1])
    assert torch.allclose(columns.log_prob(raw, x), expected, atol=1e-5)


def test_all_columns_at_once_are_the_sum_of_single_ones():
    columns, x = Columns(ALL), rows()
    raw = torch.randn(5, 400, columns.outputs, generator=torch.Generator().manual_seed(0))
    k = 15
    numbers = [raw[..., k * i : k * (i + 1)] for i in range(3)]
    category, there, gaps = raw[..., 3 * k :].split([3, 2, 4], -1)
    single = [numbers[0], category, numbers[1], torch.cat([numbers[2], there], -1), gaps]
    expected = sum(Columns([ALL[i]]).log_prob(single[i], x[:, i : i + 1]) for i in range(5))
    assert torch.allclose(columns.log_prob(raw, x), expected, atol=1e-3)


def test_gradients_are_finite_where_cells_are_missing():
    columns, x = Columns(ALL), rows()
    raw = (3 * torch.randn(400, columns.outputs)).requires_grad_()
    columns.log_prob(raw, x).sum().backward()
    assert raw.grad.isfinite().all()


def test_samples_follow_the_likelihood_and_the_seed():
    columns = Columns(ALL)
    raw = torch.randn(1, columns.outputs, generator=torch.Generator().manual_seed(3)).expand(20_000, -1)
    x = columns.sample(raw, torch.Generator().manual_seed(0))
    assert same(x, columns.sample(raw, torch.Generator().manual_seed(0)))
    assert ((x[:, 0] >= -3) & (x[:, 0] <= 9)).all()
    whole = x[:, 2] * 2 + 3
    assert (whole - whole.round()).abs().max() < 1e-4
    logits = raw[0, 45:]
    for i, of in ((1, logits[:3]), (4, logits[5:])):
        codes = (x[:, i] * 0.6 + 0.7).round().nan_to_num(3).long()
        assert torch.allclose(codes.bincount(minlength=len(of)) / 20_000, of.softmax(0), atol=0.02)
    assert float(x[:, 3].isnan().float().mean()) == pytest.approx(float(logits[3:5].softmax(0)[1]), abs=0.02)
    inner = (x[:, 2] > -1.5) & (x[:, 2] < 3.5)  # the outer ones hold what is beyond
    for value in x[inner, 2].unique()[:4]:
        share = float((x[:, 2] == value).float().mean())
        at = torch.cat([raw[:1, 15:30]], 1)
        assert share == pytest.approx(float(Columns([INTEGER]).log_prob(at, value.view(1, 1)).exp()), abs=0.02)


def test_dequantisation_of_categories_loses_nothing_to_a_gaussian():
    """Parts of N(0, 1) as large as the categories are often: its bound is then the log of their shares."""
    columns, x = Columns([CATEGORY, WITH_GAPS]), rows()[:, [1, 4]]
    v, log_w = columns.dequantize(x)
    bound = torch.distributions.Normal(0, 1).log_prob(v).sum(1) + log_w
    codes = (x * 0.6 + 0.7).round().nan_to_num(3).long()
    shares = [torch.tensor(of["shares"])[codes[:, i]].log() for i, of in enumerate((CATEGORY, WITH_GAPS))]
    assert torch.allclose(bound, shares[0] + shares[1], atol=2e-3)


def test_the_bound_of_integers_is_below_their_probability():
    columns = Columns([INTEGER])
    x = ((torch.arange(0, 9) - 3) / 2)[:, None]
    edges = ((torch.arange(-1, 9) + 0.5 - 3) / 2).numpy()
    score = Columns([{**NUMBER}]).encode(torch.tensor(edges)[:, None].float())[:, 0].numpy()
    exact = np.log(np.diff(stats.norm.cdf(score)))
    draws = [columns.dequantize(x, torch.Generator().manual_seed(i)) for i in range(400)]
    each = torch.stack([torch.distributions.Normal(0, 1).log_prob(v)[:, 0] + w for v, w in draws])
    assert (each.mean(0).numpy() <= exact + 0.02).all()
    assert np.allclose(each.exp().mean(0).log(), exact, atol=0.1)  # and without bias before the logarithm


def test_a_generator_gets_gradients_and_draws_choices():
    columns = Columns(ALL)
    raw = torch.randn(500, columns.width, requires_grad=True)
    v = columns.activate(raw)
    assert v.shape == raw.shape
    assert v.abs().max() <= 4
    v.square().sum().backward()
    assert raw.grad.isfinite().all()
    assert raw.grad.abs().sum(0).min() > 0
    assert torch.allclose(v[:, 3:6].sum(1), torch.tensor(-1.0), atol=1e-4)  # 1 and twice -1


def test_many_columns_and_many_categories_take_no_loop():
    columns = Columns([{**CATEGORY, "shares": [1 / 2000] * 2000}] * 3 + [NUMBER] * 300)
    x = torch.zeros(4, 303)
    assert columns.log_prob(torch.zeros(4, columns.outputs), x).isfinite().all()
