"""A training step of every model beside plain PyTorch, torch.compile, JAX, other libraries, and its matrix products.

A step is the loss, its gradients, Adam's update and the gradients' clearing, on one batch that is there. All sides have
the same network, loss and weights. Before anything is timed, the loss and the gradients of each side that can be given
genfuse's weights and noise are held against plain PyTorch's.
"""

import dataclasses
import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import genfuse
from benchmarks import _jax, _peers, _plain
from benchmarks._measure import FULL, QUICK, Side, Timing, rounds
from benchmarks._record import Bar
from benchmarks.examples import KernelNoise
from genfuse.models import Batch

OURS, PRODUCTS, FUSED, PLAIN, COMPILED, JAX = (
    "genfuse", "products", "PyTorch, fused Adam", "PyTorch", "torch.compile", "JAX"
)  # fmt: skip
RATE = 1e-5  # a step costs the same, and the model stays as it is
MOVED = 0.02  # of all weights before anything, by chance: a flow starts as the identity, where much is 0
LOSS_ERROR = 1e-4  # as a share of the loss
GRADIENT_ERROR = 1e-3  # of the gradient's norm: rounding moves examples across a ReLU's kink
SETTINGS = {"one": "one pinned thread, CPU time", "all": "all threads, wall time"}


@dataclass(frozen=True)
class Case:
    """A model and a batch of x (rows, *shape): binary pixels, pixels in [0, 1), or normal rows with their context."""

    model: str
    rows: int
    settings: dict[str, Any]
    plain: Callable[..., _plain.Plain]  # of our model
    jax: Callable[..., tuple[Callable, Callable]] | None = None  # likewise: the loss, and the noise of a step
    draw: Callable[..., Tensor] = torch.randn
    peers: dict[str, Callable[[], _peers.Flow]] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)  # the least or, of products and JAX, most times as fast

    @property
    def name(self) -> str:
        return f"{self.model}"


def _binary(*shape: int) -> Tensor:
    return torch.rand(*shape).round()


def _vae(side: int, hidden: tuple[int, ...], latent: int, rows: int, **bars: float) -> Case:
    return Case(
        "vae",
        rows,
        {"shape": (1, side, side), "levels": 2, "hidden": hidden, "latent_dim": latent},
        lambda model: _plain.VAE(side**2, hidden, latent),
        lambda model: _jax.vae(len(hidden) + 1, latent),
        _binary,
        bars=bars,
    )


def _critic(name: str, rows: int, penalty: bool, **bars: float) -> Case:
    settings = {} if penalty else {"loss": "non-saturating", "penalty": "none"}
    return Case(
        name,
        rows,
        {"shape": (1, 28, 28), "levels": 256, **settings},
        lambda model: _plain.Critic(784, (256, 256), 100, model.generator, penalty),
        (lambda model: _jax.critic(model.generator.parameters(), 100)) if penalty else None,
        torch.rand,
        bars=bars,
    )


def _flow(
    name: str, rows: int, features: int, plain: Callable[..., _plain.Flow], context: int = 0, **rest: Any
) -> Case:
    given = {"conditional": True, "condition": context} if context else {}
    settings = {"shape": (features,), "levels": None, **given, **rest.pop("settings", {})}
    return Case(name, rows, settings, lambda model: plain(features), **rest)


def _couplings(features: int, hidden: int, layers: int, **bars: float) -> Case:
    """As in the paper: halves that are kept in turn, scales by tanh."""
    widths = (hidden, hidden)
    return _flow(
        "realnvp",
        256,
        features,
        lambda d: _plain.realnvp(d, widths, layers, linear=False),
        jax=lambda model: _jax.realnvp(features, layers),
        settings={"layers": layers, "hidden": widths, "linear": False, "scale": "tanh", "squash": False},
        bars=bars,
    )


CASES = {
    "VAE 64-64-64-10, batch 64": _vae(8, (64, 64), 10, 64, JAX=1.0),
    "RealNVP, D = 2, 8 couplings of 2 x 64, batch 256": _couplings(2, 64, 8, JAX=1.0),
    "VAE 784-256-256-20, batch 128": _vae(28, (256, 256), 20, 128, JAX=1.0, products=1.25),
    "WGAN-GP critic 784-256-256-1, batch 64": _critic("wgan-gp", 64, True, JAX=1.0, products=1.25),
    "RealNVP, D = 43, 10 couplings of 2 x 256, batch 256": _couplings(43, 256, 10, JAX=1.0),
    "GAN discriminator 784-256-256-1, batch 64": _critic("gan", 64, False, products=1.25),
    "realnvp, D = 43, batch 256": _flow(
        "realnvp", 256, 43, lambda d: _plain.realnvp(d, (256, 256), 10), bars={"products": 1.25, "zuko": 1.8}
    ),
    "nsf, D = 43, batch 256": _flow("nsf", 256, 43, _plain.nsf, bars={"products": 1.25, "nflows": 4.0}),
    "maf, D = 43, batch 256": _flow("maf", 256, 43, _plain.maf, bars={"products": 1.25, "zuko": 1.7}),
    "nsf-ar, D = 43, batch 256": _flow("nsf-ar", 256, 43, _plain.nsf_ar, bars={"products": 1.25}),
}


class Products(TorchDispatchMode):
    """Records the matrix products and convolutions that are made within, and their backward."""

    names = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in [f"aten::{name}" for name in self.names]:
            kept = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)
            self.calls.append((function, kept, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def replay(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


class Ours:
    """Genfuse's model, as it is trained: the player of the first step, and its optimizer."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.x = case.draw(case.rows, *case.settings["shape"])
        context = case.settings.get("condition", 0)
        self.given = torch.randn(case.rows, context) if context else None
        self.batch = Batch(self.x, self.given)
        self.model = genfuse.create(case.model, **case.settings).train()
        self.player, *others = self.model.players()
        self.parameters = list(self.player.parameters)
        for other in others:
            for weight in other.parameters:
                weight.requires_grad_(False)
        with torch.no_grad():
            self.loss()  # which starts what normalises activations
            for weight in self.parameters:
                weight += MOVED * torch.randn_like(weight)
        self.optimizer = self.player.optimizer(self.parameters)

    def loss(self) -> Tensor:
        return self.model.loss(self.batch, self.player.name)[0]

    def stepped(self) -> None:
        with torch.no_grad():
            self.model.stepped(self.player.name)


def _step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, after: Callable[[], object] | None) -> Side:
    for group in optimizer.param_groups:
        group["lr"] = RATE

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after()

    return Side(run)


def _gradients(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def _wrong(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> str:
    """What is wrong with a loss and its gradients, or an empty text."""
    (loss, gradients), (right, truth) = found, wanted
    off = [f.double().flatten() - w.double().flatten() for f, w in zip(gradients, truth, strict=True)]
    norm = torch.cat([w.double().flatten() for w in truth]).norm()
    errors = {
        "loss": (float((loss - right).abs() / right.abs()), LOSS_ERROR),
        "gradient": (float(torch.cat(off).norm() / norm), GRADIENT_ERROR),
    }
    wrong = [f"the {what} is off by {error:.1e}" for what, (error, allowed) in errors.items() if not error <= allowed]
    return f"WRONG: {', '.join(wrong)}" if wrong else ""


def sides(case: Case, compiled: bool) -> dict[str, Side | str]:
    """All that is compared; a side that is a text is left out, and the text says why."""
    ours, plain = Ours(case), None
    x = ours.x if ours.given is None else torch.cat([ours.x, ours.given], -1)

    def own(fused: bool) -> tuple[_plain.Plain, torch.optim.Optimizer]:
        model = case.plain(ours.model)
        _plain.load(model, ours.parameters, ours.model)
        betas = ours.optimizer.param_groups[0]["betas"]
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        return model, torch.optim.Adam(weights, lr=RATE, betas=betas, fused=fused or None)

    plain, optimizer = own(fused=True)
    with KernelNoise():
        torch.manual_seed(1)
        noise = plain.draw(x)
    torch.manual_seed(1)
    found = _gradients(ours.loss(), ours.parameters)
    wanted = _gradients(plain.loss(x, *noise), list(plain.parameters()))
    step = partial(_step, after=None)
    result: dict[str, Side | str] = {
        OURS: _wrong(found, wanted) or _step(ours.loss, ours.optimizer, ours.stepped),
        FUSED: step(partial(_loss, plain, x), optimizer),
    }
    with Products() as products:
        result[FUSED].run()  # type: ignore[union-attr]
    result[PRODUCTS] = Side(products.replay, torch.no_grad)
    plain, optimizer = own(fused=False)
    result[PLAIN] = step(partial(_loss, plain, x), optimizer)
    if compiled:
        plain, optimizer = own(fused=True)
        plain.loss = torch.compile(plain.loss)  # type: ignore[method-assign]
        result[COMPILED] = step(partial(_loss, plain, x), optimizer)
        try:
            result[COMPILED].run()  # type: ignore[union-attr]
        except Exception as error:  # no compiler, or a formula that it cannot take: the row says why
            result[COMPILED] = str(error).partition("\n")[0]
    if case.jax:
        if reason := _peers.absent("jax") or _peers.absent("optax"):
            result[JAX] = reason
        else:
            _jax.quiet()
            loss, draw = case.jax(ours.model)
            flat = x.flatten(1)
            wrong = _wrong(_jax.loss_and_gradients(loss, ours.parameters, flat, *noise), wanted)
            result[JAX] = wrong or Side(*_jax_step(loss, draw, ours.parameters, flat))
    for name, make in case.peers.items():
        result[name] = _peers.absent(name) or make()
    return result


def _jax_step(*args: Any) -> tuple[Any, ...]:
    import contextlib

    run, finish = _jax.step(*args, RATE)
    return run, contextlib.nullcontext, finish


def _loss(plain: _plain.Plain, x: Tensor) -> Tensor:
    return plain.loss(x, *plain.draw(x))


def measure(name: str, setting: str, quick: bool, compiled: bool) -> dict[str, Any]:
    """One case as a row of the record, printed too. Times of a side, and how many times genfuse's they are, by round."""
    case = CASES[name]
    made = sides(case, compiled)
    now = time.process_time if setting == "one" else time.perf_counter
    times = rounds({k: s for k, s in made.items() if isinstance(s, Side)}, "cpu", QUICK if quick else FULL, now)
    found: dict[str, Any] = {}
    for side, what in made.items():
        if isinstance(what, str):
            found[side] = {"failure": what}
            continue
        found[side] = dataclasses.asdict(Timing.of(times[side]))
        if side != OURS and OURS in times:
            ratios = [theirs / ours for theirs, ours in zip(times[side], times[OURS], strict=True)]
            found[side]["ratio"] = dataclasses.asdict(Timing.of(ratios))
    print(f"{name}, {SETTINGS[setting]}", flush=True)
    for side, result in found.items():
        if "failure" in result:
            print(f"  {side:<20} {result['failure']}", flush=True)
            continue
        ratio = result.get("ratio")
        times_ours = f"{ratio['median']:6.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] of genfuse's" if ratio else ""
        print(f"  {side:<20} {1e3 * result['median']:8.3f} ms {times_ours}", flush=True)
    return {"case": name, "setting": setting, "sides": found}


def _in_setting(setting: str, names: list[str], quick: bool, compiled: bool) -> list[dict[str, Any]]:
    if setting == "one":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    return [measure(name, setting, quick, compiled) for name in names]


def run(args: Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure and print; each setting in a process of its own, whose threads are made after it is pinned."""
    names = [name for name in CASES if not args.only or any(part in name for part in args.only)]
    rows: list[dict[str, Any]] = []
    for setting in [args.threads] if args.threads else SETTINGS:
        before = os.environ.get("OMP_NUM_THREADS")
        if setting == "one":
            os.environ["OMP_NUM_THREADS"] = "1"
        with get_context("spawn").Pool(1) as pool:
            rows += pool.apply(_in_setting, (setting, names, args.quick, args.compile))
        if setting == "one":
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
    return {"command": "steps", "settings": {"device": "cpu", "quick": args.quick}, "comparisons": rows}, bars(rows)


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    return []
