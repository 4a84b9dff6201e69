"""A comparison on disk: comparison.json, and what is made from it."""

import math
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from genfuse._files import demand, intact, occupied, read_json, refuse_links, shown, write_json, write_text
from genfuse._version import __version__
from genfuse.comparison import _report
from genfuse.errors import RunError, SettingsError
from genfuse.training import Run

RESULT, REPORT, TABLE, PICTURES = "comparison.json", "report.html", "table.md", "pictures"
VERSION = 1
POINTS = 200  # of a loss curve, at most
DATA = ("name", "binarize", "seed", "fingerprint", "splits")  # what is kept of a description of data
# Keys of comparison.json that are read, and what they must be; of its rows, and of their runs if they have them.
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


@dataclass(frozen=True)
class Entry:
    """A row of the table that is to be: a model with its settings, under the name that the table gives it."""

    label: str
    model: str
    settings: dict[str, Any]


def same_content(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same data; if one is older than their splits, by the training split."""
    if "splits" in a and "splits" in b:
        same: bool = a["fingerprint"] == b["fingerprint"]
        return same
    train = [each["splits"]["train"] if "splits" in each else each["fingerprint"] for each in (a, b)]
    return train[0] == train[1]


def check_distinct(labels: Sequence[str]) -> None:
    folders: dict[str, str] = {}
    for label in labels:
        if (folder := folder_of(label)) in folders:
            raise SettingsError(
                f"{folders[folder]!r} and {label!r} would be one row: give one a label of its own, LABEL=MODEL"
            )
        folders[folder] = label


def folder_of(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label).strip("-.") or "-"


def place_of(label: str, seed: int) -> str:
    """Where in the comparison a run lies."""
    return f"{folder_of(label)}/seed-{seed}"


def claim(out: Path, options: dict[str, Any], entries: Sequence[Entry] = ()) -> dict[str, Any]:
    """The comparison that is in ``out``, or nothing. Raises RunError if it is another one, or something else."""
    file = out / RESULT
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} exists and is not a folder")
    refuse_links(out, PICTURES, *(folder_of(entry.label) for entry in entries))
    if not file.is_file():
        if occupied(out):
            raise RunError(f"{out} exists and is no comparison, as it has no {RESULT}: name another folder")
        return {}
    was = read(file)
    before = dict(was["options"])
    if "data" in before and same_content(before["data"], options["data"]):
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
        row = asdict(entry)
        old = rows.get(entry.label, row)
        if any(old[key] != row[key] for key in row):
            raise RunError(
                f"{out} has {entry.label!r} already, as {old['model']} with {old['settings'] or 'its defaults'}, not "
                f"as {entry.model} with {entry.settings or 'its defaults'}: give it another label, LABEL=MODEL, or "
                "name another folder"
            )
        for seed, run in enumerate(old.get("runs", ())):
            if (run["seed"], run["path"]) != (seed, place_of(entry.label, seed)):
                raise RunError(
                    f"{file}: run {seed} of {entry.label!r} is said to lie in {run['path']!r}, seed {run['seed']}, "
                    f"not in {place_of(entry.label, seed)!r}: it was edited"
                )
    return was


def read(file: Path) -> dict[str, Any]:
    """comparison.json. Raises RunError, which names file and key, if it is none, or damaged or edited."""
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
        if "class_names" in was["options"]["data"]:
            demand(was, {"options.data.class_names": list[str] | None}, where)
    for key, made in was["plugins"].items():
        demand(made, {"better": str, "about": str, "from": str}, f"{where}: plugins: {key}")
    for number, row in enumerate(was["rows"]):
        demand(row, FORMAT_OF_ROW, f"{where}: row {number}")
        for seed, run in enumerate(row["runs"]):
            at = f"{where}: row {number}, run {seed}"
            demand(run, {key: kind for key, kind in FORMAT_OF_RUN.items() if key in run or key in ("seed", "path")}, at)
            points = [point for curve in run.get("losses", {}).values() for point in curve]
            if any(len(point) != 2 or not 0 < point[0] < 2**63 for point in points):
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


def begin(options: dict[str, Any], device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    machine = {
        "genfuse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }
    return {"version": VERSION, "machine": machine, "options": options, "real": {}, "plugins": {}, "rows": []}


def log_of(path: Path, run: dict[str, Any]) -> None:
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
        size = math.ceil(len(curve) / POINTS)  # of parts, for each of which its mean stands
        parts = [curve[start : start + size] for start in range(0, len(curve), size)]
        run["losses"][player] = [(p[-1][0], float(f"{statistics.fmean(loss for _, loss in p):.5g}")) for p in parts]


def keep(out: Path, result: dict[str, Any]) -> None:
    """Write what is to be found again. The file is replaced in one step, so a kill leaves the one before."""
    for row in result["rows"]:
        row |= _report.summary(row["runs"], _report.measures(result))
    write_json(out / RESULT, result, indent=1)


def write(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    keep(out, result)
    write_text(out / TABLE, _report.markdown(result))
    write_text(out / REPORT, _report.html(result, out / PICTURES, folder_of))
    return result
