"""`python -m benchmarks disentanglement`: MIG and other scores of VAEs on `sprites:tiny`.

A VAE, beta-VAE, beta-TCVAE and FactorVAE of the same networks, steps and batches, over several seeds, by the metrics of
codes that `genfuse evaluate` has.

The bar: MIG of beta-TCVAE above that of beta-VAE above that of the VAE, in the mean over the seeds.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import genfuse
from genfuse.metrics import evaluate_codes
from genfuse.training import gallery

METHODS: dict[str, dict[str, object]] = {
    "vae": {},
    "beta-vae": {"beta": 2.0},
    "beta-tcvae": {"objective": "tc", "beta": 6.0},
    "factor-vae": {"objective": "factor", "gamma": 6.0, "discriminator": (128, 128, 128)},
}
NETWORKS = {"latent_dim": 10, "hidden": (128, 128)}
STEPS, BATCH, LR = 3000, 128, 2e-3  # steps of the VAE itself: FactorVAE's discriminator takes as many more


def fit(name: str, seed: int, steps: int, out: Path | None) -> dict[str, object]:
    """One training, measured: with ``out`` the pictures of it."""
    data = genfuse.load_data("sprites:tiny")
    torch.manual_seed(seed)
    model = genfuse.create("vae", data, **NETWORKS, **METHODS[name])
    players = len(model.players())
    trainer = genfuse.Trainer(
        steps=players * steps, batch_size=BATCH, lr=LR, schedule="cosine", seed=seed, device="cpu", log_every=500
    )
    start = time.process_time()
    trainer.fit(model, data)
    seconds = time.process_time() - start
    found = evaluate_codes(model, data, seed=seed, picture=out and out / name / "factors.png")
    if out is not None:
        gallery.draw(out / name, model.eval(), data, [])
    return {"method": name, "seed": seed, "steps": steps, "seconds": seconds, **found}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only this one (may be repeated)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of each VAE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here; those in it are kept")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the pictures of the first seed go")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    results: list[dict] = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {(each["method"], each["seed"]) for each in results}
    names = args.method or list(METHODS)
    for seed in range(args.seeds):
        for name in names:
            if (name, seed) not in done:
                results.append(fit(name, seed, args.steps, args.out if seed == 0 else None))
                print(f"{name}, seed {seed}, {results[-1]['seconds']:.0f} s:", results[-1]["scores"], flush=True)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))
    scores = list(results[0]["scores"])
    print(f"\n| | {' | '.join(scores)} | CPU seconds |\n|---|{'---|' * (len(scores) + 1)}")
    mig = {}
    for name in names:
        of = [each for each in results if each["method"] == name]
        table = np.array([[each["scores"][score] for score in scores] for each in of])
        mig[name] = table[:, scores.index("mig")].mean()
        cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(table.mean(0), table.std(0), strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {np.mean([each['seconds'] for each in of]):.0f} |")
    if {"vae", "beta-vae", "beta-tcvae"} <= mig.keys():
        met = mig["vae"] < mig["beta-vae"] < mig["beta-tcvae"]
        print(f"\nMIG of beta-tcvae above beta-vae above vae: {'met' if met else 'not met'}")
