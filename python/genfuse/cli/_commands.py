"""All commands but ``train``. tyro makes their options and help of signature and docstring."""

import inspect
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from genfuse import plugins
from genfuse._files import plain
from genfuse.cli._compare import compare
from genfuse.cli._device import find_device
from genfuse.errors import SettingsError

SLOW = 1.0  # seconds that the import of a plugin takes, beside those of torch and genfuse

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from rich.text import Text

    from genfuse.models import GenerativeModel
    from genfuse.training import Run


Kind = Literal["models", "datasets", "metrics", "all"]


def list_(kind: Kind = "all", /) -> int:
    """Show the models, data sets and metrics that are installed, and the distribution that each comes from.

    This reads metadata and imports no plugin; `genfuse plugins` imports them all and shows what fails.

    example:
      genfuse list models

    Args:
        kind: what to show
    """
    print(plain("\n\n".join("\n".join(plugins.table(group)) for group in _groups(kind))))
    return 0


def plugins_(kind: Kind = "all", /) -> int:
    """Import every plugin, and show its state: whether it works, and if not, the error.

    A plugin is a model, data set or metric of any installed package, ours included. A broken one disturbs nothing but
    the command that uses it. Where a name is claimed by several packages, DISTRIBUTION:NAME is shown: type that.

    example:
      genfuse plugins models

    Args:
        kind: what to show
    """
    from genfuse.doctor import describe

    states = list(describe(*_groups(kind)))
    rows = []
    for plugin, seconds, error in states:
        state = "BROKEN" if error else "ok" if seconds < SLOW else f"ok, but its import takes {seconds:.1f} s"
        kind_of = plugins.KINDS[plugin.kind]
        rows.append((plugins.typed(plugin), kind_of, plugin.distribution, plugin.version, plugin.target, state))
    heads = ("name", "kind", "distribution", "version", "target", "state")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row, (_, _, error) in zip((heads, *rows), [(None, 0, None), *states], strict=True):
        print(plain("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))
        if error is not None:
            print(plain(f"    {error}"))
    broken = sum(error is not None for _, _, error in states)
    print(f"{len(states)} plugins of {len({row[2] for row in rows})} distributions, {broken} broken")
    return 0


def _groups(kind: Kind) -> tuple[str, ...]:
    return tuple(plugins.KINDS) if kind == "all" else (kind,)


def sample(
    run: Annotated[Path, arg(metavar="RUN")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE")],
    n: int = 64,
    label: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: drawn for each example)")] = None,
    condition: Annotated[str | None, arg(metavar="A=1,B=2", help_behavior_hint="(default: test examples')")] = None,
    temperature: Annotated[float | None, arg(metavar="T", help_behavior_hint="(default: the model's)")] = None,
    sampler: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the model's)")] = None,
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's)")] = None,
    guidance: Annotated[float | None, arg(metavar="W", help_behavior_hint="(default: the model's)")] = None,
    seed: int = 0,
    data: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: where it was)")] = None,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Draw from the model of a run: a picture, or the numbers.

    A .png is a grid of images, or points in 2 dimensions beside those of the data. A .npy is the array (n, *shape); a
    .npz has it as `x`, the `names` of a table's columns, and the labels `y` of a conditional model. Tables are in their
    original units; discrete data, such as images, is in [0, 1].

    example:
      genfuse sample runs/vae --n 64 --out grid.png

    Args:
        run: run folder
        out: file to write: .png, .npy or .npz
        n: number of examples
        label: conditional models: the label of all examples, a class's name or number
        condition: models of p(x | columns): a value of each of these columns, in their units, for all examples
        temperature: models that take one, such as flows: above 0; below 1 for samples nearer to the modes
        sampler: diffusion models: ancestral, ddim, heun, heun-stochastic, langevin or dpm-solver++
        steps: diffusion models: steps of the sampler
        guidance: conditional diffusion models: above 1 for samples more typical of their label
        seed: of the draws
        data: for points beside those of the data: the data set of the run, where it has moved, as csv:NEW/PATH
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace an existing file
    """
    if out.suffix not in (".png", ".npy", ".npz"):
        raise SettingsError(f"--out must end in .png, .npy or .npz; got {out}")
    if n < 1:
        raise SettingsError(f"--n must be at least 1; got {n}")
    if temperature is not None and not 0 < temperature < math.inf:
        raise SettingsError(f"--temperature must be above 0 and finite; got {temperature}")
    _refuse_existing(out, overwrite)

    import numpy as np
    import torch

    from genfuse import plots
    from genfuse._files import writing
    from genfuse.models import sample_in_parts
    from genfuse.training import Run
    from genfuse.training.process import seed_of

    trained = Run(run)
    shape = tuple(trained.config["data"]["shape"])
    if out.suffix == ".png" and len(shape) != 3 and shape != (2,):
        raise SettingsError(
            f"a .png shows images or points in 2 dimensions, but {run} has examples of shape {shape}: "
            f"use --out {out.with_suffix('.npy')} or .npz"
        )
    model = trained.model(find_device(device))
    generator = torch.Generator(model.device).manual_seed(seed)
    given_options = {"temperature": temperature, "sampler": sampler, "steps": steps, "guidance": guidance}
    options = {name: value for name, value in given_options.items() if value is not None}
    for name in options:
        if name not in inspect.signature(model.sample).parameters:
            raise SettingsError(f"--{name}: the model of {run}, a {type(model).__name__}, takes none: leave it out")
    # Labels are of a generator of their own, so that the noise does not depend on how many there are.
    numbers = torch.Generator(model.device).manual_seed(seed_of(seed, 1))
    if trained.config["data"].get("options", {}).get("condition"):
        if label is not None:
            raise SettingsError(f"--label: the model of {run} is given columns, no labels: use --condition")
        y: torch.Tensor | None = _contexts(trained, n, condition, data, numbers).to(model.device)
    elif condition is not None:
        raise SettingsError(f"--condition: the model of {run} was trained without --data.condition: leave it out")
    else:
        y = _labels(trained, model, n, label, numbers)
    x = torch.cat([part.cpu() for part in sample_in_parts(model, n, y, generator, **options)])
    out.parent.mkdir(parents=True, exist_ok=True)
    scaling = trained.scaling
    if out.suffix == ".png" and len(shape) == 3:
        plots.sample_grid(x, out)
    elif out.suffix == ".png":
        test = trained.data(name=data).batch("test", slice(None))
        alike = None
        if test.y is not None and y is not None and label is not None:
            alike = test.y == y[0].cpu()
        elif test.y is not None and y is not None and condition is not None:  # the tenth that is nearest
            off = (test.y - y[0].cpu()).norm(dim=1)
            alike = off <= off.quantile(0.1)
        points = test.x if alike is None or not alike.any() else test.x[alike]
        plots.scatter(points[:: max(1, len(points) // n)], x, out, scaling)
    else:
        array = (x if scaling is None else scaling.restore(x)).numpy()
        more: dict[str, Any] = {"names": np.array(scaling.names)} if scaling is not None and scaling.names else {}
        if y is not None:
            given = trained.condition_scaling
            more["y"] = y.cpu().numpy() if given is None else given.restore(y.cpu()).numpy()
            if given is not None and given.names:
                more["y_names"] = np.array(given.names)
            if trained.class_names:
                more["class_names"] = np.array(trained.class_names)
        with writing(out) as file:
            if out.suffix == ".npy":
                np.save(file, array)
            else:
                np.savez(file, x=array, **more)
    print(plain(out))
    return 0


def evaluate(
    run: Annotated[Path, arg(metavar="RUN")],
    /,
    *,
    samples: Annotated[int, arg(metavar="K")] = 50,
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None,
    features: Annotated[str, arg(metavar="NAME")] = "auto",
    n: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all, 10000 at most)")] = None,
    metrics: Annotated[tuple[str, ...] | None, arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = None,
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
        data: the data set of the run, where it has moved, as csv:NEW/PATH
        data_root: folder with the data sets that are read from files
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace an existing --json file
    """
    if json is not None:
        _refuse_existing(json, overwrite)

    from genfuse.metrics import evaluate, evaluate_samples
    from genfuse.models import GenerativeModel
    from genfuse.training import Run

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
    binarize: Annotated[Literal["none", "static", "dynamic"], arg(name="data.binarize")] = "none",
    data_seed: Annotated[int, arg(name="data.seed")] = 0,
    header: Annotated[Literal["auto", "yes", "no"], arg(name="data.header")] = "auto",
    delimiter: Annotated[str, arg(name="data.delimiter")] = ",",
    decimal: Annotated[str, arg(name="data.decimal")] = ".",
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
        binarize: as it was given to `genfuse train`
        data_seed: as it was given to `genfuse train`
        header: as it was given to `genfuse train`
        delimiter: as it was given to `genfuse train`
        decimal: as it was given to `genfuse train`
        data_root: folder with the data sets that are read from files
        steps: updates on 128 examples each
        seed: of the first weights and of the order of the examples
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace an existing classifier
    """
    from genfuse.data import load_data
    from genfuse.metrics import train_features

    loaded = load_data(
        data, root=data_root, binarize=binarize, seed=data_seed, header=header, delimiter=delimiter, decimal=decimal
    )
    path, accuracy = train_features(loaded, steps=steps, seed=seed, device=find_device(device), overwrite=overwrite)
    print(plain(path))
    print(f"held-out accuracy: {accuracy:.2%} of {len(loaded.splits['test']):,} examples of the test split")
    return 0


def new_plugin(
    name: Annotated[str, arg(metavar="NAME")],
    /,
    *,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: NAME)")] = None,
) -> int:
    """Write a package with a model of your own, which installs, trains and passes its test as it is.

    The model, a small variational autoencoder, is there to be changed.

    example:
      genfuse new-plugin my-model

    Args:
        name: what users will type, and the name of the package: lower-case letters, digits and -
        out: folder to make
    """
    from genfuse.cli._new_plugin import write

    for file in write(name, Path(name) if out is None else out):
        print(plain(f"written: {file}"))
    folder = shlex.quote(str(out or name))
    print(f"next: pip install --editable {folder}\n      genfuse train {name} --data digits\n      pytest {folder}")
    return 0


def doctor(
    *, data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None
) -> int:
    """Show versions, hardware, which implementation each operator got and why, and how many plugins there are.

    Look here where something is slower than it should be, or a model does not appear. This imports every plugin, and
    shows the errors of those that are broken.

    example:
      genfuse doctor

    Args:
        data_root: folder of the data sets that are read from files
    """
    from genfuse.doctor import report

    for line in report(data_root):
        print(plain(line))
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "list": list_,
    "plugins": plugins_,
    "new-plugin": new_plugin,
    "sample": sample,
    "evaluate": evaluate,
    "train-features": train_features,
    "compare": compare,
    "doctor": doctor,
}


def _labels(
    run: "Run", model: "GenerativeModel", n: int, label: str | None, generator: "torch.Generator"
) -> "torch.Tensor | None":
    """The labels (n,) that a model is to be given: all the same, or drawn evenly; None where it takes none."""
    import torch

    if not model.conditional:
        if label is not None:
            raise SettingsError(
                f"--label: the model of {run.path}, a {type(model).__name__}, was trained without labels: leave it "
                "out, or sample from a conditional one"
            )
        return None
    labels = model.drawn_labels.to(model.device)
    if label is None:
        return labels[torch.randint(len(labels), (n,), generator=generator, device=model.device)]
    names = run.class_names or ()
    number = names.index(label) if label in names else int(label) if label.isdecimal() else -1
    # A number that is no name may only be meant as a label if no name is a number.
    if not 0 <= number < model.config.classes or (label not in names and any(name.isdecimal() for name in names)):
        known = ", ".join(names) if names else f"0..{model.config.classes - 1}"
        raise SettingsError(f"--label must be one of {known}; got {label}")
    if number not in labels:
        raise SettingsError(f"--label {label}: no training example of {run.path} has this label")
    return torch.full((n,), number, device=model.device)


def _contexts(
    run: "Run", n: int, condition: str | None, data: str | None, generator: "torch.Generator"
) -> "torch.Tensor":
    """The contexts (n, C) that a model is to be given: all as typed, or those of test examples drawn by chance."""
    import torch

    if condition is None:
        y = run.data(name=data).splits["test"].y
        assert y is not None
        return y[torch.randint(len(y), (n,), generator=generator, device=generator.device).cpu()]
    columns = run.config["data"]["options"]["condition"].split(",")
    values = dict(each.split("=", 1) for each in condition.split(",") if "=" in each)
    try:
        typed = [float(values.pop(column)) for column in columns]
    except (KeyError, ValueError):
        typed = []
    if not typed or values or not all(map(math.isfinite, typed)):
        wanted = ",".join(f"{column}=NUMBER" for column in columns)
        raise SettingsError(f"--condition must be {wanted}, with a finite number for each; got {condition}")
    y = torch.tensor([typed])
    return (y if run.condition_scaling is None else run.condition_scaling.apply(y)).expand(n, -1)


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


def _refuse_existing(file: Path, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise SettingsError(f"{file} exists: name another file, or pass --overwrite")
