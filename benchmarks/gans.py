"""Adversarial models: a critic's step beside plain PyTorch, and what they cover of eight Gaussians."""

import dataclasses
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

import genfuse
from benchmarks._measure import FULL, QUICK, Side, Timing, interleave
from benchmarks._record import Bar
from benchmarks._report import figure
from genfuse.metrics import mode_coverage
from genfuse.models import Batch

SEEDS = range(3)
SAMPLES = 10_000
MODES, HIGH_QUALITY = 8, 90.0  # percent
STEP = 1.3  # times as fast as plain PyTorch

TOY = {"hidden": (128, 128, 128), "latent_dim": 8}
EIGHT_GAUSSIANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the training, and of the model
    "gan": ({"steps": 6_000, "lr": 1e-3}, TOY),
    "wgan": ({"steps": 24_000, "lr": 5e-4}, {**TOY, "clip": 0.1}),
    "wgan-gp": ({"steps": 24_000, "lr": 1e-3}, {**TOY, "penalty_weight": 1.0}),
}


def modes(name: str, seed: int, device: str, quick: bool = False) -> tuple[int, float]:
    """Modes of eight Gaussians that a model covers after its training, and the share of good samples, in percent."""
    training, settings = EIGHT_GAUSSIANS[name]
    training = {**training, "steps": 60} if quick else training
    data = genfuse.load_data("toy:eight-gaussians")
    assert data.mixture
    torch.manual_seed(seed)
    model = genfuse.create(name, data, **settings)
    genfuse.Trainer(**training, seed=seed, device=device).fit(model, data)
    samples = model.sample(SAMPLES, generator=torch.Generator(model.device).manual_seed(seed))
    covered, good = mode_coverage(samples, data.mixture)
    return covered, 100 * good


def plain_step(critic: nn.Module, generator: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """A step of WGAN-GP's critic as most code has it: three passes, and double backward."""
    with torch.no_grad():
        fake = generator(torch.randn(len(x), 100, device=x.device)).sigmoid()
    eps = torch.rand(len(x), 1, 1, 1, device=x.device)
    between = (eps * x + (1 - eps) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()
    loss = critic(fake).mean() - critic(x).mean() + 10 * penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def steps(device: str, quick: bool) -> dict[str, Timing]:
    """Seconds of a whole critic step at 784-256-256-1, batch 64, of ours and of plain PyTorch, on the same networks."""
    torch.manual_seed(0)
    model = genfuse.create("wgan-gp", shape=(1, 28, 28)).to(device).train()
    model.generator.requires_grad_(False)
    batch = Batch(torch.rand(64, 1, 28, 28, device=device))
    player = model.players()[0]
    optimizer = player.optimizer(player.parameters)

    def ours() -> None:
        optimizer.zero_grad()
        model.loss(batch, player.name)[0].backward()
        optimizer.step()
        model.after_step(player.name)

    plain = torch.optim.Adam(model.critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    sides = {
        "genfuse": Side(ours),
        "plain PyTorch": Side(lambda: plain_step(model.critic, model.generator, plain, batch.x)),
    }
    return interleave(sides, device, QUICK if quick else FULL)


def run(args: Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure and print; returns the record and its bars. ``--quick`` trains for 60 steps, which cover little."""
    times = steps(args.device, args.quick)
    rows = [{"what": f"wgan-gp, a critic step, {side}", **dataclasses.asdict(each)} for side, each in times.items()]
    for row in rows:
        print(f"{row['what']}: {figure(row)}", flush=True)
    ratio = times["plain PyTorch"].median / times["genfuse"].median
    bars = [Bar("wgan-gp, a critic step vs plain PyTorch", ratio, STEP, "x")]
    for name in EIGHT_GAUSSIANS:
        for seed in SEEDS:
            covered, good = modes(name, seed, args.device, args.quick)
            bars.append(Bar(f"{name} on eight Gaussians, seed {seed}, modes covered", covered, MODES))
            bars.append(Bar(f"{name} on eight Gaussians, seed {seed}, high-quality samples", good, HIGH_QUALITY, "%"))
            print(*bars[-2:], sep="\n", flush=True)
    return {"command": "gans", "settings": {"device": args.device, "quick": args.quick}, "rows": rows}, bars
