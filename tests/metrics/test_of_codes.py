"""Metrics of codes are right where their value is known in closed form."""

import math

import numpy as np
import pytest
import torch

import genfuse
from genfuse.cli import main
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, SettingsError
from genfuse.metrics import Codes, beta_vae_score, dci, evaluate_codes, factor_vae_score, kl_parts, mig
from genfuse.models import create
from genfuse.training import Trainer

SIZES = (3, 6, 10, 8)
GRID = np.stack(np.unravel_index(np.arange(math.prod(SIZES)), SIZES), 1)  # all combinations: (1440, 4)
ALIGNED = (GRID - GRID.mean(0)) / GRID.std(0)
METRICS = (mig, dci, factor_vae_score, beta_vae_score)


def scores(codes):
    return {name: value for metric in METRICS for name, value in metric(codes).items()}


def rng():
    return np.random.default_rng(0)


def information_of_a_mixture(values, std):
    """I(z; v) in nats for z = v + N(0, std^2), by a sum over a fine grid."""
    z = np.linspace(values.min() - 8 * std, values.max() + 8 * std, 20_001)
    each = np.exp(-0.5 * ((z[:, None] - np.unique(values)) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    density = each.mean(1)
    return -(density * np.log(density + 1e-300)).sum() * (z[1] - z[0]) - 0.5 * math.log(2 * math.pi * math.e * std**2)


@pytest.mark.parametrize("std", [None, np.full(ALIGNED.shape, 1e-3)])
def test_axis_aligned_codes_without_noise_have_every_score_1(std):
    permuted = [2, 0, 3, 1]
    found = scores(Codes(-3 * ALIGNED[:, permuted], GRID, std))
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=5e-3)


@pytest.mark.parametrize("std", [None, np.full((len(GRID), 8), 0.05)])
def test_duplicated_codes_have_no_gap(std):
    assert mig(Codes(np.hstack([ALIGNED, ALIGNED]), GRID, std))["mig"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("std", [None, np.full((3200, 2), 0.4)])
def test_codes_rotated_by_45_degrees_have_no_gap(std):
    factors = np.stack(np.unravel_index(np.arange(3200) % 64, (8, 8)), 1)
    plane = (factors - 3.5) / 2.3
    turned = plane @ np.array([[1, -1], [1, 1]]) / math.sqrt(2)
    turned = turned + (0.4 * rng().standard_normal(turned.shape) if std is None else 0)
    found = scores(Codes(turned, factors, std))
    assert found["mig"] == pytest.approx(0, abs=0.02)
    assert found["dci_disentanglement"] < 0.1
    assert mig(Codes(plane, factors, std))["mig"] > 0.4  # the same codes, not turned


@pytest.mark.parametrize("std", [0.2, 0.5, 1.0])
def test_the_information_of_gaussian_codes_is_that_of_a_mixture_in_nats(std):
    wanted = [information_of_a_mixture(column, std) for column in ALIGNED.T]
    repeats = 2
    mean, factors = np.tile(ALIGNED, (repeats, 1)), np.tile(GRID, (repeats, 1))
    exact = Codes(mean, factors, np.full(mean.shape, std)).information
    drawn = Codes(mean + std * rng().standard_normal(mean.shape), factors).information
    for found in (exact, drawn):
        assert np.diag(found) == pytest.approx(wanted, abs=0.06)
        assert np.abs(found - np.diag(np.diag(found))).max() < 0.06
    entropies = [math.log(size) for size in SIZES]
    gaps = np.array(wanted) / entropies
    assert mig(Codes(mean, factors, np.full(mean.shape, std)))["mig"] == pytest.approx(gaps.mean(), abs=0.04)


def test_random_codes_tell_nothing():
    found = scores(Codes(rng().standard_normal((len(GRID), 5)), GRID))
    assert found["mig"] < 0.02
    assert max(found["dci_disentanglement"], found["dci_completeness"]) < 0.05
    for name in ("factor_vae_score", "beta_vae_score"):
        assert found[name] == pytest.approx(1 / 4, abs=0.06)


def test_a_factor_in_two_latents_lowers_completeness_and_two_factors_in_one_disentanglement():
    twice = dci(Codes(np.hstack([ALIGNED, ALIGNED]), GRID))
    assert twice["dci_disentanglement"] == pytest.approx(1, abs=1e-6)
    assert twice["dci_completeness"] < 0.8
    one = dci(Codes(GRID @ np.cumprod([1, *SIZES[:-1]])[:, None], GRID))  # a latent that says everything
    assert one["dci_completeness"] == pytest.approx(1)
    assert one["dci_disentanglement"] < 0.3


def test_a_latent_without_spread_is_not_taken_for_the_steadiest():
    codes = Codes(np.hstack([ALIGNED, np.zeros((len(GRID), 1))]), GRID)
    assert factor_vae_score(codes)["factor_vae_score"] == 1


def test_the_parts_of_the_kl_are_those_of_a_gaussian():
    """Means of a correlated Gaussian: q(z) is one too, whose total correlation is -log(1 - r^2) / 2."""
    covariance, noise = np.array([[0.7, 0.5], [0.5, 0.7]]), 0.3
    mean = rng().multivariate_normal([0, 0], covariance, 5000)
    codes = Codes(mean, np.arange(5000)[:, None] % 2, np.full(mean.shape, math.sqrt(noise)))
    found = kl_parts(codes)
    assert found["total_correlation"] == pytest.approx(-0.5 * math.log(1 - 0.5**2), abs=0.04)
    assert found["dimension_kl"] == pytest.approx(0, abs=0.02)
    information = 0.5 * np.linalg.slogdet((covariance + noise * np.eye(2)) / noise)[1]
    assert found["mutual_information"] == pytest.approx(information, abs=0.06)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": np.where(np.arange(4)[:, None] == 2, np.nan, np.eye(4))}, "codes has 4 NaN .* row 2, column 0"),
        ({"mean": np.eye(5)}, "5 codes, 4 rows of 2 factors"),
        ({"mean": np.ones(4)}, "codes must be a matrix"),
        ({"mean": np.array([["a"]] * 4)}, "codes must be a matrix of numbers"),
        ({"factors": np.c_[[0, 1, 0, 1], [2, 2, 2, 2]]}, "factor 2 has one value in all 4 examples"),
        ({"factors": np.c_[[0, 1, 0, 1], [0.5, 1, 2, 3]]}, "factor 2 is 0.5 in row 0: put real numbers into bins"),
        ({"factors": np.c_[[0, 1, np.inf, 1]]}, "factors has 1 NaN"),
        ({"mean": np.ones((1, 2)), "factors": np.ones((1, 2))}, "two examples or more"),
        ({"std": np.zeros((4, 4))}, "std must be .* above 0"),
        ({"std": np.ones((4, 3))}, r"std must be \(4, 4\)"),
        ({"names": ("a",)}, "2 factors, 1 names"),
    ],
)
def test_what_is_no_codes_and_factors_is_refused(change, words):
    given = {"mean": np.eye(4), "factors": np.c_[[0, 1, 0, 1], [0, 0, 1, 1]], **change}
    with pytest.raises(DataError, match=words):
        Codes(**given)


@pytest.mark.parametrize("metric", [factor_vae_score, beta_vae_score])
def test_one_factor_cannot_be_told_from_others(metric):
    with pytest.raises(DataError, match="told apart takes two or more, got 1"):
        metric(Codes(np.eye(4), np.array([[0], [1], [0], [1]])))


def shapes(n=400):
    """Squares of two sizes at four places in a row, as a third party's data set with factors."""
    factors = torch.cartesian_prod(torch.arange(2), torch.arange(4)).repeat(n // 8, 1)
    x = torch.zeros(n, 1, 4, 8, dtype=torch.uint8)
    for image, (size, place) in zip(x, factors.tolist(), strict=True):
        image[0, : 2 + size, 2 * place : 2 * place + 2] = 1
    values = {"size": (2.0, 3.0), "place": (0.0, 2.0, 4.0, 6.0)}
    splits = {"train": Split(x, factors=factors), "test": Split(x[:80], factors=factors[:80])}
    return Dataset("shapes", splits, levels=2, factors=values)


def test_a_run_on_data_with_factors_is_measured(tmp_path, capsys):
    data = genfuse.load_data("sprites:tiny")
    model = create("vae", data, hidden=(8,), latent_dim=3)
    Trainer(steps=2, out=tmp_path / "run", pictures=False).fit(model, data)
    assert main(["evaluate", str(tmp_path / "run"), "--metrics", "mig,kl-parts", "--limit", "500"]) == 0
    said = capsys.readouterr().out
    assert "codes of 500 examples" in said
    assert "total correlation" in said
    assert (tmp_path / "run/pictures/factors.png").is_file()
    assert not (tmp_path / "run/pictures/neighbours.png").exists()  # no metric of samples was asked for
    assert '"information"' in (tmp_path / "run/evaluation.json").read_text()


def test_codes_of_a_model_are_measured_with_its_own_posterior():
    data = shapes()
    model = create("vae", data, hidden=(16,), latent_dim=2).eval()
    found = evaluate_codes(model, data, metrics=["mig"])
    assert found["examples"] == 480
    assert list(found["information"]) == ["size", "place"]
    assert found["entropy"] == pytest.approx({"size": math.log(2), "place": math.log(4)})
    assert found == evaluate_codes(model, data, metrics=["mig"])
    flow = create("vae", data, hidden=(16,), latent_dim=2, posterior="planar")  # codes as such
    assert set(evaluate_codes(flow, data, metrics=["mig", "kl-parts"])["scores"]) == {"mig"}


def test_codes_need_factors_and_a_posterior():
    with pytest.raises(SettingsError, match="the data has no factors"):
        evaluate_codes(create("vae", digits := genfuse.load_data("digits"), hidden=(4,)), digits)
    with pytest.raises(SettingsError, match="a GAN has no posterior"):
        evaluate_codes(create("gan", data := shapes(), hidden=(4,)), data)
