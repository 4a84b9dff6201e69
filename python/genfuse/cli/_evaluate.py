"""``genfuse evaluate``, and ``genfuse train-features`` for what it compares samples by."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from genfuse._files import plain, write_text
from genfuse.cli._arguments import READ_AS_USUAL, DataOptions, find_device, refuse_existing, show_table
from genfuse.errors import DataError, GenfuseError, SettingsError

if TYPE_CHECKING:
    from genfuse.data import Dataset
    from genfuse.training import Run

SPLITS = ("train", "validation", "test")


def evaluate(
    run: Annotated[Path, arg(metavar="RUN")],
    /,
    *,
    samples: Annotated[int, arg(metavar="K")] = 50,
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None,
    features: Annotated[str, arg(metavar="NAME")] = "auto",
    n: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all, 10000 at most)")] = None,
    metrics: Annotated[tuple[str, ...] | None, arg(metavar="NAME,...", help_behavior_hint="(default: all)")] = None,
    seed: int = 0,
    inception_weights: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    pictures: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: RUN/pictures)")] = None,
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    data: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: where it was)")] = None,
    data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None,
    labels: Annotated[str | None, arg(metavar="COLUMN|FILE", help_behavior_hint="")] = None,
    method: Literal["auto", "relative", "likelihood", "reconstruction", "denoising", "critic"] = "auto",
    fpr: Annotated[float, arg(metavar="SHARE")] = 0.05,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Measure the model of a run on the splits of its data, and its samples against the test split.

    What is measured depends on the model. A flow: the exact log-density in nats per example, for tables in their
    original units too; for images a bound, in nats and in bits per dimension. A VAE: ELBO and IWAE bound in nats per
    example, mean squared error of a reconstructed cell, KL of each latent dimension in nats, and how many latent
    dimensions are active (arXiv 1509.00519).

    Data that has moved since the training is named by --data. Other data can be named too, and is measured as the run's
    own would be, by its columns and units, as one split; data that has changed in its place is refused. A run that
    cannot be written to is measured all the same.

    With --labels, which say of each example of --data whether it is odd (1) or not (0), it is measured how well the
    scores of `genfuse score` find the odd ones: AUROC, average precision, and a threshold for a share of false alarms;
    the curves are detection.png.

    Of a run with --data.task, what the model makes of images of the test split is compared with these, in place of all
    else, beside bicubic and Lanczos interpolation: PSNR, structural similarity, and distances of the --features.

    Samples of a model that can sample are compared with the test split in the space of --features: Fréchet, kernel and
    sliced Wasserstein distance, precision, recall, density, coverage, and the distance to the nearest training example;
    each beside its value for real examples, which is what a perfect model gets. Images are drawn beside their nearest
    training examples. The codes of a VAE, of data with known factors such as sprites, are measured by MIG, DCI, the
    FactorVAE and the beta-VAE score, and factors.png shows which latents tell of which factors. The same run, data and
    options give the same numbers, which RUN/evaluation.json holds too.

    example:
      genfuse evaluate runs/vae --samples 50 --limit 2000

    Args:
        run: run folder
        samples: K of the IWAE bound: importance samples per example
        limit: use N examples of each split, by chance and always the same, for all but the samples; of codes, N in all
        features: what the metrics of samples compare: columns (tables); pixels, random-conv (images, clips); inception
            (images); classifier, which `genfuse train-features` trains; auto: the classifier if there is one, else
            random-conv or columns
        n: samples to draw, and real examples to compare them with; 0: measure no samples
        metrics: of samples and codes, of `genfuse list metrics`, those of other packages too
        seed: of the samples, and of what metrics draw
        inception_weights: for --features inception: a TorchScript file
        pictures: folder for neighbours.png and factors.png
        json: also write the numbers to this file
        data: the data set of the run, if it has moved, as csv:NEW/PATH; or another one, or a file
        data_root: folder with the data sets that are read from files
        labels: a column of --data, y for the labels in an npz file, or a file with a number a row: 1 is odd, 0 is not
        method: of the scores, as of `genfuse score`
        fpr: share of the examples that are not odd which may reach the threshold
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace an existing --json file
    """
    if json is not None:
        refuse_existing(json, overwrite)
    if labels is not None:
        if data is None:
            raise SettingsError("--labels are of the examples of --data: name those too")
        folder = pictures or (run / "pictures" if os.access(run, os.W_OK) else None)
        return _detect(run, data, data_root, labels, method, fpr, samples, seed, device, folder, json)

    from genfuse.data import names_in
    from genfuse.metrics import evaluate, evaluate_codes, evaluate_samples, restoration, select
    from genfuse.models import Encodes, GenerativeModel, HasPosterior
    from genfuse.training import Run

    metrics = metrics and tuple(name for each in metrics for name in names_in(each))
    trained = Run(run)
    other = False
    try:
        found = trained.data(data_root, data)
    except GenfuseError:
        if data is None:
            raise
        found, other = _other_data(trained, data, data_root), True
        n = n if "train" in found.splits else 0
    model = trained.model(find_device(device))
    # Someone else's run, or one on a disk for reading alone, is told apart before anything is measured.
    writable = os.access(run, os.W_OK)
    of_samples = of_codes = picture = None
    of_task: dict[str, Any] | None = None
    folder = pictures or (run / "pictures" if writable else None)
    if found.task:
        of_task, n = restoration(model, found, features=features, n=n, seed=seed), 0
        _print_restoration(of_task)
    wanted = not metrics or bool(select(metrics))
    if wanted and not (n == 0 or type(model).sample is GenerativeModel.sample):
        if found.is_image and folder:
            picture = folder / "neighbours.png"
        of_samples = evaluate_samples(
            model,
            found,
            features=features,
            n=n,
            seed=seed,
            metrics=metrics,
            inception_weights=inception_weights,
            picture=picture,
        )
    result: dict[str, Any] = {"restoration": of_task}
    if of_task is None:
        result = evaluate(model, found, samples=samples, limit=limit, splits=("test",) if other else SPLITS)
        _print_evaluation(result)
    if of_samples is not None:
        _print_samples(of_samples)
        if picture is not None:
            print(plain(f"picture: {picture}"))
    able = found.factors and isinstance(model, HasPosterior) and isinstance(model, Encodes)
    if select(metrics, "codes") and (able or metrics):
        shown = folder / "factors.png" if folder else None
        try:
            of_codes = evaluate_codes(model, found, metrics=metrics, n=limit or 10_000, seed=seed, picture=shown)
        except DataError as error:
            print(plain(f"genfuse: codes are not measured: {error}"), file=sys.stderr)
        else:
            _print_evaluation({f"codes of {of_codes['examples']:,} examples": of_codes["scores"]}, of_codes["left_out"])
            if shown:
                print(plain(f"picture: {shown}"))
    content = {**result, **{k: v for k, v in (("samples", of_samples), ("codes", of_codes)) if v is not None}}
    if json is not None:
        _write_json(json, content)
        print(plain(f"written: {json}"))
    if other:
        print(plain(f"{data} is not what {run} was trained on, so {run / 'evaluation.json'} stays as it is"))
    elif writable:
        _write_json(run / "evaluation.json", content)
        print(plain(f"written: {run / 'evaluation.json'}"))
    else:
        print(plain(f"genfuse: {run} cannot be written to, so it has no evaluation.json of this"), file=sys.stderr)
    return 0


def _other_data(run: "Run", name: str, root: Path | None) -> "Dataset":
    """Other data than a run's, as its test split beside the run's own training split, if that is still there."""
    from genfuse.applications import examples

    found = examples(run, name, root=root).data
    splits = {"test": found.splits["test"]}
    try:
        splits["train"] = run.data(root).splits["train"]
    except GenfuseError as error:
        print(plain(f"genfuse: samples are not measured, for want of the run's own data: {error}"), file=sys.stderr)
    return replace(found, splits={"train": found.splits["test"], **splits})


def _detect(
    run: Path, data: str, root: Path | None, labels: str, method: str, fpr: float, samples: int, seed: int, device: str,
    pictures: Path | None, json: Path | None,
) -> int:  # fmt: skip
    """Measure how well the scores of labelled examples find those of label 1."""
    from genfuse import plots
    from genfuse.applications import detection, examples, find_method, labels_of, score

    found = examples(run, data, root=root, device=find_device(device))
    odd = labels_of(found, labels)
    scores = score(found, method=method, samples=samples, seed=seed, explain=0)["score"]
    result = {"method": find_method(found.model, method), "fpr": fpr, **detection(scores, odd, fpr=fpr)}
    curves = {name: result.pop(name) for name in ("roc", "precision_recall")}
    for name, value in result.items():
        _say(f"{_words(name)}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        plots.detection(**curves, share=result["share"], path=pictures / "detection.png")
        print(plain(f"picture: {pictures / 'detection.png'}"))
    if json is not None:
        _write_json(json, {**result, **curves})
        print(plain(f"written: {json}"))
    return 0


def train_features(
    data: Annotated[str, arg(metavar="DATA")],
    /,
    *,
    data_options: Annotated[DataOptions, arg(name="data")] = READ_AS_USUAL,
    data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None,
    steps: int = 2000,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Train the classifier of a data set with labels whose features `genfuse evaluate` then compares samples by.

    It is kept in $GENFUSE_CACHE/features (~/.cache/genfuse/features), under the name of the data set and a hash of its
    content, for all runs on the same data.

    example:
      genfuse train-features digits

    Args:
        data: data set, of `genfuse list datasets`
        data_root: folder with the data sets that are read from files
        steps: updates on 128 examples each
        seed: of the first weights and of the order of the examples
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace an existing classifier
    """
    from genfuse.data import load_data
    from genfuse.metrics import train_features

    loaded = load_data(data, root=data_root, **asdict(data_options))
    path, accuracy = train_features(loaded, steps=steps, seed=seed, device=find_device(device), overwrite=overwrite)
    print(plain(path))
    print(f"held-out accuracy: {accuracy:.2%} of {len(loaded.splits['test']):,} examples of the test split")
    return 0


def _print_evaluation(result: dict[str, dict[str, Any]], left_out: Mapping[str, str] = {}) -> None:
    names = dict.fromkeys(name for of_split in result.values() for name in of_split)
    lists = [name for name in names if any(isinstance(of_split.get(name), list) for of_split in result.values())]
    rows = ([_words(name), *(each.get(name, "") for each in result.values())] for name in names if name not in lists)
    show_table(("", *result), rows)
    for name in lists:
        for split, of_split in result.items():
            if isinstance(value := of_split.get(name), list):
                each = " ".join(f"{v:.2f}" for v in sorted(value, reverse=True))
                _say(f"{_words(name)}, {split}, largest first: {each}")
    for reason in left_out.values():
        _say(f"not measured: {reason}")


def _print_restoration(result: dict[str, Any]) -> None:
    print(plain(f"{result['n']:,} images of the test split, {result['task']}"))
    print(plain(f"features: {result['features']}: {result['about']}"))
    names = dict.fromkeys(name for of in result["methods"].values() for name in of)
    show_table(("", *map(_words, names)), ([how, *map(of.get, names)] for how, of in result["methods"].items()))


def _print_samples(result: dict[str, Any]) -> None:
    print(f"{result['n']:,} samples against {result['n']:,} examples of the test split")
    print(plain(f"features: {result['features']}: {result['about']}"))
    both = ((name, value, result["real"].get(name)) for name, value in result["samples"].items())
    rows = ([_words(name), value, "–" if real is None else real] for name, value, real in both)
    show_table(("", "samples", "real examples"), rows)
    for reason in result["left_out"].values():
        _say(f"not measured: {reason}")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _say(words: str) -> None:
    from rich.console import Console

    Console().print(plain(words), markup=False, highlight=False)


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=2) + "\n")
