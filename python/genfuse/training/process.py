"""What a training does to its process: random streams, interrupts, memory; and the progress bar."""

import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from genfuse.models import GenerativeModel

SMALL = 1e8  # operations of a step that one core does in 2 to 4 ms
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
REFRESH = 0.1  # seconds, of the progress bar
ORDER, NOISE, TEST, AUGMENTATION = range(4)  # what a random stream is for


def seed_of(*key: int) -> int:
    """A seed from several integers. Mixed, since torch's CPU generator uses the low 32 bits of a seed alone."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def generators(device: torch.device) -> dict[str, Any]:
    """Where torch's global generators are read and set: the CPU's, and the device's own."""
    return {"cpu": torch.random, **({} if device.type == "cpu" else {device.type: torch.get_device_module(device)})}


def keep_freed_memory() -> None:
    """Keep glibc from giving the memory of each step's temporaries, up to 2 GiB, back to the system, to be faulted in
    and filled with zeros again: every block of over 32 MB, unless glibc is too old for that, and what is free at the
    end of its heap.

    On the CPU this is some 5% of a small model's step, and 15% and 40% of a VAE's of images of 64 and 128 pixels.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another library, which keeps it or cannot be told
        return
    mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def fitting_threads(model: GenerativeModel, batch_size: int, recorded: Any = None) -> Iterator[None]:
    """Let a training whose steps are `SMALL` run on one thread of torch's in place of all, and one that goes on on as
    many as were ``recorded``, if there are so many; afterwards it is as before. The environment has the last word.

    Threads that wait for each other gain nothing there, and on busy cores make a step 10 to 70 times as long. A step is
    taken for 6 operations for each weight and example, and of an image's convolution for each pixel.
    """
    before = torch.get_num_threads()
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        pixels = math.prod((model.shape or ())[1:])
        weights = (weight for weight in model.parameters() if not is_lazy(weight))
        uses = sum(weight.numel() * (pixels if weight.dim() > 3 else 1) for weight in weights)
        usual = 1 if 6 * batch_size * uses < SMALL else before
        torch.set_num_threads(min(before, recorded if type(recorded) is int and recorded > 0 else usual))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Put torch's global generators back in the end. (torch.random.fork_rng does not know mps.)"""
    before = {kind: generator.get_rng_state() for kind, generator in generators(device).items()}
    try:
        yield
    finally:
        for kind, generator in generators(device).items():
            generator.set_rng_state(before[kind])


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Hold the first SIGINT, SIGTERM or SIGHUP back; yields a function that gives its number, or 0 so far.

    The second one has the effect that it had before. One that is ignored, as under nohup, stays so.
    """
    caught = 0
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def catch(number: int, frame: Any) -> None:
        nonlocal caught
        caught = number
        put_back()

    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {
            number: signal.signal(number, catch) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
        }
    try:
        yield lambda: caught
    finally:
        put_back()


class Progress:
    """Steps done, loss terms, examples per second and time left, in one line: on standard error if that is a terminal,
    and in notebooks. Silent where nobody would see it."""

    def __init__(self, total: int, done: int) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        self._console = Console(stderr=True)
        self._notebook = self._console.is_jupyter
        seen = self._console.is_terminal and not self._notebook
        self._bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(bar_width=10),
            progress.TaskProgressColumn(),
            progress.TextColumn(
                "{task.fields[terms]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            progress.TextColumn("{task.fields[rate]}", style="cyan"),
            progress.TimeRemainingColumn(compact=True),
            console=self._console,
            expand=True,
            disable=not seen,
        )
        self._task = self._bar.add_task("", total=total, completed=done, epoch="", terms="", rate="")
        self._next = 0.0 if seen or self._notebook else float("inf")
        self._done, self._epoch = done, 0
        self._shown: Any = None  # in a notebook

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._refresh()
        self._bar.stop()

    def step(self, done: int, epoch: int) -> None:
        """Called at every step, so cheap between two refreshes."""
        self._done, self._epoch = done, epoch
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH
            self._refresh()

    def _refresh(self) -> None:
        self._bar.update(self._task, completed=self._done, epoch=self._epoch)
        if self._notebook:  # rich would need ipywidgets there
            from IPython.display import display  # type: ignore[import-not-found]

            task = self._bar.tasks[0]
            text = f"epoch {self._epoch}  {task.percentage:3.0f}%  {task.fields['terms']}  {task.fields['rate']}"
            bar = f"<progress max=100 value={task.percentage:.0f}></progress> {text}"
            line = {"text/plain": text, "text/html": bar}
            if self._shown is None:
                self._shown = display(line, raw=True, display_id=True)
            else:
                self._shown.update(line, raw=True)

    def terms(self, terms: dict[str, float], rate: float) -> None:
        """Show loss terms, and the speed in examples per second."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
        self._bar.update(self._task, terms=shown, rate=f"{rate:,.0f} examples/s")
