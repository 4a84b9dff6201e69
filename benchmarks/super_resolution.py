"""`python -m benchmarks super-resolution`: MNIST from 7 x 7 to 28 x 28, patches of photographs from 12 x 12 to 48 x 48.

A generator of least squared error, the same one trained on by SRGAN's objective, and an EDM, beside bicubic and Lanczos
interpolation: PSNR, SSIM and distances of features on test images. Trainings are of one thread; those that are in the
folder of runs are not done again. MNIST lies in GENFUSE_DATA.
"""

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

import genfuse
from genfuse import plots
from genfuse.data import resized
from genfuse.metrics import classifier_path, restoration, train_features
from genfuse.training import Run

TASK = "super-resolution:4"
# By data set and name: the model, what its training begins with, its settings, and the training's.
RUNS: dict[str, dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]] = {
    "mnist": {
        "mse": ("wgan-gp", "", {"adversarial_weight": 0.0, "channels": (32,)}, {"steps": 2500, "lr": 1e-3}),
        "gan": ("wgan-gp", "mse", {"channels": (32,), "n_critic": 1}, {"steps": 1600, "lr": 3e-4}),
        "edm": ("edm", "", {}, {"steps": 400, "lr": 2e-3}),
    },
    "photos": {
        "mse": ("wgan-gp", "", {"adversarial_weight": 0.0, "channels": (32,)},
                {"steps": 3000, "lr": 1e-3, "batch_size": 16}),
        "gan": ("wgan-gp", "mse", {"channels": (32,), "n_critic": 1}, {"steps": 400, "lr": 3e-4}),
        "edm": ("edm", "", {"channels": (24, 32, 48)}, {"steps": 400, "lr": 2e-3, "batch_size": 16}),
    },
}  # fmt: skip
# Of photographs, whose patches begin every 24 cells: moved by up to 3, a small one's cells begin anywhere.
MOVED = {"flip": True, "shift": 3}
NAMES = {"mse": "squared error (`adversarial_weight` 0)", "gan": "SRGAN's objective (`wgan-gp`)", "edm": "`edm`"}


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", choices=list(RUNS), default=list(RUNS), help="(default: all)")
    parser.add_argument("--model", nargs="+", choices=list(NAMES), default=list(NAMES), help="(default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/super-resolution"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--n", type=int, default=500, help="test images, or as many as there are")
    parser.add_argument("--quick", action="store_true", help="two steps each: a check that all runs")


def train(data: genfuse.data.Dataset, name: str, folder: Path, quick: bool) -> Run:
    """The run of a name, which is trained if it is not there."""
    out = folder / f"{data.name}-{name}"
    if (out / "config.json").is_file():
        return Run(out)
    model, start, settings, training = RUNS[data.name][name]
    torch.manual_seed(0)
    made = genfuse.create(model, data, **settings)
    if start:
        train(data, start, folder, quick).start(made)
    moved = MOVED if data.name == "photos" else {}
    options: dict[str, Any] = {"batch_size": 32, **moved, **training, **({"steps": 2} if quick else {})}
    began = time.process_time()
    run = genfuse.Trainer(**options, schedule="cosine", device="cpu", pictures=False, out=out).fit(made, data)
    print(f"{out}: {(time.process_time() - began) / 60:.1f} CPU-minutes", flush=True)
    assert isinstance(run, Run)
    return run


def run(args: Namespace) -> None:
    torch.set_num_threads(1)
    for name in args.data:
        data = genfuse.load_data(name, task=TASK)
        assert data.before is not None
        if not args.quick and not classifier_path(data.before).is_file():
            print(f"classifier: held-out accuracy {train_features(data.before, steps=500)[1]:.1%}", flush=True)
        rows: dict[str, dict[str, float]] = {}
        x, y = data.batch("test", torch.arange(8) * (len(data.splits["test"]) // 8))
        assert y is not None
        size = (x.shape[2], x.shape[3])
        shown = {"given": resized(y, size, "nearest"), "bicubic": resized(y, size, "bicubic")}
        count = min(16 if args.quick else args.n, len(data.splits["test"]))
        for which in args.model:
            model = train(data, which, args.runs, args.quick).model()
            found = restoration(model, data, n=count)
            for method, values in found["methods"].items():
                rows[method.replace("model", NAMES[which])] = values
            shown[which] = model.sample(8, y=y, generator=torch.Generator().manual_seed(0))  # type: ignore[call-arg]
        shown["truth"] = x
        plots.rows(shown.values(), list(shown), args.out / f"super-resolution-{name}.png")
        print(f"\n{name}: {count} test images, {TASK}; {found['about']}\n")
        names = list(next(iter(rows.values())))
        print(f"| | {' | '.join(name.replace('_', ' ') for name in names)} |\n|---|{'---|' * len(names)}")
        for method, values in rows.items():
            print(f"| {method} | {' | '.join(f'{values[each]:.4g}' for each in names)} |")
