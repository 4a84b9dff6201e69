"""``genfuse evaluate``, and ``genfuse train-features`` for what it compares samples by."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from genfuse._files import plain
from genfuse.cli._arguments import READ_AS_USUAL, DataOptions, find_device, refuse_existing

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


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
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Measure the model of a run on the splits of its data, and its samples against the test split.

    What is measured depends on the model. A flow: the exact log-density in nats per example, for tables in their
    original units too; for images a bound, in nats and in bits per dimension. A VAE: ELBO and IWAE bound in nats per
    example, mean squared error of a reconstructed cell, KL of each latent dimension in nats, and how many latent
    dimensions are active (arXiv 1509.00519).

    Data that has moved since the training is named by --data; data that has changed is refused. A run that cannot be
    written to is measured all the same.

    Samples of a model that can sample are compared with the test split in the space of --features: Fréchet, kernel and
    sliced Wasserstein distance, precision, recall, density, coverage, and the distance to the nearest training example;
    each beside its value for real examples, which is what a perfect model gets. Images are drawn beside their nearest
    training examples. The same run, data and options give the same numbers, which RUN/evaluation.json holds too.

    example:
      genfuse evaluate runs/vae --samples 50 --limit 2000

    Args:
        run: run folder
        samples: K of the IWAE bound: importance samples per example
        limit: use N examples of each split, by chance and always the same, for all but the samples
        features: what the metrics of samples compare: columns (tables); pixels, random-conv, inception (images);
            classifier, which `genfuse train-features` trains; auto: the classifier if there is one, else random-conv or
            columns
        n: samples to draw, and real examples to compare them with; 0: measure no samples
        metrics: of samples, of `genfuse list metrics`, those of other packages too
        seed: of the samples
        inception_weights: for --features inception: a TorchScript file
        pictures: folder for neighbours.png
        json: also write the numbers to this file
        data: the data set of the run, if it has moved, as csv:NEW/PATH
        data_root: folder with the data sets that are read from files
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace an existing --json file
    """
    if json is not None:
        refuse_existing(json, overwrite)

    from genfuse.data import names_in
    from genfuse.metrics import evaluate, evaluate_samples
    from genfuse.models import GenerativeModel
    from genfuse.training import Run

    metrics = metrics and tuple(name for each in metrics for name in names_in(each))
    trained = Run(run)
    found = trained.data(data_root, data)
    model = trained.model(find_device(device))
    # Someone else's run, or one on a disk for reading alone, is told apart before anything is measured.
    writable = os.access(run, os.W_OK)
    of_samples = picture = None
    if not (n == 0 or type(model).sample is GenerativeModel.sample):
        if found.is_image and (writable or pictures):
            picture = (pictures or run / "pictures") / "neighbours.png"
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
    result = evaluate(model, found, samples=samples, limit=limit)
    _print_evaluation(result)
    if of_samples is not None:
        _print_samples(of_samples)
        if picture is not None:
            print(plain(f"picture: {picture}"))
    content = result if of_samples is None else {**result, "samples": of_samples}
    if json is not None:
        _write_json(json, content)
        print(plain(f"written: {json}"))
    if writable:
        _write_json(run / "evaluation.json", content)
        print(plain(f"written: {run / 'evaluation.json'}"))
    else:
        print(plain(f"genfuse: {run} cannot be written to, so it has no evaluation.json of this"), file=sys.stderr)
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


def _print_evaluation(result: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("")
    for split in result:
        table.add_column(_text(split), justify="right")
    names = dict.fromkeys(name for of_split in result.values() for name in of_split)
    for name in names:
        values = [of_split.get(name, "") for of_split in result.values()]
        if not any(isinstance(value, list) for value in values):
            shown = (f"{v:.5g}" if isinstance(v, float) else str(v) for v in values)
            table.add_row(_text(name.replace("_", " ")), *map(_text, shown))
    _show(table)
    for name in names:
        for split, of_split in result.items():
            if isinstance(value := of_split.get(name), list):
                each = " ".join(f"{v:.2f}" for v in sorted(value, reverse=True))
                _show(f"{name.replace('_', ' ')}, {split}, largest first: {each}")


def _print_samples(result: dict[str, Any]) -> None:
    from rich.table import Table

    print(f"{result['n']:,} samples against {result['n']:,} examples of the test split")
    print(plain(f"features: {result['features']}: {result['about']}"))
    table = Table("", "samples", "real examples")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in result["samples"].items():
        real = result["real"].get(name)
        table.add_row(_text(name.replace("_", " ")), f"{value:.5g}", "–" if real is None else f"{real:.5g}")
    _show(table)
    for reason in result["left_out"].values():
        _show(f"not measured: {reason}")


def _text(words: str) -> "Text":
    """What metrics, plugins and files are called, without markup."""
    from rich.text import Text

    return Text(plain(words))


def _show(what: "str | Table") -> None:
    from rich.console import Console

    Console().print(plain(what) if isinstance(what, str) else what, markup=False, highlight=False)


def _write_json(file: Path, content: Any) -> None:
    from genfuse._files import writing

    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file) as written:
        written.write((json.dumps(content, indent=2) + "\n").encode("utf-8"))
