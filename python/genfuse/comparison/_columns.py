"""What a row of the table holds: the measures by name, and how each is taken of one trained model."""

import csv
import ctypes
import dataclasses
import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from genfuse import plots
from genfuse.data import Dataset
from genfuse.metrics import Extractor, evaluate, evaluate_samples
from genfuse.models import Decodes, DrawsLatents, Encodes, GenerativeModel, HasTrajectory, sample_in_parts
from genfuse.nn import slerp
from genfuse.training import Run

PATHS, STEPS = 64, 16  # interpolations, and the steps of each
RETURNED = 1e-3  # real-valued cells that come back so near are counted as the same


class Column(NamedTuple):
    """A column of the table."""

    key: str
    title: str
    group: str  # quality, diversity, plugins, stability, latent space, likelihood or cost
    better: str  # lower, higher or nothing
    about: str
    form: str = ".3g"  # that its values are shown in

    @classmethod
    def of_plugin(cls, key: str, described: dict[str, str]) -> "Column":
        """The column of a figure that another package's metric makes."""
        about = f"{described['about'] or key}; by the {described['from']}"
        return cls(key, key.replace("_", " "), "plugins", described["better"], about)


with Path(__file__).with_name("columns.csv").open(encoding="utf-8", newline="") as _file:
    COLUMNS = tuple(
        Column(**{**row, "about": row["about"].format(PATHS=PATHS, STEPS=STEPS, RETURNED=RETURNED)})
        for row in csv.DictReader(_file)
    )


def measure(
    run: Run,
    data: Dataset,
    extract: Extractor,
    device: str,
    *,
    n: int | None = None,
    limit: int | None = None,
    inception_weights: str | Path | None = None,
    picture: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is measured of the model of ``run`` by the verbs that it has, by the keys of `COLUMNS`, and what
    `evaluate_samples` returned for it.

    ``n`` is as there; ``limit`` examples of the test split, chosen once and for all models alike, are encoded, decoded
    and asked for their likelihood. ``bound`` names what ``log_likelihood`` is. Samples are drawn into ``picture``.
    """
    model = run.model(device)
    data = data.to(device)
    samples = evaluate_samples(model, data, features=extract.name, n=n, inception_weights=inception_weights)
    found = {
        **samples["samples"],
        "training_seconds": training_seconds(run, data),
        "steps": run.step,
        "sampling_seconds": _sampling_seconds(model, data),
        "parameters": sum(weights.numel() for player in model.players() for weights in player.parameters),
    }
    test = data.splits["test"]
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:limit].to(test.x.device)
    held_out = dataclasses.replace(data, splits={**data.splits, "test": test.some(chosen)}, classes=data.classes)
    found |= _likelihood(model, held_out)
    found |= _latent_space(model, held_out, extract)
    if picture is not None:
        draw(model, data, picture)
    usable = {key: v for key, v in found.items() if not isinstance(v, float) or math.isfinite(v)}  # JSON has no NaN
    return usable, samples


def training_seconds(run: Run, data: Dataset, since: int = 0) -> float:
    """Seconds that the updates of a run took, from the speeds that it logged; those after ``since`` alone."""
    batch = run.config["training"]["batch_size"]
    examples = len(data.splits["train"])
    per_epoch = math.ceil(examples / batch)

    def seen(step: int) -> int:
        return step // per_epoch * examples + step % per_epoch * batch

    rates = {e["step"]: e["examples_per_second"] for e in run.metrics() if "examples_per_second" in e}
    steps = [0, *sorted(rates)]
    return sum((seen(b) - seen(a)) / rates[b] for a, b in pairwise(steps) if a >= since)


def _sampling_seconds(model: GenerativeModel, data: Dataset) -> float:
    """For 1,000 samples, on their way to the CPU: the fastest of three times. Where they are slow, by the first 100."""

    def seconds(n: int) -> float:
        began = time.perf_counter()
        y = model.some_given(data, n).get("y")
        for part in sample_in_parts(model, n, y, torch.Generator(model.device).manual_seed(0)):
            part.cpu()
        return time.perf_counter() - began

    first = seconds(100)
    return 10 * first if first > 1 else min(seconds(1000) for _ in range(3))


def _likelihood(model: GenerativeModel, data: Dataset) -> dict[str, Any]:
    """The log-likelihood, or its tightest bound, and what it is."""
    if not model.likelihoods:
        grey = hasattr(model, "elbo") and data.columns is None
        return {"bound": "none (Bernoulli on grey)" if grey else "none"}
    found = evaluate(model, data, splits=["test"])["test"]
    for name, value in reversed(found.items()):  # an IWAE bound comes after the ELBO, and is tighter
        if (name in ("log_prob", "elbo") or name.startswith("iwae_bound")) and isinstance(value, float):
            bits = -value / (math.prod(data.shape) * math.log(2)) if data.levels else None
            return {"bound": name, "log_likelihood": value, **({} if bits is None else {"bits_per_dim": bits})}
    return {"bound": "none"}


@torch.no_grad()
def _latent_space(model: GenerativeModel, data: Dataset, extract: Extractor) -> dict[str, float]:
    found = {}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        code: Any = model
        if isinstance(model, Encodes) and isinstance(model, Decodes):
            errors, returned = [], []
            tolerance = RETURNED if data.levels is None else 0.5 / (data.levels - 1)
            for start in range(0, len(data.splits["test"]), 500):
                x, y = data.batch("test", slice(start, start + 500))
                given = {"y": y} if model.conditional else {}
                off = (code.decode(code.encode(x, **given), **given) - x).flatten(1)
                errors.append(off.square().nan_to_num().mean(1))
                returned.append(((off.abs() <= tolerance) | x.flatten(1).isnan()).all(1))
            found["reconstruction_error"] = torch.cat(errors).double().mean().item()
            found["inverted"] = torch.cat(returned).double().mean().item()
        if isinstance(model, Decodes | HasTrajectory):
            found["smoothness"] = _smoothness(model, data, extract)
    return found


def _smoothness(model: Any, data: Dataset, extract: Extractor) -> float:
    """How even the changes between draws of the prior are. On arcs, as most of a normal's mass is at one radius."""
    generator = torch.Generator(model.device).manual_seed(0)
    given = model.some_given(data, PATHS)
    if isinstance(model, DrawsLatents):
        start, end = (model.latents(PATHS, generator=generator) for _ in range(2))
    else:
        dimensions = model.columns.width if getattr(model, "columns", None) is not None else math.prod(data.shape)
        if isinstance(model, Encodes):
            few = data.batch("test", slice(0, 2))
            dimensions = model.encode(few.x, **({"y": few.y} if given else {})).shape[1]
        start, end = torch.randn(2, PATHS, dimensions, generator=generator, device=model.device)
    weights = torch.linspace(0, 1, STEPS + 1, device=model.device)
    decode = model.decode if isinstance(model, Decodes) else lambda z, **y: model.trajectory(z, **y)[-1]
    features = torch.stack([extract.of_samples(decode(z, **given)) for z in slerp(start, end, weights)])
    changes = features.diff(dim=0).norm(dim=2)  # (STEPS, PATHS)
    largest = changes.amax(0)
    # A path without any change is as even as can be.
    return torch.where(largest > 0, changes.mean(0) / largest, 1.0).double().mean().item()


@torch.no_grad()
def draw(model: GenerativeModel | None, data: Dataset, path: Path) -> None:
    """Draw samples of ``model``, or if it is None real examples, as `pictures` shows such data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = plots.SAMPLES if data.is_image else plots.CLIPS if data.is_clip else plots.POINTS
    count = min(shown, len(data.splits["test"]))
    chosen = torch.randperm(len(data.splits["test"]), generator=torch.Generator().manual_seed(0))[:count]
    test = data.batch("test", chosen.to(data.splits["test"].x.device))
    if model is None:
        drawn = test.x
    else:
        y = test.y if model.conditional else None
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            drawn = torch.cat(list(sample_in_parts(model, count, y, torch.Generator(model.device).manual_seed(0))))
    if data.is_image or data.is_clip:
        plots.sample_grid(drawn, path)
    elif len(data.shape) == 1:
        plots.table(test.x, drawn, path, data.scaling, data.schema)


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], float | None]]:
    """Yields a function that gives the most memory, in MB, held since beyond what was held before; None if unknown.

    Of a CUDA device what torch allocated there; else the resident memory of the process, which only Linux tells.
    """
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    if device != "cpu":
        yield lambda: None
        return
    with suppress(OSError, AttributeError):  # give back what is free, or it would hide what is taken anew
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here: man 5 proc
        held = _resident("VmRSS")
    except (OSError, AttributeError):
        yield lambda: None
        return
    yield lambda: _resident("VmHWM") - held


def _resident(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 / 1e6  # type: ignore[union-attr]
