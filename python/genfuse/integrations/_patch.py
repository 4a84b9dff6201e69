"""Functions and methods of a peer replaced while it is patched, what is put back after, and the count of calls."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from genfuse import ops

LARGE = 2**16  # elements, from which on an affine operator is the faster on a CPU


class Left(Exception):  # noqa: N818, which is no error of anybody's
    """Raised by what replaces a peer's function, for a call that the peer has to serve itself: the reason."""


@dataclass(frozen=True)
class Report:
    """What became of the calls of a peer's functions and methods since it was patched.

    Attributes:
        served: how many calls of each our operators served.
        left: how many were left to the peer, by the reason.
    """

    served: dict[str, int]
    left: dict[str, dict[str, int]]

    def __str__(self) -> str:
        rows = [f"{count:>9} served  {name}" for name, count in self.served.items()]
        rows += [f"{n:>9} left    {name}: {why}" for name, reasons in self.left.items() for why, n in reasons.items()]
        return "\n".join(rows) or "no calls"


@dataclass
class _Replaced:
    owner: Any  # a class; or a module, whose function other modules may have imported by value
    name: str
    theirs: Any  # as the owner's own dictionary has it, or None if the owner inherits it
    ours: Any


class Peer:
    """A library, the versions of it that were tested, and what is replaced in it."""

    def __init__(self, name: str, *tested: str) -> None:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            wanted = f"genfuse.integrations.{name} patches {name}, which is not installed"
            raise ImportError(f"{wanted}: pip install {name}=={tested[-1]}", name=name) from None
        self.name, self.tested = name, tested
        self.active = False
        self._replaced: list[_Replaced] = []
        self._served: Counter[str] = Counter()
        self._left: Counter[tuple[str, str]] = Counter()

    def replaces(self, owner: Any, name: str, *, quick: bool = False) -> Callable[[Callable], Callable]:
        """Decorate what stands for ``owner.name`` while the peer is patched.

        It raises `Left` for calls that the peer has to serve, and so do operators, by ValueError, for tensors that
        they do not take. With ``quick`` such a call is not counted: it is a way around functions that are replaced
        as well, and count.
        """
        theirs = getattr(owner, name)
        what = f"{owner.__name__.removeprefix(self.name + '.')}.{name}"

        def decorate(ours: Callable) -> Callable:
            @wraps(theirs)
            def call(*args: Any, **kwargs: Any) -> Any:
                return self.serve(what, ours, theirs, *args, quick=quick, **kwargs)

            return self.puts(owner, name)(call)

        return decorate

    def puts(self, owner: Any, name: str) -> Callable[[Callable], Callable]:
        """Decorate what stands for ``owner.name`` while the peer is patched, and counts by itself."""

        def decorate(ours: Callable) -> Callable:
            self._replaced.append(_Replaced(owner, name, vars(owner).get(name), ours))
            return ours

        return decorate

    def leaves(self, owner: Any, *names: str, why: str) -> None:
        """Count the calls of functions that no operator serves."""
        for name in names:

            @self.replaces(owner, name)
            def left(*args: Any, **kwargs: Any) -> Any:
                raise Left(why)

    def serve(self, what: str, ours: Callable, theirs: Callable, *args: Any, quick: bool = False, **kwargs: Any) -> Any:
        """The result of ours, or of theirs where ours has none, counted."""
        try:
            result = ours(*args, **kwargs)
        except (Left, ValueError) as error:
            if not quick:
                self.leave(what, str(error).partition(", got")[0])
        else:
            if not torch.compiler.is_compiling():  # which compiles anew for each value that a counter has
                self._served[what] += 1
            return result
        return theirs(*args, **kwargs)

    def leave(self, what: str, why: str) -> None:
        """Count a call that is left to the peer."""
        if not torch.compiler.is_compiling():
            self._left[what, why] += 1

    def patch(self) -> ExitStack:
        """Let our operators serve the library's calls until `unpatch`, or to the end of a `with` block of the result.

        Raises:
            RuntimeError: if the library's version is not one that was tested.
        """
        if self.active:
            return ExitStack()  # whose end undoes nothing
        if (found := version(self.name)) not in self.tested:
            raise RuntimeError(
                f"{self.name} {found} is installed, and what replaces its functions was tested with "
                f"{self.name} {' and '.join(self.tested)} alone: pip install {self.name}=={self.tested[-1]}"
            )
        self._served.clear()
        self._left.clear()
        self._put(ours=True)
        undo = ExitStack()
        undo.callback(self.unpatch)
        return undo

    def unpatch(self) -> None:
        """Put the library's own functions and methods back, in all modules that have imported them."""
        if self.active:
            self._put(ours=False)

    def _put(self, *, ours: bool) -> None:
        """Put ours, or theirs, into classes; and for functions, into all modules that are loaded, by whatever name."""
        functions = {}
        for each in self._replaced:
            old, new = (each.theirs, each.ours) if ours else (each.ours, each.theirs)
            if isinstance(each.owner, ModuleType):
                functions[id(old)] = new
            elif new is None:
                delattr(each.owner, each.name)
            else:
                setattr(each.owner, each.name, new)
        for module in list(sys.modules.values()) if functions else ():
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in functions:
                    setattr(module, name, functions[id(value)])
        self.active = ours

    def report(self) -> Report:
        """What became of the calls since the library was patched."""
        left: dict[str, dict[str, int]] = {}
        for (what, why), count in self._left.items():
            left.setdefault(what, {})[why] = count
        return Report(dict(self._served), left)


def inherits(instance: object, owner: type, *names: str) -> None:
    """Leave an instance of a class of somebody's own that has another of the methods."""
    kind = type(instance)
    if not all(getattr(kind, name, None) is getattr(owner, name, kind) for name in names):
        raise Left(f"{kind.__name__} has a method of its own")


def affine(x: Tensor, log_scale: Tensor, shift: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """x exp(log_scale) + shift of what has an axis of examples and any others, or its inverse."""
    params = log_scale.flatten(1), shift.flatten(1)
    y, logdet = ops.affine_coupling(x.flatten(1), params, scale="exp", inverse=inverse)
    return y.view(x.shape), logdet


def check_large(x: Tensor) -> None:
    """Leave a tensor for which a few passes of PyTorch are as fast as an operator: of a GPU none is."""
    if x.is_cpu and x.numel() < LARGE:
        raise Left(f"fewer than {LARGE:,} elements, for which PyTorch is as fast on a CPU")


def joined(*parts: Tensor) -> Tensor:
    """Tensors side by side along the last axis: without a copy where they are views of one, as which they were made,
    and nobody waits for the gradient of one; and of one row only where they are one row, expanded."""
    first, width = parts[0], sum(part.shape[-1] for part in parts)
    base, shape = None, (*first.shape[:-1], width)
    if not torch.compiler.is_compiling() and not ops.transformed():
        base = first._base
    if base is not None and base.is_contiguous() and base.numel() == first.shape[:-1].numel() * width:
        at, whole = base.storage_offset(), base.view(shape)
        for part in parts:
            made_so = part._base is base and part.requires_grad == base.requires_grad
            awaited = (part.is_leaf and part.requires_grad) or part._backward_hooks or part.retains_grad
            if not made_so or awaited or part.stride() != whole.stride() or part.storage_offset() != at:
                break
            at += part.shape[-1]
        else:
            return whole
    if first.dim() > 2 and all(part.stride(0) == 0 and len(part) for part in parts):
        return torch.cat([part[:1] for part in parts], -1).expand(shape)
    return torch.cat(parts, -1)
