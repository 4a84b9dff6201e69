"""Distances between two sets of features, in float64: Fréchet, kernel and sliced Wasserstein."""

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfuse.errors import SettingsError

Features = Tensor | Iterable[Tensor]  # (N, D), whole or in batches

LARGEST = 1e50  # features: the sixth power of it is still a number, which the kernel distance takes
BLOCK = 2**24  # numbers that are held at a time where pairs are looked at: 128 MiB


class TooFewSamplesError(SettingsError):
    """A metric has no meaning, or none that can be trusted, with so few examples."""


class Moments:
    """Count, mean (D,) and covariance (D, D) of features, accumulated in batches in memory that does not grow with N.

    The update is that of Chan, Golub & LeVeque (1983), which does not cancel where the mean is far from 0, as sums of
    squares do. The covariance is divided by N - 1.
    """

    def __init__(self, features: Features = ()) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self._scatter: Any = 0.0
        for batch in batches(features):
            self.update(batch)

    def update(self, batch: Tensor) -> None:
        """Add features (N, D). Raises SettingsError if they are not finite or of another shape."""
        x = checked(batch)
        if not len(x):
            return
        if self.count and x.shape[1:] != self.mean.shape:
            raise SettingsError(f"features of {x.shape[1]} dimensions cannot be added to those of {len(self.mean)}")
        total = self.count + len(x)
        mean = x.mean(0)
        delta = mean - self.mean
        x = x - mean
        self._scatter = self._scatter + x.T @ x + delta.outer(delta) * (self.count * len(x) / total)
        self.mean = self.mean + delta * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        return self._scatter / (self.count - 1)


def frechet_distance(samples: Features | Moments, reference: Features | Moments) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the squared 2-Wasserstein distance of two Gaussians with the means
    and covariances of the features (Heusel et al., arXiv 1706.08500, equation 6). 0 and more; lower is better.

    On Inception features this is the FID. Biased upwards by about 1/N: compare values of equal N. Raises
    TooFewSamplesError unless each set has more examples than dimensions, without which its covariance is singular.
    """
    moments = {
        "samples": samples if isinstance(samples, Moments) else Moments(samples),
        "reference examples": reference if isinstance(reference, Moments) else Moments(reference),
    }
    for name, of in moments.items():
        needed = 1 + (len(of.mean) if of.count else 1)
        require("Fréchet distance", of.count, needed, name, f", one more than the {needed - 1} feature dimensions")
    a, b = moments.values()
    check_alike(a.mean, b.mean)
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C1 C2 and the symmetric C1^(1/2) C2 C1^(1/2) have the same eigenvalues, so the same trace of the root.
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, distance.item())


class KernelDistance(NamedTuple):
    value: float  # the mean over the subsets
    std: float | None  # over the subsets; None where both sets were taken whole


def kernel_distance(
    samples: Features, reference: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """The unbiased squared MMD with the kernel k(x, y) = (x . y / D + 1)^3, a mean over random subsets of both sets
    (Bińkowski et al., arXiv 1801.01401). On Inception features this is the KID. Around 0 where both are of one
    distribution, at times below; lower is better; its expectation does not depend on N.

    A subset has ``subset_size`` examples, or as many as the smaller set has; two sets of that size are taken whole, and
    once. Raises TooFewSamplesError for fewer than 2 examples.
    """
    if subsets < 2 or subset_size < 2:
        raise SettingsError(f"subsets must be at least 2 and subset_size at least 2, got {subsets} and {subset_size}")
    x, y = pair(samples, reference)
    for name, features in (("samples", x), ("reference examples", y)):
        require("kernel distance", len(features), 2, name)
    size = min(subset_size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)

    def chosen(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    found = []
    for _ in range(1 if size == len(x) == len(y) else subsets):
        a, b = chosen(x), chosen(y)
        within = sum(k.sum() - k.trace() for k in (kernel(a, a), kernel(b, b)))  # without an example and itself
        found.append((within / (size * (size - 1)) - 2 * kernel(a, b).mean()).item())
    return KernelDistance(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


def sliced_wasserstein_distance(
    samples: Features, reference: Features, *, p: float = 2, projections: int = 1000, seed: int = 0
) -> float:
    """(E_u W_p(u . x, u . y)^p)^(1/p) over random directions u on the unit sphere (Bonneel et al., *Sliced and Radon
    Wasserstein barycenters of measures*, 2015), in the units of the features; 0 and more; lower is better.

    W_p in one dimension is exact, also of sets of different sizes: the integral over the quantile functions. Raises
    TooFewSamplesError if a set is empty.
    """
    if p < 1 or projections < 1:
        raise SettingsError(f"p and projections must be at least 1, got p={p} and projections={projections}")
    x, y = pair(samples, reference)
    n, m = len(x), len(y)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, x.shape[1], generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions).to(x.device)
    # Where either quantile function jumps, in units of 1 / (n m): between two jumps both are constant.
    jumps = torch.cat([m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)]).unique().to(x.device)
    weights = jumps.diff(prepend=jumps.new_zeros(1)).double() / (n * m)
    at_x, at_y = (jumps - 1) // m, (jumps - 1) // n
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in directions.split(max(1, BLOCK // (4 * (n + m)))):
        a, b = ((part @ points.T).sort(1).values for points in (x, y))
        total += ((a[:, at_x] - b[:, at_y]).abs() ** p @ weights).sum()
    return math.pow(total.item() / projections, 1 / p)


def require(metric: str, count: int, needed: int, what: str, why: str = "") -> None:
    """Raise TooFewSamplesError if there are fewer than ``needed``."""
    if count < needed:
        raise TooFewSamplesError(f"{metric}: at least {needed} {what} are needed{why}; there are {count}")


def pair(samples: Features, reference: Features) -> tuple[Tensor, Tensor]:
    """Both sets whole, (N, D) and (M, D), in float64. Raises SettingsError if they are not finite or not alike."""
    found = []
    for name, features in (("samples", samples), ("reference examples", reference)):
        parts = [checked(batch) for batch in batches(features)]
        require("comparison", sum(map(len, parts)), 1, name)
        found.append(torch.cat(parts))
    check_alike(found[0][0], found[1][0])
    return found[0], found[1]


def batches(features: Features) -> Iterator[Tensor]:
    yield from [features] if isinstance(features, Tensor) else features


def checked(batch: Tensor) -> Tensor:
    """Features (N, D), as float64. Raises SettingsError for anything else, and for what cannot be reckoned with."""
    if batch.ndim != 2 or not batch.shape[1]:
        raise SettingsError(f"features must be (N, D), got a tensor of shape {tuple(batch.shape)}")
    if batch.is_complex():
        raise SettingsError(f"features must be real numbers, got a tensor of {batch.dtype}")
    if bad := int((~batch.isfinite()).any(1).sum()):
        raise SettingsError(f"{bad} of {len(batch)} rows of features have NaN or infinite values")
    x = batch.detach().double()
    if len(x) and (most := float(x.abs().max())) > LARGEST:
        raise SettingsError(
            f"features reach {most:.2g}, beyond {LARGEST:g}, so that their powers overflow: rescale them"
        )
    return x


def check_alike(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise SettingsError(f"the samples have {len(a)} feature dimensions, the reference has {len(b)}")
