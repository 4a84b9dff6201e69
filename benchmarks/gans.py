"""Adversarial models beside plain PyTorch: the gradient penalty, R3GAN's critic; and what they learn."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import genfuse
from benchmarks._measure import Side, peak_memory
from benchmarks._part import OURS, Part
from benchmarks._record import Bar
from examples.plain import wgan_gp
from genfuse.metrics import mode_coverage
from genfuse.ops import gradient_norm_penalty, gradient_penalty, scores_and_gradient

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


class _Biased(nn.Module):
    """Leaky ReLU of x + b, b (channels,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.1 * torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias, 0.2)


class _R3GANBlock(nn.Module):
    """1 x 1, grouped 3 x 3 and 1 x 1 convolutions without bias, which the activations have; the branch is scaled."""

    def __init__(self, width: int, group: int) -> None:
        super().__init__()
        inner = 2 * width
        self.branch = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            _Biased(inner),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner // group, bias=False),
            _Biased(inner),
            nn.Conv2d(inner, width, 1, bias=False),
        )
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.branch(x)


class R3GANDown(nn.Module):
    """Half the size by a depthwise filter of fixed weights 1 2 1, then a 1 x 1 convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filter", taps.outer(taps).expand(before, 1, 3, 3) / 16)
        self.mix = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.conv2d(x, self.filter, stride=2, padding=1, groups=len(self.filter)))


def r3gan_critic(
    widths: tuple[int, ...] = (32, 64, 128, 128), group: int = 32, down: Callable[..., nn.Module] = R3GANDown
) -> nn.Sequential:
    """The critic of R3GAN (arXiv 2501.05441, section 3.4) for RGB images that end at 4 x 4, a block in each stage."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 1, bias=False), _R3GANBlock(widths[0], group)]
    for before, after in pairwise(widths):
        layers += [down(before, after), _R3GANBlock(after, group)]
    last = widths[-1]  # of which a depthwise basis makes one number each
    return nn.Sequential(
        *layers, nn.Conv2d(last, last, 4, groups=last, bias=False), nn.Flatten(), nn.Linear(last, 1, bias=False)
    )


class _Products(TorchDispatchMode):
    """Counts the multiplications of convolutions, which are all of this critic but its last layer."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            x, weight, transposed = args[0], args[1], args[6]
            self.count += (x if transposed else out).numel() * weight[0].numel()
        elif function is torch.ops.aten.convolution_backward.default:
            gradient, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
            self.count += sum(wanted[:2]) * (x if transposed else gradient).numel() * weight[0].numel()
        return out


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


def _r1_and_r2(critic: nn.Module, real: Tensor, fake: Tensor, ours: bool) -> Tensor:
    """R3GAN's critic's loss, with both penalties at gamma 1; each side has one forward pass for all."""
    points = torch.cat([real, fake])
    if ours:
        scores, gradient = scores_and_gradient(critic, points)
        penalty = gradient_norm_penalty(gradient, target=0.0)
    else:
        points.requires_grad_()
        scores = critic(points)
        (gradient,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
        penalty = gradient.square().flatten(1).sum(1).mean()
    out, fake_out = scores.chunk(2)
    return F.softplus(fake_out - out).mean() + penalty


def r3gan(part: Part) -> None:
    """R1 and its gradients for all weights, and all of a critic's step with R1 and R2, of R3GAN's critic: grouped
    convolutions, biased LeakyReLU, FIR filters. Ceiling: how many times the multiplications double backward needs."""
    torch.manual_seed(0)
    critic = r3gan_critic().to(part.args.device)
    real, fake = torch.randn(2, part.size(16, 2), 3, 32, 32, device=part.args.device)

    def r1(critic: nn.Module, real: Tensor, fake: Tensor, ours: bool) -> Tensor:
        if ours:
            return gradient_penalty(critic, real, target=0.0, at="real")
        x = real.requires_grad_()
        return torch.autograd.grad(critic(x).sum(), x, create_graph=True)[0].square().flatten(1).sum(1).mean()

    for name, loss, bar in (("R1", r1, 1.5), ("loss with R1 and R2", _r1_and_r2, 1.0)):
        sides: dict[str, Side | str] = {}
        counts: dict[str, int] = {}
        weights: dict[str, Tensor] = {}
        for side, ours in ((OURS, True), (PLAIN, False)):

            def run(loss: Callable[..., Tensor] = loss, ours: bool = ours) -> None:
                loss(critic, real, fake, ours).backward()
                critic.zero_grad()

            with _Products() as products:
                run()
            sides[side], counts[side] = Side(run), products.count
            weights[side] = _gradients(partial(loss, ours=ours), critic, real, fake)
        if (error := float((weights[OURS] - weights[PLAIN]).norm() / weights[PLAIN].norm())) > ERROR:
            sides[OURS] = f"WRONG: the gradient is off by {error:.1e}"
        part.compare(f"R3GAN's critic, batch {len(real)}, {name}", sides, {PLAIN: bar})
        part.row(f"R3GAN's critic, {name}, ceiling by multiplications", value=counts[PLAIN] / counts[OURS], unit="x")


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


PARTS = {part.__name__: part for part in (penalty, r3gan, modes)}
QUALITY = (modes.__name__,)
