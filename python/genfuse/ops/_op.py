"""Registers fused operators with PyTorch: the only code that touches torch.library.

Each device gets one implementation of each kernel when this is imported, so that a call pays nothing for the choice.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

_C: Any  # the compiled module, or None
try:
    _C = importlib.import_module("genfuse._C")
    _why_not = ""
except ImportError as error:  # installed without a compiler, or with GENFUSE_PURE=1
    _C = None
    _why_not = f"no compiled kernels ({error})"

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as portable.h numbers them
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}  # other devices: reference


@dataclass(frozen=True)
class Kernel:
    """One torch operator, ``genfuse::name``, and what implements it."""

    name: str
    operator: Callable  # as PyTorch dispatches it, by device
    reference: Callable
    native: Callable | None
    triton: str | None  # "module:function" in genfuse.ops._triton, imported on first use
    chosen: dict[str, Callable] = field(default_factory=dict)  # what is registered for each type of device

    def __call__(self, tensor: Any, *rest: Any) -> Any:
        """Call the operator. Where nobody listens to PyTorch's dispatcher (no compiler, mode, profiler or subclass of
        Tensor), go straight to what is registered: a tenth of the time of a small forward and backward pass."""
        if (
            torch.compiler.is_compiling()
            or type(tensor) is not Tensor
            or _len_torch_dispatch_stack()
            or torch.autograd._profiler_enabled()
        ):
            return self.operator(tensor, *rest)
        return self.chosen.get(tensor.device.type, self.operator)(tensor, *rest)

    def find(self, implementation: str, device: str) -> tuple[Callable | None, str]:
        """What implements this on a type of device, or None and the reason why nothing does."""
        if implementation == "reference":
            return self.reference, "plain PyTorch"
        if implementation == "native":
            if _C is None or self.native is None:
                return None, _why_not or "no compiled kernel for this operator"
            if device == "cuda" and "cuda" not in _C.build_info():
                return None, "built without CUDA (no nvcc, or GENFUSE_CUDA=OFF)"
            return self.native, "C++" if device == "cpu" else "CUDA"
        if implementation == "triton":
            if self.triton is None:
                return None, "no Triton kernel for this operator"
            if importlib.util.find_spec("triton") is None:
                return None, "Triton is not installed"
            if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                return None, "Triton runs on the CPU only under TRITON_INTERPRET=1"
            return self._triton, "Triton"
        raise ValueError(f"no implementation is called {implementation!r}; there are native, triton and reference")

    def _triton(self, *arguments: Any) -> Any:
        module, function = str(self.triton).split(":")
        return getattr(importlib.import_module(f"genfuse.ops._triton.{module}"), function)(*arguments)

    def choose(self, device: str, asked: str) -> tuple[str, Callable | None, str]:
        """Name, function and reason of the implementation for a device; the function is None where the one that was
        asked for by name is missing."""
        if asked != "auto":
            function, why = self.find(asked, device)
            return asked, function, f"asked for; {why}"
        missing = []
        for implementation in PREFERENCE[device]:
            function, why = self.find(implementation, device)
            if function is not None:
                break
            missing.append(f"{implementation}: {why}")
        return implementation, function, "; ".join([why, *missing])


@dataclass(frozen=True)
class Operator:
    """A public operator, as tests and benchmarks see it."""

    name: str
    function: Callable  # the public function
    eager: Callable  # the same as one writes it in plain PyTorch; takes also what `replay` returns
    kernels: tuple[Kernel, ...]
    sizes: tuple[tuple[int, ...], ...]  # from launch-bound to bandwidth-bound
    example: Callable[..., dict[str, Any]]  # (size, dtype, device) -> arguments of `function`
    moved: Callable[
        [tuple[int, ...], int], tuple[int, int]
    ]  # (size, itemsize) -> bytes that must move, forward, backward
    replay: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: {}  # the noise of the next call, in float64

    def error(self, size: tuple[int, ...], dtype: torch.dtype, device: str, *, eager: bool = False) -> float:
        """Largest error of outputs and gradients against float64, of `function` or of `eager`, each as a share of the
        largest value of its tensor (of 1, where all are smaller).

        In float64 the eager formula would be held against itself: it gets as many roundings as it makes in float32.
        """
        if eager and dtype is torch.float64:
            return self.error(size, torch.float32, device, eager=True) * 2.0**-29
        arguments = self.example(size, dtype, device)
        torch.manual_seed(0)
        noise = self.replay(arguments)
        torch.manual_seed(0)
        cast = {name: value.to(dtype) for name, value in noise.items()}
        ours = _results(self.eager, {**arguments, **cast}) if eager else _results(self.function, arguments)
        exact = {name: _double(value) for name, value in arguments.items()}
        truth = _results(self.eager, {**exact, **noise})
        shares = [
            (a.double() - b).abs().max() / b.detach().abs().max().clamp(min=1)
            for a, b in zip(ours, truth, strict=True)
            if b.numel()
        ]
        return float(torch.stack(shares).max()) if shares else 0.0  # Python's max would drop a NaN


def _double(value: Any) -> Any:
    return value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _results(function: Callable, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients, for cotangents that differ from element to element and are the same in every dtype."""
    outputs = function(**arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    if not leaves:
        return outputs
    cotangents = [
        torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o.device, o.dtype) for o in outputs
    ]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, cotangents))


KERNELS: dict[str, Kernel] = {}
OPERATORS: dict[str, Operator] = {}

_schemas = torch.library.Library("genfuse", "DEF")
_implementations: dict[tuple[str, str], torch.library.Library] = {}  # by kernel and device
_asked = os.environ.get("GENFUSE_IMPL", "auto") or "auto"


def define(
    schema: str, *, reference: Callable, fake: Callable, native: Callable | None = None, triton: str | None = None
) -> Kernel:
    """Define ``genfuse::<schema>`` and register an implementation for each device.

    ``fake`` allocates what every implementation returns. Devices without a kernel run ``reference``.
    """
    name = schema[: schema.index("(")]
    _schemas.define(schema)
    _schemas.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genfuse::{name}", fake, lib=_schemas)
    kernel = KERNELS[name] = Kernel(name, getattr(torch.ops.genfuse, name).default, reference, native, triton)
    _register(kernel, _asked)
    return kernel


def define_random(schema: str, function: Callable, *, fake: Callable) -> None:
    """Define an operator that draws from PyTorch's generators: two calls of it are never taken for one."""
    name = schema[: schema.index("(")]
    _schemas.define(schema, tags=(torch.Tag.nondeterministic_seeded,))
    _schemas.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genfuse::{name}", fake, lib=_schemas)


def _register(kernel: Kernel, asked: str) -> None:
    for device in PREFERENCE:
        old = _implementations.pop((kernel.name, device), None)
        if old is not None:
            old._destroy()
        implementation, function, why = kernel.choose(device, asked)
        library = _implementations[kernel.name, device] = torch.library.Library("genfuse", "IMPL")
        function = function or _missing(f"{kernel.name} has no {implementation} implementation on {device}: {why}")
        library.impl(kernel.name, function, device.upper())
        kernel.chosen[device] = function


def _missing(message: str) -> Callable:
    def kernel(*arguments: Any) -> None:
        raise RuntimeError(message)

    return kernel


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every operator's "native", "triton" or "reference" implementation inside this context, or "auto".

    What is missing on a device raises RuntimeError when it is called. Meant for tests and benchmarks.
    """
    global _asked
    before = _asked
    try:
        _asked = implementation
        for kernel in KERNELS.values():
            _register(kernel, implementation)
        yield
    finally:
        _asked = before
        for kernel in KERNELS.values():
            _register(kernel, before)


def available(device: str) -> list[str]:
    """The implementations that every operator which is written in them at all has on a type of device."""
    return [
        i
        for i in ("native", "triton", "reference")
        if all(k.find(i, device)[0] for k in KERNELS.values() if getattr(k, i) is not None)
    ]


def choices() -> list[tuple[str, str, str, str]]:
    """Operator, device, implementation and reason, for every kernel and every device."""
    rows = []
    for name, kernel in KERNELS.items():
        for device in PREFERENCE:
            implementation, function, why = kernel.choose(device, _asked)
            rows.append((name, device, implementation if function else f"{implementation} (missing)", why))
        rows.append((name, "other", "reference", "plain PyTorch"))
    return rows


def info() -> dict[str, Any]:
    """How the compiled kernels were built, and what they use here."""
    build = {} if _C is None else _C.build_info()
    return {
        "native": _C is not None,
        "reason": _why_not,
        "simd": build.get("simd", ""),
        "openmp": build.get("openmp", False),
        "threads": torch.get_num_threads(),
        "compiler": build.get("compiler", ""),
        "cuda_built": "cuda" in build,
        "cuda_compiler": build.get("cuda", ""),
        "cuda_architectures": build.get("cuda_architectures", "").split(",") if "cuda" in build else [],
    }


def rows(t: Tensor) -> tuple[Tensor, int]:
    """``t`` and the stride between its rows (all but the last axis taken together); copied only if there is no such
    stride, or if neighbours in a row are not neighbours in memory."""
    if t.is_contiguous():
        return t, t.shape[-1]
    stride = t.stride()
    collapses = all(stride[i] == stride[i + 1] * t.shape[i + 1] for i in range(t.dim() - 2))
    if stride[-1] == 1 and collapses:
        return t, stride[-2] if t.dim() > 1 else t.shape[-1]
    return t.contiguous(), t.shape[-1]


def order(t: Tensor) -> list[int]:
    """The axes of ``t``, (N, ...), with those of an example as they lie in memory: images have one of two formats."""
    return [0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)]  # stable: contiguous ones stay as they are


def flatten(t: Tensor, order: list[int]) -> Tensor:
    """``t``, (N, ...), as (N, D) with its axes in that order; copied only if an example has gaps in it."""
    return t.permute(order).reshape(t.shape[0], t.shape[1:].numel())


def unflatten(t: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """What has that shape and becomes ``t`` by `flatten`."""
    return t.view([shape[axis] for axis in order]).permute(sorted(order, key=order.__getitem__))


def wide(t: Tensor) -> torch.dtype:
    """The type that is computed in, which is also that of sums: many terms do not fit 16 bits."""
    return t.dtype if t.dtype is torch.float64 else torch.float32


def like(t: Tensor) -> Tensor:
    """Room for a result of t's shape and dtype, contiguous."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def place(t: Tensor) -> tuple[int, int]:
    """Device index and raw stream as the compiled kernels take them; -1 is the CPU."""
    if not t.is_cuda:
        return -1, 0
    return t.device.index, torch._C._cuda_getCurrentRawStream(t.device.index)


def complain_unless_like(first: Tensor, name: str, **others: tuple) -> None:
    """Raise a ValueError that names the argument which the kernels cannot take together with ``first``.

    ``others`` maps names to (tensor, shape that it must have), and a dtype that it may have beside first's.
    """
    if first.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float64, float16 or bfloat16, got {first.dtype}")
    if not first.dim():
        raise ValueError(f"{name} must have at least one axis, got a scalar")
    for other, (tensor, shape, *also) in others.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{other} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in (first.dtype, *also):
            or_also = "".join(f" or {dtype}" for dtype in also if dtype is not first.dtype)
            raise ValueError(f"{other} must have {name}'s dtype {first.dtype}{or_also}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{other} must be on {name}'s device {first.device}, got {tensor.device}")
