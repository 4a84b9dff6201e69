"""The progress bar: on standard error if that is a terminal, and in notebooks."""

import time
from types import TracebackType
from typing import Any

REFRESH = 0.1  # seconds


class Progress:
    """Steps done, loss terms, examples per second and time left, in one line. Silent where nobody would see it."""

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
