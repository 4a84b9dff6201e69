"""Run folders: what a training leaves on disk. `Run` reads one, `Recorder` writes one.

``config.json`` says what was trained on what and how, ``model.safetensors`` holds the weights, ``metrics.jsonl`` one
JSON object a line, and ``state.safetensors`` all that resuming needs. The last is one file on purpose: writing it is
the commit, so a kill between two files cannot mix two steps. ``state-1.safetensors`` is the one before, and so on.

Every file has a checksum of itself within. Weights and state also hold what `essentials` takes of config.json, so that
one that was edited is not taken for the one they were trained by.
"""

import dataclasses
import html
import json
import math
import os
import re
import sys
import threading
import typing
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfuse import _files, models, plots, plugins
from genfuse._version import __version__
from genfuse.data import Dataset, Scaling, Schema, load_data
from genfuse.errors import DataError, DataWarning, RunError, RunWarning, SettingsError
from genfuse.models import GenerativeModel, configure
from genfuse.training.checkpoint import BEFORE, STATE, WEIGHTS, Checkpoint, before
from genfuse.training.options import Options

VERSION = 1
CONFIG, METRICS = "config.json", "metrics.jsonl"
PICTURES, TENSORBOARD, PROGRESS, EVALUATION = "pictures", "tensorboard", "progress", "evaluation.json"

WHERE = ("out", "resume", "overwrite")  # options of a training that are not of the run

# What a resumed run may have otherwise than the run that it continues: none of these has a say in the weights.
FREE = {
    "epochs", "steps", "patience", "device", "devices", "checkpoint_every", "keep_checkpoints", "log_every", "pictures"
}  # fmt: skip

# What a run folder holds that a training or `genfuse evaluate` wrote, and in its folders.
OURS = re.compile("|".join([*map(re.escape, (CONFIG, WEIGHTS, STATE, METRICS, EVALUATION)), BEFORE.pattern]))
OURS_WITHIN = {PICTURES: "*.png", TENSORBOARD: "events.out.tfevents.*", PROGRESS: "[0-9]*.npy"}

# Keys of config.json that are read, and what they must be.
FORMAT: dict[str, Any] = {
    "genfuse": str,
    "model.name": str,
    "model.settings": dict[str, Any],
    "data.name": str,
    "data.binarize": str,
    "data.seed": int,
    "data.fingerprint": str,
    "data.shape": list[int],
    "data.scaling": dict[str, Any] | None,
    "training": dict[str, Any],
    "training.batch_size": int,
    "training.epochs": int | None,
    "training.schedule": str,
    "training.seed": int,
}
OptionOfData = typing.Literal[
    "header", "delimiter", "decimal", "condition", "validation", "columns", "drop", "types", "target", "size", "fit",
    "mode", "damaged", "stream", "task",
]  # fmt: skip
FORMAT_OF_DATA = {  # what older runs do not have
    "root": str | None,
    "splits": dict[str, str],
    "options": dict[OptionOfData, str],
    "class_names": list[str] | None,
}
FORMAT_OF_SCALING = {"mean": list[float], "std": list[float], "names": list[str] | None}


class History:
    """What a training logged."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries = entries

    def metrics(self) -> list[dict[str, Any]]:
        """The entries, in order, as the lines of metrics.jsonl: docs/runs.md says what is in them."""
        return self._entries

    @property
    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) over the training, by split, as "train"; where there are several players "train, critic"."""
        entries = [entry for entry in self.metrics() if entry["split"] in plots.SPLITS]
        several = len({entry["player"] for entry in entries}) > 1
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in entries:
            name = entry["split"] + (f", {entry['player']}" if several else "")
            found.setdefault(name, []).append((entry["step"], entry["loss"]))
        return found

    def __repr__(self) -> str:
        ends = "; ".join(f"{name} {points[-1][1]:.5g} at step {points[-1][0]}" for name, points in self.losses.items())
        return f"<{type(self).__name__}: {ends or 'nothing logged'}>"

    def _repr_html_(self) -> str:
        drawn = plots.as_html(plots.curves, self.metrics()) if self.losses else ""
        return f"<p>{html.escape(repr(self))}</p>{drawn}"


class Run(History):
    """An existing run folder. Nothing is written to it.

    Raises RunError, which names file and key, if ``path`` is not a run folder, is half there, damaged, of another
    version, or holds a link. A RunWarning tells of a config.json that was changed by hand: if that has a say in
    what is asked for, `model`, `scaling` and `data` raise RunError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_config(self.path)
        if not (self.path / WEIGHTS).is_file():
            raise RunError(f"the run folder {self.path} is half there: it has {CONFIG}, but no {WEIGHTS}")
        if "sha256" not in self.config:
            _files.warn(
                f"{self.path} is of a genfuse without checksums: that its files are whole cannot be verified",
                RunWarning,
            )
        elif not _files.intact(self.config):
            _files.warn(
                f"{self.path / CONFIG} is not as genfuse wrote it: it was changed by hand, or is damaged", RunWarning
            )

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        model, data = (html.escape(str(self.config[key]["name"])) for key in ("model", "data"))
        widths = {"samples": 420 if len(self.config["data"]["shape"]) == 3 else 900, "curves": 900}
        pictures = {self.path / PICTURES / f"{name}.png": width for name, width in widths.items()}
        shown = "".join(f"<p>{plots.inline(file, width)}</p>" for file, width in pictures.items() if file.is_file())
        return f"<p>{html.escape(repr(self))}: {model} on {data}, {self.step:,} steps</p>{shown}"

    @property
    def scaling(self) -> Scaling | None:
        """For a table: the means and standard deviations that it was standardized by. Else None."""
        return self._scaling("scaling")

    @property
    def condition_scaling(self) -> Scaling | None:
        """`scaling` of the columns that were given as the context, if there were any. Else None."""
        return self._scaling("condition_scaling")

    def _scaling(self, name: str) -> Scaling | None:
        self._check("data")
        content = self.config["data"].get(name)
        return content and Scaling(**content)

    @property
    def schema(self) -> Schema | None:
        """The columns of a table that are not all numbers without end: by it rows are read and written. Else None."""
        return self._schema("schema")

    @property
    def condition_schema(self) -> Schema | None:
        """`schema` of the columns of such a table that were given as the context. Else None."""
        return self._schema("condition_schema")

    def _schema(self, name: str) -> Schema | None:
        content = self.config["data"].get(name)
        return content and Schema.from_json(content)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of labels 0, 1, ..., if the data has them. Else None."""
        names = self.config["data"].get("class_names")
        return names and tuple(names)

    @property
    def step(self) -> int:
        """Updates behind the weights."""
        step: int = _files.demand(_files.tensor_facts(self.path / WEIGHTS), {"step": int}, self.path / WEIGHTS)["step"]
        return step

    def model(self, device: str | torch.device = "cpu") -> GenerativeModel:
        """The trained model in evaluation mode, in float32. Raises PluginError if its plugin is not installed."""
        named, file = self.config["model"], self.path / CONFIG
        cls = models.load(named["name"])
        weights, facts = _files.read_tensors(self.path / WEIGHTS)
        self._check("model", facts)
        if found := self._differences("training", facts):
            _files.warn(
                f"{self.path / WEIGHTS} was not trained by the settings that {CONFIG} names: {'; '.join(found)}",
                RunWarning,
            )
        try:
            with torch.random.fork_rng(devices=[]):  # the first weights are drawn only to be replaced
                model: GenerativeModel = cls.from_config(configure(cls, cls.current(named["settings"])))
        except SettingsError as error:
            raise RunError(f"{file}: model.settings: {error}") from None
        except Exception as error:
            raise RunError(
                f"{file}: no {named['name']} can be made of its model.settings: {type(error).__name__}: {error}"
            ) from error
        model.plugin = named["name"]
        try:
            model.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise RunError(f"{self.path / WEIGHTS} does not fit the model that {CONFIG} names: {error}") from None
        return model.to(device).eval()

    def start(self, model: GenerativeModel) -> list[str]:
        """Give ``model`` the weights of the run, as the start of another training, and return what is other in its
        settings. Raises SettingsError if it is another kind of model, or its weights have other names or shapes."""
        weights, _ = _files.read_tensors(self.path / WEIGHTS)
        was, named = self.config["model"], model.plugin or plugin_of(type(model))
        now = {"name": named, **json.loads(json.dumps(dataclasses.asdict(model.config)))}
        found = [f"name: was {was['name']!r}, now {named!r}"] if was["name"] != named else differences(
            {"model": {"name": named, **was["settings"]}, "data": self.config["data"]}, {"model": now})  # fmt: skip
        try:
            if was["name"] != named:
                raise RuntimeError(f"{named} is no {was['name']}")
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = "; ".join(found) or str(error)
            raise SettingsError(
                f"the weights of {self.path} do not fit this {type(model).__name__}: {reason}"
            ) from None
        return found

    def data(self, root: str | Path | None = None, name: Any = None) -> Dataset:
        """The data set that the run was trained on, from where it was then, or from ``root``.

        ``name`` is for data that has moved: "csv:NEW/PATH", or what was given in place of a name. Raises DataError if
        it is not found, RunError, which says what is other in it, if it has changed. Only of what has moved are there
        warnings: the training has told of the rest.
        """
        was = self.config["data"]
        try:
            with warnings.catch_warnings():
                if name is None:
                    warnings.simplefilter("ignore", DataWarning)
                data = load_data(
                    was["name"] if name is None else name,
                    root=root or home(was),
                    binarize=was["binarize"],
                    seed=was["seed"],
                    **was.get("options", {}),
                )
        except DataError as error:
            if name is not None:
                raise
            raise DataError(
                f"{error}\nthe run {self.path} was trained on {was['name']!r}: if that has moved, say where it is, by "
                "--data or --data-root (in Python: run.data(root, name))"
            ) from error
        now = describe_data(data)
        if found := differences_of_data(was, now):
            raise RunError(
                f"the data set {data.name!r} is not what the run {self.path} was trained on: "
                f"its fingerprint was {was['fingerprint']} and is now {now['fingerprint']}: {'; '.join(found)}"
            )
        self._check("data")
        return data

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order. A killed run may have left half a line at the end: it is left out."""
        path = self.path / METRICS
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        # What follows the last line break is not a whole line.
        return [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], 1)]

    def progress(self) -> dict[int, Tensor]:
        """Samples (N, *shape) from the same noise at moments of the training, by the number of steps before them."""
        found = {}
        for file in sorted((self.path / PROGRESS).glob("[0-9]*.npy")):
            if re.fullmatch("[0-9]{8,18}", file.stem):
                try:
                    found[int(file.stem)] = torch.from_numpy(_files.read_array(file))
                except Exception as error:  # damaged files raise all kinds of errors
                    raise RunError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
        return dict(sorted(found.items()))

    def _check(self, section: str, facts: dict[str, Any] | None = None) -> None:
        """Raise RunError if a section of config.json is not the one that the weights were trained by."""
        if found := self._differences(section, _files.tensor_facts(self.path / WEIGHTS) if facts is None else facts):
            raise RunError(
                f"{self.path / WEIGHTS} does not fit the {section} that {CONFIG} names, which was edited or is "
                f"damaged: {'; '.join(found)}"
            )

    def _differences(self, section: str, facts: dict[str, Any]) -> list[str]:
        """What is other in a section of config.json than it was for the weights."""
        if "config" not in facts:  # which is younger than the run
            return []
        _files.demand(facts, {f"config.{section}": dict[str, Any]}, self.path / WEIGHTS)
        return differences({section: facts["config"][section]}, {section: essentials(self.config)[section]})


def describe(model: GenerativeModel, data: Dataset, training: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json. Raises SettingsError if `Run.model` could not rebuild the model from it."""
    if model.config is None:
        raise SettingsError(
            f"this {type(model).__name__} was made of parts that were given, not of settings, so a run folder could "
            "not make it again: leave `out` out and save model.state_dict(), or make a plugin of it"
        )
    name = model.plugin or plugin_of(type(model))
    settings = dataclasses.asdict(model.config)
    try:
        plain = json.loads(json.dumps(settings))
        same = configure(type(model), plain) == model.config
    except TypeError:
        same = False
    if not same:
        raise SettingsError(
            f"the settings of {type(model).__name__} do not survive being written as JSON, so the run could not be "
            f"loaded again; make them of numbers, strings, booleans, None and flat tuples of these: {settings}"
        )
    return {
        "version": VERSION,
        "genfuse": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": {"name": name, "settings": plain},
        "data": describe_data(data),
        "training": training,
    }


def describe_data(data: Dataset) -> dict[str, Any]:
    """What config.json says of a data set: where it is found from any folder, and what is in it."""
    scaling, given = (
        of and json.loads(json.dumps(dataclasses.asdict(of)))  # which has no tuples
        for of in (data.scaling, data.condition_scaling)
    )
    return {
        "name": data.source or data.name,
        "root": data.root,
        "binarize": data.binarize,
        "seed": data.seed,
        "fingerprint": data.fingerprint(),
        "splits": {part: data.fingerprint(part) for part in data.splits},
        "shape": list(data.shape),
        "scaling": scaling,
        "condition_scaling": given,
        **{name: of.to_json() for name in ("schema", "condition_schema") if (of := getattr(data, name)) is not None},
        "options": dict(data.options),
        "class_names": data.class_names and list(data.class_names),
    }


def home(was: dict[str, Any]) -> str | None:
    """The folder that a data set's files were found in, where config.json names one that is still there."""
    root = was.get("root")
    return root if isinstance(root, str) and os.path.isdir(root) else None


def differences_of_data(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is other in a data set than when it was described; of a run that is older than that, by its training split.

    Both are what `describe_data` returns.
    """
    if not isinstance(before := was.get("splits"), dict):
        return [] if now["splits"]["train"] == was["fingerprint"] else ["the train split has changed"]
    if now["fingerprint"] == was["fingerprint"]:
        return []
    found = []
    for part in (*now["splits"], *(part for part in before if part not in now["splits"])):
        if before.get(part) != now["splits"].get(part):
            change = "is new" if part not in before else "has changed" if part in now["splits"] else "is gone"
            found.append(f"the {part} split {change}")
    old, new = was["scaling"] or {}, now["scaling"] or {}
    found += [f"the {key} of its columns: was {old.get(key)}, now {new.get(key)}" for key in FORMAT_OF_SCALING
              if old.get(key) != new.get(key)]  # fmt: skip
    same = [f"the {part} split is the same" for part in before if before[part] == now["splits"].get(part)]
    return [*(found or ["its kind of values, or its labels, are others"]), *same]


def essentials(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of config.json has a say in the weights and in what they mean, by sections."""
    free = FREE if config["training"].get("schedule", "constant") == "constant" else FREE - {"epochs", "steps"}
    impatient = {} if config["training"].get("patience") is None else {"keep": "best"}
    settings = {key: value for key, value in config["model"]["settings"].items() if key != "examples"}  # of the data
    keys = ["shape", "binarize", "fingerprint", "scaling"]
    keys += ["condition_scaling"] if config["data"].get("condition_scaling") else []  # a run may be older
    return {
        "model": {"name": config["model"]["name"], **settings},
        "data": {key: config["data"][key] for key in keys},
        "training": {key: value for key, value in (config["training"] | impatient).items() if key not in free},
    }


def differences(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    """What is other in the sections of ``new`` than in ``old``. Both are what `essentials` returns, or parts of it."""
    found = []
    for section in new:
        was_all, now_all, defaults = old[section], new[section], {}  # defaults of what is younger than the run
        if section == "training":
            defaults = dataclasses.asdict(Options()) | {"keep": "last"}  # as it was before there was auto
        elif section == "model":
            cls = models.load(new[section]["name"])
            fields = dataclasses.fields(cls.Config)
            was_all, now_all = (json.loads(json.dumps(cls.current(each))) for each in (was_all, now_all))
            # What the data decides is compared with the data.
            now_all = {key: value for key, value in now_all.items() if key in was_all or key not in models.FACTS}
            defaults = json.loads(
                json.dumps({f.name: f.default for f in fields if f.default is not dataclasses.MISSING})
            )
        for key in sorted(was_all.keys() | now_all.keys()):
            was, now = (of.get(key, defaults.get(key)) for of in (was_all, now_all))
            if was != now and key == "columns" and was and now:
                names = ((old.get("data") or {}).get("scaling") or {}).get("names") or range(1, len(was) + 1)
                found.append(f"{section} columns: {_of_columns(was, now, names)}")
            elif was != now:
                found.append(f"{section} {key}: was {was!r}, now {now!r}")
    return found


def _of_columns(was: list[dict[str, Any]], now: list[dict[str, Any]], names: Iterable[Any]) -> str:
    """What is other in the columns of a table, as `genfuse.data.Schema.specs` has them."""

    def kinds(columns: list[dict[str, Any]]) -> list[str]:
        return [f"{of['kind']} of {len(of['shares'])} choices" if of["shares"] else of["kind"] for of in columns]

    if len(was) != len(now):
        return f"were {len(was)}, and are now {len(now)}"
    each = [f"{name} was {a}, now {b}" for name, a, b in zip(names, kinds(was), kinds(now), strict=True) if a != b]
    return "; ".join(each) or "their means, spreads or quantiles are others"


def plugin_of(cls: type) -> str:
    """The name under which a class is registered. Its module is loaded already, so nothing is imported to find out."""
    for plugin in plugins.discover("models"):
        module, _, attribute = plugin.target.partition(":")
        if getattr(sys.modules.get(module), attribute, None) is cls:
            return plugins.typed(plugin)
    raise SettingsError(
        f"{cls.__module__}:{cls.__qualname__} is not registered as a model, so its run folder could not be loaded "
        'again: declare it under the entry point group "genfuse.models" in a package, or train without `out`'
    )


def claim(path: Path, resume: bool, overwrite: bool, config: dict[str, Any]) -> None:
    """Raise RunError unless a training by ``config`` may write to ``path``. Nothing is written."""
    try:
        os.path.abspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise RunError(
            f"the run folder {path} cannot be written: safetensors and TensorBoard take no path that is not UTF-8"
        ) from None
    if resume:
        if not path.exists():
            raise RunError(f"there is no run folder {path} to resume")
        read_config(path)
        if not (path / STATE).is_file():
            older = "".join(f"; {each.name}, the checkpoint before, is there" for each in before(path)[:1])
            raise RunError(f"the run folder {path} cannot be resumed: it has no {STATE}{older}")
        _check_same(path, config)
    elif path.exists() and not path.is_dir():
        raise RunError(f"{path} exists and is not a folder")
    elif _files.occupied(path) and ((path / CONFIG).exists() or not any(path.glob(f".stage.*.new/{CONFIG}"))):
        # Else it is what a kill leaves in the moment in which a run appears there, or replaces another.
        try:
            read_config(path)
        except RunError as error:
            raise RunError(f"{path} is taken, and by something that will not be overwritten: {error}") from None
        if not overwrite:
            raise RunError(
                f"the run folder {path} exists: choose another one, or ask for --resume or --overwrite "
                "(in Python: resume=True, overwrite=True)"
            )


def _check_same(path: Path, config: dict[str, Any]) -> None:
    """Raise RunError, naming every difference, unless ``config`` continues the run in ``path``.

    A RunWarning tells where versions or threads are others, since then its promise of the same bits does not hold.
    """
    was = read_config(path)
    old, new = essentials(was), essentials(config)
    if "splits" not in was["data"] and not differences_of_data(was["data"], config["data"]):
        old["data"]["fingerprint"] = new["data"]["fingerprint"]  # its own stands for the training split alone
    if found := differences(old, new):
        found += differences_of_data(was["data"], config["data"])
        raise RunError(f"the run {path} cannot be resumed with other settings: {'; '.join(found)}")
    around = [f"{key} {was[key]}, now {config[key]}" for key in ("genfuse", "torch", "threads")
              if key in was and was[key] != config[key]]  # fmt: skip
    if around:
        _files.warn(
            f"{path} was trained by {'; '.join(around)}: it goes on from the same state, but may round otherwise than "
            "if it had never stopped",
            RunWarning,
        )


class Recorder:
    """The writing side of a run folder, for who has its lock."""

    def __init__(self, path: Path, step: int, keep: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self._keep_checkpoints = path, keep
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._metrics = open(path / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        with _files.named(path / TENSORBOARD):
            self._tensorboard = SummaryWriter(str(path / TENSORBOARD), purge_step=step + 1)

    @classmethod
    def begin(cls, path: Path, config: dict[str, Any], checkpoint: Checkpoint, keep: int) -> "Recorder":
        """Make a new run with its first checkpoint. What a run before left there goes, and nothing else.

        The new files are written first, so a disk that is full leaves the run before; config.json, without which it is
        no run, goes first and comes last.
        """
        _files.refuse_links(path, *OURS_WITHIN)
        _files.sweep(path)
        with _files.staging(path) as stage:
            checkpoint.write(stage)
            _files.write_json(stage / CONFIG, config, indent=2)
            _erase(path)
            for name in (STATE, WEIGHTS, CONFIG):
                os.replace(stage / name, path / name)
        _files.sync_folder(path)
        return cls(path, checkpoint.facts["step"], keep)

    @classmethod
    def continued(cls, path: Path, config: dict[str, Any], checkpoint: Checkpoint, keep: int) -> "Recorder":
        """Continue a run from its checkpoint: what it logged after that step is forgotten."""
        step = checkpoint.facts["step"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # who asked for the run has had them
            entries = [entry for entry in Run(path).metrics() if entry["step"] <= step]
        for name in ("", *OURS_WITHIN):
            _files.sweep(path / name)
        checkpoint.write(path)  # a kill may have left the weights of the one before beside its state
        _files.write_text(path / METRICS, "".join(map(_line, entries)))
        _files.write_json(path / CONFIG, config, indent=2)
        return cls(path, step, keep)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and its numbers to TensorBoard."""
        with _files.named(self.path / METRICS):
            self._metrics.write(_line(entry))
            self._metrics.flush()
        prefix = "/".join(entry[key] for key in ("split", "player") if key in entry)
        with _files.named(self.path / TENSORBOARD):
            for key, value in entry.items():
                if key not in ("step", "epoch", "split", "player"):
                    add = self._tensorboard.add_text if isinstance(value, str) else self._tensorboard.add_scalar
                    add(f"{prefix}/{key}", value, entry["step"])

    def keep(self, step: int, samples: Tensor) -> None:
        """Write what the model drew after ``step`` steps; `Run.progress` reads it."""
        (self.path / PROGRESS).mkdir(exist_ok=True)
        with _files.writing(self.path / PROGRESS / f"{step:08}.npy") as file:
            np.save(file, samples.float().cpu().numpy())
        if samples.dim() == 4:
            with _files.named(self.path / TENSORBOARD):
                images = samples if samples.shape[1] == 3 else samples[:, :1]
                self._tensorboard.add_images("samples", images.float().clamp(0, 1), step)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, once all that was logged up to its step is safe."""
        with _files.named(self.path / METRICS):
            os.fsync(self._metrics.fileno())
        with _files.named(self.path / TENSORBOARD):
            self._tensorboard.flush()
        checkpoint.write(self.path, self._keep_checkpoints)

    def close(self) -> None:
        """Close the files; what could not be written is an OSError."""
        threading.excepthook = self._hook
        try:
            with _files.named(self.path / METRICS):
                self._metrics.close()
        finally:
            with _files.named(self.path / TENSORBOARD):
                self._tensorboard.close()

    def _thread_failed(self, args: Any) -> None:
        """TensorBoard writes in a thread, and raises here what goes wrong in it: it need not be told twice."""
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            self._hook(args)


def _erase(path: Path) -> None:
    """Remove what a run wrote to a folder, and the folders in it that are then empty."""
    for name in (CONFIG, *sorted(each.name for each in path.iterdir() if OURS.fullmatch(each.name))):
        (path / name).unlink(missing_ok=True)
    for name, pattern in OURS_WITHIN.items():
        _files.sweep(path / name)
        for file in (path / name).glob(pattern):
            file.unlink()
        if (path / name).is_dir() and not any((path / name).iterdir()):
            (path / name).rmdir()


def _line(entry: dict[str, Any]) -> str:
    """A line of metrics.jsonl, with a checksum of itself."""
    said = json.dumps(entry)
    return f'{said[:-1]}, "crc32": "{zlib.crc32(said.encode()):08x}"}}\n'


def _entry(line: bytes, where: str) -> dict[str, Any]:
    """What a line of metrics.jsonl says. Raises RunError, which names ``where`` and the key, for what is wrong."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: not JSON: {error or 'nested too deeply'}") from None
    if not isinstance(entry, dict):
        raise RunError(f"{where}: an object with step, epoch and split is wanted; got {_files.shown(entry)}")
    crc = entry.pop("crc32", None)
    if crc is not None and crc != f"{zlib.crc32(json.dumps(entry).encode()):08x}":
        raise RunError(f"{where}: its checksum crc32 is not that of the line, which is damaged: remove the line")
    texts = {"warning": ("player", "name", "message"), "epoch": ()}.get(str(entry.get("split")), ("player",))
    wanted = {"step": int, "epoch": int, "split": str, **dict.fromkeys(texts, str)}
    wanted |= {key: float for key in entry if key not in (*wanted, "name", "message", "player")}
    wanted |= {"loss": float} if texts == ("player",) else {}
    # There may be a million lines, so the slow check, which makes the message, is of those that fail a quick one.
    for key, kind in wanted.items():
        value = entry.get(key)
        if not isinstance(value, kind) or (isinstance(value, int) and value >= 2**63):
            _files.demand(entry, wanted, where)
    return entry


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises RunError if there is none, or it is not ours."""
    file = path / CONFIG
    if not path.exists():
        raise RunError(f"there is no run folder {path}")
    _files.refuse_links(path, *OURS_WITHIN)
    if not file.is_file():
        raise RunError(f"{path} is not a run folder, or half of one: it has no {CONFIG}")
    try:
        config = _files.read_json(file)
    except ValueError as error:
        raise RunError(f"{file} is not the {CONFIG} of a run: {type(error).__name__}: {error}") from None
    return check_config(config, file)


def check_config(config: Any, file: Path) -> dict[str, Any]:
    """The content of the config.json of a run, if it is that. Raises RunError, which names file and key, if not."""
    where = f"{file} is not the {CONFIG} of a run"
    version = _files.demand(config, {"version": Any}, where)["version"]
    if version != VERSION:
        raise RunError(
            f"the run folder {file.parent} is of version {_files.shown(version)}; this genfuse {__version__} reads "
            f"{VERSION}"
        )
    _files.demand(config, FORMAT, where)
    _check_data(config["data"], where)
    _check_training(config["training"], where)
    checked: dict[str, Any] = config
    return checked


def _check_data(data: dict[str, Any], where: str) -> None:
    if not 0 <= data["seed"] < 2**63:
        raise RunError(f"{where}: 'data.seed' is {data['seed']}")
    _files.demand({"data": data}, {f"data.{key}": kind for key, kind in FORMAT_OF_DATA.items() if key in data}, where)
    for section in ("schema", "condition_schema"):
        if (content := data.get(section)) is not None:
            _files.demand({"data": data}, {f"data.{section}": dict[str, Any]}, where)
            try:
                columns = len(Schema.from_json(content).columns)
            except DataError as error:
                raise RunError(f"{where}: 'data.{section}': {error}") from None
            if section == "schema" and [columns] != data["shape"]:
                raise RunError(f"{where}: 'data.schema' has {columns} columns, but the shape is {data['shape']}")
    for section in ("scaling", "condition_scaling"):
        if (scaling := data.get(section)) is None:
            continue
        named = f"data.{section}"
        _files.demand({"data": data}, {named: dict[str, Any]}, where)
        if unknown := scaling.keys() - FORMAT_OF_SCALING.keys():
            raise RunError(f"{where}: '{named}' has {', '.join(sorted(unknown))}, which are unknown")
        _files.demand({"data": data}, {f"{named}.{key}": kind for key, kind in FORMAT_OF_SCALING.items()}, where)
        shape = data["shape"] if section == "scaling" else [len(scaling["mean"])]
        for key in ("mean", "std", "names"):
            column = scaling[key]
            if column is not None and [len(column)] != shape:
                raise RunError(f"{where}: '{named}.{key}' has {len(column)} columns, but the shape is {shape}")
        if not (all(map(math.isfinite, scaling["mean"])) and all(0 < std < math.inf for std in scaling["std"])):
            raise RunError(f"{where}: '{named}' has a mean that is not finite, or a std that is not positive")


def _check_training(training: dict[str, Any], where: str) -> None:
    kinds = typing.get_type_hints(Options)
    for key in training:
        if key not in kinds:
            raise RunError(f"{where}: 'training.{key}' is no option of the training that genfuse {__version__} knows")
    _files.demand({"training": training}, {f"training.{key}": kinds[key] for key in training}, where)
    try:
        Options(**training)
    except SettingsError as error:
        raise RunError(f"{where}: training: {error}") from None
