"""Metrics of codes against the factors that examples were made of, registered as plugins like those of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributions import Independent, Normal

from genfuse import plots
from genfuse.data import Dataset
from genfuse.errors import DataError, SettingsError
from genfuse.metrics._evaluate import some, undisturbed
from genfuse.metrics.scores import compute, select
from genfuse.models import Encodes, GenerativeModel, HasPosterior

DRAWS = 1000  # of codes, at which densities are looked at
EXAMPLES = 10_000  # that are encoded unless asked for otherwise
TOGETHER, VOTES = 64, 4000  # examples that share a value, and how many such groups are drawn


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes of examples and the factors that these were made of: what a metric of codes is given.

    Arrays, tensors or lists. Raises DataError, which says where, unless all is finite, std above 0, and factors whole
    numbers, each with two values or more.
    """

    mean: Any  # (N, D): the codes, or the means of q(z | x)
    factors: Any  # (N, K): the number of each factor's value
    std: Any = None  # (N, D): the standard deviations of q(z | x) where it is a diagonal Gaussian; None: codes as such
    seed: int = 0  # of what a metric draws
    names: Sequence[str] = ()  # of the K factors

    def __post_init__(self) -> None:
        mean, factors = _numbers("codes", self.mean), _numbers("factors", self.factors)
        names = self.names or [f"factor {i + 1}" for i in range(factors.shape[1])]
        if len(mean) != len(factors) or len(mean) < 2 or len(names) != factors.shape[1]:
            got = f"{len(mean)} codes, {len(factors)} rows of {factors.shape[1]} factors, {len(names)} names"
            raise DataError(f"two examples or more need a row of codes and of factors each, factors a name; got {got}")
        for name, column in zip(names, factors.T, strict=True):
            if (odd := column.round() != column).any():
                raise DataError(f"factors are the numbers of their values; {name} is {column[odd][0]} in row "
                                f"{odd.argmax()}: put real numbers into bins, as numpy.digitize does")  # fmt: skip
            if np.ptp(column) == 0:
                raise DataError(f"{name} has one value in all {len(column)} examples, so that no code can tell of it: "
                                "leave it out, or take more examples")  # fmt: skip
        std = None if self.std is None else _numbers("std", self.std)
        if std is not None and (std.shape != mean.shape or std.min() <= 0):
            raise DataError(f"std must be {mean.shape}, as codes, and above 0; got {std.shape}, from {std.min()} up")
        for name, value in {"mean": mean, "factors": factors.astype(int), "std": std, "names": tuple(names)}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def entropy(self) -> np.ndarray:
        """H(v_k) of each factor, (K,) nats."""
        shares = [np.unique(column, return_counts=True)[1] / len(column) for column in self.factors.T]
        return np.array([-(share * np.log(share)).sum() for share in shares])

    @cached_property
    def information(self) -> np.ndarray:
        """I(z_d; v_k) of each dimension and factor, (D, K) nats.

        With ``std`` from q(z | x), as in arXiv 1802.04942, section 4.1: E[log q(z_d | v_k) / q(z_d)] over draws of
        codes, where both are means of q(z_d | x), over the examples with the value, and over all. Without, by nearest
        neighbours (Ross, 2014; scikit-learn's `mutual_info_classif`); codes of few values are counted.
        """
        if self.std is not None:
            return self.densities[0]
        from sklearn.feature_selection import mutual_info_classif

        ranks = [np.unique(column, return_inverse=True)[1] for column in self.mean.T]
        few = np.array([rank.max() < math.sqrt(len(rank)) for rank in ranks])
        x = np.where(few, np.stack(ranks, 1), self.mean)
        each = [mutual_info_classif(x, v, discrete_features=few, random_state=self.seed) for v in self.factors.T]
        return np.stack(each, 1)

    @cached_property
    def densities(self) -> tuple[np.ndarray, dict[str, float]]:
        """`information`, and the parts of the KL from N(0, I), nats, at `DRAWS` codes; all examples make up q(z)."""
        n, d = self.mean.shape
        rng = np.random.default_rng(self.seed)
        rows = rng.permutation(n)[:DRAWS]
        mean, std = torch.from_numpy(self.mean), torch.from_numpy(self.std)
        z = mean[rows] + std[rows] * torch.from_numpy(rng.standard_normal((len(rows), d)))
        numbers = [torch.from_numpy(np.unique(column, return_inverse=True)[1]) for column in self.factors.T]
        alike = [torch.eye(int(v.max()) + 1, dtype=z.dtype)[v] for v in numbers]  # (N, values) each
        information, marginals, joint = np.zeros((d, len(alike))), 0.0, torch.zeros(len(rows), n, dtype=z.dtype)
        for i in range(d):
            log_q = -0.5 * ((z[:, i, None] - mean[:, i]) / std[:, i]).square() - std[:, i].log()  # constants cancel
            joint += log_q
            top = log_q.amax(1, keepdim=True)
            share = (log_q - top).exp_()
            total = share.mean(1).log()
            marginals += float((total + top[:, 0]).mean())
            for k, (of, v) in enumerate(zip(alike, numbers, strict=True)):
                same = (share @ of).gather(1, v[rows, None])[:, 0] / of.sum(0)[v[rows]]
                information[i, k] = (same.clamp(min=1e-300).log() - total).mean()
        information = information.clip(0)  # which it is, but for the noise of the draws
        given, log_q_z = float(joint[range(len(rows)), rows].mean()), float(joint.logsumexp(1).mean()) - math.log(n)
        prior = -0.5 * float(z.square().sum(1).mean())
        names = "mutual_information", "total_correlation", "dimension_kl"
        return information, dict(zip(names, (given - log_q_z, log_q_z - marginals, marginals - prior), strict=True))

    def together(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of examples that share the value of a factor, (VOTES, size), and which factor that is, (VOTES,): drawn
        uniformly, its values and the examples as they occur. Raises DataError if there is only one."""
        n, k = self.factors.shape
        if k < 2:
            raise DataError("how well factors are told apart takes two or more, got 1")
        rng = np.random.default_rng(self.seed)
        which, rows = rng.integers(k, size=VOTES), np.empty((VOTES, size), int)
        for i, column in enumerate(self.factors.T):
            order, of = column.argsort(kind="stable"), np.flatnonzero(which == i)
            value = column[rng.integers(n, size=(len(of), 1))]
            first, end = (np.searchsorted(column[order], value, side=side) for side in ("left", "right"))
            rows[of] = order[rng.integers(first, end, size=(len(of), size))]
        return rows, which


def mig(codes: Codes) -> dict[str, float]:
    """Mutual information gap, 0..1: how much more the best dimension tells of a factor than the next (1802.04942)."""
    share = np.sort(codes.information / codes.entropy, axis=0)[::-1]
    return {"mig": float((share[0] - (share[1] if len(share) > 1 else 0)).mean())}


def dci(codes: Codes) -> dict[str, float]:
    """Disentanglement, completeness and informativeness, 0..1, by bagged trees (Eastwood & Williams, 2018).

    Importances (D, K) are those of scikit-learn's forests, one for a factor, of 20 trees that see all dimensions at
    each split and keep 1% of the examples, 5,000 at most, in a leaf, as deeper ones split on noise; informativeness is
    the share of other examples, one in five, that they name right.
    """
    from sklearn.ensemble import RandomForestClassifier

    rows = np.random.default_rng(codes.seed).permutation(len(codes.mean))[: EXAMPLES // 2]
    test, train = np.split(rows, [max(1, len(rows) // 5)])
    options = {"max_features": None, "min_samples_leaf": max(1, len(train) // 100), "random_state": codes.seed}
    forests = [RandomForestClassifier(20, **options).fit(codes.mean[train], v[train]) for v in codes.factors.T]
    right = [forest.score(codes.mean[test], v[test]) for forest, v in zip(forests, codes.factors.T, strict=True)]
    table = np.stack([forest.feature_importances_ for forest in forests], 1)
    return {
        "dci_disentanglement": float(np.average(_purity(table), weights=table.sum(1) + 1e-300)),
        "dci_completeness": float(_purity(table.T).mean()),
        "dci_informativeness": float(np.mean(right)),
    }


def factor_vae_score(codes: Codes) -> dict[str, float]:
    """How often the dimension that varies least in a group tells which factor its examples share (1802.05983)."""
    rows, factor = codes.together(TOGETHER)
    spread = codes.mean.std(0)
    used = spread > 1e-6 * spread.max()  # a dimension that stands still is the steadiest, and tells of nothing
    if not used.any():
        raise DataError("all codes are the same, so that none tells of a factor")
    least = (codes.mean[:, used] / spread[used])[rows].var(1).argmin(1)
    votes, half = np.zeros((used.sum(), codes.factors.shape[1])), VOTES // 2
    np.add.at(votes, (least[:half], factor[:half]), 1)
    return {"factor_vae_score": float((votes.argmax(1)[least[half:]] == factor[half:]).mean())}


def beta_vae_score(codes: Codes) -> dict[str, float]:
    """How often a linear classifier tells from differences of codes which factor pairs share (Higgins et al., 2017)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, factor = codes.together(2 * TOGETHER)
    first, second = np.split(codes.mean[rows], 2, axis=1)
    differences, half = np.abs(first - second).mean(1), VOTES // 2
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(differences[:half], factor[:half])
    return {"beta_vae_score": float(classifier.score(differences[half:], factor[half:]))}


def kl_parts(codes: Codes) -> dict[str, float]:
    """The parts of a VAE's KL, nats: mutual information, total correlation, dimension-wise KL (1802.04942, eq. 2)."""
    return {} if codes.std is None else codes.densities[1]


for _metric in (mig, dci, factor_vae_score, beta_vae_score, kl_parts):
    _metric.measures = "codes"  # type: ignore[attr-defined]


def evaluate_codes(
    model: GenerativeModel, data: Dataset, *, metrics: Sequence[str] | None = None, n: int = EXAMPLES, seed: int = 0,
    picture: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the codes of ``model`` against the factors of ``data``, of ``n`` examples by chance out of all splits.

    Returns plain numbers: ``scores`` by ``metrics``, names of installed ones of codes, by default all; ``information``,
    {factor: I(z_d; v_k) of each dimension}, and ``entropy``, {factor: H(v_k)}, in nats; ``left_out`` says why a metric
    made none. I / H is drawn into ``picture``. Raises SettingsError for data without factors and for a model without
    ``posterior`` and ``encode``, and what `Codes` raises.
    """
    if data.factors is None or not (isinstance(model, HasPosterior) and isinstance(model, Encodes)):
        lacks = "the data has no factors" if data.factors is None else f"a {type(model).__name__} has no posterior"
        raise SettingsError(f"codes are measured of data with factors by a model with a posterior: {lacks}")
    model.check_data(data)
    chosen, found = some(sum(map(len, data.splits.values())), n, seed), []
    with undisturbed(model), torch.no_grad():
        first = 0
        for part, split in sorted(data.splits.items()):
            for rows in (chosen[(chosen >= first) & (chosen < first + len(split))] - first).split(500):
                batch = data.batch(part, rows)
                given = {"y": batch.y.to(model.device)} if model.conditional and batch.y is not None else {}
                q = model.posterior(x := batch.x.to(model.device), **given)
                gaussian = isinstance(q, Independent) and isinstance(q.base_dist, Normal)
                mean, std = (q.mean, q.stddev) if gaussian else (model.encode(x, **given), torch.zeros(len(x), 0))
                found.append((mean.double().cpu(), std.double().cpu(), split.factors[rows]))  # type: ignore[index]
            first += len(split)
    mean, std, factors = map(torch.cat, zip(*found, strict=True))
    codes = Codes(mean, factors, std if std.numel() else None, seed, tuple(data.factors))
    scores = compute(select(metrics, "codes"), codes)
    if picture is not None:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        latents = [f"z{i + 1}" for i in range(len(codes.information))]
        plots.heat_map((codes.information / codes.entropy).T, codes.names, latents, picture)
    return {
        "examples": len(mean),
        "scores": scores.values,
        "information": dict(zip(codes.names, codes.information.T.tolist(), strict=True)),
        "entropy": dict(zip(codes.names, codes.entropy.tolist(), strict=True)),
        "left_out": {name: str(error) for name, error in scores.failed.items()},
    }


def _numbers(what: str, given: Any) -> np.ndarray:
    """A matrix of finite float64. Raises DataError that says what is wrong."""
    given = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if given.ndim != 2 or not given.size or given.dtype.kind not in "biuf":
        raise DataError(f"{what} must be a matrix of numbers, a row for each example; got {given.dtype} {given.shape}")
    if (bad := ~np.isfinite(given)).any():
        row, column = np.argwhere(bad)[0]
        raise DataError(f"{what} has {bad.sum()} NaN or infinite values, the first in row {row}, column {column}")
    return given.astype(np.float64)


def _purity(table: np.ndarray) -> np.ndarray:
    """1 - the entropy of each row, as a share of that of a uniform one."""
    share = table / (table.sum(1, keepdims=True) + 1e-300)
    return 1 + (share * np.log(share + 1e-300)).sum(1) / max(math.log(table.shape[1]), 1e-300)
