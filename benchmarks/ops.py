"""Every operator of the registry, in every implementation, beside eager PyTorch and torch.compile."""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._measure import FULL, QUICK, Side, interleave, peak_memory, replayed
from benchmarks._record import Bar
from benchmarks._report import MODES, describe
from benchmarks.operators import OPERATORS, Operator
from genfuse import ops
from genfuse.training.process import keep_freed_memory


class Speed(NamedTuple):
    """How many times as fast as ``against`` the device's default implementation has to be, in float32."""

    op: str
    size: tuple[int, ...]
    mode: str
    against: str
    factor: float
    device: str = "cpu"


BARS = (
    Speed("affine_coupling", (65536, 64), "both", "eager", 3.0),
    Speed("affine_coupling", (4096, 64), "both", "eager", 3.0),
    Speed("affine_coupling", (256, 32), "both", "eager", 1.0),
    Speed("affine_coupling", (65536, 64), "both", "compile", 1.8),
    Speed("affine_coupling", (4096, 64), "both", "compile", 1.8),
    Speed("affine_coupling", (256, 32), "both", "compile", 1.0),
    Speed("diffuse", (128, 3, 32, 32), "forward", "eager", 2.0),
    Speed("diffuse", (512, 784), "forward", "eager", 2.0),
    Speed("diffuse", (128, 3, 32, 32), "forward", "compile", 1.5),
    Speed("diffuse", (512, 784), "forward", "compile", 1.5),
    Speed("reparameterize_kl", (16384, 256), "both", "eager", 2.5),
    Speed("reparameterize_kl", (1024, 128), "both", "eager", 2.5),
    Speed("reparameterize_kl", (128, 32), "both", "eager", 1.0),
    Speed("reparameterize_kl", (1, 8), "both", "eager", 1.0),
    Speed("reparameterize_kl", (16384, 256), "both", "compile", 2.0),
    Speed("reparameterize_kl", (1024, 128), "both", "compile", 2.0),
    Speed("reparameterize_kl", (128, 32), "both", "compile", 2.0),
    Speed("reparameterize_kl", (1, 8), "both", "compile", 2.0),
    Speed("rational_quadratic_spline", (4096, 32), "both", "eager", 5.0),
    Speed("rational_quadratic_spline", (4096, 32), "both", "compile", 3.0),
    Speed("rational_quadratic_spline_inverse", (4096, 32), "both", "eager", 5.0),
    Speed("rational_quadratic_spline_inverse", (4096, 32), "both", "compile", 3.0),
    Speed("gradient_norm_penalty", (64, 784), "both", "eager", 2.5),
    Speed("gradient_norm_penalty", (256, 3072), "both", "eager", 2.5),
    Speed("gradient_norm_penalty", (64, 49152), "both", "eager", 2.5),
    Speed("gradient_norm_penalty", (64, 784), "both", "compile", 1.0),
    Speed("gradient_norm_penalty", (256, 3072), "both", "compile", 1.0),
    Speed("gradient_norm_penalty", (64, 49152), "both", "compile", 1.3),
)
MEANS = {"eager": 3.2, "compile": 2.4}  # forward and backward, over the sweep of what PyTorch does in one pass, too
BEHIND = 4.0  # microseconds, forward, at any size


def _differentiable(result: Any) -> list[Tensor]:
    results = [result] if isinstance(result, Tensor) else result
    return [tensor for tensor in results if isinstance(tensor, Tensor) and tensor.requires_grad]


def task(function: Callable, inputs: dict[str, Any], mode: str) -> Callable[[], object]:
    """What is timed. Gradients are returned and never accumulated; those of the results are made beforehand."""
    if mode == "forward":
        return lambda: function(**inputs)
    leaves = _differentiable(list(inputs.values()))
    results = _differentiable(function(**inputs))
    grads = [torch.randn_like(result) for result in results]
    if mode == "backward":
        return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(_differentiable(function(**inputs)), leaves, grads)


def compiled_task(formula: Callable, inputs: dict[str, Any], mode: str) -> Callable[[], object]:
    import torch._functorch.config as functorch

    torch.compiler.reset()  # each size has its own kernels, and no size meets the limit of recompilations
    with functorch.patch(donated_buffer=mode != "backward"):  # a graph that is used again must keep its buffers
        compiled = task(torch.compile(formula, dynamic=False), inputs, mode)
        compiled()
    return compiled


def _copy(moved: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes ``moved`` bytes in all: what memory allows an operator that moves as many."""
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def implementations(operator: Operator, device: str) -> list[str]:
    """What can run the operator on a device; the first is what the device gets by default."""
    names = ("native", "triton", "reference")
    return [name for name in names if all(ops._op.KERNELS[kernel].find(name, device)[0] for kernel in operator.kernels)]


def first_line(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}".splitlines()[0]


def check(operator: Operator, size: tuple[int, ...], dtype: torch.dtype, device: str, name: str) -> dict[str, Any]:
    """The error against float64, or why it is wrong: over twice eager PyTorch's in this dtype and four roundings."""
    try:
        with ops.using(name):
            error = operator.error(size, dtype, device)
    except Exception as reason:
        return {"failure": f"WRONG: {first_line(reason)}"}
    allowed = 2 * operator.eager_error(size, dtype, device, error) + 4 * torch.finfo(dtype).eps
    if not error <= allowed:  # NaN is wrong too
        return {"failure": f"WRONG: error {error:.1e} against float64, {allowed:.1e} allowed"}
    return {"error": error}


def _compare(operator: Operator, size: tuple[int, ...], args: Namespace) -> Iterator[dict[str, Any]]:
    """For each mode all sides at one size: what they have got wrong, or else how long they take and what they hold."""
    dtype, device = getattr(torch, args.dtype), args.device
    facts = {name: check(operator, size, dtype, device, name) for name in implementations(operator, device)}
    moved = dict(zip(("forward", "backward"), operator.moved(size, dtype.itemsize), strict=True))
    moved["both"] = moved["forward"] + moved["backward"]
    # Autograd launches a backward pass on the stream of its forward pass, so a graph has both or the latter.
    for mode in args.mode or (["forward", "both"] if args.replay else MODES):
        inputs = operator.arguments(size, dtype, device)
        if mode != "forward" and not _differentiable(list(inputs.values())):
            continue
        results = {"eager": {"error": operator.error(size, dtype, device, eager=True)}, "compile": {}, **facts}
        sides = {"copy": Side(_copy(moved[mode], device)), "eager": Side(task(operator.eager, inputs, mode))}
        try:
            if args.compile:
                sides["compile"] = Side(compiled_task(operator.eager, inputs, mode))
            else:
                results["compile"] = {"failure": "left out by --no-compile"}
        except Exception as reason:  # no compiler, or a formula that it cannot take: the row says why
            results["compile"] = {"failure": first_line(reason)}
        for name, fact in facts.items():
            if "failure" not in fact:
                with ops.using(name):
                    sides[name] = Side(task(operator.function, inputs, mode), partial(ops.using, name))
        if args.replay:
            sides = {name: replayed(side) for name, side in sides.items()}
        timings = interleave(sides, device, QUICK if args.quick else FULL)
        copy = timings.pop("copy")
        for name, timing in timings.items():
            memory = peak_memory(sides[name], device)
            results[name] = {**results[name], **dataclasses.asdict(timing), "memory": memory}
        yield {
            "op": operator.name,
            "size": list(size),
            "mode": mode,
            "bytes": moved[mode],
            "copy": copy.median,
            "default": next(iter(facts)),
            "sides": results,
        }


def judge(comparisons: list[dict[str, Any]], device: str, dtype: str) -> list[Bar]:
    """The bars that speak of what was compared."""
    found = {(done["op"], tuple(done["size"]), done["mode"]): done for done in comparisons}
    judged = []
    for bar in BARS:
        done = found.get((bar.op, bar.size, bar.mode))
        if done is None or bar.device != device or dtype != "float32":
            continue
        ours, theirs = done["sides"][done["default"]], done["sides"][bar.against]
        failure = ours.get("failure") or theirs.get("failure") or ""
        value = None if failure else theirs["median"] / ours["median"]
        what = f"{bar.op} {bar.size} {MODES[bar.mode]} vs {bar.against}"
        judged.append(Bar(what, value, bar.factor, "x", why=failure))
    return judged + (_over_the_sweep(comparisons) if device == "cpu" and dtype == "float32" else [])


def _over_the_sweep(comparisons: list[dict[str, Any]]) -> list[Bar]:
    """Geometric means of all that was compared, and the forward pass that is furthest behind."""

    def times(done: dict[str, Any], side: str) -> tuple[float, float] | None:
        ours, theirs = done["sides"][done["default"]], done["sides"].get(side, {})
        return (ours["median"], theirs["median"]) if "median" in ours and "median" in theirs else None

    comparisons = [done for done in comparisons if done["op"] != "autoregressive_inverse"]
    bars = []
    for against, factor in MEANS.items():
        ratios = [t[1] / t[0] for done in comparisons if done["mode"] == "both" and (t := times(done, against))]
        if ratios:
            bars.append(Bar(f"{MODES['both']} vs {against}, geometric mean of {len(ratios)} sizes",
                            math.exp(sum(map(math.log, ratios)) / len(ratios)), factor, "x"))  # fmt: skip
    forward = [(done, t) for done in comparisons if done["mode"] == "forward" and (t := times(done, "eager"))]
    if forward:
        done, (ours, theirs) = max(forward, key=lambda found: found[1][0] - found[1][1])
        what = f"{MODES['forward']}, furthest behind eager: {done['op']} {tuple(done['size'])}"
        bars.append(Bar(what, 1e6 * (ours - theirs), BEHIND, " us", at_most=True))
    return bars


def _sizes(operator: Operator, args: Namespace) -> list[tuple[int, ...]]:
    sizes = {*operator.sizes, *(bar.size for bar in BARS if bar.op == operator.name and bar.device == args.device)}
    chosen = args.size or sorted(sizes, key=math.prod)
    return chosen[:2] if args.quick and not args.size else chosen


def run(args: Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure and print the operators, sizes and modes that were asked for; returns the record and its bars."""
    keep_freed_memory()  # or where glibc gave it back would depend on the order of a few frees, on either side
    comparisons = []
    for name in args.op or OPERATORS:
        for size in _sizes(OPERATORS[name], args):
            for comparison in _compare(OPERATORS[name], size, args):
                comparisons.append(comparison)
                print(describe(comparison), flush=True)
    settings = {"device": args.device, "dtype": args.dtype, "quick": args.quick, "replay": args.replay}
    record = {"command": "ops", "settings": settings, "comparisons": comparisons}
    return record, judge(comparisons, args.device, args.dtype)


def wrong(record: dict[str, Any]) -> bool:
    """Whether an implementation of ours gave a wrong result or failed."""
    baselines = ("eager", "compile")
    return any(
        "failure" in result
        for comparison in record["comparisons"]
        for side, result in comparison["sides"].items()
        if side not in baselines
    )
