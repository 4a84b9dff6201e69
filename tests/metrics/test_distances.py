from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from sklearn.metrics.pairwise import polynomial_kernel

from genfuse.errors import SettingsError
from genfuse.metrics import (
    Moments,
    TooFewSamplesError,
    frechet_distance,
    kernel_distance,
    nearest,
    prdc,
    sliced_wasserstein_distance,
)


def features(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Correlated Gaussians."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift)


# Fréchet


def test_moments_in_batches_are_those_of_numpy_far_from_the_origin():
    x = features(1000, 6, shift=1e6)
    for sizes in ([1000], [1, 1, 998], [0, 300, 700], [7] * 142 + [6]):
        moments = Moments(iter(x.split(sizes)))
        assert moments.count == 1000
        assert moments.mean.numpy() == pytest.approx(x.mean(0).numpy(), rel=1e-13)
        assert moments.covariance.numpy() == pytest.approx(np.cov(x.numpy().T), rel=1e-9)


def test_the_frechet_distance_is_that_of_scipys_matrix_square_root():
    x, y = features(300, 8), features(200, 8, seed=1, shift=0.5)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = linalg.sqrtm(a @ b).real
    expected = np.square((x.mean(0) - y.mean(0)).numpy()).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x.split(7), Moments(y)) == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_of_a_shift_and_of_a_scale_is_the_closed_form():
    x = features(300, 8)
    shift = torch.arange(8.0)
    assert frechet_distance(x + shift, x) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    variance = x.var(0).sum().item()
    assert frechet_distance(3 * (x - x.mean(0)), x - x.mean(0)) == pytest.approx(4 * variance, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6 * variance)


def test_the_frechet_distance_of_singular_covariances_is_finite():
    x = features(300, 4)
    flat = torch.cat([x, x, torch.zeros(300, 2)], 1)
    assert frechet_distance(flat + 1, flat) == pytest.approx(10, rel=1e-6)


def test_the_frechet_distance_is_that_of_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1)

    x, y = features(100, 12), features(80, 12, seed=1)
    oracle = image.FrechetInceptionDistance(feature=Flat()).set_dtype(torch.float64)
    oracle.update(x.reshape(-1, 3, 2, 2), real=False)
    oracle.update(y.reshape(-1, 3, 2, 2), real=True)
    assert frechet_distance(x, y) == pytest.approx(oracle.compute().item(), rel=1e-8)


# Kernel


def mmd_squared(x: np.ndarray, y: np.ndarray) -> float:
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    n = len(x)
    off = 1 - np.eye(n)
    return ((xx * off).sum() + (yy * off).sum()) / (n * (n - 1)) - 2 * xy.mean()


def test_the_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    x, y = features(60, 5), features(60, 5, seed=1, shift=0.3)
    found = kernel_distance(x, iter(y.split(11)))
    assert found.value == pytest.approx(mmd_squared(x.numpy(), y.numpy()), rel=1e-10)
    assert found.std is None


def test_the_kernel_distance_of_subsets_has_the_expectation_of_the_whole():
    x, y = features(400, 3), features(300, 3, seed=1)
    found = kernel_distance(x, y, subsets=400, subset_size=100)
    whole = kernel_distance(x[:300], y).value
    assert found.value == pytest.approx(whole, rel=0.2)
    assert 0 < found.std < whole
    assert kernel_distance(x, y, subset_size=100) == kernel_distance(x, y, subset_size=100)
    assert kernel_distance(x, y, subset_size=100, seed=1) != kernel_distance(x, y, subset_size=100)


def test_the_kernel_distance_has_no_bias():
    values = [kernel_distance(*torch.randn(2, 20, 4, dtype=torch.float64)).value for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * stats.sem(values)


def test_the_kernel_distance_is_that_of_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    x, y = features(50, 5), features(50, 5, seed=1)
    oracle = kid.poly_mmd(x, y, degree=3, gamma=None, coef=1.0)
    assert kernel_distance(x, y).value == pytest.approx(oracle.item(), rel=1e-9)


# Sliced Wasserstein


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 30), (7, 1), (20, 60)])
def test_in_one_dimension_the_sliced_distance_is_that_of_scipy(n, m):
    x, y = features(n, 1), features(m, 1, seed=1, shift=0.7)
    expected = stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert sliced_wasserstein_distance(x, y, p=1, projections=3) == pytest.approx(expected, rel=1e-10)


def test_the_sliced_distance_is_the_mean_over_directions():
    x, y = features(40, 2), features(25, 2, seed=1, shift=2.0)
    angles = np.linspace(0, np.pi, 2000, endpoint=False)
    rays = np.stack([np.cos(angles), np.sin(angles)])
    expected = np.mean(
        [stats.wasserstein_distance(a, b) for a, b in zip((x.numpy() @ rays).T, (y.numpy() @ rays).T, strict=True)]
    )
    assert sliced_wasserstein_distance(x, y, p=1, projections=20_000) == pytest.approx(expected, rel=0.01)


def test_the_sliced_distance_of_a_shift_is_the_closed_form():
    x = features(50, 5)
    shift = torch.arange(5.0)
    expected = (shift.square().sum().item() / 5) ** 0.5  # E (u . s)^2 = |s|^2 / D
    assert sliced_wasserstein_distance(x + shift, x, projections=20_000) == pytest.approx(expected, rel=0.02)
    assert sliced_wasserstein_distance(x.split(9), x) == 0


# Neighbours


def brute_force(x: np.ndarray, y: np.ndarray, k: int, k_density: int) -> tuple[float, ...]:
    def radii(a, k):
        return np.array(
            [np.sort([np.linalg.norm(p - q) for j, q in enumerate(a) if j != i])[k - 1] for i, p in enumerate(a)]
        )

    between = np.linalg.norm(x[:, None] - y[None], axis=2)
    precision = (between <= radii(y, k)).any(1).mean()
    recall = (between <= radii(x, k)[:, None]).any(0).mean()
    inside = between <= radii(y, k_density)
    return precision, recall, inside.sum() / (k_density * len(x)), inside.any(0).mean()


@pytest.mark.parametrize(("k", "k_density"), [(3, 5), (1, 1), (6, 2)])
def test_precision_recall_density_and_coverage_are_those_of_brute_force(k, k_density, monkeypatch):
    x, y = features(40, 3), features(50, 3, seed=1)
    expected = pytest.approx(brute_force(x.numpy(), y.numpy(), k, k_density))
    assert prdc(x, y, k=k, k_density=k_density) == expected
    monkeypatch.setattr("genfuse.metrics._neighbours.BLOCK", 130)  # 2 or 3 rows at a time
    assert prdc(x.split(7), iter(y.split(3)), k=k, k_density=k_density) == expected
    assert 0 < min(expected.expected) <= max(expected.expected[:2]) < 1  # nothing that holds of itself


def exact_counts(x, y, k, k_density):
    """The same in fractions, which do not round."""
    x, y = ([[Fraction(value) for value in row] for row in points.double().tolist()] for points in (x, y))

    def squared(a, b):
        return [[sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) for v in b] for u in a]

    def radii(a, k):
        return [sorted(d for j, d in enumerate(row) if j != i)[k - 1] for i, row in enumerate(squared(a, a))]

    between, ry, rx, rd = squared(x, y), radii(y, k), radii(x, k), radii(y, k_density)
    inside = [[d <= r for d, r in zip(row, rd, strict=True)] for row in between]
    return (
        sum(any(d <= r for d, r in zip(row, ry, strict=True)) for row in between) / len(x),
        sum(any(row[j] <= r for row, r in zip(between, rx, strict=True)) for j in range(len(y))) / len(y),
        sum(map(sum, inside)) / (k_density * len(x)),
        sum(any(row[j] for row in inside) for j in range(len(y))) / len(y),
    )


def tied(kind):
    """Two sets (40, D) and (30, D) in which points repeat or distances tie."""
    base, n, m = torch.rand(8, 4), 40, 30
    some = torch.randint(8, (n,)), torch.randint(8, (m,))
    weights = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7])
    outlier = torch.randn(m, 3)
    outlier[0] = 1e9
    return {
        "bits": lambda: (torch.rand(n, 5).round(), torch.rand(m, 5).round()),
        "integers": lambda: (torch.randint(4, (n, 3)).float(), torch.randint(4, (m, 3)).float() + 1e6),
        "thirds": lambda: ((torch.rand(n, 4) * 3).round() / 3, (torch.rand(m, 4) * 3).round() / 3),
        "pixels": lambda: ((torch.rand(n, 3) * 3).round() / 255, (torch.rand(m, 3) * 3).round() / 255),
        "weighted bits": lambda: (torch.rand(n, 5).round() * weights, torch.rand(m, 5).round() * weights),
        "repeats": lambda: (base[some[0]], base[some[1]]),
        "repeats of normal values": lambda: (torch.randn(8, 6)[some[0]], torch.randn(8, 6)[some[1]]),
        "collapsed": lambda: (base[:1].repeat(n, 1), base[some[1]]),
        "both collapsed": lambda: (base[:1].repeat(n, 1), base[:1].repeat(m, 1)),
        "all zero": lambda: (torch.zeros(n, 3), torch.zeros(m, 3)),
        "far from 0": lambda: (base[some[0]] + 1000.1, base[some[1]] + 1000.1),
        "one far away": lambda: (torch.randn(n, 3).round(decimals=1), outlier.round(decimals=1)),
        "one beyond all digits": lambda: (
            torch.randn(n, 3),
            torch.cat([torch.full((1, 3), 2.0**60), torch.randn(m, 3)]),
        ),
        "nearly repeats": lambda: tuple(base[which].double() + 1e-9 * torch.randn(len(which), 4) for which in some),
        "right triangles": lambda: tuple(
            torch.tensor([[3.0, 4, 0], [5, 0, 0], [0, 0, 5], [4, 0, 3], [0, 0, 0]]).double()[torch.randint(5, (count,))]
            * (1 + 2**-49)  # whose squares need 99 bits
            for count in (n, m)
        ),
        "tiny": lambda: (base[some[0]] * 1e-30, base[some[1]] * 1e-30),
    }[kind]()


TIED = (
    "bits", "integers", "thirds", "pixels", "weighted bits", "repeats",
    "repeats of normal values", "collapsed", "both collapsed", "all zero", "far from 0", "one far away",
    "one beyond all digits", "nearly repeats", "right triangles", "tiny",
)  # fmt: skip


@pytest.mark.parametrize("block", [2**24, 90])
@pytest.mark.parametrize("kind", TIED)
def test_precision_to_coverage_are_counted_exactly_where_distances_tie(kind, block, monkeypatch):
    monkeypatch.setattr("genfuse.metrics._neighbours.BLOCK", block)  # at 90, 2 or 3 rows, and repeats are put together
    x, y = tied(kind)
    assert prdc(x, y) == pytest.approx(exact_counts(x, y, 3, 5), abs=1e-12)
    assert prdc(y, x, k=1, k_density=2) == pytest.approx(exact_counts(y, x, 1, 2), abs=1e-12)


def test_without_ties_precision_to_coverage_are_those_of_the_package_prdc_and_of_torch_fidelity():
    """The first counts what is nearer than a radius, the second what is no farther; both take the (k + 1)-th smallest
    distance of a point to its own set, itself among it."""
    x, y = features(60, 3), features(50, 3, seed=1)
    between = torch.cdist(x, y)
    rx, ry = (torch.cdist(a, a).kthvalue(4, 1).values for a in (x, y))
    open_ = (between < ry).any(1), (between < rx[:, None]).any(0), (between < ry).sum(1) / 3, (between < ry).any(0)
    assert prdc(x, y, k=3, k_density=3) == pytest.approx([of.double().mean().item() for of in open_], rel=1e-6)
    closed = (between <= ry).any(1), (between <= rx[:, None]).any(0)
    assert prdc(x, y)[:2] == pytest.approx([of.double().mean().item() for of in closed], rel=1e-6)


def test_a_copy_far_from_0_has_distance_0_from_what_it_copies():
    points = torch.randn(50, 6) + 1e4
    distances, index = nearest(points.flip(0), points, 2)
    assert not distances[:, 0].any()
    assert index[:, 0].tolist() == list(range(49, -1, -1))
    expected = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").sort().values
    assert torch.equal(distances.flip(0)[:, 1].float(), expected[:, 1].float())


def test_a_dropped_mode_costs_recall_and_coverage_and_strays_cost_precision_and_density():
    real = torch.cat([torch.randn(300, 2), torch.randn(300, 2) + 50])
    dropped = prdc(torch.randn(600, 2), real)
    assert dropped.precision > 0.95
    assert dropped.recall == pytest.approx(0.5, abs=0.03)
    assert dropped.coverage < 0.52
    strays = prdc(torch.cat([real[::2] + 0.01, 500 + 100 * torch.randn(300, 2)]), real)
    assert strays.precision == pytest.approx(0.5, abs=0.03)
    assert strays.density < 0.7


def test_neighbours_are_those_of_scikit_learn_in_batches_too():
    from sklearn.neighbors import NearestNeighbors

    queries, points = features(20, 4).float(), features(90, 4, seed=1).float()
    distances, index = NearestNeighbors(n_neighbors=5).fit(points.double()).kneighbors(queries.double())
    for batches in (points, points.split(1), iter(points.split(40))):
        found, where = nearest(queries, batches, 5)
        assert found.numpy() == pytest.approx(distances)
        assert (where.numpy() == index).all()
    with pytest.raises(
        TooFewSamplesError, match="search for 91 neighbours: at least 91 points are needed; there are 90"
    ):
        nearest(queries, points, 91)


# Wrong inputs


@pytest.mark.parametrize(
    ("metric", "n", "m", "message"),
    [
        (
            frechet_distance,
            8,
            50,
            r"Fréchet distance: at least 9 samples are needed, one more than the 8 feature dimensions; there are 8",
        ),
        (frechet_distance, 50, 4, r"at least 9 reference examples are needed"),
        (kernel_distance, 1, 50, r"at least 2 samples are needed; there are 1"),
        (prdc, 3, 50, r"recall: at least 4 samples are needed for 3 neighbours of each; there are 3"),
        (prdc, 50, 5, r"at least 6 reference examples are needed for 5 neighbours"),
        (sliced_wasserstein_distance, 0, 5, r"at least 1 samples are needed; there are 0"),
    ],
)
def test_too_few_samples_are_told_how_many_are_needed(metric, n, m, message):
    with pytest.raises(TooFewSamplesError, match=message):
        metric(features(n, 8), features(m, 8))


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, prdc, sliced_wasserstein_distance, nearest])
def test_features_that_are_not_finite_or_not_alike_are_refused(metric):
    x = features(30, 3)
    spoiled = x.clone()
    spoiled[[4, 7], 1] = torch.nan
    with pytest.raises(SettingsError, match="2 of 30 rows of features have NaN or infinite values"):
        metric(spoiled, x)
    with pytest.raises(SettingsError, match="the samples have 3 feature dimensions, the reference has 2"):
        metric(x, x[:, :2])
    with pytest.raises(SettingsError, match=r"must be \(N, D\), got a tensor of shape \(30, 3, 1\)"):
        metric(x[..., None], x)
    with pytest.raises(SettingsError, match=r"must be \(N, D\), got a tensor of shape \(30, 0\)"):
        metric(x[:, :0], x[:, :0])
    with pytest.raises(SettingsError, match="must be real numbers"):
        metric(x + 0j, x)
    with pytest.raises(SettingsError, match=r"features reach 1e\+60, beyond 1e\+50"):
        metric(torch.cat([x.double(), torch.full((1, 3), 1e60, dtype=torch.float64)]), x)


def test_precision_to_coverage_do_not_depend_on_the_unit():
    x, y = features(60, 3).double(), features(50, 3, seed=1).double()
    for unit in (2.0**-900, 2.0**-40, 2.0**40):
        assert prdc(x * unit, y * unit) == prdc(x, y)


def test_settings_out_of_range_are_refused():
    x = features(30, 3)
    for call in (
        lambda: kernel_distance(x, x, subsets=1),
        lambda: kernel_distance(x, x, subset_size=1),
        lambda: prdc(x, x, k=0),
        lambda: prdc(x, x, k_density=0),
        lambda: sliced_wasserstein_distance(x, x, p=0.5),
        lambda: sliced_wasserstein_distance(x, x, projections=0),
    ):
        with pytest.raises(SettingsError, match="must be at least"):
            call()
