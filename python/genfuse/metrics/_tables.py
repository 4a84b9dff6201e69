"""Metrics of samples of tables, registered as plugins like anybody's. Of other data each makes no scores."""

from typing import Any

import numpy as np
from torch import Tensor

from genfuse.data import Schema
from genfuse.metrics.scores import Samples
from genfuse.nn import Columns

ROWS = 2000  # at most, of samples and of test examples each, that a classifier is trained on
MOST = 10_000  # that trees are trained on to predict a column
FOLDS = 3


def marginals(samples: Samples) -> dict[str, float]:
    """How far single columns are off: Wasserstein-1 of numbers, in standard deviations, total variation of categories.

    ``marginal_wasserstein`` is the mean over columns of numbers, integers and dates, of the cells that are there;
    ``marginal_total_variation`` that over categories and over which cells are missing, in 0..1.
    """
    if (schema := _schema(samples)) is None:
        return {}
    x, reference = (of.double().cpu().numpy() for of in (samples.x, samples.reference))
    grid = (np.arange(1000) + 0.5) / 1000
    distances, variations = [], []
    for i, column in enumerate(schema.columns):
        a, b = (of[:, i][~np.isnan(of[:, i])] for of in (x, reference))
        if column.coded:
            codes = [np.append((of * column.std + column.mean).round().astype(int), -1) for of in (a, b)]
            shares = [np.bincount(of + 1, minlength=len(column.categories) + 1) for of in codes]
            missing = np.abs(len(a) - len(b))
            variations.append(float(np.abs(shares[0] - shares[1]).sum() + missing) / (2 * len(x)))
            continue
        if column.missing:
            variations.append(abs(len(a) - len(b)) / len(x))
        if len(a) and len(b):
            distances.append(float(np.abs(np.quantile(a, grid) - np.quantile(b, grid)).mean()))
    found = {"marginal_wasserstein": distances, "marginal_total_variation": variations}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def correlations(samples: Samples) -> dict[str, float]:
    """How far correlations between columns are off: the mean absolute difference of the entries of two matrices.

    Those of the columns as `genfuse.nn.Columns` encodes them, normal scores of numbers and one-hot categories, over all
    pairs of cells of different columns; in 0..2.
    """
    schema = _schema(samples)
    if schema is None or len(schema.columns) < 2:
        return {}
    columns = Columns(schema.specs()).to(samples.x.device)
    owners = columns.owners
    pairs = owners[:, None] != owners
    a, b = (_correlation(columns.encode(x)) for x in (samples.x, samples.reference))
    return {"correlation_difference": (a - b)[pairs].abs().mean().item()}


def detection(samples: Samples) -> dict[str, float]:
    """How well gradient-boosted trees tell samples from test examples: AUROC out of fold; 0.5: not at all; 1: always.

    scikit-learn's histogram-based trees, in 3 folds, of at most 2,000 rows of each.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    count = min(len(samples.x), ROWS)
    if _schema(samples) is None or count < 10 * FOLDS:
        return {}
    rows = np.concatenate([of[:count].cpu().numpy() for of in (samples.x, samples.reference)]).round(4)
    real = np.repeat([0, 1], count)
    trees = HistGradientBoostingClassifier(max_iter=50, random_state=samples.seed)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=samples.seed)
    said = cross_val_predict(trees, rows, real, cv=folds, method="predict_proba")[:, 1]
    return {"detection_auroc": float(roc_auc_score(real, said))}


def usefulness(samples: Samples) -> dict[str, float]:
    """How well trees trained on samples predict a column of test examples: AUROC of categories, R^2 of numbers.

    Train on synthetic, test on real. The column is that of --data.target, else the last one of categories; the value
    for real examples is that of trees trained on these. AUROC is the mean of each category against the rest.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.metrics import r2_score, roc_auc_score

    if (schema := _schema(samples)) is None or len(schema.columns) < 2:
        return {}
    named = samples.data.options.get("target")
    coded = [i for i, column in enumerate(schema.columns) if column.coded and len(column.categories) > 1]
    if named is None and not coded:
        return {}
    target = schema.names.index(named) if named is not None else coded[-1]
    column = schema.columns[target]

    def parts(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        rows = x[~x[:, target].isnan()][:MOST].double().cpu().numpy().round(4)
        y = rows[:, target] * column.std + column.mean
        return np.delete(rows, target, 1), y.round().astype(int) if column.coded else y

    (x, y), (tested, truth) = parts(samples.x), parts(samples.reference)
    if not column.coded:
        if not len(x):
            return {"synthetic_r2": 0.0}
        trees: Any = HistGradientBoostingRegressor(max_iter=50, random_state=samples.seed)
        return {"synthetic_r2": float(r2_score(truth, trees.fit(x, y).predict(tested)))}
    seen = sorted({*truth.tolist()})
    if len(seen) < 2:
        return {}
    if len({*y.tolist()}) < 2:
        return {"synthetic_auroc": 0.5}
    trees = HistGradientBoostingClassifier(max_iter=50, random_state=samples.seed).fit(x, y)
    odds = dict(zip(trees.classes_.tolist(), trees.predict_proba(tested).T, strict=True))
    wanted = seen[1:] if len(seen) == 2 else seen
    each = [roc_auc_score(truth == c, odds.get(c, np.zeros(len(truth)))) for c in wanted]
    return {"synthetic_auroc": float(np.mean(each))}


for metric in (marginals, correlations, detection):
    metric.better = "lower"  # type: ignore[attr-defined]
usefulness.better = "higher"  # type: ignore[attr-defined]


def _schema(samples: Samples) -> Schema | None:
    """The schema of a table; None of other data, such as images and toys."""
    return samples.data.described() if samples.data.scaling is not None else None


def _correlation(v: Tensor) -> Tensor:
    v = v.double() - v.double().mean(0)
    v = v / v.square().mean(0).sqrt().clamp(min=1e-6)
    return v.T @ v / len(v)
