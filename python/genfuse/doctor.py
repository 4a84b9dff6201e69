"""What ``genfuse doctor`` prints: the facts that decide what runs here, and how fast."""

import importlib.metadata
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from genfuse import plugins
from genfuse._version import __version__
from genfuse.errors import DataError, PluginError

SWITCHES = ("GENFUSE_IMPL", "GENFUSE_DISABLE_PLUGINS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def report(data_root: Path | None = None) -> Iterator[str]:
    """The lines of the report. Raises DataError, in the end, where ``data_root`` is given and is no folder."""
    yield from _section("versions", _versions())
    yield from _section("hardware", _hardware())
    yield from _section("kernels", _kernels())
    yield from _section("plugins", _plugins())
    root = data_root or os.environ.get("GENFUSE_DATA")
    if root is None:
        yield from _section("data", [("root", "none: name a folder by --data-root or GENFUSE_DATA")])
    else:
        yield from _section("data", [("root", f"{root}{'' if Path(root).is_dir() else ': there is no such folder'}")])
    if data_root is not None and not data_root.is_dir():
        raise DataError(f"--data-root {data_root} is not a folder")


def _section(title: str, facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    yield f"{title}:"
    for name, fact in facts:
        yield f"  {name:{width}}  {fact}"


def _versions() -> Iterator[tuple[str, str]]:
    import torch

    yield "genfuse", f"{__version__}, {Path(__file__).parent}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed"
    yield "platform", platform.platform()
    yield from ((name, os.environ[name]) for name in SWITCHES if name in os.environ)


def _hardware() -> Iterator[tuple[str, str]]:
    import torch

    from genfuse.training.process import SMALL

    yield "CPU", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    waiting = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
    how = waiting or "spin while they wait, which is slow on busy cores: set OMP_WAIT_POLICY=passive"
    fixed = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    small = "" if fixed else f"; trainings of less than {SMALL / 1e6:.0f} million operations a step use 1"
    yield "threads", how + small
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    elif not torch.cuda.device_count():
        yield "GPU", "none that torch can use"


def _kernels() -> Iterator[tuple[str, str]]:
    from genfuse import ops

    info = ops.build_info()
    if info["native"]:
        yield "native", f"built by {info['compiler']}"
        yield "SIMD", info["simd"]
        yield "OpenMP", f"{info['threads']} threads" if info["openmp"] else "not built"
        yield "CUDA", " ".join(info["cuda_architectures"]) if info["cuda_built"] else "not built"
    else:
        yield "native", f"missing: {info['reason']}"
    for operator, device, implementation, why in ops.implementations():
        yield f"{operator} on {device}", f"{implementation}: {why}"


def _plugins() -> Iterator[tuple[str, str]]:
    states = list(describe())
    for kind in plugins.KINDS:
        owners = Counter(f"{p.distribution} {p.version}" for p, _, _ in states if p.kind == kind)
        yield kind, ", ".join(f"{count} of {owner}" for owner, count in owners.items()) or "none"
    for plugin, _, error in states:
        if error is not None:
            yield f"{plugins.KINDS[plugin.kind]} {plugin.name}", f"ERROR: {error}"


class Status(NamedTuple):
    """What came of importing a plugin."""

    plugin: plugins.Plugin
    seconds: float  # that the import took, less what was imported before
    error: PluginError | None


def describe(*kinds: str) -> Iterator[Status]:
    """Import every plugin of these kinds, or of all: each with the error that this raises, if it does."""
    import genfuse.metrics
    import genfuse.training  # noqa: F401, with torch: no plugin's own time
    from genfuse.models import unfit

    for plugin in (plugin for kind in kinds or plugins.KINDS for plugin in plugins.discover(kind)):
        began, failed = time.perf_counter(), None
        try:
            plugin.load(unfit if plugin.kind == "models" else None)
        except PluginError as error:
            failed = error
        yield Status(plugin, time.perf_counter() - began, failed)
