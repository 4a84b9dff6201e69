"""`python -m benchmarks sheet`: every model trained with default settings, what it draws side by side."""

import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from genfuse import plugins
from genfuse.training import Run

DATA = ("digits", "toy:moons", "toy:pinwheel")
IMAGES, POINTS, COLUMNS = 36, 2000, 6
SAMPLES = "samples.npy"


def models() -> list[str]:
    return [plugin.name for plugin in plugins.discover("models") if plugin.distribution == plugins.OURS]


def train(model: str, data: str, out: Path) -> str:
    """Train and sample by the commands, with nothing but data and folder said; returns what the picture is told by."""
    command = [sys.executable, "-m", "genfuse"]
    start = time.perf_counter()
    log = ""
    for arguments in (
        ["train", model, "--data", data, "--out", str(out)],
        ["sample", str(out), "--n", str(POINTS if "toy" in data or ":" in data else IMAGES), "--seed", "0",
         "--out", str(out / SAMPLES)],
    ):  # fmt: skip
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        log += done.stdout + done.stderr
        if done.returncode:
            break
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text(log)
    return f"{time.perf_counter() - start:.0f} s" if not done.returncode else log.strip().splitlines()[-1][:60]


def sheet(data: str, folders: dict[str, Path], captions: dict[str, str], path: Path) -> None:
    """The data, and what each model draws: images in a grid, or points, of tables along their main axes."""
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    drawn = {name: torch.from_numpy(np.load(folder / SAMPLES)) for name, folder in folders.items()
             if (folder / SAMPLES).exists()}  # fmt: skip
    loaded = Run(folders[next(iter(drawn))]).data()
    real = loaded.batch("test", slice(IMAGES if loaded.is_image else POINTS)).x
    if loaded.scaling is not None:
        real = loaded.scaling.restore(real)
    rows = -(-(len(folders) + 1) // COLUMNS)
    figure = Figure((2.2 * COLUMNS, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS).flatten()
    flat = PCA(2).fit(real.flatten(1).numpy()) if real[0].numel() > 2 and not loaded.is_image else None
    window = None
    for axis in axes:
        axis.set_axis_off()
    for axis, name in zip(axes, ["the data", *folders], strict=False):
        axis.set_title(f"{name} ({captions[name]})" if name in captions else name, fontsize=8)
        if name not in drawn and name != "the data":
            continue
        x = drawn.get(name, real)
        if loaded.is_image:
            c, h, w = x.shape[1:]
            side = round(IMAGES**0.5)
            grid = torch.nn.functional.pad(x[:IMAGES], (1, 0, 1, 0), value=0.5).view(side, side, c, h + 1, w + 1)
            picture = grid.permute(0, 3, 1, 4, 2).reshape(side * (h + 1), side * (w + 1), c)
            axis.imshow(picture.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            continue
        points = x.numpy() if flat is None else flat.transform(x.flatten(1).numpy())
        if window is None:
            low, high = np.quantile(points, (0.002, 0.998), axis=0)
            window = np.stack([low - 0.1 * (high - low), high + 0.1 * (high - low)])
        axis.scatter(*points.T, s=1, alpha=0.4, linewidths=0)
        axis.set_xlim(*window[:, 0])
        axis.set_ylim(*window[:, 1])
    figure.suptitle(f"{data}: samples with default settings", fontsize=9)
    figure.savefig(path, dpi=110)


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", action="append", metavar="DATA", help=f"(default: {', '.join(DATA)})")
    parser.add_argument("--model", action="append", metavar="MODEL", help="only this one (may be repeated)")
    parser.add_argument("--runs", type=Path, default=Path("runs/sheet"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")


def run(args: Namespace) -> None:
    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = args.model or models()
    jobs = [(data, model) for data in args.data or DATA for model in chosen]
    folders = {job: args.runs / f"{job[1]}-{Path(job[0]).stem.replace(':', '-')}" for job in jobs}

    def job(work: tuple[str, str]) -> str:
        caption = train(work[1], work[0], folders[work])
        print(f"{work[1]} on {work[0]}: {caption}", flush=True)
        return caption

    with ThreadPoolExecutor(args.jobs) as pool:
        captions = dict(zip(jobs, pool.map(job, jobs), strict=True))
    for data in args.data or DATA:
        path = args.out / f"defaults-{Path(data).stem.replace(':', '-')}.png"
        of = {model: folders[data, model] for model in chosen}
        sheet(data, of, {model: captions[data, model] for model in chosen}, path)
        print(path)
