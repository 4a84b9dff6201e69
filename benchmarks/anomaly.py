"""Anomaly detection on the tables of ADBench: `python -m benchmarks.anomaly`, with GENFUSE_DATA/adbench.

The protocol of arXiv 2305.18593: half of the normal rows train, the other half and all anomalies are the test, columns
standardized by the training rows; AUROC in percent, the mean over seeds. Every method has one setting for all tables.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from genfuse.sklearn import AnomalyDetector

Score = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # (train, test, seed) -> the higher, the odder


def _ours(model: str, train: np.ndarray, test: np.ndarray, seed: int, **options: object) -> np.ndarray:
    detector = AnomalyDetector(model, random_state=seed, contamination=0.01, **options)  # type: ignore[arg-type]
    return -detector.fit(train).score_samples(test)


def _neighbours(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    return NearestNeighbors(n_neighbors=5).fit(train).kneighbors(test)[0][:, -1]


def _of(estimator: type, train: np.ndarray, test: np.ndarray, seed: int, **options: object) -> np.ndarray:
    if estimator is IsolationForest:
        options["random_state"] = seed
    return -estimator(**options).fit(train).score_samples(test)


METHODS: dict[str, Score] = {
    "vae": partial(_ours, "vae", steps=1000, settings={"latent_dim": 8, "hidden": (128, 128)}),
    "nsf": partial(_ours, "nsf", steps=600),
    "maf": partial(_ours, "maf", steps=600),
    "edm": partial(_ours, "edm", steps=1500, method="denoising"),
    "kNN (5th)": _neighbours,
    "LOF": partial(_of, LocalOutlierFactor, novelty=True, n_neighbors=20),
    "isolation forest": partial(_of, IsolationForest),
    "PCA, likelihood": partial(_of, PCA, n_components=0.9, svd_solver="full"),
}


def fit(job: tuple[Path, str, int]) -> dict[str, object]:
    """One method on one table with one seed."""
    file, name, seed = job
    torch.set_num_threads(1)
    with np.load(file) as table:
        x, y = table["X"].astype(np.float64), table["y"]
    normal = np.random.default_rng(seed).permutation(np.flatnonzero(y == 0))
    half = len(normal) // 2
    rest = np.concatenate([normal[half:], np.flatnonzero(y)])
    scaler = StandardScaler().fit(x[normal[:half]])
    train, test = scaler.transform(x[normal[:half]]), scaler.transform(x[rest])
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = METHODS[name](train, test, seed)
    return {
        "table": file.stem.partition("_")[2],
        "method": name,
        "seed": seed,
        "auroc": 100 * roc_auc_score(y[rest], np.nan_to_num(scores, nan=1e30, posinf=1e30)),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only this one (may be repeated)")
    parser.add_argument("--table", action="append", help="only this one (may be repeated)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    args = parser.parse_args()
    files = sorted((Path(os.environ["GENFUSE_DATA"]) / "adbench").glob("*.npz"), key=lambda file: file.stat().st_size)
    files = [file for file in files if not args.table or file.stem.partition("_")[2] in args.table]
    methods = args.method or list(METHODS)
    results = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for result in pool.map(fit, [(file, name, seed) for file in files for name in methods
                                     for seed in range(args.seeds)]):  # fmt: skip
            results.append(result)
            if args.json:
                args.json.write_text(json.dumps(results))
    print(f"| table | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    means = []
    for table in dict.fromkeys(str(result["table"]) for result in results):
        row = [np.mean([r["auroc"] for r in results if (r["table"], r["method"]) == (table, name)]) for name in methods]
        means.append(row)
        print(f"| {table} | {' | '.join(f'{value:.1f}' for value in row)} |")
    print(f"| **mean** | {' | '.join(f'**{value:.1f}**' for value in np.mean(means, 0))} |")


if __name__ == "__main__":
    main()
