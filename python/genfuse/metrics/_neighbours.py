"""What nearest neighbours tell of samples: precision, recall, density, coverage, and copies of training examples."""

from collections.abc import Iterator
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
    with a sample in their ball. Memory does not grow with the number of pairs. Raises TooFewSamplesError unless either
    set has more than k examples.
    """
    if k < 1 or k_density < 1:
        raise SettingsError(f"k and k_density must be at least 1, got {k} and {k_density}")
    x, y = pair(samples, reference)
    require("precision and recall", len(x), k + 1, "samples", f" for {k} neighbours of each")
    most = max(k, k_density)
    require("precision to coverage", len(y), most + 1, "reference examples", f" for {most} neighbours of each")
    middle = y.mean(0)  # distances between far away points would lose digits
    x, y = x - middle, y - middle
    [around_x] = _radii(x, [k])
    around_y, around_y_density = _radii(y, [k, k_density])
    precise = density = 0
    recalled, covered = (torch.zeros(len(y), dtype=torch.bool, device=y.device) for _ in range(2))
    for rows, distances in _blocks(x, y):
        precise += int((distances <= around_y).any(1).sum())
        recalled |= (distances <= around_x[rows, None]).any(0)
        inside = distances <= around_y_density
        density += int(inside.sum())
        covered |= inside.any(0)
    return PRDC(
        precise / len(x), recalled.double().mean().item(),
        density / (k_density * len(x)), covered.double().mean().item(),
    )  # fmt: skip


def nearest(queries: Tensor, points: Features, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, k), rising, of ``queries`` (N, D) to the nearest of ``points``, and their indices (N, k).

    Points (M, D) may come in batches, of which one at a time is held. Raises TooFewSamplesError where M < k.
    """
    best = queries.new_zeros((len(queries), 0), dtype=torch.float64)
    index = queries.new_zeros((len(queries), 0), dtype=torch.int64)
    seen = 0
    for batch in batches(points):
        for rows, distances in _blocks(batch, queries):
            here = torch.arange(rows.start, rows.stop, device=batch.device) + seen
            best = torch.cat([best, distances.T], 1)
            index = torch.cat([index, here.expand(len(queries), -1)], 1)
            best, order = best.topk(min(k, best.shape[1]), largest=False)
            index = index.gather(1, order)
        seen += len(batch)
    require(f"search for {k} neighbours", seen, k, "points")
    return best.sqrt(), index


def _radii(points: Tensor, ks: list[int]) -> list[Tensor]:
    """The squared distance (N,) of each point to its k-th nearest other, for each k."""
    found = []
    for rows, distances in _blocks(points, points):
        distances[:, rows].fill_diagonal_(torch.inf)
        found.append(distances.topk(max(ks), largest=False).values)
    nearest_ones = torch.cat(found)
    return [nearest_ones[:, k - 1] for k in ks]


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The squared distances between x (N, D) and y (M, D), a block of rows at a time: which rows, and (rows, M)."""
    x, y = x.double(), y.double()
    lengths = y.square().sum(1)
    step = max(1, BLOCK // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        part = x[rows]
        squared = (part @ y.T).mul_(-2).add_(part.square().sum(1, keepdim=True)).add_(lengths)
        yield rows, squared.clamp_(min=0)
