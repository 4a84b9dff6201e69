"""A benchmark in parts, each a function of what it measures: `flows`, `gans` and `examples`.

On a CPU they run in one pinned thread, and times are of the processor: what else a machine does counts little.
"""

import contextlib
import dataclasses
import inspect
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks._measure import FULL, QUICK, Effort, Side, Timing, interleave, pinned
from benchmarks._record import Bar
from benchmarks._report import figure

OURS = "genfuse"


@dataclass
class Part:
    """What one part measured. Rows are printed as they come."""

    args: Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def row(self, what: str, **values: Any) -> None:
        self.rows.append({"what": what, **values})
        print(f"{what}: {figure(self.rows[-1])}", flush=True)

    def size(self, full: Any, quick: Any) -> Any:
        return quick if self.args.quick else full

    def compare(
        self, what: str, sides: dict[str, Side | str], bars: dict[str, float] | None = None, effort: Effort = FULL
    ) -> dict[str, Timing]:
        """Time all sides in turns; a side that is a text has no time, and the text says why. ``bars``: how many times
        as fast as each of these sides ours has to be, on the CPU."""
        runs = {name: side for name, side in sides.items() if isinstance(side, Side)}
        times = interleave(runs, self.args.device, QUICK if self.args.quick else effort, time.process_time)
        failures = {name: side for name, side in sides.items() if isinstance(side, str)}
        for name in sides:
            if name in failures:
                self.row(f"{what}, {name}", failure=failures[name])
                continue
            values = dataclasses.asdict(times[name])
            if name != OURS and OURS in times:
                values["ratio"] = times[name].median / times[OURS].median
            self.row(f"{what}, {name}", **values)
        for name, factor in (bars or {}).items() if self.args.device == "cpu" else ():
            why = failures.get(OURS) or failures.get(name) or ""
            value = None if why else times[name].median / times[OURS].median
            self.bars.append(Bar(f"{what} vs {name}", value, factor, "x", why=why))
        return times


def run(
    args: Namespace, functions: dict[str, Callable[[Part], None]], quality: tuple[str, ...]
) -> tuple[dict[str, Any], list[Bar]]:
    """Measure and print the parts that were asked for, without those of quality unless asked; the record and bars."""
    chosen = args.only or [name for name in functions if args.quality or name not in quality]
    parts, bars = [], []
    for name in chosen:
        part = Part(args)
        with pinned() if args.device == "cpu" else contextlib.nullcontext():
            functions[name](part)
        parts.append({"name": name, "about": inspect.getdoc(functions[name]), "rows": part.rows})
        bars += part.bars
    return {"command": args.command, "settings": {"device": args.device, "quick": args.quick}, "parts": parts}, bars


def wrong(record: dict[str, Any]) -> bool:
    """Whether something of ours gave a wrong result."""
    return any(row.get("failure", "").startswith("WRONG") for part in record["parts"] for row in part["rows"])
