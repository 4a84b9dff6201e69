"""What nearest neighbours tell of samples: precision to coverage, modes, and copies of training examples."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.data import Mixture
from genfuse.errors import SettingsError
from genfuse.metrics._distances import Features, batches, check_alike, checked, pair, require

BLOCK = 2**20  # distances that are held at a time: 8 MiB, which a processor's cache holds


class PRDC(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(samples: Features, reference: Features, *, k: int = 3, k_density: int = 5) -> PRDC:
    """Precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2), density and coverage (Naeem et
    al., arXiv 2002.09797). Higher is better; all but density are in [0, 1].

    The ball of an example reaches to its k-th nearest other one of its own set, boundary included. ``precision`` is the
    share of samples in the ball of some reference example and ``recall`` that of reference examples in the ball of some
    sample, both with ``k``; with ``k_density``, ``density`` is the number of reference balls that a sample lies in,
    divided by k_density (1 in expectation for the same distribution), and ``coverage`` the share of reference examples
    with a sample in their ball. The counts are exact where points repeat and distances tie, too; there the package prdc
    has others, as its balls are without their boundary. Memory does not grow with the number of pairs. Raises
    TooFewSamplesError unless either set has more than k examples.
    """
    if k < 1 or k_density < 1:
        raise SettingsError(f"k and k_density must be at least 1, got {k} and {k_density}")
    x, y = pair(samples, reference)
    require("precision and recall", len(x), k + 1, "samples", f" for {k} neighbours of each")
    most = max(k, k_density)
    require("precision to coverage", len(y), most + 1, "reference examples", f" for {most} neighbours of each")
    # By a power of 2, which rounds nothing and leaves squares within float64's range.
    scale = 2.0 ** min(1000, -math.frexp(max(float(points.abs().max()) for points in (x, y)))[1])
    # Points that repeat, as those of a model that collapsed do, are looked at once, and counted as often as they are.
    (x, times_x), (y, times_y) = ((points * scale).unique(dim=0, return_counts=True) for points in (x, y))
    n, m = int(times_x.sum()), int(times_y.sum())
    around_x, around_y = _radii(x, times_x, (k,)), _radii(y, times_y, (k, k_density))
    precise = density = 0
    recalled, covered = (torch.zeros(len(y), dtype=torch.bool, device=y.device) for _ in range(2))
    pairs = _Pairs(x, y)
    for rows in pairs.parts():
        distances = pairs.quick(rows)
        precise += int(times_x[rows[pairs.within(rows, distances, around_y[0]).any(1)]].sum())
        recalled |= pairs.within(rows, distances, around_x[0][:, rows, None]).any(0)
        inside = pairs.within(rows, distances, around_y[1])
        density += int(times_x[rows].double() @ inside.double() @ times_y.double())
        covered |= inside.any(0)
    return PRDC(
        precise / n, int(times_y[recalled].sum()) / m, density / (k_density * n), int(times_y[covered].sum()) / m
    )


def nearest(queries: Tensor, points: Features, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, k), rising, of ``queries`` (N, D) to the nearest of ``points``, and their indices (N, k).

    Points (M, D) may come in batches, of which one at a time is held. Raises TooFewSamplesError if M < k, and
    SettingsError if they are not finite or not alike.
    """
    queries = checked(queries)
    best = queries.new_zeros((len(queries), 0), dtype=torch.float64)
    index = queries.new_zeros((len(queries), 0), dtype=torch.int64)
    seen = 0
    for batch in batches(points):
        batch = checked(batch)
        check_alike(queries[:0].T, batch[:0].T)
        pairs = _Pairs(queries, batch)
        found = [pairs.nearest(rows, min(k, len(batch))) for rows in pairs.parts()]
        near, _, places = (torch.cat(parts) for parts in zip(*found, strict=True))
        best, order = torch.cat([best, near], 1).sort(stable=True)
        best, index = best[:, :k], torch.cat([index, places + seen], 1).gather(1, order)[:, :k]
        seen += len(batch)
    require(f"search for {k} neighbours", seen, k, "points")
    return best.sqrt(), index


class ModeCoverage(NamedTuple):
    modes_covered: int
    high_quality: float  # share of the samples


def mode_coverage(samples: Tensor, mixture: Mixture) -> ModeCoverage:
    """How many modes of a mixture samples (N, D) reach, and what share of them is near one.

    A sample is of high quality within 3 standard deviations of the nearest centre; a mode is covered where it is the
    nearest one of at least one such sample (VEEGAN, arXiv 1705.07761; PacGAN, arXiv 1712.04086). In two dimensions
    98.9% of the mixture itself is of high quality. Raises TooFewSamplesError for fewer samples than modes.
    """
    centres = torch.tensor(mixture.centres, dtype=torch.float64)
    require("mode coverage", len(samples), len(centres), "samples", ", one a mode")
    distances, index = nearest(samples.double().cpu(), centres)
    good = distances <= 3 * mixture.std
    return ModeCoverage(len(index[good].unique()), good.double().mean().item())


def _radii(points: Tensor, times: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """The squared distances of points (N, D), each of which is there so many ``times``, to their k-th nearest others:
    (2, N) for each of ``ks``, numbers, and what is to be added to them that is below their last digit."""
    pairs, found = _Pairs(points, points), []
    for rows in pairs.parts():
        near, below, places = pairs.nearest(rows, min(max(ks), len(points) - 1), others=True)
        within = torch.cat([times[rows, None] - 1, times[places]], 1).cumsum(1)  # copies of the point come first
        kth = torch.stack([(within < k).sum(1) for k in ks], 1)
        found.append(torch.stack([F.pad(of, (1, 0)).gather(1, kth).T for of in (near, below)], 1))
    return list(torch.cat(found, 2))


class _Pairs:
    """The squared distances of the rows of x (N, D) to those of y (M, D), float64, in two ways.

    ``quick`` is one product of matrices, off by at most the sum of the pair's ``error_x`` and ``error_y``; ``measure``
    has twice as many digits, and is off by at most its ``tie`` share.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        dimensions, eps = x.shape[1], torch.finfo(torch.float64).eps
        size = max(float(points.abs().amax()) for points in (x, y))
        # Numbers on a grid that leaves the products of their differences 53 bits: nothing rounds.
        steps = 2.0 ** math.floor(25 - 0.5 * math.log2(dimensions) - math.log2(size)) if size > 1e-300 else 1.0
        self.exact = all(bool((points * steps == (points * steps).round()).all()) for points in (x[:1], x, y))
        self.tie = 16 * dimensions * eps**2
        # Distances between far away points would lose digits.
        middle = torch.zeros_like(y[0]) if self.exact else y.mean(0)
        a, b = x - middle, y - middle
        squares_x, squares_y = a.square().sum(1, keepdim=True), b.square().sum(1, keepdim=True)
        self._left = torch.cat([a, squares_x, torch.ones_like(squares_x)], 1)
        self._right = torch.cat([b.mul_(-2), torch.ones_like(squares_y), squares_y], 1).T
        rounding = 0.0 if self.exact else 4 * (dimensions + 8) * eps
        self.error_x, self.error_y = rounding * squares_x, rounding * squares_y[:, 0]

    def parts(self) -> Iterator[Tensor]:
        """The indices of x, so many at a time that their distances are some BLOCK numbers."""
        yield from torch.arange(len(self.x), device=self.x.device).split(max(1, BLOCK // len(self.y)))

    def quick(self, rows: Tensor) -> Tensor:
        return self._left[rows] @ self._right

    def measure(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Of pairs of rows: numbers, and what is to be added to them that is below their last digit, (K,) each."""
        step = max(1, BLOCK // self.x.shape[1])
        parts = [_squared(self.x[i], self.y[j]) for i, j in zip(i.split(step), j.split(step), strict=True)]
        high, low = zip(*parts, strict=True)
        return torch.cat(high), torch.cat(low)

    def within(self, rows: Tensor, distances: Tensor, radius: Tensor) -> Tensor:
        """Which of the ``quick`` distances of some rows are at most a radius as `_radii` has them: (2, M) of the points
        of y, or (2, rows, 1) of x. What is too near to a radius for the error is measured."""
        found = distances <= radius[0]
        if not self.exact:
            of_y = radius[0].dim() == 1
            most = self.error_x[rows].amax() + self.error_y if of_y else self.error_x[rows] + self.error_y.amax()
            i, j = ((distances <= radius[0] - most) ^ (distances <= radius[0] + most)).nonzero().T
            to, below = (of.expand_as(found)[i, j] for of in radius)
            open_ = (distances[i, j] - to).abs() <= self.error_x[rows[i], 0] + self.error_y[
                j
            ]  # its own error is smaller
            i, j, to, below = i[open_], j[open_], to[open_], below[open_]
            high, low = self.measure(rows[i], j)
            found[i, j] = (high - to) + (low - below) <= self.tie * high
        return found

    def nearest(self, rows: Tensor, k: int, others: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The k smallest distances of each of ``rows``, as measured and rising, and their places, (rows, k) each.

        With ``others`` x is y, and no row is its own neighbour.
        """
        distances = self.quick(rows)
        if others:
            distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        near, places = distances.topk(k, largest=False)
        if self.exact or not k:
            return near, torch.zeros_like(near), places
        error = self.error_x[rows]
        bound = (near + error + self.error_y[places]).amax(1, keepdim=True)  # of the k-th
        i, j = (distances <= bound + error + self.error_y.amax()).nonzero().T
        open_ = distances[i, j] - error[i, 0] - self.error_y[j] <= bound[i, 0]
        i, j = i[open_], j[open_]
        high, low = self.measure(rows[i], j)
        order = low.argsort()
        for of in (high, i):
            order = order[of[order].argsort(stable=True)]
        first = torch.searchsorted(i[order], torch.arange(len(rows), device=i.device))
        chosen = order[first[:, None] + torch.arange(k, device=i.device)]
        return high[chosen], low[chosen], j[chosen]


def _squared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The squared distance of each row of x (K, D) to that of y, rounded once, and what that rounds off, (K,) each.

    What each operation rounds off is summed too: Knuth's two-sum, in a tree, and Dekker's product (Ogita, Rump & Oishi,
    *Accurate sum and dot product*, 2005).
    """
    difference, off = _two_sum(x, -y)
    large = difference * (2**27 + 1)
    large = large - (large - difference)
    small = difference - large
    terms = difference.square()
    rest = (large.square() - terms + 2 * large * small + small.square() + 2 * difference * off).sum(1)
    while (width := terms.shape[1]) > 1:
        total, off = _two_sum(terms[:, : width // 2], terms[:, width // 2 : width // 2 * 2])
        rest += off.sum(1)
        terms = torch.cat([total, terms[:, width // 2 * 2 :]], 1)
    return _two_sum(terms[:, 0], rest)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b, and what it rounds off."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)
