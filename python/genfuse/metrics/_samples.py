"""Measure what a model draws against data that it has not seen, each metric beside its value for real examples."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from genfuse import pictures
from genfuse.errors import SettingsError
from genfuse.metrics._distances import (
    TooFewSamplesError,
    frechet_distance,
    kernel_distance,
    require,
    sliced_wasserstein_distance,
)
from genfuse.metrics._evaluate import undisturbed
from genfuse.metrics._features import BATCH, Extractor, extractor
from genfuse.metrics._neighbours import nearest, prdc
from genfuse.models import GenerativeModel, sample_in_parts

if TYPE_CHECKING:
    from genfuse.data import Dataset, Mixture

MOST = 10_000  # examples that are compared unless asked for otherwise
SEARCHED = 1000  # of the samples, those whose nearest training example is looked for
SHOWN, NEIGHBOURS = 8, 7  # rows of a picture, and training examples in each


def evaluate_samples(
    model: GenerativeModel,
    data: "Dataset",
    *,
    features: str = "auto",
    n: int | None = None,
    seed: int = 0,
    inception_weights: str | Path | None = None,
    picture: str | Path | None = None,
) -> dict[str, Any]:
    """Compare ``n`` samples of ``model`` with as many examples of the test split: a dict of plain numbers and strings.

    ``samples`` holds the metrics of the samples and ``real`` the same of ``n`` examples of the training split: the
    floor, or ceiling, what a perfect model gets. Both are measured against the same ``n`` examples of the test split,
    in the space of the features that `extractor` names: ``frechet_distance``, ``kernel_distance`` and its ``_std``,
    ``precision``, ``recall``, ``density``, ``coverage``, ``sliced_wasserstein``; of data with a known `Mixture`
    ``modes_covered`` and ``high_quality``. ``nearest_training`` is the mean distance of the first 1,000 samples to
    their nearest training example, and in ``real`` that of test examples: samples far below it are copies.
    ``features``, ``about``, ``dimensions`` and ``n`` say what was compared.

    By default ``n`` is as many as both splits have, 10,000 at most; a metric that needs more is then missing, and
    ``left_out`` says why. A given ``n`` that is too small for any metric is a TooFewSamplesError that says how many are
    needed. A conditional model is given labels as they occur in the training split. With ``picture``, samples of images
    are drawn into that file beside their nearest training examples. The same seed gives the same numbers; torch's
    global generators and the model's mode are left as they were.

    Raises SettingsError for an ``n`` beyond the data, samples that are not finite, and a model that cannot sample, and
    what ``model.check_data`` and `extractor` raise.
    """
    model.check_data(data)
    if type(model).sample is GenerativeModel.sample:
        raise SettingsError(f"a {type(model).__name__} cannot sample: there is nothing to compare with the data")
    most = min(len(data.splits[part]) for part in ("train", "test"))
    count = min(most, MOST) if n is None else n
    if not 1 <= count <= most:
        raise SettingsError(f"n must be in 1..{most}, the examples of the smaller of train and test split; got {n}")
    extract = extractor(features, data, device=model.device, inception_weights=inception_weights)
    generator = torch.Generator().manual_seed(seed)
    train, test = (torch.randperm(len(data.splits[part]), generator=generator)[:count] for part in ("train", "test"))
    left_out: dict[str, str] = {}
    with undisturbed(model):
        torch.manual_seed(seed)
        reference, real = (_features(extract, data, *of, model.device) for of in (("test", test), ("train", train)))
        points = data.batch("train", train).x if data.mixture else None
        found = {"samples": {}, "real": _measured(real, reference, points, data.mixture, seed, left_out)}
        if n is not None and left_out:  # before anything is drawn, which may take long
            raise TooFewSamplesError("; ".join(left_out.values()))

        labels = data.splits["train"].y if model.conditional else None
        y = None if labels is None else labels[train.to(labels.device)].to(model.device)
        drawn: list[Tensor] = []
        kept: list[Tensor] = []
        for part in sample_in_parts(model, count, y, torch.Generator(model.device).manual_seed(seed)):
            drawn.append(extract(part))
            if data.mixture or not kept:
                kept.append(part)
        samples, shown = torch.cat(drawn), torch.cat(kept)
        if bad := int((~samples.isfinite()).any(1).sum()):
            raise SettingsError(f"{bad} of {count} samples are NaN or infinite: the model has diverged")
        found["samples"] = _measured(samples, reference, shown, data.mixture, seed, left_out)

        everything = torch.arange(len(data.splits["train"]))
        queries = torch.cat([of[:SEARCHED] for of in (samples, reference)])
        stream = (_features(extract, data, "train", rows, model.device) for rows in everything.split(4 * BATCH))
        distances, index = nearest(queries, stream, min(NEIGHBOURS, len(everything)))
        for column, of in zip(found, distances[:, 0].chunk(2), strict=True):
            found[column]["nearest_training"] = of.mean().item()
        if picture is not None and data.is_image:
            neighbours = data.batch("train", index[:SHOWN].flatten().cpu()).x
            Path(picture).parent.mkdir(parents=True, exist_ok=True)
            pictures.neighbours(shown[:SHOWN], neighbours.unflatten(0, (-1, index.shape[1])), picture)
    return {
        "features": extract.name,
        "about": extract.about,
        "dimensions": samples.shape[1],
        "n": count,
        **found,
        "left_out": left_out,
    }


class ModeCoverage(NamedTuple):
    modes_covered: int
    high_quality: float  # share of the samples


def mode_coverage(samples: Tensor, mixture: "Mixture") -> ModeCoverage:
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


def _measured(
    x: Tensor, reference: Tensor, points: Tensor | None, mixture: "Mixture | None", seed: int, left_out: dict[str, str]
) -> dict[str, float]:
    """All metrics of features x of the examples ``points``; why one cannot be measured goes to ``left_out``."""

    def kernel() -> dict[str, float]:
        found = kernel_distance(x, reference, seed=seed)
        std = {} if found.std is None else {"kernel_distance_std": found.std}
        return {"kernel_distance": found.value, **std}

    metrics: dict[str, Callable[[], dict[str, float]]] = {
        "frechet_distance": lambda: {"frechet_distance": frechet_distance(x, reference)},
        "kernel_distance": kernel,
        "precision_recall": lambda: prdc(x, reference)._asdict(),
        "sliced_wasserstein": lambda: {"sliced_wasserstein": sliced_wasserstein_distance(x, reference, seed=seed)},
    }
    if mixture is not None and points is not None:
        metrics["mode_coverage"] = lambda: mode_coverage(points, mixture)._asdict()
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        try:
            found |= metric()
        except TooFewSamplesError as error:
            left_out[name] = str(error)
    return found


def _features(extract: Extractor, data: "Dataset", split: str, rows: Tensor, device: torch.device) -> Tensor:
    """Of some examples of a split, (N, D)."""
    return torch.cat([extract(data.batch(split, part).x.to(device)) for part in rows.split(BATCH)])
