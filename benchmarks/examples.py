"""What the operators change in code of one's own: the plain examples beside their fused twins."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks._measure import Side
from benchmarks._part import OURS, Part
from genfuse.ops import _philox

PLAIN = "plain PyTorch"
RATE = 1e-5  # a step costs the same, and the model stays as it is
ERROR = 1e-4  # of the twin's loss and gradient, against plain PyTorch's in the same dtype


@dataclass(frozen=True)
class Example:
    model: str
    loss: str
    batches: tuple[tuple[int, int], ...]
    draw: Callable[..., Tensor] = torch.rand

    def make(self, path: str, features: int) -> nn.Module:
        """The model of this file, with the same weights whenever it is made."""
        torch.manual_seed(0)
        return getattr(import_module(path), self.model)(features)


EXAMPLES = {
    "vae": Example("VAE", "loss", ((128, 784),)),
    "wgan_gp": Example("WGANGP", "critic_loss", ((64, 784),)),
    "realnvp": Example("RealNVP", "loss", ((256, 43), (128, 784)), torch.randn),
}


class KernelNoise(TorchFunctionMode):
    """Within, PyTorch's own functions return the noise that the kernels make of the same seed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn_like, torch.bernoulli):
            (like,) = args
            key, shape = _philox.seed(like), tuple(like.shape)
            if func is torch.randn_like:
                return _philox.normal(key, shape, like.dtype)
            return (_philox.uniform(key, shape).to(like.dtype) <= like).to(like.dtype)
        if func is torch.rand:
            return _philox.uniform(_philox.seed(torch.empty((), **kwargs)), args).float()
        return func(*args, **(kwargs or {}))


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def difference(name: str, x: Tensor) -> tuple[float, float]:
    """How far the twin's loss and gradient are from plain PyTorch's at x, given the same noise: as shares of the loss,
    and of the gradient's norm."""
    losses, gradients = [], []
    for folder in ("plain", "fused"):
        model = EXAMPLES[name].make(f"examples.{folder}.{name}", x.shape[1]).to(x.device)
        torch.manual_seed(1)
        with KernelNoise():
            loss = getattr(model, EXAMPLES[name].loss)(x)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(_vector(p.grad for p in model.parameters() if p.grad is not None))
    (plain, fused), (truth, found) = losses, gradients
    return float((fused - plain).abs() / plain.abs()), float((found - truth).norm() / truth.norm())


def _wrong(name: str, x: Tensor) -> str:
    """What is wrong with the twin at x, or an empty text."""
    errors = zip(("loss", "gradient"), difference(name, x), strict=True)
    wrong = [f"the {what} is off by {error:.1e}" for what, error in errors if not error <= ERROR]
    return f"WRONG: {', '.join(wrong)}" if wrong else ""


def _step(model: nn.Module, loss: str, x: Tensor) -> Side:
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

    def update() -> None:
        optimizer.zero_grad()
        getattr(model, loss)(x).backward()
        optimizer.step()

    return Side(update)


def step(part: Part) -> None:
    """A training step of each file in `examples/plain`, and of its twin in `examples/fused`, which calls the operators
    after at most five changed lines: noise, loss, gradients and fused Adam. vae: 784-256-256-20 and back, 128 images
    that are binarized anew in each step. wgan_gp: an update of the critic, 784-256-256-1, by 64 images. realnvp: 10
    couplings of 2 hidden layers of 256, of 256 rows of a table or 128 images. The twin is timed where its loss and
    gradient are those of plain PyTorch, given the same noise."""
    for name, example in EXAMPLES.items():
        for rows, features in part.size(example.batches, ((8, 6),)):
            x = example.draw(rows, features, device=part.args.device)
            models = {
                side: example.make(f"examples.{folder}.{name}", features).to(part.args.device)
                for side, folder in ((OURS, "fused"), (PLAIN, "plain"))
            }
            sides: dict[str, Side | str] = {side: _step(model, example.loss, x) for side, model in models.items()}
            sides[OURS] = _wrong(name, x) or sides[OURS]
            part.compare(f"{name} ({rows}, {features}), a step", sides)


PARTS = {step.__name__: step}
