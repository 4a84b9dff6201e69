"""`python -m benchmarks anomaly`: anomalies found in the tables of ADBench, and digits unlike one digit.

Both lie in GENFUSE_DATA. Tables (adbench) by the protocol of arXiv 2305.18593: half of the normal rows train, the other
half and all anomalies are the test, columns standardized by the training rows. Images (mnist, with --images): each
digit of the training images alone trains, all test images are the test, the other nine digits odd. AUROC in percent,
the mean over seeds; every method has one setting for all tables, and one for all digits.
"""

import json
import os
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import StandardScaler

import genfuse
from genfuse.applications import scores
from genfuse.sklearn import AnomalyDetector

Score = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # (train, test, seed) -> the higher, the odder


def _ours(model: str, train: np.ndarray, test: np.ndarray, seed: int, **options: Any) -> np.ndarray:
    detector = AnomalyDetector(model, random_state=seed, contamination=0.01, **options)
    return -detector.fit(train).score_samples(test)


def _of_images(model: str, train: np.ndarray, test: np.ndarray, seed: int, *, method: str, steps: int) -> Any:
    """Levels of grey (N, 1, H, W)."""
    data = genfuse.load_data(train, hold_out=False, seed=seed)
    torch.manual_seed(seed)
    made = genfuse.create(model, data)
    genfuse.Trainer(steps=steps, seed=seed, pictures=False).fit(made, data)
    return scores(made, torch.from_numpy(test).float() / 255, method=method, samples=5).numpy()


def _flat(score: Score, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    return score(train.reshape(len(train), -1) / 255, test.reshape(len(test), -1) / 255, seed)


def _neighbours(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    return NearestNeighbors(n_neighbors=5).fit(train).kneighbors(test)[0][:, -1]


def _of(estimator: type, train: np.ndarray, test: np.ndarray, seed: int, **options: Any) -> np.ndarray:
    if estimator is IsolationForest:
        options["random_state"] = seed
    return -estimator(**options).fit(train).score_samples(test)


TABLES: dict[str, Score] = {
    "vae": partial(_ours, "vae", steps=1000, settings={"latent_dim": 8, "hidden": (128, 128)}),
    "nsf": partial(_ours, "nsf", steps=600),
    "maf": partial(_ours, "maf", steps=600),
    "edm": partial(_ours, "edm", steps=1500, method="denoising"),
    "kNN (5th)": _neighbours,
    "LOF": partial(_of, LocalOutlierFactor, novelty=True, n_neighbors=20),
    "isolation forest": partial(_of, IsolationForest),
    "PCA, likelihood": partial(_of, PCA, n_components=0.9, svd_solver="full"),
}
IMAGES: dict[str, Score] = {
    **{f"vae, {method}": partial(_of_images, "vae", method=method, steps=2000)
       for method in ("relative", "reconstruction", "likelihood")},
    **{f"realnvp, {method}": partial(_of_images, "realnvp", method=method, steps=400)
       for method in ("relative", "likelihood")},
    **{f"edm, {method}": partial(_of_images, "edm", method=method, steps=150) for method in ("relative", "denoising")},
    "kNN (5th)": partial(_flat, _neighbours),
    "isolation forest": partial(_flat, partial(_of, IsolationForest)),
    "PCA, likelihood": partial(_flat, partial(_of, PCA, n_components=0.9, svd_solver="full")),
}  # fmt: skip


def _rows(file: Path, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows; rows and labels of the test."""
    with np.load(file) as table:
        x, y = table["X"].astype(np.float64), table["y"]
    normal = np.random.default_rng(seed).permutation(np.flatnonzero(y == 0))
    half = len(normal) // 2
    rest = np.concatenate([normal[half:], np.flatnonzero(y)])
    scaler = StandardScaler().fit(x[normal[:half]])
    return scaler.transform(x[normal[:half]]), scaler.transform(x[rest]), y[rest]


@cache
def _mnist() -> Any:
    return genfuse.load_data("mnist").splits


def _digits(digit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training images of a digit, levels (N, 1, 28, 28); all test images, and which of them are others."""
    train, test = _mnist()["train"], _mnist()["test"]
    return train.x[train.y == digit].numpy(), test.x.numpy(), (test.y != digit).long().numpy()


def fit(job: tuple[Path | int, str, int]) -> dict[str, Any]:
    """One method on one table, or digit, with one seed."""
    case, name, seed = job
    torch.set_num_threads(1)
    train, test, y = _rows(case, seed) if isinstance(case, Path) else _digits(case)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = (TABLES if isinstance(case, Path) else IMAGES)[name](train, test, seed)
    return {
        "case": case.stem.partition("_")[2] if isinstance(case, Path) else f"digit {case}",
        "method": name,
        "seed": seed,
        "auroc": 100 * roc_auc_score(y, np.nan_to_num(found, nan=1e30, posinf=1e30)),
        "seconds": time.process_time() - start,
    }


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", action="store_true", help="digits of MNIST in place of tables")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--method", action="append", help="only this one (may be repeated)")
    parser.add_argument("--table", action="append", help="only this one, or this digit (may be repeated)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")


def run(args: Namespace) -> None:
    cases: list[Path | int] = [digit for digit in range(10) if not args.table or str(digit) in args.table]
    if not args.images:
        files = sorted(
            (Path(os.environ["GENFUSE_DATA"]) / "adbench").glob("*.npz"), key=lambda file: file.stat().st_size
        )
        cases = [file for file in files if not args.table or file.stem.partition("_")[2] in args.table]
    methods = args.method or list(IMAGES if args.images else TABLES)
    jobs = [(case, name, seed) for case in cases for name in methods for seed in range(args.seeds)]
    results = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for result in pool.map(fit, jobs):
            results.append(result)
            if args.json:
                args.json.write_text(json.dumps(results))
    print(f"| {'digit' if args.images else 'table'} | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    means = []
    for case in dict.fromkeys(result["case"] for result in results):
        row = [np.mean([r["auroc"] for r in results if (r["case"], r["method"]) == (case, name)]) for name in methods]
        means.append(row)
        print(f"| {case} | {' | '.join(f'{value:.1f}' for value in row)} |")
    print(f"| **mean** | {' | '.join(f'**{value:.1f}**' for value in np.mean(means, 0))} |")
    seconds = [sum(r["seconds"] for r in results if r["method"] == name) / args.seeds for name in methods]
    print(f"| seconds of one core, a seed | {' | '.join(f'{value:.0f}' for value in seconds)} |")
