"""`python -m benchmarks quality`: every model trained with default settings for as long as it needs, and what it draws.

One sheet and one table for each data set. What is trained stays in the folder of the runs, so that the same command
goes on where it was stopped, and draws the sheet of what there is.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import genfuse
from genfuse import plugins
from genfuse.data import Dataset
from genfuse.errors import GenfuseError
from genfuse.metrics import evaluate, evaluate_samples, train_missing

DATA = ("mnist", "stacked-mnist")
STEPS = {  # of all players, for larger images: up to 6 minutes of one core
    "vae": 6000, "gan": 24_000, "wgan": 24_000, "wgan-gp": 24_000, "realnvp": 6000, "glow": 2000,
    "ddpm": 1500, "edm": 1500, "score": 1500, "flow-matching": 1500, "idf": 1200,
}  # fmt: skip
STEADY = ("gan", "wgan", "wgan-gp")  # whose learning rate does not fall
IMAGES, POINTS, COLUMNS = 36, 2000, 3
SMALL = 16  # sides of images that all models are trained on, for as long as they usually need
MEASURED = 500  # samples that are compared with as many test examples
ROWS = 2000  # of a table
FAR = {"frechet_distance": "Fréchet distance ↓", "precision": "precision ↑", "recall": "recall ↑",
       "coverage": "coverage ↑"}  # fmt: skip
FAR_OF_TABLES = {"frechet_distance": "Fréchet distance ↓", "detection_auroc": "told from real (AUROC) ↓",
                 "marginal_wasserstein": "marginals ↓", "correlation_difference": "correlations ↓"}  # fmt: skip
DENSITIES = ("log_prob", "iwae_bound_50", "elbo")  # the best there is
SAMPLES, FOUND = "samples.npy", "quality.json"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", action="append", metavar="DATA", help=f"(default: {', '.join(DATA)})")
    parser.add_argument("--model", action="append", metavar="MODEL", help="only this one (may be repeated)")
    parser.add_argument("--steps", type=int, help="of each training (default: what each needs)")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER", help="where the pictures go")


def models() -> list[str]:
    return [plugin.name for plugin in plugins.discover("models") if plugin.distribution == plugins.OURS]


def train(name: str, data: Dataset, out: Path, steps: int | None) -> dict[str, Any]:
    """Train, draw and measure with seed 0 in one thread; what was found is left in ``out``, and taken from there."""
    if (out / FOUND).exists():
        return json.loads((out / FOUND).read_text())
    torch.manual_seed(0)
    model = genfuse.create(name, data)
    large = data.is_image and min(data.shape[1:]) > SMALL
    steps = steps or (STEPS.get(name) if large else None)  # left out, as many as the model usually needs
    options: dict[str, Any] = (
        {"batch_size": 64, "schedule": "constant" if name in STEADY else "cosine"} if large else {}
    )
    start = time.process_time()
    genfuse.Trainer(steps=steps, out=out, overwrite=True, **options).fit(model, data)
    trained = time.process_time()
    samples = model.sample(IMAGES if data.is_image else POINTS, generator=torch.Generator().manual_seed(0))
    drawn = time.process_time()
    np.save(out / SAMPLES, samples.numpy())
    rows = data.scaling is not None
    count = min(ROWS if rows else MEASURED, *(len(data.splits[part]) for part in ("train", "test")))
    metrics = ["frechet-distance", *(["detection", "marginals", "correlations"] if rows else ["precision-recall"])]
    measured = evaluate_samples(model, data, n=count, metrics=metrics)
    density = evaluate(model, data, limit=MEASURED, splits=("test",))["test"] if rows else {}
    found = {
        "steps": steps or model.usual_steps,
        "training": trained - start,
        "sampling": (drawn - trained) / len(samples),
        "parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "features": measured["about"],
        "samples": measured["samples"],
        "real": measured["real"],
        **{
            verb: density[verb]
            for verb in DENSITIES
            if verb in density and verb in (*model.likelihoods, "iwae_bound_50")
        },
    }
    (out / FOUND).write_text(json.dumps(found, indent=1))
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: time of training and drawing, how near samples are to data, and of tables the log-likelihood."""
    real = next(iter(found.values()), {}).get("real", {})
    rows = "detection_auroc" in real
    columns = FAR_OF_TABLES if rows else FAR
    heads = [*columns.values(), *(["log-likelihood, nats ↑"] if rows else [])]
    lines = [f"| | training, CPU s | steps | parameters | a sample, CPU ms | {' | '.join(heads)} |",
             "|---|" + "--:|" * (4 + len(heads))]  # fmt: skip
    for name, of in found.items():
        figures = [f"{of['samples'][column]:.3g}" for column in columns]
        if rows:
            verb = next((verb for verb in DENSITIES if verb in of), None)
            figures.append("–" if verb is None else f"{'' if verb == 'log_prob' else '≥ '}{of[verb]:.2f}")
        lines.append(
            f"| `{name}` | {of['training']:.0f} | {of['steps']:,} | {of['parameters']:,} | "
            f"{1000 * of['sampling']:.3g} | {' | '.join(figures)} |"
        )
    reached = [f"{real.get(column, 0):.3g}" for column in columns] + [""] * rows
    return "\n".join([*lines, f"| real examples | | | | | {' | '.join(reached)} |"])


def sheet(data: Dataset, folders: dict[str, Path], captions: dict[str, str], path: Path) -> None:
    """The data, and what each model drew: images in a grid, or points, of tables along their main axes."""
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    real = data.batch("test", slice(IMAGES if data.is_image else POINTS)).x
    if data.scaling is not None:
        real = data.scaling.restore(real)
    drawn = {name: torch.from_numpy(np.load(folder / SAMPLES)) for name, folder in folders.items()
             if (folder / SAMPLES).exists()}  # fmt: skip
    rows = -(-(len(folders) + 1) // COLUMNS)
    figure = Figure((3.4 * COLUMNS, 3.65 * rows), layout="constrained")
    flat = PCA(2).fit(real.flatten(1).numpy()) if real[0].numel() > 2 and not data.is_image else None
    window = None
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, name in zip(axes, ["the data", *folders], strict=False):
        axis.set_title(f"{name} ({captions[name]})" if name in captions else name, fontsize=10)
        if name not in drawn and name != "the data":
            continue
        x = drawn.get(name, real)
        if data.is_image:
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
    figure.savefig(path, dpi=100)


def run(args: Namespace) -> None:
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for text in args.data or DATA:
        data, word = genfuse.load_data(text), Path(text).stem.replace(":", "-")
        train_missing("auto", data, "cpu", print)
        large = data.is_image and min(data.shape[1:]) > SMALL
        names = args.model or [name for name in models() if name in STEPS or not large]
        folders = {name: args.runs / f"{name}-{word}" for name in names}
        found: dict[str, dict[str, Any]] = {}
        captions: dict[str, str] = {}
        for name in names:
            try:
                found[name] = train(name, data, folders[name], args.steps)
                captions[name] = f"{found[name]['training'] / 60:.1f} min"
            except GenfuseError as error:
                captions[name] = str(error).splitlines()[0][:60]
            print(f"{name} on {text}: {captions[name]}", flush=True)
        print(table(found))
        path = args.out / f"comparison-{word}.png"
        sheet(data, folders, captions, path)
        print(path)
