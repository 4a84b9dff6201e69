"""``genfuse train``: its options are the fields of the trainer and of the model's config."""

import argparse
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
import tyro
from tyro.conf import arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from genfuse import models, plots, plugins
from genfuse._files import plain, read_json
from genfuse.cli._arguments import DataOptions, load_told, show_columns
from genfuse.cli._yaml import read_yaml
from genfuse.data import Dataset
from genfuse.errors import DataWarning, SettingsError, near
from genfuse.models import FACTS
from genfuse.training import Run, Trainer
from genfuse.training.run import check_config, describe_data, differences_of_data, home

LEFT_OUT = ("out", "resume")  # fields of the trainer for which the command has options of its own


Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Config]):
    """One training as it was typed; `parse` makes training and model dicts of what is the user's to set."""

    data: Annotated[str, arg(metavar="NAME")]
    """What to train on, of `genfuse list datasets`; some take an argument, as csv:PATH or toy:moons."""
    data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None
    """Folder of the data sets that are read from files."""
    out: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="(default: runs/MODEL-DATA)")] = None
    """Run folder to make."""
    resume: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")] = None
    """Run to continue with its own settings, to its end or to a larger --epochs or --steps."""
    start: Annotated[Path | None, arg(name="from", metavar="RUN", help_behavior_hint="")] = None
    """Run to begin with the weights of, and its model's settings: a new run, on the same data or other."""
    config: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """YAML or JSON file of these options, as {data: digits, model: {latent-dim: 8}}; the command line wins over it."""
    training: Annotated[Trainer, arg(name="")]
    data_options: Annotated[DataOptions, arg(name="data")]
    model: Config


def train(args: list[str]) -> int:
    """Run ``genfuse train``. Options that a file gives are put before those of the user, who so has the last word."""
    name = None if args[0].startswith("-") else args[0]
    options = args if name is None else args[1:]
    files = argparse.ArgumentParser("genfuse train", add_help=False, allow_abbrev=False)
    files.add_argument("--resume", type=Path)
    files.add_argument("--config", type=Path)
    files.add_argument("--from", type=Path, dest="start")
    given, _ = files.parse_known_args(options)

    sources: dict[Path, dict[str, Any]] = {}
    if given.resume:
        sources[given.resume / "config.json"] = _as_typed(Run(given.resume).config, given.resume / "config.json")
    if given.start:
        if given.resume:
            raise SettingsError("--from begins a new run, and --resume continues one: give one of them")
        typed = _as_typed(Run(given.start).config, given.start / "config.json")
        sources[given.start / "config.json"] = {"model": typed["model"], "data": typed["data"]}
    if given.config:
        sources[given.config] = _read(given.config)
    for file, settings in sources.items():
        named = settings["model"].pop("name", name)
        if name is not None and plugins.find("models", name) != plugins.find("models", named):
            raise SettingsError(f"the model is {name!r} on the command line, but {named!r} in {file}")
        name = named
    if name is None:
        raise SettingsError("which model? genfuse train MODEL --data NAME; `genfuse train --help` lists the models")

    of_files = [word for file, settings in sources.items() for word in _as_arguments(name, file, settings)]
    try:
        job = parse(name, of_files + options)
    except SystemExit as stop:
        if stop.code and of_files:
            print(f"read from {' and '.join(map(str, sources))}: {shlex.join(of_files)}", file=sys.stderr)
        raise
    out = given.resume or job.out or Path("runs") / re.sub(r"[^\w.-]+", "-", f"{name}-{job.data}").strip("-")
    if given.resume and job.out not in (None, out):
        raise SettingsError(f"--resume {out} continues in that folder: leave out --out {job.out}")

    trainer = Trainer(**cast(dict, job.training), out=out, resume=bool(given.resume))
    before = max((entry["step"] for entry in Run(out).metrics()), default=0) if given.resume else None
    with warnings.catch_warnings():
        if given.resume:  # told before
            warnings.simplefilter("ignore", DataWarning)
        data = load_told(job.data, root=job.data_root, **asdict(job.data_options))
    if data.schema is not None:
        show_columns(data.schema)
    if given.resume and "columns" in {field.name for field in fields(models.load(name).Config)}:
        columns = Run(given.resume).config["model"]["settings"].get("columns")  # a run may be older than these
        job.model["columns"] = columns and tuple(columns)
    torch.manual_seed(trainer.seed)  # of the first weights
    model = models.create(name, data, **job.model)
    if given.start:
        _start(Run(given.start), model, data)
    try:
        run = trainer.fit(model, data, [_Length(model, data, trainer).tell])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_continue(out, job.data_root)) from None
    if isinstance(run, Run) and os.environ.get("RANK", "0") == "0":
        for line in _summary(run, before or 0):
            print(plain(line))
        if before and before == max(entry["step"] for entry in run.metrics()):
            print("nothing was to be done: the run had ended; to train on, ask for more, by --epochs or --steps")
    return 0


class _Length:
    """Says before a training of the usual length how many steps it takes, and once that is known, how long."""

    def __init__(self, model: models.GenerativeModel, data: Dataset, trainer: Trainer) -> None:
        self.examples = 0.0  # still to be told about
        if trainer.epochs or trainer.steps or os.environ.get("RANK", "0") != "0":
            return
        n, self.examples = len(data.splits["train"]), model.usual_steps * trainer.batch_size
        print(f"{model.usual_steps:,} steps of {trainer.batch_size} examples, as {model.plugin} usually needs: "
              f"{self.examples / n:.3g} passes over {n:,}; --epochs or --steps to choose", flush=True)  # fmt: skip

    def tell(self, entry: dict[str, Any]) -> None:
        """Called with each line of metrics."""
        if self.examples and entry["split"] == "train" and entry["step"] > 1:
            seconds = self.examples / entry["examples_per_second"]
            time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
            print(f"about {time}, at {entry['examples_per_second']:,.0f} examples/s", flush=True)
            self.examples = 0.0


def parse(model: str, args: list[str]) -> Job:
    """Read the options of ``genfuse train MODEL``. Raises SystemExit, after help or an error was printed."""
    config_class = models.load(model).Config
    left_out = {Trainer: LEFT_OUT, config_class: FACTS}
    registry = ConstructorRegistry()

    @registry.struct_rule
    def settings(info: StructTypeInfo) -> StructConstructorSpec | None:
        """Read a dataclass as the dict of those fields that are the user's to set."""
        names = left_out.pop(info.type, None)
        if names is None:
            return None
        spec = ConstructorRegistry.get_struct_spec(info)  # asks this rule again, which passes
        left_out[info.type] = names
        assert isinstance(spec, StructConstructorSpec)
        kept = (replace(f, helptext=partial(_in_one_line, f.helptext)) for f in spec.fields if f.name not in names)
        return replace(spec, instantiate=dict, fields=tuple(kept))

    @registry.primitive_rule
    def numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        """Read 64,64 as 64 64."""
        if get_origin(info.type) is not tuple or get_args(info.type) != (int, ...):
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="N,N,...",
            instance_from_str=lambda words: tuple(int(n) for word in words for n in word.split(",") if n.strip()),
            is_instance=lambda value: isinstance(value, tuple) and all(isinstance(n, int) for n in value),
            str_from_instance=lambda value: [",".join(map(str, value))],
        )

    @registry.primitive_rule
    def number_or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        """Show a number that may be left out as a number."""
        kinds = get_args(info.type)
        if len(kinds) != 2 or kinds[0] not in (int, float) or kinds[1] is not type(None):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=kinds[0].__name__.upper(),
            instance_from_str=lambda words: None if words == ["None"] else kinds[0](words[0]),
            is_instance=lambda value: value is None or isinstance(value, kinds[0]),
            str_from_instance=lambda value: [str(value)],
        )

    example = f"genfuse train {model} --data digits --out runs/{model} --epochs 5"
    description = f"Train the {plugins.find('models', model)}.\n\nexample:\n  {example}"
    with registry:
        return tyro.cli(cast(Any, Job)[config_class], prog=f"genfuse train {model}", description=description, args=args)


def _in_one_line(told: str | Callable[[], str | None] | None) -> str:
    """What a field says, without the ends of the source's lines, which tyro keeps."""
    return " ".join(((told() if callable(told) else told) or "").split())


def _read(file: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file."""
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        settings = read_json(file) if kind == "JSON" else read_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{file} is not {kind}: {error}") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{file} must hold options by name, as epochs: 5; it holds {settings!r:.100}")
    return _as_typed(settings, file)


def _as_typed(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Settings as the command line has them: of a file, or of a run's config.json less what the data decided."""
    if "version" in settings and "training" in settings:
        config = check_config(settings, file)
        model, data = config["model"], config["data"]
        settings = models.load(model["name"]).current(model["settings"])  # of a former version, too
        plain_settings = json.loads(json.dumps(settings))  # which has no tuples
        own = {key: value for key, value in plain_settings.items() if key not in FACTS}
        root = {} if (root := home(data)) is None else {"data_root": root}
        data = {**{key: data[key] for key in ("name", "binarize", "seed")}, **data.get("options", {})}
        return {**config["training"], **root, "model": {"name": model["name"], **own}, "data": data}
    sections = {}
    for key in ("model", "data"):
        given = settings.get(key) or {}
        sections[key] = dict(given) if isinstance(given, dict) else {"name": given}
        if not isinstance(sections[key].get("name", ""), str):
            raise SettingsError(f"{file}: {key} must be a name or options by name; it is {given!r:.100}")
    return {**settings, **sections}


def arguments_of(model: str, file: Path) -> list[str]:
    """The arguments of ``genfuse train MODEL`` that say what a file says, which may name the model too."""
    settings = _read(file)
    settings["model"].pop("name", None)
    return list(_as_arguments(model, file, settings))


def known_options(model: str) -> dict[str, Any]:
    """What ``genfuse train MODEL`` takes, and its types, as a file names them."""

    def types(cls: type, but: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
        hints = get_type_hints(cls)
        return {prefix + f.name: hints[f.name] for f in fields(cls) if f.name not in but}

    known = {"data.name": str, "data_root": Path, "out": Path, **types(Trainer, LEFT_OUT)}
    return known | types(DataOptions, prefix="data.") | types(models.load(model).Config, FACTS, "model.")


def _as_arguments(model: str, file: Path, settings: dict[str, Any]) -> Iterator[str]:
    """The arguments of ``genfuse train MODEL`` that say what a file says. Raises SettingsError for unknown names."""

    known = known_options(model)
    flat = {key: value for key, value in settings.items() if key not in ("model", "data")}
    flat |= {f"{section}.{key}": value for section in ("model", "data") for key, value in settings[section].items()}
    for key, value in flat.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise SettingsError(
                f"{file}: there is no option {key!r}; known: {', '.join(sorted(known))}{near(name, known)}"
            )
        option = "data" if name == "data.name" else name.replace("_", "-")
        if known[name] is bool and isinstance(value, bool):
            section, dot, last = option.rpartition(".")
            yield f"--{section}{dot}{last if value else f'no-{last}'}"
        else:
            yield from (f"--{option}", *map(str, value if isinstance(value, list) else [value]))


def _start(start: Run, model: models.GenerativeModel, data: Dataset) -> None:
    """Begin with the weights of another run, and say what is other than it was there."""
    others = start.start(model) + differences_of_data(start.config["data"], describe_data(data))
    print(plain(f"begins with the weights of {start.path}, step {start.step}"))
    for other in others:
        print(plain(f"other than there: {other}"))


def _how_to_continue(out: Path, data_root: Path | None) -> str:
    if not (out / "config.json").is_file():
        return " before anything was saved"
    root = [] if data_root is None else ["--data-root", str(data_root)]
    return f"; saved in {out}; to continue: {shlex.join(['genfuse', 'train', '--resume', str(out), *root])}"


def _summary(run: Run, before: int = 0) -> Iterator[str]:
    """Where the run lies, the last of its metrics, its pictures, and what to do next; and what was warned of up to step
    ``before``, where it went on: of the rest it has just told."""
    metrics = run.metrics()
    last = {(each["split"], each["player"]): each for each in metrics if each["split"] in plots.SPLITS}
    end = max(last.values(), key=lambda entry: entry["step"], default={"epoch": 0, "step": run.step})
    yield f"run: {run.path}: {end['epoch']} epochs, {end['step']} steps"
    for (split, player), entry in last.items():
        numbers = ", ".join(f"{key} {value:.5g}" for key, value in entry.items() if isinstance(value, float))
        yield f"{split}: {player}: {numbers}"
    for entry in metrics:
        if entry["split"] == "warning" and entry["step"] <= before:
            yield f"warning: step {entry['step']}: {entry['message']}"
    if validated := [entry for entry in metrics if entry["split"] == "validation"]:
        best = min(validated, key=lambda entry: entry["loss"])
        yield f"kept: the weights of step {best['step']}, with the lowest validation loss, {best['loss']:.5g}"
    for picture in sorted((run.path / "pictures").glob("*.png")):
        yield f"picture: {picture}"
    path = shlex.quote(str(run.path))
    kinds = {1: "--n 1000 --out rows.csv", 3: "--n 64 --out samples.png", 4: "--n 16 --out clip.gif"}
    out = kinds.get(len(run.config["data"]["shape"]), "--n 64 --out samples.npy")
    yield f"next: genfuse sample {path} {out}\n      genfuse evaluate {path}"
