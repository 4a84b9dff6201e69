"""The progress bar: on standard error, and only if that is a terminal."""

import time
from types import TracebackType

REFRESH = 0.1  # seconds


class Progress:
    """Steps done, loss terms, examples per second and time left. Silent where standard error is no terminal."""

    def __init__(self, total: int, done: int) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(bar_width=20),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[terms]}", markup=False),
            progress.TextColumn("{task.fields[rate]}", style="cyan"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done, epoch="", terms="", rate="")
        self._next = 0.0 if console.is_terminal else float("inf")
        self._done, self._epoch = done, 0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
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

    def terms(self, terms: dict[str, float], rate: float) -> None:
        """Show loss terms, and the speed in examples per second."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
        self._bar.update(self._task, terms=shown, rate=f"{rate:,.0f} examples/s")
