"""Train several models equally long, measure them alike, and keep what is found as it is found."""

import json
import math
import os
import platform
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from genfuse import plugins
from genfuse._files import (
    demand,
    intact,
    locked,
    occupied,
    read_json,
    refuse_links,
    shown,
    sweep,
    write_json,
    writing,
)
from genfuse._version import __version__
from genfuse.comparison import _report
from genfuse.comparison._columns import draw, measure, peak_memory, training_seconds
from genfuse.data import Dataset
from genfuse.errors import (
    GenfuseError,
    NonFiniteLossError,
    PluginError,
    RunError,
    SettingsError,
    TrainingWarning,
)
from genfuse.metrics import extractor
from genfuse.models import configure, create, load
from genfuse.training import Run, Trainer
from genfuse.training.run import FREE, describe_data

RESULT, REPORT, TABLE, PICTURES = "comparison.json", "report.html", "table.md", "pictures"
VERSION = 1
CHECKPOINTS = 10  # of a training
DATA = ("name", "binarize", "seed", "fingerprint", "splits")  # what is kept of a description of data
OURS = ("out", "resume", "overwrite")  # options of a trainer that are not the user's here
# Keys of comparison.json that are read, and what they must be; of its rows, and of their runs where they have them.
FORMAT: dict[str, Any] = {
    "options": dict[str, Any],
    "machine": dict[str, Any],
    "real": dict[str, float],
    "plugins": dict[str, dict[Literal["better", "about", "from"], str]],
    "rows": list[dict[str, Any]],
}
FORMAT_OF_ROW: dict[str, Any] = {
    "label": str,
    "model": str,
    "settings": dict[str, Any],
    "steps": int | None,
    "runs": list[dict[str, Any]],
}
FORMAT_OF_RUN: dict[str, Any] = {
    "seed": int,
    "path": str,
    "error": str,
    "diverged": bool,
    "peak_memory": float | None,
    "warnings": list[str],
    "losses": dict[str, list[list[float]]],
    "left_out": dict[str, str],
}
UNITS = {"s": 1, "m": 60, "h": 3600}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """How long each model trains: so many seconds of updates, or so many examples, counted as often as seen."""

    seconds: float | None = None
    examples: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "90s", "5m", "1h" or "200000examples". Raises SettingsError for anything else, and for nothing."""
        found = re.fullmatch(r"\s*([\d_.]+)\s*(s|m|h|examples)\s*", text)
        try:
            amount, unit = float(found.group(1)), found.group(2)  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            amount, unit = 0.0, ""
        if not 0 < amount < math.inf or (unit == "examples" and amount != int(amount)):
            raise SettingsError(
                f"a budget is a time above 0, as 90s, 5m or 1h, or a number of examples, as 200000examples; "
                f"got {text!r}"
            )
        return cls(examples=int(amount)) if unit == "examples" else cls(seconds=amount * UNITS[unit])


@dataclass(frozen=True)
class Entry:
    """A row of the table that is to be: a model with its settings, under the name that the table gives it."""

    label: str
    model: str
    settings: dict[str, Any]


def compare(
    models: Sequence[str],
    data: Dataset,
    *,
    out: str | Path,
    budget: str | Budget = "5m",
    seeds: int = 3,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    trainer: Trainer | None = None,
    features: str = "auto",
    n: int | None = None,
    limit: int | None = 500,
    inception_weights: str | Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Train each of ``models`` on ``data`` from each of the seeds 0 .. seeds - 1, and measure all of them alike.

    A model is a name, or LABEL=NAME, so that one model can stand in the table twice; ``settings`` holds those of a
    label that are not the defaults, and ``trainer`` the options of all trainings. ``budget`` is a `Budget` or what
    `Budget.parse` reads. A time is turned into a number of updates before the first training: a trial, which is thrown
    away, shows their speed. So all seeds of a model take the same number of updates, and a schedule knows its end;
    ``training_seconds`` says how well the time was met. ``features``, ``n`` and ``inception_weights`` are as for
    `genfuse.metrics.evaluate_samples`; ``limit`` test examples are encoded, decoded and asked for their likelihood.
    ``say`` is told what is being done.

    Writes the folder ``out``: comparison.json, which is returned, report.html, table.md, and LABEL/seed-N, a run folder
    each. Called again it goes on where it was: what is trained and measured stays, what was interrupted is resumed,
    and models and seeds can be added. A model that fails is a row that says why, and the others go on; one that met a
    loss that is not finite is not trained again, all else is tried again.

    Raises SettingsError or PluginError before anything is trained for an unknown model, a setting that it does not
    have, a seeds or budget out of range, and RunError where ``out`` is something else or a comparison of other data or
    options.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    entries = _entries(models, settings or {}, data)
    if seeds < 1:
        raise SettingsError(f"seeds must be at least 1, got {seeds}")
    trainer = trainer or Trainer()
    if trainer.devices > 1:
        raise SettingsError(f"a comparison trains on one device at a time; got devices={trainer.devices}")
    device = _resolved(trainer.device)
    trainer = replace(trainer, device=device, pictures=False, resume=False, overwrite=False, out=None, steps=None)
    extract = extractor(features, data, device=device, inception_weights=inception_weights)
    options = {
        "data": {**{key: describe_data(data)[key] for key in (*DATA, "class_names")}, "name": data.name},
        "budget": {"seconds": budget.seconds, "examples": budget.examples},
        "training": {key: value for key, value in asdict(trainer).items() if key not in (*FREE, "seed", *OURS)},
        "features": extract.name,
        "about": extract.about,
        "n": n,
        "limit": limit,
    }
    out = Path(out)
    _claim(out, options, entries)
    with locked(out):
        was = _claim(out, options, entries)  # again: from here on nobody else writes
        sweep(out)
        sweep(out / PICTURES)
        result: dict[str, Any] = {
            **_begin(options, device),
            **{key: was[key] for key in ("real", "plugins", "rows") if key in was},
        }
        for key, value in was.get("machine", {}).items():
            if value != result["machine"].get(key):
                say(f"was begun with {key} {value}, and goes on with {result['machine'].get(key)}")
        rows = {row["label"]: row for row in result["rows"]}
        for entry in entries:
            rows.setdefault(entry.label, {**_row(entry), "steps": None, "runs": []})
        result["rows"] = list(rows.values())
        _keep(out, result)  # before all else, so that the same command goes on wherever it is stopped

        measured = partial(
            _measure, data=data, extract=extract, device=device, n=n, limit=limit, inception_weights=inception_weights
        )
        draw(None, data, out / PICTURES / "real.png")
        for entry in entries:
            row = rows[entry.label]
            for seed in range(seeds):
                what = f"{entry.label}, seed {seed}"
                if seed == len(row["runs"]):
                    row["runs"].append({"seed": seed, "path": _place(entry.label, seed)})
                run = row["runs"][seed]
                if "figures" in run or run.get("diverged"):
                    say(f"{what}: done before")
                    continue
                with _failure_noted(run, what, say), warnings.catch_warnings():
                    warnings.simplefilter("ignore", TrainingWarning)  # the run folder has them, and so has the table
                    if row["steps"] is None:
                        row["steps"] = _steps(budget, entry, data, trainer, say)
                        _keep(out, result)
                    every = max(1, row["steps"] // CHECKPOINTS)
                    of_seed = replace(
                        trainer, steps=row["steps"], seed=seed, checkpoint_every=every, out=out / run["path"]
                    )
                    trained = _trained(of_seed, entry, data, run, say)
                    say(f"{what}: measuring")
                    measured(trained, run, result, say, picture=out / PICTURES / f"{_folder(entry.label)}.png")
                _log_of(out / run["path"], run)
                _write(out, result)
        return _write(out, result)


def compare_runs(
    runs: Sequence[str | Path],
    *,
    out: str | Path,
    data_root: str | Path | None = None,
    device: str = "auto",
    features: str = "auto",
    n: int | None = None,
    limit: int | None = 500,
    inception_weights: str | Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Column runs that exist, each a row; the rest is as for `compare`. The runs themselves are left as they are.

    Raises RunError, which names both, for runs on different data.
    """
    opened = [Run(path) for path in runs]
    _distinct([str(path) for path in runs])
    was = [run.config["data"] for run in opened]
    for run, its in zip(opened, was, strict=True):
        if its["binarize"] != was[0]["binarize"] or not _same_content(its, was[0]):
            first, other = (f"{d['name']!r} (binarize {d['binarize']}, {d['fingerprint']})" for d in (was[0], its))
            raise RunError(
                f"runs on different data cannot be compared: {opened[0].path} was trained on {first}, {run.path} on "
                f"{other}"
            )
    data, device, out = opened[0].data(data_root), _resolved(device), Path(out)
    extract = extractor(features, data, device=device, inception_weights=inception_weights)
    options = {
        "data": {key: was[0][key] for key in (*DATA, "class_names") if key in was[0]},
        "budget": None,
        "features": extract.name,
        "about": extract.about,
        "n": n,
        "limit": limit,
    }
    _claim(out, options)
    with locked(out):
        _claim(out, options)
        sweep(out)
        sweep(out / PICTURES)
        result = _begin(options, device)
        _keep(out, result)
        measured = partial(
            _measure, data=data, extract=extract, device=device, n=n, limit=limit, inception_weights=inception_weights
        )
        draw(None, data, out / PICTURES / "real.png")
        for path, run in zip(runs, opened, strict=True):
            model = run.config["model"]
            found: dict[str, Any] = {"seed": run.config["training"]["seed"], "path": os.path.relpath(run.path, out)}
            result["rows"].append(
                {"label": str(path), "model": model["name"], "settings": model["settings"], "runs": [found]}
            )
            say(f"{path}: measuring")
            with _failure_noted(found, str(path), say):
                peaks = [e["peak_memory_bytes"] / 1e6 for e in run.metrics() if "peak_memory_bytes" in e]
                found["peak_memory"] = max(peaks, default=None)
                measured(run, found, result, say, picture=out / PICTURES / f"{_folder(str(path))}.png")
            _log_of(run.path, found)
        return _write(out, result)


def _same_content(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same data; where one is older than their splits, by the training split."""
    if "splits" in a and "splits" in b:
        same: bool = a["fingerprint"] == b["fingerprint"]
        return same
    train = [each["splits"]["train"] if "splits" in each else each["fingerprint"] for each in (a, b)]
    return train[0] == train[1]


def _entries(models: Sequence[str], settings: Mapping[str, Mapping[str, Any]], data: Dataset) -> list[Entry]:
    """Raises SettingsError and PluginError for what is wrong with the names and the settings as they were given."""
    if not models:
        raise SettingsError("there is nothing to compare: name models, as `genfuse list models` shows them, or runs")
    entries = []
    for each in models:
        label, _, model = each.rpartition("=")
        plugins.find("models", model)
        label = label or model
        entries.append(
            Entry(label, model, json.loads(json.dumps(settings.get(label, {}))))
        )  # as they will be read again
    _distinct([entry.label for entry in entries])
    for label in settings.keys() - {entry.label for entry in entries}:
        raise SettingsError(
            f"there are settings for {label!r}, but it is none of {', '.join(entry.label for entry in entries)}"
        )
    for entry in entries:
        if entry.settings:  # the defaults may be wrong for the data: that is for its row to say, as is a failing import
            with suppress(PluginError):
                configure(load(entry.model), entry.settings, data)
    return entries


def _distinct(labels: Sequence[str]) -> None:
    folders: dict[str, str] = {}
    for label in labels:
        if (folder := _folder(label)) in folders:
            raise SettingsError(
                f"{folders[folder]!r} and {label!r} would be one row: give one a label of its own, LABEL=MODEL"
            )
        folders[folder] = label


def _folder(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label).strip("-.") or "-"


def _resolved(device: str) -> str:
    if device != "auto":
        return device
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def _row(entry: Entry) -> dict[str, Any]:
    return {"label": entry.label, "model": entry.model, "settings": entry.settings}


def _place(label: str, seed: int) -> str:
    """Where in the comparison a run lies."""
    return f"{_folder(label)}/seed-{seed}"


def _claim(out: Path, options: dict[str, Any], entries: Sequence[Entry] = ()) -> dict[str, Any]:
    """The comparison that is in ``out``, or nothing. Raises RunError where it is another one, or something else."""
    file = out / RESULT
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} exists and is not a folder")
    refuse_links(out, PICTURES, *(_folder(entry.label) for entry in entries))
    if not file.is_file():
        if occupied(out):
            raise RunError(f"{out} exists and is no comparison, as it has no {RESULT}: name another folder")
        return {}
    was = _read(file)
    before = dict(was["options"])
    if "data" in before and _same_content(before["data"], options["data"]):
        # The same data from elsewhere is the same data.
        before["data"] = {**options["data"], **{key: before["data"].get(key) for key in ("binarize", "seed")}}
    differences = [
        f"{key}: was {before.get(key)!r}, now {options.get(key)!r}"
        for key in before.keys() | options.keys()
        if before.get(key) != options.get(key)
    ]
    if differences:
        raise RunError(
            f"{out} is another comparison ({'; '.join(sorted(differences))}): name another folder, or give the options "
            "that it was begun with"
        )
    rows = {row["label"]: row for row in was["rows"]}
    for entry in entries:
        old, row = rows.get(entry.label, _row(entry)), _row(entry)
        if any(old[key] != row[key] for key in row):
            raise RunError(
                f"{out} has {entry.label!r} already, as {old['model']} with {old['settings'] or 'its defaults'}, not "
                f"as {entry.model} with {entry.settings or 'its defaults'}: give it another label, LABEL=MODEL, or "
                "name another folder"
            )
        for seed, run in enumerate(old.get("runs", ())):
            if (run["seed"], run["path"]) != (seed, _place(entry.label, seed)):
                raise RunError(
                    f"{file}: run {seed} of {entry.label!r} is said to lie in {run['path']!r}, seed {run['seed']}, "
                    f"not in {_place(entry.label, seed)!r}: it was edited"
                )
    return was


def _read(file: Path) -> dict[str, Any]:
    """comparison.json. Raises RunError, which names file and key, where it is none, or damaged or edited."""
    where = f"{file} is no comparison"
    try:
        was: dict[str, Any] = read_json(file)
    except ValueError as error:
        raise RunError(f"{where}: {type(error).__name__}: {error}") from None
    version = demand(was, {"version": Any}, where)["version"]
    if version != VERSION:
        raise RunError(f"{file} is of version {shown(version)}; this genfuse {__version__} reads {VERSION}")
    demand(was, FORMAT, where)
    demand(was["real"], dict.fromkeys(was["real"], float), f"{where}: real")
    if "data" in was["options"]:
        demand(was, {"options.data.fingerprint": str, "options.data.name": str}, where)
    for number, row in enumerate(was["rows"]):
        demand(row, FORMAT_OF_ROW, f"{where}: row {number}")
        for seed, run in enumerate(row["runs"]):
            at = f"{where}: row {number}, run {seed}"
            demand(run, {key: kind for key, kind in FORMAT_OF_RUN.items() if key in run or key in ("seed", "path")}, at)
            if any(len(point) != 2 for curve in run.get("losses", {}).values() for point in curve):
                raise RunError(f"{at}: 'losses' has what is no pair of step and loss")
            if "figures" in run:
                demand(run, {"figures.bound": str}, at)
                demand(run["figures"], {key: float | None for key in run["figures"] if key != "bound"}, at)
    if not intact(was):
        raise RunError(
            f"{file} is not as genfuse wrote it: it was edited or is damaged; to go on with it so, remove its last "
            'line, "sha256"'
        )
    return was


def _begin(options: dict[str, Any], device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    machine = {
        "genfuse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }
    return {"version": VERSION, "machine": machine, "options": options, "real": {}, "plugins": {}, "rows": []}


def _steps(budget: Budget, entry: Entry, data: Dataset, trainer: Trainer, say: Say) -> int:
    """Updates that the budget buys. Of a time: at the speed of the last part of a trial, past all warming up.

    There is a trial of an update where examples are counted, too: what is loaded in it is no part of a run's memory.
    """
    test = data.splits["test"]
    few = replace(test, x=test.x[:100], y=None if test.y is None else test.y[:100])
    data = replace(data, splits={**data.splits, "test": few})  # its loss is of no interest here
    say(f"{entry.label}: a trial")
    with tempfile.TemporaryDirectory() as folder:
        done, steps = 0, 16 if budget.seconds else 1
        model = create(entry.model, data, **entry.settings)
        trainer = replace(
            trainer, steps=steps, schedule="constant", keep="last", checkpoint_every=10**9, out=Path(folder) / "trial"
        )
        while True:
            run = trainer.fit(model, data)
            assert run is not None
            if budget.examples:
                return math.ceil(budget.examples / trainer.batch_size)
            assert budget.seconds
            seconds = training_seconds(run, data, since=done)
            if seconds >= min(budget.seconds / 20, 10):
                return max(1, round(budget.seconds * (steps - done) / seconds))
            done, steps = steps, 2 * steps
            trainer = Trainer.resuming(run, steps=steps)


def _trained(trainer: Trainer, entry: Entry, data: Dataset, run: dict[str, Any], say: Say) -> Run:
    """The run of ``trainer``, from its last checkpoint on where it has one; finished ones are left as they are."""
    path = Path(trainer.out or "")
    if (path / "config.json").is_file():
        there = Run(path)
        if there.step == trainer.steps:
            return there
        trainer = Trainer.resuming(there, device=trainer.device)
    say(f"{entry.label}, seed {trainer.seed}: {'resuming' if trainer.resume else 'training'}, {trainer.steps:,} steps")
    with peak_memory(trainer.device) as peak:
        torch.manual_seed(trainer.seed)
        trained = trainer.fit(create(entry.model, data, **entry.settings), data)
        run["peak_memory"] = peak()
    assert trained is not None
    return trained


def _measure(
    trained: Run, run: dict[str, Any], result: dict[str, Any], say: Say, *, picture: Path, **options: Any
) -> None:
    """Put the figures of a run into its place, and those of real examples into the result. The first run is drawn."""
    figures, samples = measure(trained, picture=None if picture.exists() else picture, **options)
    run["figures"] = {**figures, "peak_memory": run.pop("peak_memory", None)}
    run["left_out"] = samples["left_out"]
    for reason in samples["left_out"].values():
        say(f"not measured: {reason}")
    for key in ("real", "plugins"):  # what was measured before stays
        result[key] = {**samples[key], **result.get(key, {})}


@contextmanager
def _failure_noted(run: dict[str, Any], what: str, say: Say) -> Iterator[None]:
    """Whatever a model does, the others go on. Why there are no figures stands in their place."""
    run.pop("error", None)
    try:
        yield
    except Exception as error:
        said = str(error).strip() or "without a message"
        run["diverged"] = isinstance(error, NonFiniteLossError)
        if run["diverged"]:
            said = said.partition(";")[0]  # what follows is where the last checkpoint lies
        run["error"] = said if isinstance(error, GenfuseError) else f"{type(error).__name__}: {said}"
        say(f"{what}: failed: {run['error']}")


def _log_of(path: Path, run: dict[str, Any]) -> None:
    """Loss curves and warnings of a run, as far as it came."""
    run["warnings"], run["losses"] = [], {}
    try:
        metrics = Run(path).metrics()
    except RunError:
        return
    run["warnings"] = [f"step {entry['step']}: {entry['message']}" for entry in metrics if entry["split"] == "warning"]
    players = dict.fromkeys(entry["player"] for entry in metrics if entry["split"] == "train")
    for player in players:
        curve = [(e["step"], e["loss"]) for e in metrics if e["split"] == "train" and e["player"] == player]
        run["losses"][player] = list(_thinned(curve, 200))


def _thinned(curve: list[tuple[int, float]], most: int) -> Iterator[tuple[int, float]]:
    """A curve of at most so many points: each the mean of those that it stands for."""
    size = math.ceil(len(curve) / most)
    for start in range(0, len(curve), size or 1):
        part = curve[start : start + size]
        yield part[-1][0], float(f"{statistics.fmean(loss for _, loss in part):.5g}")


def _keep(out: Path, result: dict[str, Any]) -> None:
    """Write what is to be found again. The file is replaced in one step, so a kill leaves the one before."""
    for row in result["rows"]:
        row |= _report.summary(row["runs"], _report.measures(result))
    write_json(out / RESULT, result, indent=1)


def _write(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    _keep(out, result)
    _text(out / TABLE, _report.markdown(result))
    _text(out / REPORT, _report.html(result, out / PICTURES, _folder))
    return result


def _text(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text.encode("utf-8"))
