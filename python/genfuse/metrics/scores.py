"""The metrics of samples, registered as plugins like anybody's: each makes scores, by name, of `Samples`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfuse import plugins
from genfuse.data import Dataset
from genfuse.errors import DataError, PluginError, SettingsError
from genfuse.metrics import _distances
from genfuse.metrics._distances import TooFewSamplesError
from genfuse.metrics._features import classify
from genfuse.metrics._neighbours import mode_coverage, prdc


@dataclass(frozen=True, eq=False)
class Samples:
    """What a metric is given: what a model drew, and as many held-out examples to hold it against.

    For the floor, ``x`` is examples of the training split in place of what a model drew. All is on one device. Where
    only metrics of ours are measured, on data without a mixture, ``x`` and ``reference`` are not kept whole.
    """

    x: Tensor  # (N, *shape), as `Dataset.batch` has them
    reference: Tensor  # (N, *shape), of the test split
    features: Tensor  # (N, D), of x
    reference_features: Tensor  # (N, D)
    data: Dataset
    seed: int  # of what a metric draws


def frechet_distance(samples: Samples) -> dict[str, float]:
    """Fréchet distance of Gaussians fitted to the features of samples and of test examples (arXiv 1706.08500)."""
    return {"frechet_distance": _distances.frechet_distance(samples.features, samples.reference_features)}


def kernel_distance(samples: Samples) -> dict[str, float]:
    """Squared maximum mean discrepancy of the features by a cubic kernel, and its spread (arXiv 1801.01401)."""
    found = _distances.kernel_distance(samples.features, samples.reference_features, seed=samples.seed)
    return {"kernel_distance": found.value, **({} if found.std is None else {"kernel_distance_std": found.std})}


def precision_recall(samples: Samples) -> dict[str, float]:
    """Shares by nearest neighbours: precision, recall (arXiv 1904.06991), density and coverage (2002.09797)."""
    return prdc(samples.features, samples.reference_features)._asdict()


def sliced_wasserstein(samples: Samples) -> dict[str, float]:
    """Wasserstein distance of the features in the mean over random directions."""
    of = samples.features, samples.reference_features
    return {"sliced_wasserstein": _distances.sliced_wasserstein_distance(*of, seed=samples.seed)}


def modes(samples: Samples) -> dict[str, float]:
    """How many Gaussians of a known mixture have samples, and the share of samples within 3 std of one."""
    mixture = samples.data.mixture
    return {} if mixture is None else mode_coverage(samples.x, mixture)._asdict()


def stacked_modes(samples: Samples) -> dict[str, float]:
    """Of stacked images: combinations of classes among samples, and the KL divergence from the data's, in nats.

    By the classifier of a channel (arXiv 1612.02136, section 3.3.1). The data's probabilities are the products of those
    of the classes; the divergence is KL(samples || data), about modes / (2 N) for N samples of a perfect model.
    """
    single = samples.data.channels
    if single is None:
        return {}
    labels, y = classify(samples.x, samples.data), single.splits["train"].y
    assert y is not None
    share = torch.bincount(y, minlength=single.classes or 0).double().cpu() / len(y)
    channels, modes = labels.shape[1], share.numel() ** labels.shape[1]
    _distances.require("the modes of stacked images", len(labels), modes, "samples", ", one a mode")
    of_data = torch.cartesian_prod(*[share] * channels).prod(1)
    place = share.numel() ** torch.arange(channels).flip(0)
    drawn = torch.bincount((labels.cpu() * place).sum(1), minlength=modes).double() / len(labels)
    kl = torch.special.xlogy(drawn, drawn / of_data).sum().item()
    return {"stacked_modes": int((drawn > 0).sum()), "stacked_kl": kl}


def select(names: Sequence[str] | None, of: str = "samples") -> list[plugins.Plugin]:
    """The metrics ``of`` samples, or codes, that a user means by these names; all that are installed, ours first, if
    there are none."""
    ours_first = sorted(plugins.discover("metrics"), key=lambda plugin: plugin.distribution != plugins.OURS)
    found = ours_first if names is None else [plugins.find("metrics", name) for name in names]
    return [metric for metric in found if _measures(metric) == of]


def _measures(metric: plugins.Plugin) -> str:
    """Codes or samples. A metric that cannot be imported is told of among those of samples."""
    try:
        return getattr(metric.load(), "measures", "samples")
    except PluginError:
        return "samples"


class Scores(NamedTuple):
    """What metrics made of samples."""

    values: dict[str, float]
    made_by: dict[str, plugins.Plugin]  # of each of them
    failed: dict[str, Exception]  # by the names of the metrics that made none


def compute(metrics: Sequence[plugins.Plugin], samples: Any) -> Scores:
    """What metrics make of ``samples``. Whatever one of another package does, the others are measured."""
    values: dict[str, float] = {}
    made_by: dict[str, plugins.Plugin] = {}
    failed: dict[str, Exception] = {}
    for metric in metrics:
        name = plugins.typed(metric)
        try:
            scores = metric.load()(samples)
            if metric.distribution != plugins.OURS:
                _check(scores, values)
        except (TooFewSamplesError, SettingsError, PluginError, DataError) as error:
            failed[name] = error
        except Exception as error:
            if metric.distribution == plugins.OURS:
                raise
            failed[name] = PluginError(f"{metric} failed: {type(error).__name__}: {error}")
        else:
            values |= scores
            made_by |= dict.fromkeys(scores, metric)
    return Scores(values, made_by, failed)


def _check(scores: Any, found: dict[str, float]) -> None:
    """Raise TypeError or ValueError unless these are scores, of names that are not ``found`` yet."""
    if not (isinstance(scores, dict) and all(isinstance(v, (int, float)) for v in scores.values())):
        raise TypeError(f"a metric must return a dict of numbers by name; it returned {scores!r:.100}")
    if odd := [f"{name} = {value}" for name, value in scores.items() if not math.isfinite(value)]:
        raise ValueError(f"not finite: {', '.join(odd)}")
    if taken := sorted(scores.keys() & {*found, "nearest_training"}):
        raise ValueError(f"another metric has scores of these names: {', '.join(taken)}")


def describe(metric: plugins.Plugin) -> dict[str, str]:
    """What a table says of the scores of a metric: which are better, lower or higher ones, and what they are."""
    loaded = metric.load()
    about = (loaded.__doc__ or "").strip().partition("\n")[0]
    better = getattr(loaded, "better", "")
    return {"better": better if better in ("lower", "higher") else "", "about": about, "from": str(metric)}
