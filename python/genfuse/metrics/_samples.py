"""Measure what a model draws, and how it restores images, against data that it has not seen."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfuse import plots, plugins
from genfuse.data import Dataset, resized
from genfuse.errors import SettingsError
from genfuse.metrics._distances import TooFewSamplesError, frechet_distance
from genfuse.metrics._evaluate import some, undisturbed
from genfuse.metrics._features import BATCH, Extractor, extractor
from genfuse.metrics._neighbours import nearest
from genfuse.metrics.scores import Samples, compute, describe, select
from genfuse.models import GenerativeModel, sample_in_parts

MOST, RESTORED = 10_000, 1000  # examples that are compared unless asked for otherwise, and images that are restored
SEARCHED = 1000  # of the samples, those whose nearest training example is looked for
SHOWN, NEIGHBOURS = 8, 7  # rows of a picture, and training examples in each


def evaluate_samples(
    model: GenerativeModel,
    data: Dataset,
    *,
    features: str = "auto",
    n: int | None = None,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    inception_weights: str | Path | None = None,
    picture: str | Path | None = None,
) -> dict[str, Any]:
    """Compare ``n`` samples of ``model`` with as many examples of the test split: a dict of plain numbers and strings.

    ``samples`` holds the metrics of the samples and ``real`` the same of ``n`` examples of the training split: the
    floor, or ceiling, what a perfect model gets. Both are measured against the same ``n`` examples of the test split,
    in the space of the features that `extractor` names, by ``metrics``: names of installed ones, by default all. Ours
    make ``frechet_distance``, ``kernel_distance`` and its ``_std``, ``precision``, ``recall``, ``density``,
    ``coverage``, ``sliced_wasserstein``, of data with a known `Mixture` ``modes_covered`` and ``high_quality``, of
    stacked images ``stacked_modes`` and ``stacked_kl``, and of tables ``marginal_wasserstein``,
    ``marginal_total_variation``, ``correlation_difference``, ``detection_auroc`` and ``synthetic_auroc`` or
    ``synthetic_r2``.
    ``nearest_training`` is the mean distance of the first 1,000 samples to their nearest training example, and in
    ``real`` that of test examples: samples far below it are copies. ``features``, ``about``, ``dimensions`` and ``n``
    say what was compared, and ``plugins`` what the figures are that metrics of other packages made.

    By default ``n`` is as many as both splits have, 10,000 at most; a metric that needs more is then missing, as is one
    of another package that fails, and ``left_out`` says why. A given ``n`` below that, too small for any metric, is a
    TooFewSamplesError that says how many are needed. A conditional model is given labels as they occur in the training
    split. With ``picture``, samples of images are drawn into that file beside their nearest training examples. The same
    seed gives the same numbers; torch's global generators and the model's mode are left as they were.

    Raises SettingsError for an ``n`` beyond the data, samples that are not finite, and a model that cannot sample,
    PluginError for metrics that are not installed, and what ``model.check_data`` and `extractor` raise.
    """
    model.check_data(data)
    if type(model).sample is GenerativeModel.sample:
        raise SettingsError(f"a {type(model).__name__} cannot sample: there is nothing to compare with the data")
    most = min(len(data.splits[part]) for part in ("train", "test"))
    count = min(most, MOST) if n is None else n
    if not 1 <= count <= most:
        raise SettingsError(f"n must be in 1..{most}, the examples of the smaller of train and test split; got {n}")
    if not (chosen := select(metrics)) and metrics:
        raise SettingsError(
            f"{', '.join(metrics)} measure codes, not samples: genfuse.metrics.evaluate_codes does that"
        )
    others = [metric for metric in chosen if metric.distribution != plugins.OURS]
    whole = bool(others or data.mixture or data.scaling or data.channels)
    extract = extractor(features, data, device=model.device, inception_weights=inception_weights)
    generator = torch.Generator().manual_seed(seed)
    train, test = (torch.randperm(len(data.splits[part]), generator=generator)[:count] for part in ("train", "test"))
    with undisturbed(model):
        torch.manual_seed(seed)

        def examples(split: str, rows: Tensor) -> Tensor:
            return data.batch(split, rows if whole else rows[:0]).x.to(model.device)

        held_out, reference = examples("test", test), _features(extract, data, "test", test, model.device)
        its_features = _features(extract, data, "train", train, model.device)
        real = Samples(examples("train", train), held_out, its_features, reference, data, seed)
        floor = compute(chosen, real)
        few = [str(error) for error in floor.failed.values() if isinstance(error, TooFewSamplesError)]
        if n is not None and n < most and few:  # before anything is drawn, which may take long
            raise TooFewSamplesError("; ".join(few))

        labels = data.splits["train"].y if model.conditional else None
        y = None if labels is None else labels[train.to(labels.device)].to(model.device)
        drawn: list[Tensor] = []
        kept: list[Tensor] = []
        for part in sample_in_parts(model, count, y, torch.Generator(model.device).manual_seed(seed)):
            drawn.append(extract.of_samples(part))
            if whole or not kept:
                kept.append(part)
        samples, shown = torch.cat(drawn), torch.cat(kept)
        if bad := int((~samples.isfinite()).any(1).sum()):
            raise SettingsError(f"{bad} of {count} samples are NaN or infinite: the model has diverged")
        ours = compute(chosen, Samples(shown, held_out, samples, reference, data, seed))
        found = {"samples": ours.values, "real": floor.values}

        everything = torch.arange(len(data.splits["train"]))
        queries = torch.cat([of[:SEARCHED] for of in (samples, reference)])
        stream = (_features(extract, data, "train", rows, model.device) for rows in everything.split(4 * BATCH))
        distances, index = nearest(queries, stream, min(NEIGHBOURS, len(everything)))
        for column, of in zip(found, distances[:, 0].chunk(2), strict=True):
            found[column]["nearest_training"] = of.mean().item()
        if picture is not None and data.is_image:
            neighbours = data.batch("train", index[:SHOWN].flatten().cpu()).x
            Path(picture).parent.mkdir(parents=True, exist_ok=True)
            plots.neighbours(shown[:SHOWN], neighbours.unflatten(0, (-1, index.shape[1])), picture)
    return {
        "features": extract.name,
        "about": extract.about,
        "dimensions": samples.shape[1],
        "n": count,
        **found,
        "plugins": {name: describe(metric) for name, metric in ours.made_by.items() if metric in others},
        "left_out": {name: str(error) for name, error in {**floor.failed, **ours.failed}.items()},
    }


def restoration(
    model: GenerativeModel, data: Dataset, *, features: str = "auto", n: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare what ``model`` makes of the images that are given with ``n`` test examples, by default 1,000, with these:
    a dict of plain numbers by method: the model, of diffusion models its one-step mean too, and ``bicubic`` and
    ``lanczos`` as Pillow has them, or ``given`` if the images are not smaller. Of each, means over the examples of
    ``psnr`` in dB and ``ssim`` (torchmetrics), of which higher is better, and of ``feature_distance``, the squared
    distance of a feature (`extractor`: of the classifier of the data if there is one), of which lower is better, as of
    ``frechet_distance``, that of all features, if there are more examples than features. By seed, always the same.

    Raises SettingsError for data that gives no image or n out of range, and what `extractor` raises.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    model.check_data(data)
    most = len(data.splits["test"])
    count = min(most, RESTORED) if n is None else n
    if data.given is None or not 1 <= count <= most:
        raise SettingsError(
            f"restorations are of data that gives images, and n in 1..{most}; got {data.name!r} and {n}"
        )
    truth, y = data.batch("test", some(most, count, seed).to(data.splits["test"].x.device))
    assert y is not None
    extract = extractor(features, data.before or data, device=model.device)
    size, several = (truth.shape[2], truth.shape[3]), "steps" in inspect.signature(model.sample).parameters
    made = {how: resized(y, size, how) for how in ("bicubic", "lanczos")} if y.shape[2:] != size else {}
    made = made or {"given": y[:, : truth.shape[1]].expand_as(truth)}
    with torch.no_grad(), undisturbed(model):
        for name, options in {"model": {}, **({"model, one step": {"steps": 1}} if several else {})}.items():
            generator = torch.Generator(model.device).manual_seed(seed)
            parts = sample_in_parts(model, count, y.to(model.device), generator, **options)
            made[name] = torch.cat([part.cpu() for part in parts])
    seen = extract(truth.to(model.device)).cpu()

    def of(x: Tensor) -> dict[str, float]:
        error = (x - truth.cpu()).square().flatten(1).mean(1).clamp(min=1e-10)
        alike = structural_similarity_index_measure(x, truth.cpu(), data_range=1.0, reduction="none")
        own = extract.of_samples(x.to(model.device)).cpu()
        found = {"psnr": float((-10 * error.log10()).mean()), "ssim": float(torch.as_tensor(alike).mean()),
                 "feature_distance": float((own - seen).square().mean())}  # fmt: skip
        return {**found, "frechet_distance": frechet_distance(own, seen)} if count > seen.shape[1] else found

    methods = {name: of(x.cpu()) for name, x in made.items()}
    return {"task": data.task, "n": count, "features": extract.name, "about": extract.about, "methods": methods}


def _features(extract: Extractor, data: Dataset, split: str, rows: Tensor, device: torch.device) -> Tensor:
    """The features (N, D) of some examples of a split."""
    return torch.cat([extract(data.batch(split, part).x.to(device)) for part in rows.split(BATCH)])
