"""A training step of every model beside plain PyTorch, torch.compile, JAX, other libraries, and its matrix products.

A step is the loss, its gradients, Adam's update and the gradients' clearing, on one batch that is there. All sides have
the same network, loss and weights. Before anything is timed, the loss and the gradients of each side that can be given
genfuse's weights and noise are held against plain PyTorch's.
"""

import dataclasses
import gc
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import genfuse
from benchmarks import _jax, _peers, _plain
from benchmarks._measure import QUICK, Effort, Side, Timing, rounds
from benchmarks._part import OURS
from benchmarks._record import Bar
from benchmarks._report import STEP_SETTINGS as SETTINGS
from benchmarks._report import describe_step
from benchmarks.examples import KernelNoise
from benchmarks.ops import first_line
from genfuse.models import Batch
from genfuse.training.lean import Graphed, lean
from genfuse.training.process import keep_freed_memory

PRODUCTS, FUSED, PLAIN, COMPILED, JAX = "products", "PyTorch, fused Adam", "PyTorch", "torch.compile", "JAX"
GRAPHS, THEIR_GRAPHS = "genfuse, CUDA graphs", "torch.compile, CUDA graphs"
AT_MOST = {"products": PRODUCTS, "JAX": JAX}
EFFORT = {  # long turns, as in training, too, a step finds its weights in caches; or many, some of them undisturbed
    "one": Effort(block=0.1, rounds=(9, 31), seconds=5),
    "all": Effort(block=0.02, rounds=(9, 201), seconds=5),
    "gpu": Effort(block=0.02, rounds=(9, 51), seconds=1.5),
}
LEAST = 0.2  # the quantile whose ratio is taken: what else runs on a machine only ever makes a turn longer
RATE = 1e-5  # a step costs the same, and the model stays as it is
WARM = 3  # steps, in which torch.compile compiles and records
MOVED = 0.02  # of all weights before anything, by chance: a flow starts as the identity, where much is 0
LOSS_ERROR = 1e-4  # as a share of the loss
GRADIENT_ERROR = 1e-3  # of the gradient's norm: rounding moves examples across a ReLU's kink
PRODUCT_NAMES = ("mm", "addmm", "bmm", "baddbmm")
SHARES: dict[str, Callable[[str], bool]] = {  # of the time of a step, by the profiler's names
    "products": lambda name: name.removeprefix("aten::") in PRODUCT_NAMES or "conv" in name,
    "kernels": lambda name: name.startswith(("genfuse::", "Function")),
    "optimizer": lambda name: name.startswith(("Optimizer.", "aten::_fused_", "aten::_foreach_")),
    "element-wise, copies": lambda name: name.startswith("aten::"),
}


Model = tuple[torch.nn.Module, Callable[[], Tensor]]  # and its loss


@dataclass(frozen=True)
class Case:
    """A model and a batch of x (rows, *shape): binary pixels, pixels in [0, 1), or normal rows with their context."""

    model: str
    rows: int
    settings: dict[str, Any]
    plain: Callable[..., _plain.Plain]  # of our model
    jax: Callable[..., tuple[Callable, Callable]] | None = None  # likewise: the loss, and the noise of a step
    draw: Callable[..., Tensor] = torch.randn
    peers: dict[str, Callable[..., Model]] = field(default_factory=dict)  # of x and the context
    bars: dict[str, float] = field(default_factory=dict)  # how many times as fast as a peer; of `AT_MOST` the reverse


def _binary(*shape: int) -> Tensor:
    return torch.rand(*shape).round()


def _pythae(hidden: tuple[int, ...], latent: int, x: Tensor, given: None) -> Model:
    model = _peers.pythae_vae(tuple(x.shape[1:]), hidden, latent)
    return model, lambda: model({"data": x}).loss


def _density(name: str, library: str, settings: dict[str, Any], x: Tensor, given: Tensor | None) -> Model:
    flow = _peers.MODELS[name][library](x.shape[1], **settings)
    args = (x,) if given is None else (x, given)
    return flow.model, lambda: -flow.log_prob(*args).mean()


def _vae(side: int, hidden: tuple[int, ...], latent: int, rows: int, **bars: float) -> Case:
    return Case(
        "vae",
        rows,
        {"shape": (1, side, side), "levels": 2, "hidden": hidden, "latent_dim": latent},
        lambda model: _plain.VAE(side**2, hidden, latent),
        lambda model: _jax.vae(len(hidden) + 1, latent),
        _binary,
        {"pythae": partial(_pythae, hidden, latent)},
        bars,
    )


def _critic(model: str, **bars: float) -> Case:
    r3gan = model == "gan"
    return Case(
        model,
        64,
        {"shape": (1, 28, 28)},
        lambda model: _plain.Critic(784, (256, 256), 100, model.generator, r3gan),
        None if r3gan else lambda model: _jax.critic(model.generator.parameters(), 100),
        torch.rand,
        bars=bars,
    )


def _flow(name: str, plain: Callable[..., _plain.Flow], **bars: float) -> Case:
    """With default settings, of a table of 43 columns."""
    peers = {library: partial(_density, name, library, {}) for library in _peers.MODELS.get(name, ())}
    return Case(name, 256, {"shape": (43,), "levels": None}, lambda model: plain(43), peers=peers, bars=bars)


def _inference(name: str, plain: Callable[..., _plain.Flow], *libraries: str) -> Case:
    """Of the size that simulation-based inference uses: 5 parameters given 5 numbers, 5 layers, 50 hidden units."""
    hidden = (50, 50)
    sizes = {"hidden": hidden, "context": 5}
    return Case(
        name,
        200,
        {"shape": (5,), "levels": None, "conditional": True, "condition": 5, "layers": 5, "hidden": hidden},
        lambda model: plain(5, **sizes),
        peers={library: partial(_density, name, library, sizes) for library in libraries},
        bars={library: {"nflows": 5.0, "zuko": 4.0}[library] for library in libraries},
    )


def _couplings(features: int, hidden: int, layers: int, **bars: float) -> Case:
    """As in the paper: halves that are kept in turn, scales by tanh."""
    widths = (hidden, hidden)
    settings = {"layers": layers, "hidden": widths, "linear": False, "scale": "tanh", "squash": False}
    return Case(
        "realnvp",
        256,
        {"shape": (features,), "levels": None, **settings},
        lambda model: _plain.realnvp(features, widths, layers, linear=False),
        lambda model: _jax.realnvp(features, layers),
        bars=bars,
    )


CASES = {
    "vae 64-64-64-10, batch 64": _vae(8, (64, 64), 10, 64, JAX=1.0),
    "8 couplings of 2 x 64, D = 2, batch 256": _couplings(2, 64, 8, JAX=1.0),
    "vae 784-256-256-20, batch 128": _vae(28, (256, 256), 20, 128, JAX=1.0, products=1.25),
    "wgan-gp critic 784-256-256-1, batch 64": _critic("wgan-gp", JAX=1.0, products=1.25),
    "10 couplings of 2 x 256, D = 43, batch 256": _couplings(43, 256, 10, JAX=1.0),
    "gan discriminator 784-256-256-1, batch 64": _critic("gan", products=1.25),
    "realnvp D = 43, batch 256": _flow("realnvp", partial(_plain.realnvp, hidden=(256, 256), layers=10),
                                       products=1.25, zuko=1.8),
    "nsf D = 43, batch 256": _flow("nsf", _plain.nsf, products=1.25, nflows=4.0),
    "maf D = 43, batch 256": _flow("maf", _plain.maf, products=1.25, zuko=1.7),
    "nsf-ar D = 43, batch 256": _flow("nsf-ar", _plain.nsf_ar, products=1.25),
    "nsf D = 5 given 5, batch 200": _inference("nsf", _plain.nsf, "nflows"),
    "maf D = 5 given 5, batch 200": _inference("maf", _plain.maf, "nflows", "zuko"),
    "nsf-ar D = 5 given 5, batch 200": _inference("nsf-ar", _plain.nsf_ar, "nflows", "zuko"),
    "ddpm D = 2, batch 256": Case("ddpm", 256, {"shape": (2,), "levels": None}, partial(_plain.ddpm, 2)),
    "glow 28 x 28, batch 32": Case("glow", 32, {"shape": (1, 28, 28), "levels": None}, lambda model: _plain.glow(1),
                                   bars={"products": 1.15}),
    "edm 28 x 28, batch 64": Case("edm", 64, {"shape": (1, 28, 28)}, _plain.edm, draw=torch.rand,
                                  bars={"products": 1.15}),
}  # fmt: skip


class Products(TorchDispatchMode):
    """Records the matrix products and convolutions that are made within, and their backward."""

    names = {f"aten::{name}" for name in (*PRODUCT_NAMES, "convolution", "convolution_backward")}

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in self.names:
            kept = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)
            self.calls.append((function, kept, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def replay(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


class Ours:
    """Genfuse's model, as it is trained: the player of the first step, and its optimizer; with ``graphs`` as a training
    by CUDA graphs has it."""

    def __init__(self, case: Case, device: str = "cpu", graphs: bool = False) -> None:
        torch.manual_seed(0)
        self.x = case.draw(case.rows, *case.settings["shape"]).to(device)
        context = case.settings.get("condition", 0)
        self.given = torch.randn(case.rows, context).to(device) if context else None
        self.batch = Batch(self.x, self.given)
        self.model = genfuse.create(case.model, **case.settings).train().to(device)
        self.player, *others = self.model.players()
        self.parameters = list(self.player.parameters)
        for other in others:
            for weight in other.parameters:
                weight.requires_grad_(False)
        with torch.no_grad():
            self.loss()  # which starts what normalises activations
            for weight in self.parameters:
                weight += MOVED * torch.randn(weight.shape).to(device)
        self.optimizer = self.player.optimizer(self.parameters)
        for group in self.optimizer.param_groups:
            group["capturable"] = graphs
        lean(self.optimizer)  # as `training/loop.py` does

    def loss(self) -> Tensor:
        return self.model.loss(self.batch, self.player.name)[0]

    def stepped(self) -> None:
        with torch.no_grad():
            self.model.stepped(self.player.name)


def _step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, after: Callable[[], object] = lambda: None
) -> Side:
    for group in optimizer.param_groups:
        group["lr"] = RATE

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return Side(run)


def _gradients(loss: Tensor, parameters: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients as an optimizer would find them."""
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in parameters if weight.grad is not None]


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


def _graphed(case: Case) -> Side:
    ours = Ours(case, "cuda", graphs=True)
    step = _step(ours.loss, ours.optimizer, ours.stepped)
    graphed = Graphed(lambda batch: step.run() or {}, case.rows)
    return Side(lambda: graphed(ours.batch))


def sides(case: Case, compiled: bool, device: str = "cpu") -> dict[str, Side | str]:
    """All that is compared; a side that is a text is left out, and the text says why."""
    ours = Ours(case, device)
    x = ours.x if ours.given is None else torch.cat([ours.x, ours.given], -1)

    def plain(fused: bool, mode: str = "") -> tuple[_plain.Plain, Side]:
        with torch.device(device):
            model = case.plain(ours.model)
        _plain.load(model, ours.parameters, ours.model)
        betas = ours.optimizer.param_groups[0]["betas"]
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=betas, fused=fused or None)
        loss = torch.compile(model.loss, mode=mode) if mode else model.loss
        return model, _step(lambda: loss(x, *model.draw(x)), optimizer, model.after_step)

    model, step = plain(fused=True)
    with KernelNoise():
        torch.manual_seed(1)
        noise = model.draw(x)
    torch.manual_seed(1)
    with torch.backends.cudnn.flags(allow_tf32=False):  # which is PyTorch's default for convolutions, on all sides
        found = _gradients(ours.loss(), ours.parameters)
        ours.optimizer.zero_grad()
        wanted = _gradients(model.loss(x, *noise), model.parameters())
        model.zero_grad()
    wrong = _wrong(found, wanted)
    result: dict[str, Side | str] = {OURS: wrong or _step(ours.loss, ours.optimizer, ours.stepped)}
    if device == "cuda":
        result[GRAPHS] = wrong or _graphed(case)
    with Products() as products:
        step.run()
    result |= {PRODUCTS: Side(products.replay, torch.no_grad), FUSED: step, PLAIN: plain(fused=False)[1]}
    modes = {COMPILED: "default", **({THEIR_GRAPHS: "reduce-overhead"} if device == "cuda" else {})}
    for side, mode in modes.items() if compiled else ():
        try:
            _, step = plain(fused=True, mode=mode)
            for _ in range(WARM):
                step.run()
            result[side] = step
        except Exception as error:  # no compiler, or a formula that it cannot take: the row says why
            result[side] = first_line(error)
    if case.jax and device == "cpu":
        result[JAX] = _peers.absent("jax") or _peers.absent("optax") or _jax_side(case, ours, noise, wanted)
    for name, make in case.peers.items():
        if reason := _peers.absent(name):
            result[name] = reason
            continue
        theirs, loss = make(ours.x, ours.given)
        result[name] = _step(loss, torch.optim.Adam(theirs.train().to(device).parameters()))
    if device == "cuda":
        result = {side: dataclasses.replace(what, finish=torch.cuda.synchronize) if isinstance(what, Side) else what
                  for side, what in result.items()}  # fmt: skip
    return result


def _jax_side(case: Case, ours: Ours, noise: tuple[Tensor, ...], wanted: tuple[Tensor, list[Tensor]]) -> Side | str:
    assert case.jax
    _jax.quiet()
    (loss, draw), x = case.jax(ours.model), ours.x.flatten(1)
    if wrong := _wrong(_jax.loss_and_gradients(loss, ours.parameters, x, *noise), wanted):
        return wrong
    run, finish = _jax.step(loss, draw, ours.parameters, x, RATE)
    return Side(run, finish=finish)


def profile(ours: Side, seconds: float) -> dict[str, float]:
    """Shares of a step's time, with the profiler's own cost in all of them: what is under no name is PyTorch's autograd
    and Python. A kernel of genfuse that makes matrix products counts as a kernel."""
    calls, start = 3, time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        while calls > 0 or time.perf_counter() - start < seconds:
            ours.run()
            calls -= 1
        whole = 1e6 * (time.perf_counter() - start)
    shares = dict.fromkeys(SHARES, 0.0)
    for event in profiled.key_averages():
        part = next((part for part, named in SHARES.items() if named(event.key)), "rest")
        if part != "rest":
            shares[part] += event.self_cpu_time_total / whole
    return {**shares, "rest": 1 - sum(shares.values())}


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Of their time to ours, by the quantile `LEAST` of each, with the 90% interval by the bootstrap over rounds."""
    pairs, drawn = np.array([theirs, ours]), np.random.default_rng(0).integers(len(ours), size=(1000, len(ours)))
    least = np.quantile(pairs, LEAST, axis=-1)
    again = np.quantile(pairs[:, drawn], LEAST, axis=-1)
    low, high = np.quantile(again[0] / again[1], [0.05, 0.95])
    return {"value": float(least[0] / least[1]), "low": float(low), "high": float(high)}


def measure(name: str, setting: str, args: Namespace) -> dict[str, Any]:
    """One case as a row of the record, and printed. Each side has its time, and as how many times genfuse's."""
    keep_freed_memory()  # as every training of ours does; here of all sides
    effort, made = QUICK if args.quick else EFFORT[setting], sides(CASES[name], args.compile, args.device)
    running = {side: what for side, what in made.items() if isinstance(what, Side)}
    gc.collect()
    gc.freeze()  # what all sides made is no side's garbage
    times = rounds(running, "cpu", effort, time.process_time if setting == "one" else time.perf_counter)
    found: dict[str, Any] = {side: {"failure": what} for side, what in made.items() if isinstance(what, str)}
    for side, seconds in times.items():
        found[side] = dataclasses.asdict(Timing.of(seconds))
        if side != OURS and OURS in times:
            found[side]["ratio"] = ratio(seconds, times[OURS])
    row = {"case": name, "setting": setting, "sides": {side: found[side] for side in made}}
    if args.profile and OURS in running:
        row["shares"] = profile(running[OURS], effort.seconds / 10)
    print(describe_step(row), flush=True)
    return row


def _in_setting(setting: str, names: list[str], args: Namespace) -> list[dict[str, Any]]:
    if setting == "one":
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):  # on Linux
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return [measure(name, setting, args) for name in names]


def run(args: Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure and print; each setting in a process of its own, which is pinned before JAX and OpenMP make threads."""
    names = [name for name in CASES if not args.only or any(part in name for part in args.only)]
    rows: list[dict[str, Any]] = []
    settings = ["gpu"] if args.device == "cuda" else [args.threads] if args.threads else ["one", "all"]
    for setting in settings:
        threads = {"OMP_NUM_THREADS": "1"} if setting == "one" else {}
        with patch.dict(os.environ, threads), get_context("spawn").Pool(1) as pool:
            rows += pool.apply(_in_setting, (setting, names, args))
    record = {"command": "steps", "settings": {"device": args.device, "quick": args.quick}, "comparisons": rows}
    return record, bars(rows)


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Genfuse's step over its products on all threads, and over JAX's and under other libraries' on one."""
    made = []
    for row in rows:
        for key, bar in CASES[row["case"]].bars.items():
            side = AT_MOST.get(key, key)
            if row["setting"] == "gpu" or (row["setting"] == "all") != (side == PRODUCTS):
                continue
            found = (row["sides"][each] for each in (OURS, side))
            why = next((each["failure"] for each in found if "failure" in each), "")
            times = None if why else row["sides"][side]["ratio"]["value"]
            what = f"{row['case']}, {SETTINGS[row['setting']]}, "
            if key in AT_MOST:
                value = None if times is None else 1 / times
                made.append(Bar(f"{what}genfuse / {side}", value, bar, at_most=True, why=why))
            else:
                made.append(Bar(f"{what}{side} / genfuse", times, bar, why=why))
    return made


def wrong(record: dict[str, Any]) -> bool:
    """Whether a side's loss or gradients were not plain PyTorch's."""
    results = (result for row in record["comparisons"] for result in row["sides"].values())
    return any(result.get("failure", "").startswith("WRONG") for result in results)
