"""Makes fused operators out of a formula, its results and a problem: the only code that touches torch.library.

Each device gets one implementation of each kernel when this is imported, so that a call pays nothing for the choice.
An operator is called in one of two ways. Where nobody listens to PyTorch's dispatcher, a call goes straight to the
kernel. Everywhere else (compilers, tracers, modes, transforms, subclasses) it goes through the dispatcher, where the
operator behaves as PyTorch's own do: its kernel without a graph, an autograd node with one, and its formula under vmap
and forward mode.
"""

import hashlib
import importlib
import importlib.util
import itertools
import marshal
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor, empty_like
from torch._C import _are_functorch_transforms_active as functorch_is_active
from torch._C import _get_tracing_state as tracing
from torch._C import _is_alias_of  # type: ignore[attr-defined]
from torch._C._functorch import TransformType, peek_interpreter_stack, unwrap_if_dead
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._C._functorch import is_legacy_batchedtensor as is_legacy_batched
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import _profiler_enabled as profiled
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_dynamo_compiling as compiling
from torch.utils import _python_dispatch as modes

from genfuse._version import __version__

try:
    from torch._C import _any_requires_grad as any_requires_grad
except ImportError:  # PyTorch 2.6

    def any_requires_grad(*args: Any, **kwargs: Any) -> bool:
        of_lists = (any_requires_grad(*each) for each in args if isinstance(each, list | tuple))
        return any(isinstance(each, Tensor) and each.requires_grad for each in args) or any(of_lists)


_C: Any  # the compiled module, or None
try:
    _C = importlib.import_module("genfuse._C")
    _why_not = ""
except ImportError as error:  # installed without a compiler, or with GENFUSE_PURE=1
    _C = None
    _why_not = f"no compiled kernels ({error})"

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as portable.h numbers them
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}  # other devices: reference
PIECES, LONG, FEW = 16, 8192, 1024  # of rows that blocks of a GPU share: their number as in rows.cuh, columns, rows
TENSORS = (Tensor, torch.nn.Parameter)  # what has an address; other subclasses may stand for anything

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)


@dataclass(frozen=True)
class Kernel:
    """One torch operator, ``namespace::name``, and what implements it."""

    name: str
    operator: Any  # as PyTorch dispatches it, by device
    reference: Callable
    native: Callable | None
    triton: Callable | None
    module: Any  # where native comes from
    check: Callable | None  # raises for what the dispatcher must not hand to kernels
    chosen: dict[str, Callable] = field(default_factory=dict)  # what is registered for each type of device

    def on(self, tensors: Sequence[Tensor | None]) -> Callable:
        """What is registered for the device of the first tensor."""
        first = tensors[0] if tensors[0] is not None else next(t for t in tensors if t is not None)
        return self.chosen["cpu"] if first.is_cpu else self.chosen.get(first.device.type, self.operator)

    @property
    def cpu_only(self) -> bool:
        """Whether its compiled kernel is for the CPU alone, by `cpu_only`; elsewhere its formula runs."""
        return isinstance(self.module, SimpleNamespace)

    def find(self, implementation: str, device: str) -> tuple[Callable | None, str]:
        """What implements this on a type of device, or None and the reason why nothing does."""
        if implementation == "reference":
            return self.reference, "plain PyTorch"
        if implementation == "native":
            if device == "cuda" and self.cpu_only:
                return None, "no CUDA kernel for this operator"
            ours = self.operator.namespace == "genfuse"
            if self.native is None or (ours and _C is None):
                return None, (ours and _why_not) or "no compiled kernel for this operator"
            if device == "cuda" and "cuda" not in getattr(self.module, "build_info", dict)():
                return None, "built without CUDA (no nvcc, or GENFUSE_CUDA=OFF)"
            return self.native, "C++" if device == "cpu" else "CUDA"
        if implementation == "triton":
            if self.triton is None:
                return None, "no Triton kernel for this operator"
            if importlib.util.find_spec("triton") is None:
                return None, "Triton is not installed"
            if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                return None, "Triton runs on the CPU only under TRITON_INTERPRET=1"
            return self.triton, "Triton"
        raise ValueError(f"no implementation is called {implementation!r}; there are native, triton and reference")

    def choose(self, device: str, asked: str) -> tuple[str, Callable | None, str]:
        """Name, function and reason of the implementation for a device; the function is None if the one that was
        asked for by name is missing."""
        if self.native is None and self.triton is None:
            return "reference", self.reference, "plain PyTorch, which is all there is"
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


KERNELS: dict[str, Kernel] = {}

_schemas: dict[str, torch.library.Library] = {}  # by operator, with its namespace
_implementations: dict[tuple[str, str], torch.library.Library] = {}  # by kernel and device
_asked = os.environ.get("GENFUSE_IMPL", "auto") or "auto"


def plain(tensors: Sequence[Tensor | None], or_profiled: bool = False) -> bool:
    """Whether nobody listens to PyTorch's dispatcher, a profiler excepted on request, and the memory of these tensors
    holds their values."""
    if (
        modes._is_in_torch_dispatch_mode
        or functorch_is_active()
        or forward_ad._current_level >= 0
        or (not or_profiled and profiled())
        or tracing() is not None
    ):
        return False
    for t in tensors:  # noqa: SIM110, which costs a generator
        if t is not None and (t.__class__ not in TENSORS or t.is_neg()):
            return False
    return True


def transformed() -> bool:
    """Whether a call is inside a transform of torch.func or of forward mode, so that tensors may stand for others."""
    return functorch_is_active() or forward_ad._current_level >= 0


def without_memory(*tensors: Tensor) -> bool:
    """Whether a gradient is one that no kernel can read: batched by torch.autograd, or zeros that are not stored."""
    return any(is_legacy_batched(t) or t._is_zerotensor() for t in tensors)


def has_values(*tensors: Tensor) -> bool:
    """Whether the values of these tensors can be looked at: they are not traced, and stand for no others."""
    if torch.compiler.is_compiling() or any(t.is_meta for t in tensors):
        return False
    return plain([t.resolve_neg() for t in tensors], or_profiled=True)


def _forward_mode() -> bool:
    """Whether tangents may come with the arguments: PyTorch's own forward mode, or torch.func's on this level."""
    return forward_ad._current_level >= 0 or (
        functorch_is_active() and peek_interpreter_stack().key() == TransformType.Jvp
    )


def _define(
    schema: str,
    reference: Callable,
    results: Callable,
    problem: Callable,
    native: Any,
    triton: Any,
    autograd: Callable,
    check: Callable | None,
    of_gradients: bool = False,
) -> Kernel:
    """Define the torch operator of a schema with a namespace, and register what runs on each device and level: the
    functions of the module ``native`` of its name, and of ``triton``, forward or backward."""
    namespace, _, rest = schema.partition("::")
    short = rest[: rest.index("(")]
    name = short if namespace == "genfuse" else f"{namespace}::{short}"
    if name in _schemas:  # defined anew, as when a cell of a notebook is run again
        for old in (_schemas.pop(name), *(_implementations.pop((name, device)) for device in PREFERENCE)):
            old._destroy()
    library = _schemas[name] = torch.library.Library(namespace, "FRAGMENT")
    library.define(rest)
    library.impl(short, reference, "CompositeExplicitAutograd")
    if not of_gradients:  # vmap: by the rules of the formula's parts. Without: PyTorch goes through the batch
        library.impl(short, reference, "FuncTorchBatched")
    torch.library.register_fake(f"{namespace}::{short}", results, lib=library)
    operator = getattr(getattr(torch.ops, namespace), short).default
    library.impl(short, partial(autograd, operator), "Autograd", with_keyset=True)
    compiled, interpreted = getattr(native, short, None), None
    if triton is not None:
        module, _, forward = triton.partition(":") if isinstance(triton, str) else (triton, "", "")
        interpreted = _triton(module, "backward" if of_gradients else forward or "forward", results, problem)
    compiled = None if compiled is None else _native(compiled, results, problem)
    kernel = KERNELS[name] = Kernel(name, operator, reference, compiled, interpreted, native, check)
    _register(kernel, _asked)
    return kernel


def fused(
    schema: str,
    *,
    formula: Callable,
    results: Callable,
    problem: Callable | None = None,
    native: Any = None,
    triton: Any = None,
    wrt: int = 0,
    gradient: Callable | None = None,
    others: Mapping[int, Callable] | None = None,
    backward: Callable | None = None,
    keep: bool | Sequence[int] = False,
    scratch: Callable | None = None,
    saved: Callable | None = None,
    constant: Callable | None = None,
    takes: Callable | None = None,
) -> Callable:
    r"""Make an operator out of its formula, its results and a problem.

    The operator runs a kernel where there is one for the device, and else the formula. It is differentiable to any
    order, and right under torch.func, torch.compile, torch.export, tracers, modes and subclasses: under vmap and
    forward mode it is its formula, and the second derivative is the formula's.

    Args:
        schema: as torch.library takes it, "namespace::name(Tensor x, ..., int n) -> (Tensor, ...)": tensors first, then
            settings, no defaults. Without a namespace, genfuse. The gradients of the first ``wrt`` arguments become
            an operator too, name_backward, which takes one cotangent a result before the same arguments.
        formula: the results in plain PyTorch, of all arguments. It gets floating-point tensors in the type that is
            computed in, float64 for those and float32 for all others, and may return it: results are cast.
        results: empty contiguous tensors for the results, given all arguments.
        problem: what kernels take before the results, given all arguments: sizes, strides, tensors or None.
        native: a compiled module with functions name and name_backward that take ``(*problem, *results, device,
            stream)``, and for the gradients ``(*problem, *cotangents, *results, device, stream)``; device is -1 for
            the CPU, else a GPU's index, and stream its address. They fill the results and return nothing.
        triton: a module, or the name of one to be imported when it is first needed, with functions forward and backward
            that take the same but device and stream; "module:function" if forward is called otherwise.
        wrt: how many arguments the kernel of the gradients differentiates by, the first ones. 0: there is none, and
            derivatives are the formula's.
        gradient: their gradients in plain PyTorch, ``gradient(*cotangents, *arguments)``, itself differentiable, if
            autograd's way through the formula would lose digits.
        others: by index, gradients of further arguments in plain PyTorch, as a function of cotangents and arguments.
        backward: in place of all that, ``backward(needed, cotangents, *arguments, outputs=...)``: the gradients of all
            tensors, made of differentiable operators; a cotangent is None where there is none.
        keep: the indices of the results that ``backward`` needs, in its ``outputs``, or True for all. Those must not be
            written to before the gradients are taken, all others may be.
        scratch: what the kernel of the gradients takes between cotangents and results, given all arguments.
        saved: of the flags of what is to be differentiated and all tensors, those that the gradients need; None for
            others. Default all.
        constant: given all arguments, the indices of results that have no derivative.
        takes: given all arguments, the shape and the dtype that each tensor must have, in a list for each list, or a
            ValueError for settings that go with none. Where the operator is called through the dispatcher, as by hand,
            it raises a ValueError for other tensors, and for some of another device; the function that is returned,
            whose callers have looked at them, does not ask. Default: any will do.

    Returns:
        The operator, a function of the schema's arguments, by position.

    Raises:
        ValueError: if a tensor follows a setting in the schema, or an argument has a default, or no argument or a
            result is no tensor; or for ``wrt`` or ``others`` beside lists of tensors, whose derivatives are the
            formula's or those of ``backward``.
    """
    schema = schema if "::" in schema else f"genfuse::{schema}"
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.partition(") -> ")
    each = [argument.split() for argument in arguments.split(",")]
    kinds = ["".join(argument[:1]) for argument in each]
    tensors = sum(kind.startswith("Tensor") for kind in kinds)
    if not tensors or "=" in arguments or any(kind.startswith("Tensor") for kind in kinds[tensors:]):
        raise ValueError(f"{name} must take tensors first, then settings, without defaults; got ({arguments})")
    if "." in name or not re.fullmatch(r"Tensor|\(Tensor(, *Tensor)*\)", returns.strip()):
        raise ValueError(f"{name} must have no overloads and return tensors, as in -> (Tensor, Tensor); got {schema}")
    lists = any("[" in kind for kind in kinds[:tensors])
    if lists and backward is None and (wrt or others):
        raise ValueError(f"{name} takes lists of tensors: it must have a `backward`, or neither wrt nor others")
    _key_caches(schema, formula, gradient, backward, *(others or {}).values())
    outputs = returns.count("Tensor")
    short = name.rpartition("::")[2]
    elsewhere = others or {}
    problem = problem or (lambda *given: given)
    native = _C if native is None and name.startswith("genfuse::") else native

    kept = range(outputs) if keep is True else tuple(keep or ())

    def reference(*given: Any) -> Any:
        made, wanted = _tuple(formula(*map(_widen, given))), _tuple(results(*given))
        if [m.shape for m in made] != [w.shape for w in wanted]:
            shapes = [[tuple(t.shape) for t in each] for each in (made, wanted)]
            raise RuntimeError(f"{name}: its formula made results of shapes {shapes[0]}, `results` has {shapes[1]}")
        made = _apart([m.to(w.dtype).contiguous() for m, w in zip(made, wanted, strict=True)], given)
        return made[0] if outputs == 1 else tuple(made)

    def gradients(by: Sequence[int], cotangents: Sequence[Tensor], given: Sequence[Any]) -> Sequence[Tensor]:
        """Those of the tensors ``by``, to be differentiated again if grad mode is on."""
        if gradient is None or any(i >= wrt for i in by):
            return differentiate(reference, cotangents, given, by)
        found = _tuple(gradient(*map(_widen, cotangents), *map(_widen, given)))
        return [found[i].to(given[i].dtype) for i in by]

    def autograd(operator: Any, keys: Any, *given: Any) -> Any:
        """The operator above the kernels: what records a graph."""
        if _forward_mode():
            return reference(*given)
        if not (torch.is_grad_enabled() and any_requires_grad(*given)):
            return operator.redispatch(keys & _BELOW_AUTOGRAD, *given)
        with enable_single_level_autograd_function():  # levels of torch.func are gone through by the dispatcher
            return record(partial(_next_level, operator, keys & _BELOW_AUTOGRAD), given)

    names = [argument for _, argument in each[:tensors]]

    def check(*given: Any) -> None:
        """Raise a ValueError for tensors that kernels would read wrongly, or beyond their ends."""
        assert takes is not None
        try:
            wanted = takes(*given)
        except IndexError:
            raise ValueError(f"{short}: a tensor has fewer axes than it must have") from None
        _check_takes(short, names, given, wanted)

    forward = _define(schema, reference, results, problem, native, triton, autograd, takes and check)

    if wrt:

        def gradient_results(*given: Any) -> Any:
            return like(given[outputs]) if wrt == 1 else tuple([like(t) for t in given[outputs : outputs + wrt]])

        def gradient_problem(*given: Any) -> tuple:
            cotangents, given = [g.contiguous() for g in given[:outputs]], given[outputs:]
            return (*problem(*given), *cotangents, *(() if scratch is None else scratch(*given)))

        def gradient_reference(*given: Any) -> Any:
            found = gradients(range(wrt), given[:outputs], given[outputs:])
            found = _apart([t.contiguous() for t in found], given)
            return found[0] if wrt == 1 else tuple(found)

        def gradient_autograd(operator: Any, keys: Any, *given: Any) -> Any:
            if _forward_mode() or (torch.is_grad_enabled() and any_requires_grad(*given)):
                return gradient_reference(*given)
            return operator.redispatch(keys & _BELOW_AUTOGRAD, *given)

        def gradient_check(*given: Any) -> None:
            check(*given[outputs:])
            like_results = [(t.shape, t.dtype) for t in _tuple(results(*given[outputs:]))]
            _check_takes(f"{short}_backward", [f"g{i}" for i in range(outputs)], given, like_results)

        cotangents = ", ".join(f"Tensor g{i}" for i in range(outputs))
        made = "Tensor" if wrt == 1 else f"({', '.join(['Tensor'] * wrt)})"
        backward_kernel = _define(
            f"{name}_backward({cotangents}, {arguments}) -> {made}", gradient_reference, gradient_results,
            gradient_problem, native, triton, gradient_autograd, takes and gradient_check, of_gradients=True,
        )  # fmt: skip

    settings = len(kinds) - tensors
    if lists and backward is None:

        def backward(needed: Any, cotangents: Any, *given: Any, outputs: Any) -> Sequence[Any]:
            return needed_gradients(reference, cotangents, given, needed[: len(needed) - settings])

    of_tensors = slice(None, -settings or None)  # of all arguments, those of lists one by one
    further, nothing = range(wrt, tensors), (None,) * settings

    class Function(_SingleLevelFunction):  # Function.apply of PyTorch 2.14 refuses levels of torch.func
        @staticmethod
        def forward(ctx: Any, run: Any, *flat: Any) -> Any:
            if lists:
                run, ctx.counts = run
            outputs = run(*flat)
            found = flat[of_tensors] if saved is None else saved(ctx.needs_input_grad[1:], *flat[of_tensors])
            ctx.save_for_backward(*found, *[_tuple(outputs)[i] for i in kept] if kept else ())
            ctx.settings = flat[len(flat) - settings :]
            if backward is not None:
                ctx.set_materialize_grads(False)
            if constant is not None:
                given = (*_nest(flat[of_tensors], ctx.counts), *ctx.settings) if lists else flat
                ctx.mark_non_differentiable(*[_tuple(outputs)[i] for i in constant(*given)])
            return outputs

        @staticmethod
        def _compiled_autograd_key(ctx: Any) -> tuple:
            return (ctx._autograd_function_id,)  # as of every autograd.Function

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            needed, found = ctx.needs_input_grad, ctx.saved_tensors
            if backward is not None:
                if cotangents[0] is None and all(g is None for g in cotangents):
                    return (None,) * len(needed)
                inputs = len(found) - len(kept)
                given = _nest(found[:inputs], ctx.counts) if lists else found[:inputs]
                made = backward(needed[1:], cotangents, *given, *ctx.settings, outputs=found[inputs:])
                return (None, *made, *nothing)
            every = (*cotangents, *found, *ctx.settings)
            # Grad mode is on in here only under create_graph=True: then stay differentiable.
            if True not in needed[1 : 1 + wrt]:
                made = (None,) * wrt
            elif not torch.is_grad_enabled() and plain(every[: outputs + tensors]):
                try:
                    made = backward_kernel.on(every)(*every)
                    made = (made,) if wrt == 1 else made
                except BufferError:  # cotangents in batches
                    made = differentiated(needed, cotangents, every[outputs:])
            else:
                made = differentiated(needed, cotangents, every[outputs:])
            if True not in needed[1 + wrt :]:
                return (None, *made, *nothing_more)
            more = [elsewhere[i](*every) if i in elsewhere and needed[1 + i] else None for i in further]
            by = [i for i in further if needed[1 + i] and i not in elsewhere]
            if by:
                for i, found in zip(by, gradients(by, cotangents, every[outputs:]), strict=True):
                    more[i - wrt] = found
            return (None, *made, *more, *nothing)

    def differentiated(needed: Sequence[bool], cotangents: Sequence[Tensor], given: Sequence[Any]) -> Sequence[Any]:
        """Gradients of the first arguments, off the quick way."""
        if torch.is_grad_enabled() or transformed():
            by = [i for i in range(wrt) if needed[1 + i]]
            found = dict(zip(by, gradients(by, cotangents, given), strict=True)) if by else {}
            return tuple(found.get(i) for i in range(wrt))
        return _tuple(backward_kernel.operator(*cotangents, *given)) if wrt else ()

    nothing_more = (None,) * (len(kinds) - wrt)
    apply = Function.apply  # type: ignore[attr-defined]

    operator, chosen = forward.operator, forward.chosen

    def record(run: Callable, given: Sequence[Any]) -> Any:
        """Run with a node in the graph."""
        if not lists:
            return apply(run, *given)
        counts = _counts(given[:tensors])
        nested = lambda *flat: run(*_nest(flat[of_tensors], counts), *flat[len(flat) - settings :])  # noqa: E731
        return apply((nested, counts), *_flat(given[:tensors]), *given[tensors:])

    def call(*given: Any) -> Any:
        if compiling():
            return operator(*given)
        every = _flat(given[:tensors]) if lists else given[:tensors]
        if not plain(every):
            return operator(*given)
        first = every[0]
        run = chosen["cpu"] if first is not None and first.is_cpu else forward.on(every)
        try:
            return record(run, given) if any_requires_grad(*every) and torch.is_grad_enabled() else run(*given)
        except BufferError:  # a tensor without memory, such as what is left of a transform that has ended
            return operator(*given)

    return call


def _key_caches(schema: str, *functions: Callable | None) -> None:
    """Make the programs that torch.compile keeps on disk programs of this definition. Their keys have no more of an
    operator than its name, but their backward passes are made of its formula: a new one would get old gradients."""
    digest = hashlib.sha256(f"{torch.compiler.config.cache_key_tag} {__version__} {schema}".encode())
    seen: set[Any] = set()
    for function in functions:
        for part in _definition(function, seen):
            digest.update(part)
    torch.compiler.config.cache_key_tag = digest.hexdigest()


def _definition(function: Any, seen: set[Any]) -> Iterator[bytes]:
    """The file of a function, or its code if there is none; the numbers that it takes from around; and the same of the
    functions from there, but PyTorch's."""
    around: list[Any] = []
    while isinstance(function, partial):
        around += [*function.args, *function.keywords.values()]
        function = function.func
    code = getattr(function, "__code__", None)
    module = str(function.__module__) if code is not None else ""  # None, where exec made the function without a name
    if code is not None and code not in seen and not module.startswith("torch."):
        seen.add(code)
        file = Path(code.co_filename)
        if not file.is_file():
            yield marshal.dumps(code)
        elif file not in seen:
            seen.add(file)
            yield file.read_bytes()
        around += [function.__globals__.get(name) for name in code.co_names] + list(function.__defaults__ or ())
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # empty: what the name stands for is made later
                around.append(cell.cell_contents)
    yield repr([each for each in around if isinstance(each, (int, float, str))]).encode()
    for each in around:
        if isinstance(each, (partial, FunctionType)):
            yield from _definition(each, seen)


def _flat(given: Sequence[Any]) -> list[Tensor | None]:
    """All tensors, those of lists one by one."""
    return [t for g in given for t in (g if isinstance(g, (list, tuple)) else (g,))]


def _counts(given: Sequence[Any]) -> list[int | None]:
    """Of each argument that is a list of tensors, how many there are."""
    return [len(g) if isinstance(g, (list, tuple)) else None for g in given]


def _nest(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    """What `_flat` was given: a list of so many tensors where there is a count."""
    tensors = iter(flat)
    return [next(tensors) if n is None else [next(tensors) for _ in range(n)] for n in counts]


def _check_takes(operator: str, names: Sequence[str], given: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Raise a ValueError that names the first tensor of another shape, dtype or device than is wanted."""
    device = None
    for name, tensors, kinds in zip(names, given, wanted, strict=False):
        listed = isinstance(tensors, (list, tuple))
        if listed and len(tensors) != len(kinds):
            raise ValueError(f"{operator}: {name} must be {len(kinds)} tensors, got {len(tensors)}")
        for i, (t, (shape, dtype)) in enumerate(zip(tensors, kinds, strict=True) if listed else [(tensors, kinds)]):
            if t is None:
                continue
            device = device or t.device
            if t.shape != tuple(shape) or t.dtype is not dtype or t.device != device:
                which = f"{name}[{i}]" if listed else name
                must, got = (
                    f"of shape {tuple(s)}, {d}, on {on}"
                    for s, d, on in ((shape, dtype, device), (t.shape, t.dtype, t.device))
                )
                raise ValueError(f"{operator}: {which} must be {must}, got {got}")


def storage(t: Tensor) -> torch.dtype:
    """The dtype of t, if kernels can take it; raises a ValueError for others."""
    if t.dtype not in DTYPES:
        raise ValueError(f"tensors must be float32, float64, float16 or bfloat16, got {t.dtype}")
    return t.dtype


def matrix(t: Tensor) -> tuple[tuple[int, int], torch.dtype]:
    """What a tensor must be of which the first axis is of examples and the last of features, and no other is there."""
    return (t.shape[0], t.shape[-1]), storage(t)


def _tuple(t: Any) -> Any:
    return t if isinstance(t, tuple) else (t,)


def _floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _widen(t: Any) -> Any:
    if isinstance(t, (list, tuple)):
        return [_widen(one) for one in t]
    return t.to(wide(t)) if _floating(t) else t


def _apart(made: list[Tensor], given: Sequence[Any]) -> list[Tensor]:
    """Results that share no memory with arguments or with each other, as PyTorch wants them of an operator: compilers
    use that of either again. Nor are they views, which nobody could write to."""
    others = [t for t in _flat(given) if isinstance(t, Tensor)]
    alias = (lambda m, t: m._base is t) if transformed() else _is_alias_of  # the operator below is asked in its turn
    for i, m in enumerate(made):
        if (m._is_view() and not transformed()) or any(m is t or alias(m, t) for t in (*others, *made[:i])):
            made[i] = m.clone()
    return made


def cpu_only(*names: str) -> Any:
    """Compiled kernels that there are for the CPU alone, as `fused` takes a module; None where they were not built."""
    return SimpleNamespace(**{n: getattr(_C, n) for n in names}) if hasattr(_C, names[0]) else None


def _native(kernel: Callable, results: Callable, problem: Callable) -> Callable:
    def native(*given: Any) -> Any:
        made = results(*given)
        if made.__class__ is tuple:
            first = made[0]
            kernel(*problem(*given), *made, *((-1, 0) if first.is_cpu else _place(first)))
        elif made.is_cpu:
            kernel(*problem(*given), made, -1, 0)
        else:
            kernel(*problem(*given), made, *_place(made))
        return made

    return native


def _place(t: Tensor) -> tuple[int, int]:
    """Device index and raw stream as the compiled kernels take them."""
    return t.device.index, torch._C._cuda_getCurrentRawStream(t.device.index)


def _triton(module: Any, function: str, results: Callable, problem: Callable) -> Callable:
    def interpreted(*given: Any) -> Any:
        made = results(*given)
        kernels = importlib.import_module(module) if isinstance(module, str) else module
        first = _tuple(made)[0]
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            try:
                getattr(kernels, function)(*problem(*given), *_tuple(made))
            except RuntimeError as error:
                if any(isinstance(t, Tensor) and (is_wrapped(t) or is_legacy_batched(t)) for t in given):
                    raise BufferError(str(error)) from error  # as compiled kernels do
                raise
        return made

    return interpreted


def _next_level(operator: Any, keys: Any, *given: Any) -> Any:
    """The operator below autograd. On a level of torch.func that is the next level, which records for itself."""
    if not functorch_is_active():
        return operator.redispatch(keys, *given)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return operator.redispatch(keys, *given)


def _recording() -> Any:
    """A context in which autograd records, also inside a kernel that a mode of the dispatcher has called."""
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD)


def differentiate(
    function: Callable, cotangents: Sequence[Tensor | None], given: Sequence[Any], by: Sequence[int]
) -> Sequence[Tensor]:
    """Gradients of a function in plain PyTorch by some arguments, to be differentiated again if grad mode is on."""
    if functorch_is_active():  # what is batched, or left of a level that has ended, has a graph on a level of its own
        given = [unwrap_if_dead(t) if isinstance(t, Tensor) else t for t in given]

        continuous: list[bool] = []

        def of(*leaves: Tensor) -> Any:
            own = dict(zip(by, leaves, strict=True))
            made = _tuple(function(*(own.get(i, t) for i, t in enumerate(given))))
            continuous[:] = [m.is_floating_point() or m.is_complex() for m in made]
            return tuple(itertools.compress(made, continuous))

        made, pull = torch.func.vjp(of, *(given[i] for i in by))  # type: ignore[misc]
        of_made = itertools.compress(cotangents, continuous)
        return pull(tuple(torch.zeros_like(m) if c is None else c for m, c in zip(made, of_made, strict=True)))
    graph = torch.is_grad_enabled() and any_requires_grad(*given, *cotangents)
    with _recording(), torch.enable_grad(), enable_inplace_requires_grad(True):
        # Views, since one argument may have been made of another.
        own = [t.view_as(t) if _floating(t) or (isinstance(t, Tensor) and t.is_complex()) else t for t in given]
        leaves = [own[i] if own[i].requires_grad else own[i].requires_grad_() for i in by]
        every = zip(_tuple(function(*own)), cotangents, strict=True)
        pairs = [(o, c) for o, c in every if c is not None and o.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in leaves]
        found, used = zip(*pairs, strict=True)
        return torch.autograd.grad(found, leaves, used, create_graph=graph, allow_unused=True, materialize_grads=True)


def needed_gradients(
    function: Callable, cotangents: Sequence[Tensor | None], given: Sequence[Any], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Those of `differentiate` by the first arguments, in lists one by one, that are needed, and None for others."""
    counts, by = _counts(given), [i for i, wanted in enumerate(needed) if wanted]
    made = iter(differentiate(lambda *flat: function(*_nest(flat, counts)), cotangents, _flat(given), by))
    return [next(made) if wanted else None for wanted in needed]


def define_random(schema: str, function: Callable, *, fake: Callable) -> None:
    """Define an operator that draws from PyTorch's generators: two calls of it are never taken for one."""
    name = schema[: schema.index("(")]
    library = _schemas[name] = torch.library.Library("genfuse", "FRAGMENT")
    library.define(schema, tags=(torch.Tag.nondeterministic_seeded,))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genfuse::{name}", fake, lib=library)


def _register(kernel: Kernel, asked: str) -> None:
    for device in PREFERENCE:
        old = _implementations.pop((kernel.name, device), None)
        if old is not None:
            old._destroy()
        implementation, function, why = kernel.choose(device, asked)
        namespace, _, name = kernel.operator.name().partition("::")
        library = _implementations[kernel.name, device] = torch.library.Library(namespace, "IMPL")
        function = function or _missing(f"{kernel.name} has no {implementation} implementation on {device}: {why}")
        library.impl(name, _checked(kernel.check, function), device.upper())
        kernel.chosen[device] = function


def _checked(check: Callable | None, function: Callable) -> Callable:
    """The function for whoever calls: the dispatcher is open to all."""
    if check is None:
        return function

    def checked(*given: Any) -> Any:
        check(*given)
        return function(*given)

    return checked


def _missing(message: str) -> Callable:
    def kernel(*arguments: Any) -> None:
        raise RuntimeError(message)

    return kernel


@contextmanager
def using(implementation: str) -> Iterator[None]:
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
    """The implementations that every operator which is written in them at all has on a type of device. Those whose
    compiled kernel is for the CPU alone run their formula elsewhere, and do not count there."""
    there = [kernel for kernel in KERNELS.values() if not (device == "cuda" and kernel.cpu_only)]
    found = {i: [k.find(i, device)[0] for k in there if getattr(k, i)] for i in ("native", "triton", "reference")}
    return [i for i, functions in found.items() if functions and all(functions)]


def decompositions() -> dict[Any, Callable]:
    """Each operator with its reference, as ``run_decompositions`` of a program of `torch.export` takes them: what is
    left then are PyTorch's own operators, which ONNX and other runtimes know."""
    return {kernel.operator: kernel.reference for kernel in KERNELS.values()}


def implementations() -> list[tuple[str, str, str, str]]:
    """Operator, device, implementation and reason, for every kernel and every device."""
    rows = []
    for name, kernel in KERNELS.items():
        for device in PREFERENCE:
            implementation, function, why = kernel.choose(device, _asked)
            rows.append((name, device, implementation if function else f"{implementation} (missing)", why))
        rows.append((name, "other", "reference", "plain PyTorch"))
    return rows


def build_info() -> dict[str, Any]:
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


def include() -> Path:
    """The folder of the headers with which other packages compile operators of their own."""
    if _C is None:
        raise RuntimeError(f"there are no headers: {_why_not}")
    return Path(_C.__file__).parent / "include"


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
    if compiling():  # which sorts no strides that are traced
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
        axes = list(range(t.dim()))
        other = last is not None and not t.is_contiguous() and t.is_contiguous(memory_format=last)
        return [0, *axes[2:], 1] if other else axes
    return [0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)]  # stable: contiguous ones stay as they are


def flatten(t: Tensor, order: list[int]) -> Tensor:
    """``t``, (N, ...), as (N, D) with its axes in that order; copied only if an example has gaps in it."""
    return t.permute(order).reshape(t.shape[0], t.shape[1:].numel())


def unflatten(t: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """What has that shape and becomes ``t`` by `flatten`."""
    return t.view([shape[axis] for axis in order]).permute(sorted(order, key=order.__getitem__))


def pieces(t: Tensor, sums: int = 1) -> Tensor | None:
    """Room for the sums of rows' pieces, (PIECES, rows, sums), if there are few and long rows: then blocks of a GPU
    share them. How they do depends on the shape alone, and so do the sums."""
    rows, cols = t.shape[:-1].numel(), t.shape[-1]
    return t.new_empty((PIECES, rows, sums), dtype=wide(t)) if cols >= LONG and 0 < rows <= FEW else None


def wide(t: Tensor) -> torch.dtype:
    """The type that is computed in, which is also that of sums: many terms do not fit 16 bits."""
    return t.dtype if t.dtype is torch.float64 else torch.float32


def softplus(t: Tensor) -> Tensor:
    """log(1 + e^t). PyTorch's own is t above 20, which lacks 2e-9 in float64."""
    return torch.nn.functional.softplus(t, threshold=40.0)


def sums(t: Tensor, *shape: int) -> Tensor:
    """Room for sums over parts of ``t``. PyTorch takes half as long again for a shape in a tuple, and for a dtype."""
    dtype = wide(t)
    return t.new_empty(*shape) if shape and dtype is t.dtype else t.new_empty(shape, dtype=dtype)


def like(t: Tensor) -> Tensor:
    """Room for a result of t's shape and dtype, contiguous."""
    quick = t.__class__ in TENSORS and t.is_contiguous()  # which traced sizes may not tell
    return empty_like(t) if quick else empty_like(t, memory_format=torch.contiguous_format)


def check_alike(first: Tensor, name: str, **others: tuple) -> None:
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
