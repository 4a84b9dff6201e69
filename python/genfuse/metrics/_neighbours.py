"""What nearest neighbours tell of samples: precision, recall, density, coverage, and copies of training examples."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.metrics._distances import Features, batches, check_alike, checked, pair, require

BLOCK = 2**20  # distances that are held at a time: 8 MiB, which a processor's cache holds
SPARE = 8  # neighbours that are kept beside those asked for, in case that they are as near
MANY = 1 / 64  # of the pairs: to measure so many takes longer than to take all differences


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
    around_x, around_y = _Radii(x, times_x, (k,)), _Radii(y, times_y, (k, k_density))
    precise = density = 0
    recalled, covered = (torch.zeros(len(y), dtype=torch.bool, device=y.device) for _ in range(2))
    pairs = _Pairs(x, y)
    for rows in pairs.parts():
        block = _Block(pairs, rows)
        precise += int(times_x[rows[block.within(around_y, 0).any(1)]].sum())
        recalled |= block.within(around_x, 0, of_rows=True).any(0)
        inside = block.within(around_y, 1)
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


class _Pairs:
    """The squared distances of the rows of x (N, D) to those of y (M, D), float64, in three ways.

    ``quick`` is one product of matrices, off by at most the sum of the pair's ``error_x`` and ``error_y``; ``direct``
    takes differences and is off by at most its ``relative`` share; ``measure`` has twice as many digits, and is off by
    at most its ``tie`` share.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        dimensions, eps = x.shape[1], torch.finfo(torch.float64).eps
        sides = [x] if x is y else [x, y]
        size = max(float(points.abs().amax()) for points in sides)
        # Numbers on a grid that leaves the products of their differences 53 bits: nothing rounds.
        steps = 2.0 ** math.floor(25 - 0.5 * math.log2(dimensions) - math.log2(size)) if size > 1e-300 else 1.0
        self.exact = all(bool((points * steps == (points * steps).round()).all()) for points in (x[:1], *sides))
        self.relative, self.tie = 2 * (dimensions + 8) * eps, 16 * dimensions * eps**2
        # Distances between far away points would lose digits.
        middle = torch.zeros_like(y[0]) if self.exact else y.mean(0)
        centred = [points - middle for points in sides]
        squared = [points.square().sum(1, keepdim=True) for points in centred]
        ones = [torch.ones_like(of) for of in squared]
        self._left = torch.cat([centred[0], squared[0], ones[0]], 1)
        self._right = torch.cat([centred[-1].mul_(-2), ones[-1], squared[-1]], 1).T
        rounding = 0.0 if self.exact else 4 * (dimensions + 8) * eps
        self.error_x, self.error_y = rounding * squared[0][:, 0], rounding * squared[-1][:, 0]

    def parts(self) -> Iterator[Tensor]:
        """The indices of x, so many at a time that their distances are some BLOCK numbers."""
        yield from torch.arange(len(self.x), device=self.x.device).split(max(1, BLOCK // len(self.y)))

    def quick(self, rows: Tensor) -> Tensor:
        return self._left[rows] @ self._right

    def direct(self, rows: Tensor) -> Tensor:
        return torch.cdist(self.x[rows], self.y, compute_mode="donot_use_mm_for_euclid_dist").square_()

    def apart(self, rows: Tensor, distances: Tensor) -> Tensor:
        """The distances, where x is y, with no row its own neighbour."""
        distances[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        return distances

    def measure(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Of pairs of rows: numbers, and what is to be added to them that is below their last digit, (K,) each."""
        step = max(1, BLOCK // self.x.shape[1])
        parts = [_squared(self.x[i], self.y[j]) for i, j in zip(i.split(step), j.split(step), strict=True)]
        high, low = zip(*parts, strict=True)
        return torch.cat(high), torch.cat(low)

    def nearest(self, rows: Tensor, k: int, others: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The k smallest distances of each of ``rows``, as measured and rising, and their places, (rows, k) each.

        With ``others`` x is y, and no row is its own neighbour.
        """
        distances = self.apart(rows, self.quick(rows)) if others else self.quick(rows)
        near, places = distances.topk(k, largest=False)
        if self.exact or not k:
            return near, torch.zeros_like(near), places
        error = self.error_x[rows, None]
        bound = (near + error + self.error_y[places]).amax(1, keepdim=True)  # of the k-th
        i, j = (distances <= bound + error + self.error_y.max()).nonzero().T
        open_ = distances[i, j] - error[i, 0] - self.error_y[j] <= bound[i, 0]
        i, j = i[open_], j[open_]
        if len(i) - near.numel() > MANY * distances.numel():
            distances = self.apart(rows, self.direct(rows)) if others else self.direct(rows)
            bound = distances.topk(k, largest=False).values[:, -1:] * (1 + 3 * self.relative)
            i, j = (distances <= bound).nonzero().T
        return _smallest(k, distances.shape, i, j, *self.measure(rows[i], j))


def _smallest(
    k: int, shape: torch.Size, i: Tensor, j: Tensor, high: Tensor, low: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The k smallest of the numbers that a table has at (i, j), of each row, and their columns, (rows, k) each."""
    order = low.argsort()
    order = order[high[order].argsort(stable=True)]
    ranks = high.new_full(shape, torch.inf)
    ranks[i[order], j[order]] = torch.arange(len(order), device=high.device).double()
    found, columns = ranks.topk(k, largest=False)
    chosen = order[found.long()]
    return high[chosen], low[chosen], columns


class _Radii:
    """The squared distances of points (N, D), each of which is there so many ``times``, to their k-th nearest others.

    ``values`` (len(ks), N) are off by at most ``error`` (N,); where that is 0, ``low`` is to be added to them.
    """

    def __init__(self, points: Tensor, times: Tensor, ks: tuple[int, ...]) -> None:
        self._pairs, self._times, self._ks = _Pairs(points, points), times, ks
        self._most = min(max(ks), len(points) - 1)  # neighbours, as there may be copies of the point
        kept, found = min(self._most + SPARE, len(points) - 1), []
        self.values, self.low = (points.new_zeros(len(ks), len(points)) for _ in range(2))
        self.error = self._pairs.error_x + self._pairs.error_y.max()
        for rows in self._pairs.parts():
            distances = self._pairs.apart(rows, self._pairs.quick(rows))
            near, places = distances.topk(kept, largest=False)
            self._take(rows, near, torch.zeros_like(near), places)
            found.append((near, places))
        self._near, self._places = (torch.cat(parts) for parts in zip(*found, strict=True))

    def settle(self, which: Tensor) -> None:
        """Measure those of some points."""
        which = which[self.error[which] > 0].unique()
        near, places = self._near[which], self._places[which]
        # Those that may be nearest are among what was kept, or all are to be looked at again.
        most = near[:, self._most - 1 : self._most] + 2 * self.error[which, None]
        enough = (near > most).any(1)
        for rows in which[~enough].split(max(1, BLOCK // len(self.error))):
            self._take(rows, *self._pairs.nearest(rows, self._most, others=True))
        rows, near, places = which[enough], near[enough], places[enough]
        i, j = (near <= most[enough]).nonzero().T
        if len(i):
            near, low, columns = _smallest(self._most, near.shape, i, j, *self._pairs.measure(rows[i], places[i, j]))
            self._take(rows, near, low, places.gather(1, columns))
        self.error[which] = 0

    def _take(self, rows: Tensor, near: Tensor, low: Tensor, places: Tensor) -> None:
        times = torch.cat([self._times[rows, None] - 1, self._times[places]], 1).cumsum(1)  # first come copies
        near, low = (torch.cat([of.new_zeros(len(of), 1), of], 1) for of in (near, low))
        for values, lows, k in zip(self.values, self.low, self._ks, strict=True):
            kth = (times < k).sum(1, keepdim=True)
            values[rows], lows[rows] = near.gather(1, kth)[:, 0], low.gather(1, kth)[:, 0]


class _Block:
    """The distances of some ``rows`` of x to all of y, (rows, M), to be held against radii.

    They are quick ones. What is too near to a radius for their error is measured; if much is, all are direct first.
    """

    def __init__(self, pairs: _Pairs, rows: Tensor) -> None:
        self._pairs, self._rows = pairs, rows
        self._distances, self._is_direct = pairs.quick(rows), False
        self._error = float(pairs.error_x[rows].max() + pairs.error_y.max())

    def within(self, radii: _Radii, k: int, of_rows: bool = False) -> Tensor:
        """Which distances are at most the radius of y's point, or of x's, of the k-th of its numbers of neighbours."""
        while True:
            found, i, j = self._compare(radii, k, of_rows)
            at = self._rows[i] if of_rows else j
            if bool(radii.error[at].any()):
                radii.settle(at)
            elif self._is_direct or len(i) <= MANY * found.numel():
                break
            else:
                self._distances, self._is_direct, self._error = self._pairs.direct(self._rows), True, 0.0
        high, low = self._pairs.measure(self._rows[i], j)
        found[i, j] = (high - radii.values[k, at]) + (low - radii.low[k, at]) <= self._pairs.tie * high
        return found

    def _compare(self, radii: _Radii, k: int, of_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Which are within, and the pairs of which it is open."""
        values, error = radii.values[k], radii.error + self._error
        relative = self._pairs.relative if self._is_direct else 0.0
        low, high = (values - error) / (1 + relative), (values + error) / (1 - relative)
        if of_rows:
            low, high = low[self._rows, None], high[self._rows, None]
        found = self._distances <= low
        maybe = found if self._pairs.exact else self._distances <= high
        i, j = found.new_zeros((2, 0), dtype=torch.int64) if torch.equal(found, maybe) else (maybe ^ found).nonzero().T
        if len(i) and not self._is_direct:  # the pair's own error is smaller
            at, distances = self._rows[i] if of_rows else j, self._distances[i, j]
            found[i, j] = distances <= values[at]
            error = radii.error[at] + self._pairs.error_x[self._rows[i]] + self._pairs.error_y[j]
            open_ = (distances - values[at]).abs() <= error
            i, j = i[open_], j[open_]
        return found, i, j


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
