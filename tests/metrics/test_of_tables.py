"""Metrics of tables against oracles, and against what they are between."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import wasserstein_distance

from genfuse.data import load_data
from genfuse.metrics import Samples
from genfuse.metrics._tables import correlations, detection, marginals, usefulness

pytestmark = pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")


def table(n: int, seed: int) -> pd.DataFrame:
    r = np.random.default_rng(seed)
    group = r.choice(["a", "b", "c"], n)
    x = r.normal(size=n) + 2 * (group == "b")
    frame = pd.DataFrame({"x": x, "y": x + 0.3 * r.normal(size=n), "count": r.poisson(3, n), "group": group})
    return frame.mask(r.random(frame.shape) < 0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.csv"
    table(2500, 0).to_csv(path, index=False)
    return load_data(f"csv:{path}")


@pytest.fixture(scope="module")
def real(data):
    return data.splits["train"].x[:500], data.splits["test"].x[:500]


def samples(data, x, reference) -> Samples:
    return Samples(x, reference, x, reference, data, 0)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Each column as it is, and none of the dependence."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([column[torch.randperm(len(x), generator=generator)] for column in x.T], 1)


def test_marginals_are_the_distances_of_single_columns(data, real):
    x, reference = real
    moved = x.clone()
    moved[:, 0] += 1
    found = marginals(samples(data, moved, reference))
    each = []
    for i in range(3):
        a, b = (of[:, i][~of[:, i].isnan()].numpy() for of in (moved, reference))
        each.append(wasserstein_distance(a, b))
    assert found["marginal_wasserstein"] == pytest.approx(np.mean(each), abs=0.01)
    groups = [data.schema.decode(of)["group"].fillna("-").value_counts(normalize=True) for of in (moved, reference)]
    variations = [groups[0].subtract(groups[1], fill_value=0).abs().sum() / 2]
    variations += [
        abs(float(a.isnan().float().mean() - b.isnan().float().mean()))
        for a, b in zip(moved.T[:3], reference.T[:3], strict=True)
    ]
    assert found["marginal_total_variation"] == pytest.approx(np.mean(variations), abs=1e-6)


def test_real_rows_are_at_the_floor_and_independent_columns_are_told_apart(data, real):
    x, reference = real
    floor, broken = (samples(data, of, reference) for of in (x, shuffled(x)))
    assert marginals(floor) == pytest.approx(marginals(broken))
    assert correlations(floor)["correlation_difference"] < correlations(broken)["correlation_difference"] / 2
    assert abs(detection(floor)["detection_auroc"] - 0.5) < 0.08
    assert detection(broken)["detection_auroc"] > 0.8
    useful, useless = (usefulness(of)["synthetic_auroc"] for of in (floor, broken))
    assert useful > 0.7
    assert abs(useless - 0.5) < 0.1


def test_a_target_that_the_user_names_is_predicted(data, real):
    x, reference = real
    object.__setattr__(data, "options", {"target": "y"})
    try:
        assert usefulness(samples(data, x, reference))["synthetic_r2"] > 0.8
        assert usefulness(samples(data, shuffled(x), reference))["synthetic_r2"] < 0.1
    finally:
        object.__setattr__(data, "options", {})


def test_samples_of_one_category_alone_teach_nothing(data, real):
    x, reference = real
    x = x.clone()
    x[:, 3] = x[0, 3] if not x[0, 3].isnan() else reference[~reference[:, 3].isnan()][0, 3]
    assert usefulness(samples(data, x, reference)) == {"synthetic_auroc": 0.5}
    x[:, :3] = float("nan")
    assert detection(samples(data, x, reference))["detection_auroc"] > 0.95
    assert np.isfinite([*marginals(samples(data, x, reference)).values()]).all()
    assert np.isfinite(correlations(samples(data, x, reference))["correlation_difference"])


def test_other_data_have_none(real):
    toy = load_data("toy:moons")
    x = toy.splits["test"].x[:100]
    for metric in (marginals, correlations, detection, usefulness):
        assert metric(samples(toy, x, x)) == {}
