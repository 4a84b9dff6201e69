"""The record of a run, which is JSON: the machine, the rows measured, and the bars they are held against."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import genfuse
from genfuse import ops

ROOT = Path(__file__).parents[1]
VERSION = 1


@dataclass(frozen=True)
class Bar:
    """A figure that must be reached. ``value`` is None where it could not be measured, and ``why`` then says why."""

    what: str
    value: float | None
    bar: float
    unit: str = ""
    at_most: bool = False
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return f"NOT MEASURED: {self.why}"
        return "met" if (self.value <= self.bar if self.at_most else self.value >= self.bar) else "NOT MET"

    @property
    def limit(self) -> str:
        return f"{'at most ' if self.at_most else ''}{self.bar:g}{self.unit}"

    @property
    def got(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.2f}{self.unit}" if abs(self.value) >= 0.01 else f"{self.value:.1e}{self.unit}"

    def __str__(self) -> str:
        return f"{self.what}: {self.got} (bar {self.limit}) {self.verdict}"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(device: str) -> dict[str, str]:
    """What the figures depend on: hardware, drivers, versions, commit and date. Warns where others use the machine."""
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = " with changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"warning: this machine is busy (load {load:.1f}): times mean little", file=sys.stderr)
    header = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit + changed,
        "genfuse": ", ".join(
            [genfuse.__version__, *(f"{key} {value}" for key, value in ops.build_info().items() if value)]
        ),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU": f"{_processor()}, {os.cpu_count()} cores",
        "SIMD": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "load before": f"{load:.1f}",
    }
    if device == "cuda":
        import triton

        header |= {
            "GPU": torch.cuda.get_device_name(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "CUDA": str(torch.version.cuda),
            "triton": triton.__version__,
        }
    return header


def record(body: dict[str, Any], bars: list[Bar]) -> dict[str, Any]:
    return {"version": VERSION, **body, "bars": [asdict(bar) for bar in bars]}


def save(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read a record. Raises ValueError, naming the file, for anything that is not one of this version."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a record of benchmarks: {error}") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise ValueError(f"{path} is not a record of version {VERSION}: run the benchmark again with --json {path}")
    return record
