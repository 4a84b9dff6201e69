"""Every tensor that an operator leaves to its kernels to fill is full of NaN at first, and watched on both sides."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _len_torch_dispatch_stack

from genfuse.ops import _op

BAND = 1024  # bytes on each side
ALIGNMENT = 64  # as PyTorch's own tensors on a CPU
PATTERN = 0xA5


def _where(frame: Any) -> str:
    """The lines of operators that lead to one."""
    lines = []
    while frame and frame.f_globals.get("__name__", "").startswith("genfuse.ops."):
        lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return ", ".join(reversed(lines))


def _stand_for_others() -> bool:
    """Whether tensors have no memory, or what is done to them is traced."""
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


class Guard:
    """Allocates tensors between bands of memory which nobody may write to."""

    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")  # which sees what is beyond a tensor, if no band is there

    def __init__(self) -> None:
        self.watched: list[tuple[torch.Tensor, int, int, str]] = []
        self.bytes = 0

    def empty(self, like: torch.Tensor, where: str) -> torch.Tensor:
        """A tensor of that one's shape, strides and dtype, full of NaN (of -1, if of integers)."""
        if self.sanitized or like.device.type != "cpu":  # a GPU's memory has compute-sanitizer
            like.untyped_storage().fill_(0xFF)
            return like
        size = (sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1) * like.element_size()
        memory = torch.full((size + 2 * BAND + ALIGNMENT,), PATTERN, dtype=torch.uint8)
        start = BAND + -(memory.data_ptr() + BAND) % ALIGNMENT
        memory[start : start + size] = 0xFF  # a NaN of every floating-point type
        flat = torch.frombuffer(memory.numpy(), dtype=like.dtype, offset=start, count=size // like.element_size())
        self.watched.append(
            (
                memory,
                start,
                start + size,
                f"a tensor of shape {tuple(like.shape)} of {like.dtype}, allocated by {where}",
            )
        )
        self.bytes += memory.numel()
        if self.bytes > 1 << 27:
            self.check()
        return flat.set_(flat.untyped_storage(), 0, like.shape, like.stride())  # unlike a view, a tensor of its own

    def check(self) -> None:
        """Raise AssertionError if a band is not as it was; watch no longer."""
        watched, self.watched, self.bytes = self.watched, [], 0
        for memory, start, end, what in watched:
            before, beyond = ((band != PATTERN).nonzero() for band in (memory[:start], memory[end:]))
            if len(before):
                raise AssertionError(f"a kernel wrote {start - int(before[-1])} bytes before {what}")
            if len(beyond):
                raise AssertionError(f"a kernel wrote to byte {int(beyond[0])} beyond {what}")

    def around(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """What allocates in place of that function of PyTorch: as it does, but for operators."""

        def guarded(*arguments: Any, **settings: Any) -> torch.Tensor:
            if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or _stand_for_others():
                return allocate(*arguments, **settings)
            tensor, caller = allocate(*arguments, **settings), sys._getframe(1)
            of_an_operator = caller.f_globals.get("__name__", "").startswith("genfuse.ops.")
            if (
                of_an_operator
                and type(tensor) is torch.Tensor
                and tensor.device.type in ("cpu", "cuda")
                and tensor.numel()
            ):
                return self.empty(tensor, _where(caller))
            return tensor

        return guarded


@pytest.fixture(scope="session")
def _compiler() -> None:
    """The compiler looks up PyTorch's functions when it is first used: it must find those of PyTorch."""
    torch.compile(torch.zeros_like, backend="eager")(torch.ones(1))


@pytest.fixture(autouse=True)
def guard(monkeypatch: pytest.MonkeyPatch, _compiler: None) -> Iterator[Guard]:
    guard = Guard()
    for of, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (_op, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(of, name, guard.around(getattr(of, name)))
    yield guard
    guard.check()
