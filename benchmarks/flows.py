"""Normalizing flows beside nflows, normflows and zuko: splines, sampling, memory, and what they learn."""

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import genfuse
import genfuse.ops
from benchmarks import _peers, ops
from benchmarks._measure import Effort, Side, peak_memory, seconds
from benchmarks._part import OURS, Part
from benchmarks._peers import Flow
from benchmarks._record import Bar
from benchmarks.operators import OPERATORS

SLOW = Effort(block=0.02, rounds=(5, 51), seconds=6)  # of calls that take seconds
RATE = 1e-5  # of the optimizers that are timed: a step costs the same, and the model stays as it is
DENSITY_ERROR = 1e-4  # of log p(x) in the model's dtype, against float64, as a share of it
GRADIENT_ERROR = 1e-2  # of the gradient likewise, of its norm: rounding moves an example across a ReLU's kink
ROUND_TRIP_ERROR = 1e-3  # of x after encode and decode, as a share of the largest x
MEMORY_GROWTH, REVERSIBLE_ERROR = 1.3, 1e-4


def _gradients(model: Any, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(-model.log_prob(x).mean(), list(model.parameters())))


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference in any tensor, as a share of the largest value in it."""
    return max(
        float((f - w).abs().max() / w.abs().max().clamp(min=torch.finfo(w.dtype).tiny))
        for f, w in zip(found, wanted, strict=True)
    )


def _norm(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the difference, as a share of that of what is wanted, over all tensors."""
    squares = [((f - w).square().sum().double(), w.square().sum().double()) for f, w in zip(found, wanted, strict=True)]
    off, whole = map(sum, zip(*squares, strict=True))
    return float(off / whole) ** 0.5


def _moved(model: Any, by: float) -> Any:
    """A copy with all weights moved a little, as a flow starts near the identity."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn_like(weight)
    return model


def _wrong(model: Any, x: Tensor) -> str:
    """What is wrong with density, gradient or round trip, against the reference in float64; or an empty text."""
    model = _moved(model, 0.02)
    with genfuse.ops.using("reference"):
        exact = copy.deepcopy(model).double()
        density, gradients = exact.log_prob(x.double()).detach(), _gradients(exact, x.double())
    with torch.no_grad():
        found, back = model.log_prob(x), model.decode(model.encode(x))
    errors = {
        "density": (_difference([found.double()], [density]), DENSITY_ERROR),
        "gradient": (_norm([g.double() for g in _gradients(model, x)], gradients), GRADIENT_ERROR),
        "round trip": (_difference([back], [x]), ROUND_TRIP_ERROR),
    }
    wrong = [f"{name} is off by {error:.1e}" for name, (error, allowed) in errors.items() if not error <= allowed]
    return f"WRONG: {', '.join(wrong)}" if wrong else ""


def spline(part: Part) -> None:
    """`rational_quadratic_spline`, 8 bins, linear tails beyond 3, from raw parameters to results and log-determinants.
    nflows is given the same raw parameters; zuko, which squashes them first, as many. The inverse alone is timed
    without gradients. `zuko compiled` is torch.compile of zuko's."""
    args = part.args
    size, compiled = part.size((4096, 32), (64, 4)), "zuko compiled"
    for name, inverse, mode in (
        ("rational_quadratic_spline", False, "both"),
        ("rational_quadratic_spline_inverse", True, "forward"),
        ("rational_quadratic_spline_inverse", True, "both"),
    ):
        operator = OPERATORS[name]
        inputs = operator.arguments(size, torch.float32, args.device)
        context = torch.no_grad if mode == "forward" else contextlib.nullcontext
        run, what = operator.function, f"{name} {size} {ops.MODES[mode]}"
        check = ops.check(operator, size, torch.float32, args.device, ops.implementations(operator, args.device)[0])
        sides: dict[str, Side | str] = {OURS: check.get("failure") or Side(ops.task(run, inputs, mode), context)}
        for library, make in {"nflows": _peers.nflows_spline, "zuko": _peers.zuko_spline}.items():
            if reason := _peers.absent(library):
                sides[library] = reason
                continue
            theirs = make(8, 3.0, inverse)
            sides[library] = Side(ops.task(theirs, inputs, mode), context)
            if library == "nflows":
                with torch.no_grad():
                    error = _difference(list(run(**inputs)), list(theirs(**inputs)))
                part.row(f"{name} {size}, genfuse against nflows", value=error, unit=" of the largest value")
            elif args.compile:
                try:
                    with context():
                        sides[compiled] = Side(ops.compiled_task(theirs, inputs, mode), context)
                except Exception as reason:  # no compiler, or a formula that it cannot take: the row says why
                    sides[compiled] = ops.first_line(reason)
        sides.setdefault(compiled, "left out by --no-compile" if not args.compile else str(sides["zuko"]))
        part.compare(what, sides, {"nflows": 10, "zuko": 8, compiled: 3})


def _flows(part: Part, name: str, x: Tensor, left_out: str = "", **settings: Any) -> dict[str, Flow | str]:
    """Ours, checked on x (N, D), and the peers', unless a text says why they are left out."""
    torch.manual_seed(0)
    device, features = part.args.device, x.shape[1]
    model = genfuse.create(name, shape=(features,), levels=None, **settings).to(device)
    flows: dict[str, Flow | str] = {OURS: _wrong(model, x) or Flow(model, model.log_prob, model.sample)}
    for library, make in _peers.MODELS[name].items():
        flows[library] = _peers.absent(library) or left_out or make(features)
    for flow in flows.values():
        if isinstance(flow, Flow):
            flow.model.to(device)
    return flows


def _sides(flows: dict[str, Flow | str], make: Callable[[Flow], Side]) -> dict[str, Side | str]:
    return {name: flow if isinstance(flow, str) else make(flow) for name, flow in flows.items()}


def _step(flow: Flow, batches: Tensor) -> Side:
    """A step of training on each of the batches (M, N, D) in turn, with our own optimizer or plain Adam."""
    if hasattr(flow.model, "players"):
        (player,) = flow.model.players()
        optimizer = player.optimizer(player.parameters)
    else:
        optimizer = torch.optim.Adam(flow.model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = RATE
    flow.model.train()
    batch = itertools.cycle(batches)

    def update() -> None:
        (-flow.log_prob(next(batch)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(update)


def inside(part: Part) -> None:
    """A step of training of the peers' own models on normal noise, with our operators in place of their splines and
    affine transforms; the networks, and all else, are theirs. zuko's come in three tensors, which are put together
    first. nsf: 5 couplings between LU-linear layers, each with a residual network of 2 blocks of 128, 8 bins; maf,
    nsf-ar: 5 layers of 2 hidden layers of 256. `genfuse.integrations` replaces networks as well: see
    `python -m benchmarks integrations`."""
    rows, features = part.size((256, 43), (16, 6))
    batches = torch.randn(64, rows, features, device=part.args.device)
    bars = {("nsf", "nflows"): 1.0, ("nsf", "normflows"): 1.0, ("nsf-ar", "zuko"): 1.8, ("maf", "zuko"): 1.1}
    for (name, library), bar in bars.items():
        what = f"{library}'s {name} ({rows}, {features}), a step"
        if reason := _peers.absent(library):
            part.compare(what, {OURS: reason, library: reason}, {library: bar})
            continue
        torch.manual_seed(0)
        flow, context = _peers.MODELS[name][library](features), partial(_peers.ours_inside, library)
        flow.model.to(part.args.device)
        with torch.no_grad():
            wanted = flow.log_prob(batches[0])
            with context():
                error = _difference([flow.log_prob(batches[0])], [wanted])
        ours = f"WRONG: log_prob is off by {error:.1e}" if error > DENSITY_ERROR else _step(flow, batches)
        sides: dict[str, Side | str] = {OURS: ours, library: _step(flow, batches)}
        if isinstance(ours, Side):
            sides[OURS] = Side(ours.run, context)
        part.compare(what, sides, {library: bar})


def sampling(part: Part) -> None:
    """Autoregressive flows, 5 layers of 2 hidden layers of 256: samples, and the log-density of as many rows, both
    without gradients. A peer's sampling takes D passes a layer; where that would take minutes it is left out."""
    rows = part.size(1000, 20)
    verbs: dict[str, Callable[[Flow, Tensor], object]] = {
        "log_prob": lambda flow, x: flow.log_prob(x),
        "samples": lambda flow, x: flow.sample(len(x)),
    }
    for name, largest in (("maf", 63), ("nsf-ar", 43)):
        for features in part.size((6, 43, 63, 784), (3,)):
            x, what = torch.randn(rows, features, device=part.args.device), f"{name} ({rows}, {features})"
            flows = _flows(part, name, x, "left out: it takes minutes" if features > largest else "")
            for flow in flows.values():
                if isinstance(flow, Flow):
                    flow.model.eval()
            times = {}
            for verb, call in verbs.items():
                sides = _sides(flows, lambda flow, call=call, x=x: Side(partial(call, flow, x), torch.no_grad))
                times[verb] = part.compare(f"{what}, {verb}", sides, effort=SLOW).get(OURS)
            why = flows[OURS] if isinstance(flows[OURS], str) else ""
            share = None if why else times["samples"].median / times["log_prob"].median
            if features == part.size(43, 3):
                part.bars.append(Bar(f"{what}, samples / log_prob", share, 4, "x", at_most=True, why=why))
            elif not why:
                part.row(f"{what}, samples / log_prob", value=share, unit="x")


def memory(part: Part) -> None:
    """The most that a training step of nsf holds at a time, parameters and their gradients left out, with and without
    `reversible`; and by how much the two gradients differ, on weights that were moved from where they start: as the
    norm of the difference over that of the whole gradient, and in any one tensor, as a share of its largest value.
    Beside it stands what rounding alone does: the ordinary gradient against that in float64. It is large in small
    tensors, where an example that lies on the other side of a ReLU's kink or of a spline's knot counts. Twice that is
    allowed."""
    layers, (rows, features) = part.size((8, 32, 128), (2, 4, 8)), part.size((1024, 64), (16, 8))
    x = torch.randn(rows, features, device=part.args.device)
    kinds = {False: "ordinary", True: "reversible"}
    held: dict[bool, list[int]] = {kind: [] for kind in kinds}
    for count in layers:
        what = f"nsf ({rows}, {features}), {count} layers"
        torch.manual_seed(0)
        start = genfuse.create("nsf", shape=(features,), levels=None, layers=count).to(part.args.device)
        model = _moved(start, 0.005)
        gradients = {}
        for model.flow.transform.reversible, kind in kinds.items():
            gradients[kind] = _gradients(model, x)
        model.flow.transform.reversible = False
        gradients["float64"] = _gradients(copy.deepcopy(model).double(), x.double())
        shares = {}
        for pair in (("reversible", "ordinary"), ("ordinary", "float64")):
            found, wanted = (gradients[kind] for kind in pair)
            compared, shares[pair[0]] = f"{what}, gradients, {' against '.join(pair)}", _norm(found, wanted)
            part.row(
                compared, value=shares[pair[0]], unit=f" of the norm, {_difference(found, wanted):.1e} in a tensor"
            )
        allowed = max(REVERSIBLE_ERROR, 2 * shares["ordinary"])
        part.bars.append(Bar(f"{what}, gradients, reversible", shares["reversible"], allowed, at_most=True))
        size = sum(gradient.nbytes for gradient in gradients["ordinary"])
        del gradients, found, wanted
        update = _step(Flow(model, model.log_prob, model.sample), x[None])
        for model.flow.transform.reversible, kind in kinds.items():
            held[model.flow.transform.reversible].append(peak_memory(update, part.args.device) - size)
            part.row(f"{what}, a step, {kind}", memory=held[model.flow.transform.reversible][-1])
    what = f"nsf ({rows}, {features}), reversible, memory of {layers[-1]} layers / {layers[0]}"
    part.bars.append(Bar(what, held[True][-1] / held[True][0], MEMORY_GROWTH, "x", at_most=True))


def _power(root: Path) -> Any:
    """POWER as a data set: the test file as it is, and one in ten of the other one's rows for validation."""
    train, test = (
        np.loadtxt(root / "power" / f"power_{part}_10000.csv", delimiter=",", skiprows=1) for part in ("train", "test")
    )
    order = np.random.default_rng(0).permutation(len(train))
    held, kept = np.split(train[order], [len(train) // 10])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "power.npz")
        np.savez(path, train=kept, validation=held, test=test)
        return genfuse.load_data(f"npz:{path}")


def _learn(part: Part, data: Any, name: str, settings: dict[str, Any], side: str) -> tuple[float, float]:
    """Log-likelihood of the test rows of a table, in nats, in the units of its file; and the training's seconds."""
    options: dict[str, Any] = {"steps": part.size(4000, 3), "batch_size": 128, "lr": 5e-4, "grad_clip": 5.0}
    torch.manual_seed(0)
    if side == OURS:
        model = genfuse.create(name, data, **settings).to(part.args.device)
        flow = Flow(model, model.log_prob, model.sample)
        trainer = genfuse.Trainer(**options, schedule="cosine", keep="best", seed=0, device=part.args.device)
        took = seconds(partial(trainer.fit, model, data), part.args.device)
    else:
        flow = _peers.MODELS[name][side](data.shape[0], **settings)
        flow.model.to(part.args.device)
        x, held = data.splits["train"].x, data.splits["validation"].x
        took = seconds(partial(_peers.fit, flow, x, held, **options), part.args.device)
    return _peers.log_likelihood(flow, data.splits["test"].x) - sum(map(math.log, data.scaling.std)), took


def tables(part: Part) -> None:
    """Log-likelihood of the test rows, in nats, in the units of the files, and the seconds of the training. All sides:
    4,000 steps of Adam, batches of 128, the learning rate falling from 5e-4 to 0 along a cosine, gradients clipped to a
    norm of 5, and at the end of each epoch a validation, of which the best gives the weights. nsf: 5 couplings between
    LU-linear layers, as above, with dropout 0.2, which is nflows' setting. maf, nsf-ar: 5 layers of 2 hidden layers, of
    64 (zuko's default) or 256. One run each, one after the other."""
    root = Path(part.args.data_root or os.environ.get("GENFUSE_DATA") or ".")
    small, wide = {"hidden": (64, 64)}, {"hidden": (256, 256)}
    models: list[tuple[str, dict[str, Any]]] = [
        ("nsf", {"dropout": 0.2}), ("maf", small), ("maf", wide), ("nsf-ar", small),
    ]  # fmt: skip
    asked = {"nsf": -13.9, "maf": -14.1}  # of MINIBOONE
    for table, data in {"MINIBOONE": genfuse.load_data(f"npy:{root / 'miniboone40'}"), "POWER": _power(root)}.items():
        if part.args.quick:
            few = {name: dataclasses.replace(split, x=split.x[:256]) for name, split in data.splits.items()}
            data = dataclasses.replace(data, splits=few)
        data = data.to(part.args.device)
        for name, settings in models:
            what = ", ".join([table, name, *(f"{key} {value}" for key, value in settings.items())])
            took: dict[str, float] = {}
            for side in [OURS, *(library for library in ("nflows", "zuko") if library in _peers.MODELS[name])]:
                if side != OURS and (reason := _peers.absent(side)):
                    part.row(f"{what}, {side}", failure=reason)
                    continue
                nats, took[side] = _learn(part, data, name, settings, side)
                part.row(f"{what}, {side}", value=nats, unit=f" nats in {took[side]:.3g} s")
                if table == "MINIBOONE" and side == OURS and name in asked and settings != small:
                    part.bars.append(Bar(f"{what}, test log-likelihood", nats, asked[name], " nats"))
            if table == "MINIBOONE" and name == "nsf":
                share = took[OURS] / took["nflows"] if "nflows" in took else None
                bar = Bar(f"{what}, seconds, genfuse / nflows", share, 0.4, at_most=True, why=_peers.absent("nflows"))
                part.bars.append(bar)


IMAGES = {  # settings, steps, and what was published
    "realnvp": ({"channels": (16,)}, 1200, 1.06),
    "glow": ({"channels": (32,), "steps": 8}, 1200, 1.05),
}


def images(part: Part) -> None:
    """MNIST, uniform dequantisation, bits per dimension: a bound by one draw of the noise, on the first 2,000 images of
    the test split. The published figures are of models many times as large, trained for days on GPUs: they are not the
    same setting, and are here only to tell how far a few minutes of two cores lead."""
    data = genfuse.load_data("mnist", root=part.args.data_root).to(part.args.device)
    limit = part.size(2000, 20)
    for name, (settings, steps, published) in IMAGES.items():
        torch.manual_seed(0)
        model = genfuse.create(name, data, **settings)
        trainer = genfuse.Trainer(
            steps=part.size(steps, 2), batch_size=part.size(64, 4), schedule="cosine", seed=0, device=part.args.device
        )
        took = seconds(lambda model=model, trainer=trainer: trainer.fit(model, data), part.args.device)
        with torch.no_grad():
            starts = range(0, limit, 100)
            bits = torch.cat([model.bits_per_dim(data.batch("test", slice(i, min(i + 100, limit))).x) for i in starts])
        chosen = ", ".join(f"{key} {value}" for key, value in settings.items())
        what = f"MNIST, {name}, {chosen}, {trainer.steps} steps of {trainer.batch_size}"
        part.row(what, value=float(bits.mean()), unit=f" bits/dim in {took:.3g} s")
        part.row(f"MNIST, {name}, published", value=published, unit=" bits/dim; not the same setting")


PARTS = {part.__name__: part for part in (spline, inside, sampling, memory, tables, images)}
QUALITY = ("tables", "images")
