"""What flows learn of four tables beside nflows and zuko, in the test rows' likelihood: `python -m benchmarks.fits`.

Every flow: Adam, the learning rate falling from 5e-4 to 0 along a cosine, gradients clipped to a norm of 5, batches of
the same rows in the same order, and of 25 validations the weights of the best. MINIBOONE and POWER have splits of
their own; the tables of ADBench are split 60 : 20 : 20, and a column whose values are on a grid has noise of that step,
without which densities have no bound.
"""

import argparse
import copy
import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import _peers
from benchmarks._peers import Flow
from genfuse import flows

OURS = {"realnvp": flows.RealNVP, "maf": flows.MAF, "nsf": flows.NSF, "nsf-ar": flows.NSFAR}
TABLES = ("MINIBOONE", "POWER", "PageBlocks", "satimage-2")


def load(table: str) -> tuple[list[Tensor], float]:
    """The rows to train on, to validate and to test, standardized, and the sum of log standard deviations."""
    root = Path(os.environ["GENFUSE_DATA"])
    if table == "MINIBOONE":
        parts = [np.load(root / "miniboone40" / f"{part}.npy") for part in ("train", "val", "test")]
    elif table == "POWER":
        train, test = (
            np.loadtxt(root / "power" / f"power_{part}_10000.csv", delimiter=",", skiprows=1)
            for part in ("train", "test")
        )
        held, kept = np.split(train[np.random.default_rng(0).permutation(len(train))], [len(train) // 10])
        parts = [kept, held, test]
    else:
        with np.load(next((root / "adbench").glob(f"*_{table}.npz"))) as file:
            x = file["X"].astype(np.float64)
        generator = np.random.default_rng(0)
        for column in x.T:
            if len(values := np.unique(column)) < len(x) / 2:
                column += np.diff(values).min() * generator.random(len(x))
        parts = np.split(x[generator.permutation(len(x))], [int(0.6 * len(x)), int(0.8 * len(x))])
    mean, std = parts[0].mean(0), parts[0].std(0)
    return [torch.tensor((part - mean) / std, dtype=torch.float32) for part in parts], float(np.log(std).sum())


def _flow(name: str, side: str, features: int) -> Flow:
    if side != "genfuse":
        return _peers.MODELS[name][side](features)
    flow = OURS[name](features)
    return Flow(flow, flow.log_prob, lambda n: flow().sample((n,)))


@torch.no_grad()
def _rows(flow: Flow, x: Tensor) -> Tensor:
    flow.model.eval()
    return torch.cat([flow.log_prob(part).double() for part in x.split(1000)])


def _batches(rows: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(rows, generator=generator).split(size)


def fit(name: str, side: str, table: str, seed: int, steps: int, batch_size: int = 128, lr: float = 5e-4) -> dict:
    """One fit, and of the test rows the mean and the least log-likelihood, in nats and the units of the file."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    (train, held, test), log_std = load(table)
    flow = _flow(name, side, train.shape[1])
    optimizer = torch.optim.Adam(flow.model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    highest, best = -math.inf, copy.deepcopy(flow.model.state_dict())
    for step, index in enumerate(itertools.islice(_batches(len(train), batch_size, seed), steps), 1):
        flow.model.train()
        optimizer.zero_grad()
        (-flow.log_prob(train[index]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 25) == 0 and (found := float(_rows(flow, held).mean())) > highest:
            highest, best = found, copy.deepcopy(flow.model.state_dict())
    flow.model.load_state_dict(best)
    nats = _rows(flow, test) - log_std
    return {
        "model": name,
        "side": side,
        "table": table,
        "seed": seed,
        "nats": float(nats.mean()),
        "worst": float(nats.min()),
    }


def _job(arguments: tuple) -> dict[str, Any]:
    name, side, table, seed, _ = arguments
    try:
        return fit(*arguments)
    except Exception as error:  # a peer's, of a loss that is not finite
        return {"model": name, "side": side, "table": table, "seed": seed, "failure": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="fits at a time, of one thread each")
    parser.add_argument("--only", default="", help="only those whose 'table, model, side' has this regular expression")
    args = parser.parse_args()
    jobs = [
        (name, side, table, seed, args.steps)
        for table in TABLES
        for name in OURS
        for side in ("genfuse", *_peers.MODELS[name])
        for seed in range(args.seeds)
        if re.search(args.only, f"{table}, {name}, {side}")
        if side == "genfuse" or not ("," in side or _peers.absent(side))
    ]
    found: dict[tuple, list[dict]] = defaultdict(list)
    with get_context("spawn").Pool(args.processes) as pool:
        for result in pool.imap_unordered(_job, jobs, chunksize=1):
            print(json.dumps(result), flush=True)
            found[result["table"], result["model"], result["side"]].append(result)
    for key, results in sorted(found.items()):
        nats = [result["nats"] for result in results if "nats" in result]
        worst = min((result["worst"] for result in results if "nats" in result), default=math.nan)
        line = f"{np.mean(nats):.4g} (spread {np.ptp(nats):.2g}), worst row {worst:.4g}" if nats else "none"
        print(f"{', '.join(key)}: {line}, of {len(nats)} of {len(results)} seeds")


if __name__ == "__main__":
    main()
