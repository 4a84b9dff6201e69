"""Densities in two dimensions, as papers on flows draw them: 20,000 + 5,000 points made from the seed."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.random import Generator

from genfuse.data._dataset import Dataset, Mixture, Source, Split
from genfuse.errors import DataError

TRAIN, TEST = 20_000, 5_000
Points = tuple[np.ndarray, np.ndarray | None]  # (N, 2), and the component (N,) that each was drawn from


def toy(source: Source) -> Dataset:
    """Points (2,) within about [-4, 4] of the density that the argument names; labels are the components."""
    make = TOYS.get(source.argument or "")
    if make is None:
        known = ", ".join(f"toy:{name}" for name in TOYS)
        raise DataError(f"data set {source.name!r}: write one of {known}")
    x, y = make(TRAIN + TEST, np.random.default_rng(source.seed))
    points = torch.from_numpy(x.astype(np.float32))
    labels = None if y is None else torch.from_numpy(y.astype(np.int64))
    parts = {"train": slice(TRAIN), "test": slice(TRAIN, None)}
    splits = {part: Split(points[rows], None if labels is None else labels[rows]) for part, rows in parts.items()}
    return Dataset(source.name, splits, mixture=MIXTURES.get(source.argument or ""))


def _moons(n: int, rng: Generator) -> Points:
    """Two half circles that reach into one another, as scikit-learn's make_moons, drawn twice as large."""
    from sklearn.datasets import make_moons

    x, y = make_moons(n, noise=0.1, random_state=int(rng.integers(2**32)))
    return 2 * x - (1, 0.5), y


def _pinwheel(n: int, rng: Generator) -> Points:
    """Five arms, Gaussian along the radius and turned the more, the further out (Johnson et al., arXiv 1603.06277)."""
    y = rng.integers(5, size=n)
    radius, across = rng.normal((1, 0), (0.3, 0.1), size=(n, 2)).T
    angle = 2 * np.pi * y / 5 + 0.25 * np.exp(radius)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([radius * cos - across * sin, radius * sin + across * cos], 1), y


def _rings(n: int, rng: Generator) -> Points:
    """Four circles around the origin, equally likely, of radius 0.75, 1.5, 2.25 and 3, with noise of 0.08."""
    y = rng.integers(4, size=n)
    angle = rng.uniform(0, 2 * np.pi, n)
    x = 0.75 * (y + 1)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return x + rng.normal(0, 0.08, (n, 2)), y


def _eight_gaussians() -> Mixture:
    """Eight Gaussians of standard deviation 0.35 on a circle of radius 2.83 (FFJORD, arXiv 1810.01367)."""
    angles = np.arange(8) * np.pi / 4
    centres = np.sqrt(8) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return Mixture(tuple(map(tuple, centres.tolist())), 0.5 / math.sqrt(2))


def _grid() -> Mixture:
    """25 Gaussians of standard deviation 0.05 on a grid of spacing 2 (VEEGAN, 1705.07761; PacGAN, 1712.04086)."""
    return Mixture(tuple(itertools.product((-4.0, -2.0, 0.0, 2.0, 4.0), repeat=2)), 0.05)


def _drawn(mixture: Mixture, n: int, rng: Generator) -> Points:
    y = rng.integers(len(mixture.centres), size=n)
    return np.array(mixture.centres)[y] + rng.normal(0, mixture.std, (n, 2)), y


def _checkerboard(n: int, rng: Generator) -> Points:
    """Uniform over the eight dark squares, 2 wide, of a board over [-4, 4] x [-4, 4]."""
    column = rng.integers(4, size=n)
    row = 2 * rng.integers(2, size=n) + column % 2
    return 2 * (np.stack([column, row], 1) + rng.uniform(size=(n, 2))) - 4, None


MIXTURES = {"eight-gaussians": _eight_gaussians(), "grid": _grid()}
TOYS: dict[str, Callable[[int, Generator], Points]] = {
    "moons": _moons,
    "pinwheel": _pinwheel,
    "rings": _rings,
    "eight-gaussians": partial(_drawn, MIXTURES["eight-gaussians"]),
    "checkerboard": _checkerboard,
    "grid": partial(_drawn, MIXTURES["grid"]),
}
