"""What nearest neighbours tell of samples: precision, recall, density, coverage, and copies of training examples."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genfuse.errors import SettingsError
from genfuse.metrics._distances import BLOCK, Features, batches, pair, require


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
    [around_x] = _radii(x, [k])
    around_y, around_y_density = _radii(y, [k, k_density])
    precise = density = 0
    recalled, covered = (torch.zeros(len(y), dtype=torch.bool, device=y.device) for _ in range(2))
    for block in _blocks(x, y):
        precise += int(block.within(around_y).any(1).sum())
        recalled |= block.within(around_x[block.rows, None]).any(0)
        inside = block.within(around_y_density)
        density += int(inside.sum())
        covered |= inside.any(0)
    return PRDC(
        precise / len(x), recalled.double().mean().item(),
        density / (k_density * len(x)), covered.double().mean().item(),
    )  # fmt: skip


def nearest(queries: Tensor, points: Features, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, k), rising, of ``queries`` (N, D) to the nearest of ``points``, and their indices (N, k).

    Points (M, D) may come in batches, of which one at a time is held. Raises TooFewSamplesError if M < k.
    """
    best = queries.new_zeros((len(queries), 0), dtype=torch.float64)
    index = queries.new_zeros((len(queries), 0), dtype=torch.int64)
    seen = 0
    for batch in batches(points):
        blocks = [block.nearest(min(k, len(batch))) for block in _blocks(queries.double(), batch.double())]
        near, places = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        best, order = torch.cat([best, near], 1).sort(stable=True)
        best, index = best[:, :k], torch.cat([index, places + seen], 1).gather(1, order)[:, :k]
        seen += len(batch)
    require(f"search for {k} neighbours", seen, k, "points")
    return best.sqrt(), index


def _radii(points: Tensor, ks: list[int]) -> list[Tensor]:
    """The squared distance (N,) of each point to its k-th nearest other, for each k."""
    found = []
    for block in _blocks(points, points):
        block.distances[:, block.rows].fill_diagonal_(torch.inf)
        found.append(block.nearest(max(ks))[0])
    return [torch.cat(found)[:, k - 1] for k in ks]


class _Block:
    """The squared distances of some ``rows`` of x (N, D) to all of y (M, D), (rows, M), in float64.

    They come from one product of matrices, which is quick and rounds, by at most ``slack`` of the pair of rows. Where
    numbers are compared, those that the rounding leaves open are first computed from differences, to the last digit
    and in any order of the columns alike: so distances that are equal are equal numbers.
    """

    def __init__(self, rows: slice, distances: Tensor, slack: Callable | None, most: float, measure: Callable) -> None:
        self.rows, self.distances, self.slack, self.most, self.measure = rows, distances, slack, most, measure

    def within(self, radius: Tensor) -> Tensor:
        """Which distances are at most ``radius``, exact numbers, (rows, 1) or (M,)."""
        found = self.distances <= radius
        if self.slack is not None:
            i, j = ((self.distances <= radius + self.most) & (self.distances >= radius - self.most)).nonzero().T
            at = radius.expand_as(self.distances)[i, j]
            open_ = (self.distances[i, j] - at).abs() <= self.slack(i + self.rows.start, j)
            i, j, at = i[open_], j[open_], at[open_]
            found[i, j] = self.measure(i + self.rows.start, j) <= at
        return found

    def nearest(self, k: int) -> tuple[Tensor, Tensor]:
        """The k smallest distances of each row, exact and rising, and their places, (rows, k) each."""
        near, places = self.distances.topk(k, largest=False)
        if self.slack is None:
            return near, places
        row = torch.arange(len(near), device=near.device)[:, None]
        bound = (near + self.slack(row + self.rows.start, places)).amax(1, keepdim=True)  # of the k-th
        i, j = (self.distances <= bound + self.most).nonzero().T
        open_ = self.distances[i, j] - self.slack(i + self.rows.start, j) <= bound[i, 0]
        i, j = i[open_], j[open_]
        self.distances[i, j] = self.measure(i + self.rows.start, j)
        return self.distances.topk(k, largest=False)


def _blocks(x: Tensor, y: Tensor) -> Iterator[_Block]:
    """The squared distances between x (N, D) and y (M, D), float64, a block of rows at a time."""
    dimensions = x.shape[1]
    size = max(float(points.abs().amax()) for points in (x, y))
    # Numbers on a grid that leaves the products of their differences 53 bits: nothing rounds.
    steps = 2.0 ** math.floor(25 - 0.5 * math.log2(dimensions) - math.log2(size)) if size > 1e-300 else 1.0
    exact = all(bool((points * steps == (points * steps).round()).all()) for points in (x, y))
    middle = torch.zeros_like(y[0]) if exact else y.mean(0)  # distances between far away points would lose digits
    a, b = x - middle, y - middle
    a_squared, b_squared = a.square().sum(1), b.square().sum(1)
    rounding = 4 * (dimensions + 8) * torch.finfo(torch.float64).eps
    step = max(1, BLOCK // len(y))

    def slack(i: Tensor, j: Tensor) -> Tensor:
        return rounding * (a_squared[i] + b_squared[j])

    def measure(i: Tensor, j: Tensor) -> Tensor:
        """The distance of each pair of rows."""
        if len(i) * dimensions > BLOCK:  # points that repeat are then measured once
            numbers = torch.cat([x, y]).unique(dim=0, return_inverse=True)[1]
            pairs, place = (numbers[i] * len(numbers) + numbers[len(x) + j]).unique(return_inverse=True)
            one = torch.empty_like(pairs).scatter_(0, place, torch.arange(len(place), device=place.device))
            if len(one) < len(i):
                return measure(i[one], j[one])[place]
        parts = zip(i.split(max(1, BLOCK // dimensions)), j.split(max(1, BLOCK // dimensions)), strict=True)
        return torch.cat([_sum((x[i] - y[j]).square()) for i, j in parts])

    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        distances = (a[rows] @ b.T).mul_(-2).add_(a_squared[rows, None]).add_(b_squared).clamp_(min=0)
        most = rounding * float(a_squared[rows].max() + b_squared.max())
        yield _Block(rows, distances, None if exact else slack, most, measure)


def _sum(terms: Tensor) -> Tensor:
    """The sum of each row of (N, D), as if rounded once: what each addition rounds off is summed too (Knuth's
    two-sum, in a tree, as Rump, Ogita & Oishi, *Accurate floating-point summation*, 2008)."""
    rest = terms.new_zeros(len(terms))
    while (width := terms.shape[1]) > 1:
        a, b = terms[:, : width // 2], terms[:, width // 2 : width // 2 * 2]
        total = a + b
        back = total - a
        rest += ((a - (total - back)) + (b - back)).sum(1)
        terms = torch.cat([total, terms[:, width // 2 * 2 :]], 1)
    return terms[:, 0] + rest
