"""Training the VAE and the WGAN-GP on MNIST with `genfuse.Trainer` beside the same architectures in plain PyTorch."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfuse
from benchmarks._measure import FULL, QUICK, Side, Timing, interleave, seconds
from benchmarks._record import Bar
from benchmarks._report import figure
from examples.plain import vae, wgan_gp
from genfuse.data import Dataset, Split
from genfuse.metrics import evaluate

BATCH = {"vae": 128, "wgan-gp": 64}
EPOCH_SHARE = 0.7  # of plain PyTorch's time that an epoch of ours may take
DATA_SHARE = 5  # percent of its time that a step of the digits VAE may spend on data
ELBO, IWAE_50 = -98.2, -94.3  # what plain PyTorch code reached on MNIST's test split after 30 epochs, in nats


def _first(data: Dataset, **counts: int) -> Dataset:
    """The data set with the first examples alone of the splits that are named."""
    splits = dict(data.splits)
    for name, count in counts.items():
        x, y = splits[name].x, splits[name].y
        splits[name] = Split(x[:count], None if y is None else y[:count])
    return dataclasses.replace(data, splits=splits)


def _plain_vae(device: str) -> Callable[[Tensor], object]:
    model = vae.VAE().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return lambda images: vae.train_epoch(model, optimizer, images, BATCH["vae"])


def _plain_wgan_gp(device: str) -> Callable[[Tensor], object]:
    """Five batches for the critic, and the next one for the generator."""
    model = wgan_gp.WGANGP().to(device)
    critic, generator = (
        torch.optim.Adam(player.parameters(), lr=1e-4, betas=(0.0, 0.9)) for player in (model.critic, model.generator)
    )

    def epoch(images: Tensor) -> None:
        for i, index in enumerate(torch.randperm(len(images), device=images.device).split(BATCH["wgan-gp"])):
            if i % 6 < 5:
                wgan_gp.update(model.critic_loss(images[index]), critic)
            else:
                wgan_gp.update(model.generator_loss(images[index]), generator)

    return epoch


PLAIN = {"vae": _plain_vae, "wgan-gp": _plain_wgan_gp}


def epochs(name: str, data: Dataset, count: int, device: str) -> tuple[Timing, Timing]:
    """Seconds an epoch of ours and of plain PyTorch, in turns, after a fifth of an epoch of each to warm up.

    The test split is cut to one batch: the Trainer looks at it after each epoch, and plain PyTorch does not.
    """
    torch.manual_seed(0)
    data = _first(data, test=BATCH[name])
    model, plain = genfuse.create(name, data), PLAIN[name](device)
    images = data.splits["train"].x.flatten(1).to(device).float() / 255
    seeds = iter(range(count + 1))

    def ours(data: Dataset) -> object:
        return genfuse.Trainer(epochs=1, batch_size=BATCH[name], device=device, seed=next(seeds)).fit(model, data)

    ours(_first(data, train=len(images) // 5))
    plain(images[: len(images) // 5])
    sides = {"ours": lambda: ours(data), "plain": lambda: plain(images)}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(count):
        for side in sorted(sides, reverse=turn % 2 == 1):
            times[side].append(seconds(sides[side], device))
    return Timing.of(times["ours"]), Timing.of(times["plain"])


def step(data: Dataset, device: str, quick: bool) -> tuple[Timing, Timing]:
    """Seconds that a step spends on its batch, and on all the rest: loss, gradients and update."""
    data = data.to(device)
    model = genfuse.create("vae", data).to(device).train()
    (player,) = model.players()
    optimizer = player.optimizer(player.parameters)
    index = torch.randperm(len(data.splits["train"]), device=device)[: BATCH["vae"]]
    batch = data.batch("train", index)

    def update() -> None:
        optimizer.zero_grad()
        model.loss(batch, player.name)[0].backward()
        optimizer.step()

    sides = {"data": Side(lambda: data.batch("train", index)), "update": Side(update)}
    timings = interleave(sides, device, QUICK if quick else FULL)
    return timings["data"], timings["update"]


def quality(data: Dataset, count: int, limit: int, device: str) -> dict[str, Any]:
    """Test ELBO (of the whole split) and IWAE-50 (of its first ``limit`` images) after ``count`` epochs, in nats."""
    torch.manual_seed(0)
    model = genfuse.create("vae", data)
    genfuse.Trainer(epochs=count, batch_size=BATCH["vae"], device=device, seed=0).fit(model, data)
    data = _first(data, train=1)  # evaluate looks at both splits
    elbo = evaluate(model, data, samples=1)["test"]["elbo"]
    return {"elbo": elbo, "iwae_50": evaluate(model, data, samples=50, limit=limit)["test"]["iwae_bound_50"]}


def run(args: Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure and print; returns the record and its bars. ``--quick`` trains on 640 images."""
    mnist, grey = (genfuse.load_data("mnist", root=args.data_root, binarize=how) for how in ("dynamic", "none"))
    if args.quick:
        mnist, grey = (_first(data, train=640) for data in (mnist, grey))
    rows, bars = [], []

    def add(what: str, **values: Any) -> None:
        rows.append({"what": what, **values})
        print(f"{what}: {figure(rows[-1])}", flush=True)

    for name, data in {"vae": mnist, "wgan-gp": grey}.items():
        ours, plain = epochs(name, data, 1 if args.quick else args.epochs, args.device)
        what = f"{name} on MNIST ({len(data.splits['train'])} images), an epoch"
        add(f"{what}, genfuse", **dataclasses.asdict(ours))
        add(f"{what}, plain PyTorch", **dataclasses.asdict(plain))
        bars.append(Bar(f"{what}, genfuse / plain PyTorch", ours.median / plain.median, EPOCH_SHARE, at_most=True))

    for name, data in {"digits": genfuse.load_data("digits"), "MNIST": mnist}.items():
        batch, rest = step(data, args.device, args.quick)
        add(f"VAE on {name}, a step, its data", **dataclasses.asdict(batch))
        add(f"VAE on {name}, a step, all the rest", **dataclasses.asdict(rest))
        what, share = f"VAE on {name}, share of a step that is data", 100 * batch.median / (batch.median + rest.median)
        if name == "digits":
            bars.append(Bar(what, share, DATA_SHARE, "%", at_most=True))
        else:
            add(what, value=share, unit="%")

    if args.quality:
        count, limit = (1, 100) if args.quick else (30, 2000)
        reached = quality(mnist, count, limit, args.device)
        bars.append(Bar(f"VAE on MNIST, {count} epochs, test ELBO", reached["elbo"], ELBO, " nats"))
        bars.append(Bar(f"VAE on MNIST, {count} epochs, test IWAE-50", reached["iwae_50"], IWAE_50, " nats"))
    return {"command": "training", "settings": {"device": args.device, "quick": args.quick}, "rows": rows}, bars
