"""The clock and the memory meter. All sides take turns, so that drift of the machine hits all of them alike."""

import contextlib
import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Side:
    """One of the things compared: what is called, the context of its calls, which is entered outside the clock, and
    what waits for the work that they began."""

    run: Callable[[], object]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext
    finish: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Effort:
    block: float  # seconds of one side's turn, at least one call
    rounds: tuple[int, int]  # fewest and most turns that each side takes
    seconds: float  # no further round is begun after this time


QUICK = Effort(block=0.002, rounds=(5, 5), seconds=0)
FULL = Effort(block=0.02, rounds=(9, 51), seconds=6)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and the 20% and 80% quantiles over ``count`` blocks (CPU) or calls (GPU)."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, times: list[float]) -> "Timing":
        low, median, high = (float(q) for q in np.quantile(times, [0.2, 0.5, 0.8]))
        return cls(median, low, high, len(times))


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """One thread, on one core where the system lets it be chosen."""
    threads, cores = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0)
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def seconds(run: Callable[[], object], device: str) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _cpu_clock(side: Side, block: float, now: Callable[[], float]) -> Callable[[], list[float]]:
    def turn() -> list[float]:
        start = now()
        for _ in range(number):
            side.run()
        side.finish()
        return [(now() - start) / number]

    number = 1
    for _ in range(2):  # the first estimate is of cold calls
        number = max(1, int(block / turn()[0]))
    return turn


def _gpu_clock(side: Side, block: float, now: Callable[[], float]) -> Callable[[], list[float]]:
    from triton.testing import do_bench

    ms = 1e3 * block
    return lambda: [t / 1e3 for t in do_bench(side.run, warmup=ms / 4, rep=ms, return_mode="all")]


def replayed(side: Side) -> Side:
    """The side as a CUDA graph, whose replays are what its kernels take, without what the host does to launch them."""
    with side.context():
        for _ in range(3):
            side.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = side.run()
    return Side(lambda: (graph.replay(), kept), side.context)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rounds(
    sides: dict[str, Side], device: str, effort: Effort, now: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds a call of all sides in rounds: in each round every side has one turn, in a new order."""
    clock = _gpu_clock if device == "cuda" else _cpu_clock
    turns = {}
    for name, side in sides.items():
        with side.context():
            turns[name] = clock(side, effort.block, now)
    times: dict[str, list[float]] = {name: [] for name in sides}
    fewest, most = effort.rounds
    end = time.perf_counter() + effort.seconds
    shuffle = random.Random(0)
    for round_ in range(most):
        if round_ >= fewest and time.perf_counter() > end:
            break
        for name in shuffle.sample(list(sides), len(sides)):
            with sides[name].context(), _no_garbage_collection():
                times[name] += turns[name]()
    return times


def interleave(
    sides: dict[str, Side], device: str, effort: Effort, now: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time all sides by `rounds`."""
    return {name: Timing.of(times) for name, times in rounds(sides, device, effort, now).items()}


def peak_memory(side: Side, device: str) -> int:
    """Most bytes that one call holds at a time beyond what was allocated before it: temporaries and results."""
    with side.context():
        side.run()
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            side.run()
            return torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            side.run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak
