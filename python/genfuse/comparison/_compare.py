"""Train several models equally long, measure them alike, and keep what is found as it is found."""

import html
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genfuse import plugins
from genfuse._files import locked, sweep
from genfuse.comparison import _store
from genfuse.comparison._columns import draw, measure, peak_memory, training_seconds
from genfuse.data import Dataset
from genfuse.errors import GenfuseError, NonFiniteLossError, PluginError, RunError, SettingsError, TrainingWarning
from genfuse.metrics import extractor, train_missing
from genfuse.models import FACTS, configure, create, load
from genfuse.training import Run, Trainer
from genfuse.training.run import FREE, WHERE, describe_data

UNITS = {"s": 1, "m": 60, "h": 3600}
CHECKPOINTS = 10  # of a training

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
    weights: Any = "last" if trainer.keep == "auto" else trainer.keep  # equally long, for all
    trainer = replace(
        trainer, keep=weights, device=device, pictures=False, resume=False, overwrite=False, out=None, steps=None
    )
    options = {
        "data": {**{key: describe_data(data)[key] for key in (*_store.DATA, "class_names")}, "name": data.name},
        "budget": {"seconds": budget.seconds, "examples": budget.examples},
        "training": {key: value for key, value in asdict(trainer).items() if key not in (*FREE, "seed", *WHERE)},
    }
    out = Path(out)

    def train(entry: _store.Entry, row: dict[str, Any], run: dict[str, Any], kept: Callable[[], None]) -> Run:
        if row["steps"] is None:
            row["steps"] = _steps_of(budget, entry, data, trainer, say)
            kept()
        every, path = max(1, row["steps"] // CHECKPOINTS), out / run["path"]
        of_seed = replace(trainer, steps=row["steps"], seed=run["seed"], checkpoint_every=every, out=path)
        if (path / "config.json").is_file():
            there = Run(path)
            if there.step == of_seed.steps:
                return there
            of_seed = Trainer.resuming(there, device=device)
        how = "resuming" if of_seed.resume else "training"
        say(f"{entry.label}, seed {of_seed.seed}: {how}, {of_seed.steps:,} steps")
        with peak_memory(device) as peak:
            torch.manual_seed(of_seed.seed)
            trained = of_seed.fit(create(entry.model, data, **entry.settings), data)
            run["peak_memory"] = peak()
        assert isinstance(trained, Run)
        return trained

    plan = [
        (entry, [{"seed": seed, "path": _store.place_of(entry.label, seed)} for seed in range(seeds)])
        for entry in entries
    ]
    return _compared(out, plan, train, entries, data, device, options, say, features, n, limit, inception_weights)


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
    """Measure runs that exist, each a row; the rest is as for `compare`. The runs themselves are left as they are.

    Raises RunError, which names both, for runs on different data.
    """
    opened = [Run(path) for path in runs]
    _store.check_distinct([str(path) for path in runs])
    was = [run.config["data"] for run in opened]
    for run, its in zip(opened, was, strict=True):
        if its["binarize"] != was[0]["binarize"] or not _store.same_content(its, was[0]):
            first, other = (f"{d['name']!r} (binarize {d['binarize']}, {d['fingerprint']})" for d in (was[0], its))
            raise RunError(
                f"runs on different data cannot be compared: {opened[0].path} was trained on {first}, {run.path} on "
                f"{other}"
            )
    data, device, out = opened[0].data(data_root), _resolved(device), Path(out)
    options = {"data": {key: was[0][key] for key in (*_store.DATA, "class_names") if key in was[0]}, "budget": None}

    def open_run(entry: _store.Entry, row: dict[str, Any], run: dict[str, Any], kept: Callable[[], None]) -> Run:
        found = by_path[entry.label]
        peaks = [e["peak_memory_bytes"] / 1e6 for e in found.metrics() if "peak_memory_bytes" in e]
        run["peak_memory"] = max(peaks, default=None)
        return found

    plan, by_path = [], dict(zip(map(str, runs), opened, strict=True))
    for path, run in by_path.items():
        model = run.config["model"]
        place = {"seed": run.config["training"]["seed"], "path": os.path.relpath(run.path, out)}
        plan.append((_store.Entry(path, model["name"], _chosen(model)), [place]))
    return _compared(out, plan, open_run, (), data, device, options, say, features, n, limit, inception_weights)


def _chosen(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's model that are neither usual nor the data's."""
    usual: dict[str, Any] = {}
    with suppress(GenfuseError):  # a plugin that is not there any more: its row will say so
        known = [of for of in fields(load(model["name"]).Config) if of.default is not MISSING]
        usual = json.loads(json.dumps({of.name: of.default for of in known}))
    return {k: value for k, value in model["settings"].items() if k not in FACTS and (k, value) not in usual.items()}


def _compared(
    out: Path,
    plan: Sequence[tuple[_store.Entry, list[dict[str, Any]]]],
    make: Callable[[_store.Entry, dict[str, Any], dict[str, Any], Callable[[], None]], Run],
    resumed: Sequence[_store.Entry],
    data: Dataset,
    device: str,
    options: dict[str, Any],
    say: Say,
    features: str,
    n: int | None,
    limit: int | None,
    inception_weights: str | Path | None,
) -> "Comparison":
    """Measure the runs that ``plan`` has for each row, and write it all. ``make`` trains one or finds it, after which
    all of its row is kept. With rows that may be ``resumed``, what ``out`` holds of them stays."""
    train_missing(features, data, device, say)
    extract = extractor(features, data, device=device, inception_weights=inception_weights)
    options = {**options, "features": extract.name, "about": extract.about, "n": n, "limit": limit}
    _store.claim(out, options, resumed)
    with locked(out):
        was = _store.claim(out, options, resumed)  # again: from here on nobody else writes
        sweep(out)
        sweep(out / _store.PICTURES)
        result = _store.begin(options, device)
        if resumed:
            result |= {key: was[key] for key in ("real", "plugins", "rows") if key in was}
            for key, value in was.get("machine", {}).items():
                if value != result["machine"].get(key):
                    say(f"was begun with {key} {value}, and goes on with {result['machine'].get(key)}")
        rows = {row["label"]: row for row in result["rows"]}
        for entry, _ in plan:
            rows.setdefault(entry.label, {**asdict(entry), "steps": None, "runs": []})
        result["rows"] = list(rows.values())
        kept = partial(_store.keep, out, result)
        kept()  # before all else, so that the same command goes on wherever it is stopped
        measured = partial(
            measure, data=data, extract=extract, device=device, n=n, limit=limit, inception_weights=inception_weights
        )
        pictures, suffix = out / _store.PICTURES, "png" if data.is_image or data.is_clip else "svg"
        draw(None, data, pictures / f"real.{suffix}")
        told: set[str] = set()
        for entry, runs in plan:
            row, picture = rows[entry.label], pictures / f"{_store.folder_of(entry.label)}.{suffix}"
            for number, place in enumerate(runs):
                what = f"{entry.label}, seed {place['seed']}" if resumed else entry.label
                if number == len(row["runs"]):
                    row["runs"].append(place)
                run = row["runs"][number]
                if "figures" in run or run.get("diverged"):
                    say(f"{what}: done before")
                    continue
                with _failure_noted(run, what, say), warnings.catch_warnings():
                    warnings.simplefilter("ignore", TrainingWarning)  # the run folder has them, and so has the table
                    made = make(entry, row, run, kept)
                    say(f"{what}: measuring")
                    figures, samples = measured(made, picture=None if picture.exists() else picture)
                    run["figures"] = {**figures, "peak_memory": run.pop("peak_memory", None)}
                    run["left_out"] = samples["left_out"]
                    for reason in samples["left_out"].values():
                        if reason not in told:
                            say(f"not measured: {reason}")
                        told.add(reason)
                    for key in ("real", "plugins"):  # what was measured before stays
                        result[key] = {**samples[key], **result.get(key, {})}
                _store.log_of(out / run["path"] if resumed else Path(entry.label), run)
                _store.write(out, result)
        return Comparison(_store.write(out, result), out)


def _steps_of(budget: Budget, entry: _store.Entry, data: Dataset, trainer: Trainer, say: Say) -> int:
    """Updates that the budget buys. Of a time: at the speed of the last part of a trial, past all warming up.

    There is a trial of an update where examples are counted, too: what is loaded in it is no part of a run's memory.
    """
    few = data.splits["test"].some(slice(100))  # whose loss is of no interest here
    data = replace(data, splits={**data.splits, "test": few})
    say(f"{entry.label}: a trial")
    with tempfile.TemporaryDirectory() as folder:
        done, steps = 0, 16 if budget.seconds else 1
        model = create(entry.model, data, **entry.settings)
        trainer = replace(
            trainer, steps=steps, schedule="constant", keep="last", checkpoint_every=10**9, out=Path(folder) / "trial"
        )
        while True:
            run = trainer.fit(model, data)
            assert isinstance(run, Run)
            if budget.examples:
                return math.ceil(budget.examples / trainer.batch_size)
            assert budget.seconds
            seconds = training_seconds(run, data, since=done)
            if seconds >= min(budget.seconds / 20, 10):
                return max(1, round(budget.seconds * (steps - done) / seconds))
            done, steps = steps, 2 * steps
            trainer = Trainer.resuming(run, steps=steps)


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


class Comparison(dict[str, Any]):
    """The content of comparison.json, which shows itself as the report in a notebook."""

    def __init__(self, result: dict[str, Any], out: Path) -> None:
        super().__init__(result)
        self.out = out

    def __repr__(self) -> str:
        labels = ", ".join(row["label"] for row in self["rows"])
        return f"<Comparison of {labels} on {self['options']['data']['name']!r}: {self.out / 'report.html'}>"

    def _repr_html_(self) -> str:
        page = html.escape((self.out / "report.html").read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width:100%; height:40rem; border:0"></iframe>'


def _entries(models: Sequence[str], settings: Mapping[str, Mapping[str, Any]], data: Dataset) -> list[_store.Entry]:
    """Raises SettingsError and PluginError for what is wrong with the names and the settings as they were given."""
    if not models:
        raise SettingsError("there is nothing to compare: name models, as `genfuse list models` shows them, or runs")
    entries = []
    for each in models:
        label, _, model = each.rpartition("=")
        plugins.find("models", model)
        label = label or model
        as_read_again = json.loads(json.dumps(settings.get(label, {})))
        entries.append(_store.Entry(label, model, as_read_again))
    _store.check_distinct([entry.label for entry in entries])
    for label in settings.keys() - {entry.label for entry in entries}:
        raise SettingsError(
            f"there are settings for {label!r}, but it is none of {', '.join(entry.label for entry in entries)}"
        )
    for entry in entries:
        if entry.settings:  # the defaults may be wrong for the data: that is for its row to say, as is a failing import
            with suppress(PluginError):
                configure(load(entry.model), entry.settings, data)
    return entries


def _resolved(device: str) -> str:
    if device != "auto":
        return device
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
