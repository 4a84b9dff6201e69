"""A plugin of pytest, and a module to import before genfuse: its "native" kernels are those of a build of emulator.py.

    EMULATED=plain PYTHONPATH=tests/cuda_emulator python -m pytest -p emulated tests/ops

With a variant of the emulator, CPU tensors count as tensors on GPU 0 to genfuse's operators, and to nobody else.
"""

import ctypes
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import emulator
import torch

VARIANT = os.environ.get("EMULATED", "plain")
_file = emulator.module(VARIANT)
_spec = importlib.util.spec_from_file_location("genfuse._C", _file)
assert _spec
assert _spec.loader
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


def launches() -> int:
    """How often a kernel was launched on the emulator until now."""
    return ctypes.c_int64.in_dll(ctypes.CDLL(str(_file)), "emulated_launches").value


class _OnGPU(ModuleType):
    """The module, of which every launch goes to GPU 0: the last arguments of a launch are the device and its stream."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(_module, name)
        if isinstance(found, type) or not callable(found):
            return found

        def function(*arguments: Any) -> Any:
            return found(*arguments[:-2], 0, 0) if arguments[-2:] == (-1, 0) else found(*arguments)

        return function


def _is_cuda(tensor: torch.Tensor) -> bool:
    asks = sys._getframe(1).f_globals.get("__name__", "")
    operators = asks.startswith("genfuse.ops._") and not asks.startswith(("genfuse.ops._op", "genfuse.ops._triton"))
    return operators or _own_is_cuda.__get__(tensor)


if VARIANT == "cpu":
    sys.modules["genfuse._C"] = _module
else:
    sys.modules["genfuse._C"] = _OnGPU("genfuse._C")
    _own_is_cuda: Any = torch.Tensor.is_cuda
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment]


def pytest_collection_modifyitems(config: Any, items: list) -> None:
    """Keep the tests that are about an implementation of kernels: the native one, on the CPU."""
    kept: list[Any] = []
    others: list[Any] = []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        ours = params.get("implementation") == "native" and params.get("device", "cpu") == "cpu"
        ours &= VARIANT == "cpu" or not any(name in item.nodeid for name in emulator.CPP_ONLY)
        (kept if ours else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if VARIANT != "cpu":
        terminalreporter.write_line(f"emulated CUDA ({VARIANT}): {launches()} launches")
