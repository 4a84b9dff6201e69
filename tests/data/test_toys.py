import numpy as np
import pytest
import torch
from scipy import stats

from genfuse.data import load_data

COMPONENTS = {"moons": 2, "pinwheel": 5, "rings": 4, "eight-gaussians": 8, "checkerboard": None, "grid": 25}


def points(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_data(f"toy:{name}", seed=seed).batch("train", slice(None))
    return x.double().numpy(), y.numpy()


@pytest.mark.parametrize(("name", "classes"), COMPONENTS.items())
def test_toys_are_points_in_two_dimensions_made_from_the_seed(name, classes):
    data = load_data(f"toy:{name}")
    assert (data.shape, data.levels, data.classes) == ((2,), None, classes)
    assert {part: len(split) for part, split in data.splits.items()} == {"train": 20_000, "test": 5_000}
    x = torch.cat([split.x for split in data.splits.values()])
    assert len(x.unique(dim=0)) == 25_000
    assert 1.5 < x.abs().max() < 6
    if classes:
        assert torch.bincount(data.splits["train"].y).min() > 0.9 * 20_000 / classes
    assert (
        data.fingerprint() == load_data(f"toy:{name}").fingerprint() != load_data(f"toy:{name}", seed=1).fingerprint()
    )


def test_eight_gaussians_have_their_means_and_spread():
    x, y = points("eight-gaussians")
    for k in range(8):
        centre = np.sqrt(8) * np.array([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)])
        residual = (x[y == k] - centre) / np.sqrt(1 / 8)
        assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-4


def test_the_grid_is_that_of_veegan_and_a_mixture_says_what_it_was_drawn_from():
    data = load_data("toy:grid")
    x, y = points("grid")
    centres = np.array([(a, b) for a in range(-4, 5, 2) for b in range(-4, 5, 2)])
    assert (np.array(data.mixture.centres) == centres).all()
    residual = (x - centres[y]) / data.mixture.std
    assert (np.abs(residual) * data.mixture.std).mean() == pytest.approx(0.05 * np.sqrt(2 / np.pi), rel=0.02)
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-4
    assert load_data("toy:eight-gaussians").mixture.std == pytest.approx(np.sqrt(1 / 8))
    assert load_data("toy:rings").mixture is None


def test_rings_have_their_radii():
    x, y = points("rings")
    radius = np.linalg.norm(x, axis=1)
    for k in range(4):
        assert radius[y == k].mean() == pytest.approx(0.75 * (k + 1), abs=0.01)
        assert radius[y == k].std() == pytest.approx(0.08, rel=0.1)


def test_the_checkerboard_is_uniform_on_its_dark_squares():
    x = load_data("toy:checkerboard").splits["train"].x.double().numpy()
    squares = np.floor((x + 4) / 2).astype(int)
    assert not ((squares.sum(1)) % 2).any()
    _, counts = np.unique(squares, axis=0, return_counts=True)
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.kstest(((x + 4) % 2 / 2).ravel(), "uniform").pvalue > 1e-4


def test_the_arms_of_the_pinwheel_are_turned_copies_of_one():
    x, y = points("pinwheel")
    for k in range(1, 5):
        angle = -2 * np.pi * k / 5
        back = x[y == k] @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for axis in range(2):
            assert stats.ks_2samp(back[:, axis], x[y == 0][:, axis]).pvalue > 1e-4


def test_the_moons_are_two_half_circles():
    x, y = points("moons")
    for k, centre in enumerate([(-1, -0.5), (1, 0.5)]):
        radius = np.linalg.norm(x[y == k] - centre, axis=1)
        assert radius.mean() == pytest.approx(2, abs=0.02)
        assert radius.std() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("name", ["toy", "toy:", "toy:spiral"])
def test_an_unknown_toy_is_refused_with_the_known_ones(refused, name):
    refused(name, "toy:moons, toy:pinwheel, toy:rings, toy:eight-gaussians, toy:checkerboard, toy:grid")
