"""Adversarial models beside plain PyTorch: the gradient penalty and a critic's step; and what they learn."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import genfuse
from benchmarks._measure import Side, peak_memory
from benchmarks._part import OURS, Part
from benchmarks._record import Bar
from examples.plain import wgan_gp
from genfuse.metrics import mode_coverage
from genfuse.models import Batch
from genfuse.ops import gradient_penalty

PLAIN = "double backward"
TOY: dict[str, Any] = {"hidden": (128, 128, 128), "latent_dim": 8}
EIGHT_GAUSSIANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the training, and of the model
    "gan": ({"steps": 6_000, "lr": 1e-3}, TOY),
    "wgan": ({"steps": 24_000, "lr": 5e-4}, {**TOY, "clip": 0.1}),
    "wgan-gp": ({"steps": 24_000, "lr": 1e-3}, {**TOY, "penalty_weight": 1.0}),
}
ERROR = 1e-4  # of the penalty's gradient against double backward in float64, of its norm

Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _dcgan_critic(channels: int = 3, width: int = 64) -> nn.Sequential:
    """The critic of DCGAN (arXiv 1511.06434) for images of 32 x 32, without its batch norm."""
    layers: list[nn.Module] = []
    for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, 1))


def _gradients(penalty: Penalty, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Those of the critic's weights, as one vector, for the same epsilons at every call."""
    torch.manual_seed(0)
    penalty(critic, real, fake).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in critic.parameters()]
    critic.zero_grad()
    return torch.cat([g.flatten().double() for g in found])


def _wrong(critic: nn.Module, x: Tensor) -> str:
    """What is wrong with our gradient at x, or an empty text."""
    at_x = partial(gradient_penalty, at="real")
    # Where all points are the same, so are those between them.
    truth = _gradients(wgan_gp.gradient_penalty, copy.deepcopy(critic).double(), x.double(), x.double())
    error = float((_gradients(at_x, critic, x, x) - truth).norm() / truth.norm())
    return "" if error <= ERROR else f"WRONG: the gradient is off by {error:.1e}"


def penalty(part: Part) -> None:
    """The gradient penalty and its gradients for all weights, LeakyReLU 0.2. Both sides draw their points between the
    same real and fake examples, and call backward. Memory is the most that a call holds at a time."""
    critics = {
        "784-1024-1024-1": (wgan_gp.mlp(784, 1024, 1024, 1), (256, 784), 2.5),
        "784-256-256-1": (wgan_gp.mlp(784, 256, 256, 1), (64, 784), 1.3),
        "DCGAN at 32 x 32": (_dcgan_critic(), (64, 3, 32, 32), 1.5),
    }
    for name, (critic, shape, bar) in critics.items():
        critic = critic.to(part.args.device)
        real, fake = torch.randn(2, part.size(shape[0], 4), *shape[1:], device=part.args.device)

        def side(penalty: Penalty, critic: nn.Module = critic, real: Tensor = real, fake: Tensor = fake) -> Side:
            def run() -> None:
                penalty(critic, real, fake).backward()
                critic.zero_grad()

            return Side(run)

        sides: dict[str, Side | str] = {
            OURS: _wrong(critic, real) or side(gradient_penalty),
            PLAIN: side(wgan_gp.gradient_penalty),
        }
        what = f"critic {name}, batch {len(real)}"
        part.compare(f"{what}, penalty", sides, {PLAIN: bar})
        for kind, each in sides.items():
            if isinstance(each, Side):
                part.row(f"{what}, memory, {kind}", memory=peak_memory(each, part.args.device))


def step(part: Part) -> None:
    """An update of WGAN-GP's critic by a batch of 64 images of 28 x 28, networks 100-256-256-784 and 784-256-256-1:
    generated images, loss, penalty, gradients, Adam. The other side is plain PyTorch code of the same."""
    device = part.args.device
    torch.manual_seed(0)
    model = genfuse.create("wgan-gp", shape=(1, 28, 28)).to(device).train()
    critic = model.players()[0]
    optimizer = critic.optimizer(critic.parameters)
    for weight in model.generator.parameters():
        weight.requires_grad_(False)  # as the training loop does
    plain = wgan_gp.WGANGP().to(device)
    plain_optimizer = torch.optim.Adam(plain.critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    x = torch.rand(part.size(64, 4), 1, 28, 28, device=device)

    def ours() -> None:
        model.loss(Batch(x), critic.name)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    def theirs() -> None:
        wgan_gp.update(plain.critic_loss(x.flatten(1)), plain_optimizer)

    sides: dict[str, Side | str] = {OURS: Side(ours), "plain PyTorch": Side(theirs)}
    part.compare(f"critic step, batch {len(x)}", sides, {"plain PyTorch": 1.3})


def modes(part: Part) -> None:
    """Eight Gaussians, by each model with three seeds: of 10,000 samples the modes covered, and the share within three
    standard deviations of one."""
    data = genfuse.load_data("toy:eight-gaussians")
    assert data.mixture
    for name, (training, settings) in EIGHT_GAUSSIANS.items():
        for seed in range(part.size(3, 1)):
            torch.manual_seed(seed)
            model = genfuse.create(name, data, **settings)
            options = {**training, "steps": part.size(training["steps"], 60), "device": part.args.device}
            genfuse.Trainer(seed=seed, **options).fit(model, data)
            samples = model.sample(10_000, generator=torch.Generator(model.device).manual_seed(seed))
            covered, good = mode_coverage(samples, data.mixture)
            what = f"{name} on eight Gaussians, seed {seed}"
            bars = [Bar(f"{what}, modes", covered, 8), Bar(f"{what}, high-quality samples", 100 * good, 90, "%")]
            print(*bars, sep="\n", flush=True)
            part.bars += bars


PARTS = {part.__name__: part for part in (penalty, step, modes)}
QUALITY = (modes.__name__,)
