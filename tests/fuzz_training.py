"""Short trainings of every model under settings and data that go wrong in practice.

A training ends with finite weights, or stops with an error that says where: which layer or column.
`make fuzz-training` runs 1,000; ``python tests/fuzz_training.py --trainings N --seed S``. A test runs the first 20.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import genfuse
from genfuse import Trainer
from genfuse.data import Dataset, Split
from genfuse.errors import GenfuseError, NonFiniteLossError

MLP = {"hidden": (8,)}
MODELS = {
    "vae": {**MLP, "latent_dim": 2, "decoder": "gaussian"},
    "realnvp": {**MLP, "layers": 2},
    "maf": {**MLP, "layers": 2},
    "iaf": {**MLP, "layers": 2},
    "nsf": {"hidden": (8, 8), "layers": 2},
    "nsf-ar": {**MLP, "layers": 2},
    "planar": {"layers": 2},
    "radial": {"layers": 2},
    "gan": {**MLP, "latent_dim": 2},
    "wgan": {**MLP, "latent_dim": 2},
    "wgan-gp": {**MLP, "latent_dim": 2},
    "ddpm": {"hidden": (8,)},
    "edm": {"hidden": (8,)},
    "score": {"hidden": (8,)},
    "flow-matching": {"hidden": (8,)},
}
COLUMNS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "constant": lambda rng, n: np.full(n, 7.1),
    "whole": lambda rng, n: rng.integers(0, 3, n).astype(float),
    "heavy-tailed": lambda rng, n: rng.standard_cauchy(n),
    "log-normal": lambda rng, n: np.exp(4 * rng.normal(size=n)),
    "outlier": lambda rng, n: np.where(
        np.arange(n) == rng.integers(n), 10.0 ** rng.integers(2, 31), rng.normal(size=n)
    ),
    "far": lambda rng, n: 1e9 + rng.normal(size=n),
}
LEFT = "finite"


def one(seed: int, folder: Path) -> str:
    """What became of one training: "finite", or the message of the error. Raises AssertionError for anything else."""
    rng = np.random.default_rng(seed)
    name = list(MODELS)[seed % len(MODELS)]
    kinds = rng.choice(list(COLUMNS), size=3)
    scaled = bool(rng.integers(4))  # else the numbers are not standardized
    table = np.stack([COLUMNS[kind](rng, 60) for kind in kinds], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if scaled:
            np.savetxt(folder / "t.csv", table, delimiter=",", header=",".join(f"c{i}" for i in range(3)), comments="")
            data = genfuse.load_data(f"csv:{folder / 't.csv'}")
        else:
            x = torch.from_numpy(table).float()
            data = Dataset("raw", {"train": Split(x[:48]), "test": Split(x[48:])})
        lr = float(10.0 ** rng.uniform(-5, 2))
        start = float(10.0 ** rng.uniform(-2, 2)) if rng.integers(2) else 1.0
        precision = "bf16-mixed" if rng.integers(4) == 0 else "32-true"
        about = f"{seed}: {name}, {', '.join(kinds)}, scaled {scaled}, lr {lr:.2g}, start x {start:.2g}, {precision}"
        torch.manual_seed(seed)
        model = genfuse.create(name, data, **MODELS[name])
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(start)
        out = folder / f"run-{seed}" if seed % 5 == 0 else None
        trainer = Trainer(
            steps=24, batch_size=16, lr=lr, precision=precision, log_every=7, device="cpu", pictures=False, out=out
        )
        try:
            trainer.fit(model, data)
        except NonFiniteLossError as error:
            said = str(error)
            layers = [name for name, _ in model.named_modules() if name] + [
                name for name, _ in model.named_parameters()
            ]
            assert "column c" in said or "column " in said or any(layer in said for layer in layers), f"{about}: {said}"
            if out is not None:
                weights = genfuse.Run(out).model().state_dict()
                assert all(w.isfinite().all() for w in weights.values()), f"{about}: the run has weights not finite"
            return said
    bad = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    assert not bad, f"{about}: not finite at the end: {', '.join(bad)}"
    return LEFT


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--trainings", type=int, default=1000)
    arguments.add_argument("--seed", type=int, default=0, help="of the first training")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    findings, ended, began = [], Counter(), time.monotonic()
    with TemporaryDirectory() as folder:
        for seed in range(given.seed, given.seed + given.trainings):
            try:
                ended[LEFT if one(seed, Path(folder)) == LEFT else "stopped, with where"] += 1
            except Exception as error:
                if isinstance(error, GenfuseError):  # before anything was trained
                    ended["refused"] += 1
                    print(f"{seed}: refused: {error}".replace(folder, "FOLDER"))
                else:
                    findings.append(f"{seed}: {type(error).__name__}: {error}")
                    print(findings[-1], file=sys.stderr)
    counts = ", ".join(f"{count} {what}" for what, count in ended.items())
    print(f"{given.trainings} trainings in {time.monotonic() - began:.0f} s: {counts}; {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
