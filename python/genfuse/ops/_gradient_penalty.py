"""The gradient of a critic in its input, and the penalty on its norm, without double backward if that can be.

The critic is called as it is, and what it computes from x is read from the graph that autograd records. If all of that
is piecewise linear, the gradient is the product of the transposed operations, none of which leads back to x.
"""

import inspect
import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch._compile import _disable_dynamo
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from genfuse.ops import _mlp, _op
from genfuse.ops._gradient_norm_penalty import gradient_norm_penalty
from genfuse.ops._interpolate import interpolate

Node = Any  # an operation in autograd's graph, torch.autograd.graph.Node, with what it has saved
Depends = dict[Node | None, bool]  # whether what an operation has computed depends on x
Gradients = Sequence[Tensor | None]
VJP = Callable[..., Gradients]  # of a node, Depends, and the gradients for its outputs: the gradients for its inputs
Check = Callable[[Node, Depends], bool]  # whether an operation is piecewise linear in what depends on x
Where = Literal["interpolated", "real", "fake"]

_log = logging.getLogger("genfuse")
_noted: set[tuple[str, ...]] = set()  # critics, and what is in their way, that the log has named
_located: set[type] = set()  # critics that have run once with an eye on which layer does what
_aten = torch.ops.aten


@cache
def _saved_names(kind: Any) -> tuple[str, ...] | None:
    """What operations of a class save for their derivative; None if it does not show."""
    shows = re.fullmatch(r"\w+Backward\d+|CopyBackwards", kind.__name__)
    return tuple(name for name in dir(kind) if name.startswith("_saved_")) if shows else None


def _saves_nothing_of_x(node: Node, depends: Depends) -> bool:
    """Whether the derivative is made of nothing that depends on x; then the operation, whichever it is, is linear."""
    names = _saved_names(node.__class__)
    if names is None:
        return False
    for name in names:
        saved = getattr(node, name)
        for value in saved if isinstance(saved, tuple) else (saved,):
            if isinstance(value, Tensor) and depends.get(value.grad_fn, True):
                return False
    return True


def _declared(node: Node, depends: Depends) -> bool:
    """Whether the operation is linear, or an autograd.Function that says of itself that it is piecewise linear."""
    declares = getattr(getattr(node, "_forward_cls", None), "piecewise_linear", False)
    return declares is True or _saves_nothing_of_x(node, depends)


def _constant(*inputs: int) -> Check:
    return lambda node, depends: not any(depends[node.next_functions[k][0]] for k in inputs)


def _not_both(left: int, right: int) -> Check:
    return lambda node, depends: not (depends[node.next_functions[left][0]] and depends[node.next_functions[right][0]])


def _fit(node: Node, depends: Depends, *gradients: Tensor | None) -> Gradients:
    """Undo the broadcasting and the promotion of dtypes in an operation of several inputs."""
    fitted: list[Tensor | None] = []
    for (before, output), g in zip(node.next_functions, gradients, strict=True):
        if g is not None and depends[before]:
            wanted = before._input_metadata[output]
            g = g.real if g.is_complex() and not wanted.dtype.is_complex else g
            g = g.sum_to_size(torch.Size(wanted.shape)).to(wanted.dtype)
        fitted.append(g)
    return fitted


def _as_recorded(node: Node, depends: Depends, *gradients: Tensor | None) -> Gradients:
    """Right for every operation, and ordinary double backward if what it has saved depends on x."""
    if not isinstance(node, BackwardCFunction):
        result = node(*gradients)
        return _fit(node, depends, *(result if isinstance(result, tuple) else (result,)))
    # An autograd.Function gets what the engine would give it, and returns something for each argument, tensor or not.
    outputs = zip(gradients, node._input_metadata, strict=True)  # type: ignore[attr-defined]
    made = node.apply(*(torch.zeros(o.shape, dtype=o.dtype, device=o.device) if g is None else g for g, o in outputs))
    made = made if isinstance(made, tuple) else (made,)
    of_tensors = itertools.compress(made, node.needs_input_grad)
    return _fit(node, depends, *(None if before is None else next(of_tensors) for before, _ in node.next_functions))


def _mul(node: Node, depends: Depends, g: Tensor) -> Gradients:
    left = depends[node.next_functions[0][0]]
    products = (g * node._saved_other.conj(), None) if left else (None, g * node._saved_self.conj())
    return _fit(node, depends, *products)


def _transposed(factor: Tensor, made_by: Node) -> Tensor:
    """The factor's adjoint: of a parameter that a linear layer has transposed, the parameter itself."""
    source: Any = made_by.next_functions[0][0] if type(made_by).__name__ == "TBackward0" else None
    return source.variable.conj() if hasattr(source, "variable") else factor.mH


def _matmul(left: str, right: str) -> VJP:
    def vjp(node: Node, depends: Depends, g: Tensor) -> Gradients:
        (by_left, _), (by_right, _) = node.next_functions[-2:]
        if depends[by_left]:
            return g @ _transposed(getattr(node, right), by_right), None
        return None, _transposed(getattr(node, left), by_left) @ g if depends[by_right] else None

    return vjp


def _added_matmul(left: str, right: str) -> VJP:
    """Of beta * added + alpha * left @ right."""
    product = _matmul(left, right)

    def vjp(node: Node, depends: Depends, g: Tensor) -> Gradients:
        added = g * node._saved_beta.conjugate() if depends[node.next_functions[0][0]] else None
        products = product(node, depends, g if node._saved_alpha == 1 else g * node._saved_alpha.conjugate())
        return _fit(node, depends, added, *products)

    return vjp


def _convolution(node: Node, depends: Depends, g: Tensor) -> Gradients:
    weight, back = node._saved_weight, not node._saved_transposed
    before, output = node.next_functions[0]
    size, dims = before._input_metadata[output].shape[2:], weight.dim() - 2
    settings = node._saved_stride, node._saved_padding, node._saved_dilation
    stride, padding, dilation = (value * dims if len(value) == 1 else value for value in settings)
    cells = zip(size, g.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    left_over = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) if back else 0 for n, m, k, s, p, d in cells]
    y = torch.convolution(g, weight, None, stride, padding, dilation, back, left_over, node._saved_groups)
    for axis, n in enumerate(size, start=2):  # there may be more where output_padding exceeds the stride
        y = y if y.shape[axis] == n else y.narrow(axis, 0, n)
    return y, None, None


def _prelu(node: Node, depends: Depends, g: Tensor) -> Gradients:
    return torch.where(node._saved_self.detach() > 0, g, node._saved_weight * g), None


def _batch_norm(node: Node, depends: Depends, g: Tensor, *_: Any) -> Gradients:
    scale, weight = (node._saved_running_var + node._saved_eps).rsqrt(), node._saved_weight
    scale = scale if weight is None else scale * weight
    return _fit(node, depends, g * scale.view(-1, *[1] * (g.dim() - 2)), None, None)  # averages may be the wider ones


def _cut(vjp: Callable[..., Tensor], *names: str) -> tuple[VJP, None]:
    """Of an operation whose slope or choice is locally constant: ``vjp(g, ...)`` gets what it has saved, by name."""
    names = tuple(f"_saved_{name}" for name in names)

    def of_node(node: Node, depends: Depends, g: Tensor, *_: Any) -> Gradients:
        saved = [getattr(node, name) for name in names]
        return (vjp(g, *[value.detach() if isinstance(value, Tensor) else value for value in saved]),)

    return of_node, None


def _clamp(g: Tensor, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return torch.where(x.clamp(low, high) == x, g, 0)


_abs = _cut(lambda g, x: g * x.sgn(), "self")[0]
_leaky = _aten.leaky_relu_backward.default
_POOL = "self", "kernel_size", "stride", "padding"
_OPERATIONS: dict[str, tuple[VJP, Check | None]] = {  # all others have to pass `_declared`
    "CopySlices": (_as_recorded, None),  # an operation in place on a view, which it hides
    "MulBackward0": (_mul, _not_both(0, 1)),
    "DivBackward0": (lambda node, depends, g: _fit(node, depends, g / node._saved_other.conj(), None), _constant(1)),
    "MmBackward0": (_matmul("_saved_self", "_saved_mat2"), _not_both(0, 1)),
    "BmmBackward0": (_matmul("_saved_self", "_saved_mat2"), _not_both(0, 1)),
    "AddmmBackward0": (_added_matmul("_saved_mat1", "_saved_mat2"), _not_both(1, 2)),
    "BaddbmmBackward0": (_added_matmul("_saved_batch1", "_saved_batch2"), _not_both(1, 2)),
    "MvBackward0": (_as_recorded, _not_both(0, 1)),
    "ConvolutionBackward0": (_convolution, _constant(1, 2)),
    "NativeBatchNormBackward0": (
        _batch_norm,
        lambda node, depends: not node._saved_training and not any(depends[by] for by, _ in node.next_functions[1:]),
    ),
    "PreluKernelBackward0": (_prelu, _constant(1)),
    "ReluBackward0": _cut(lambda g, y: _aten.threshold_backward.default(g, y, 0), "result"),
    "LeakyReluBackward0": _cut(lambda g, x, slope: _leaky(g, x, slope, False), "self", "negative_slope"),
    "LeakyReluBackward1": _cut(lambda g, y, slope: _leaky(g, y, slope, True), "result", "negative_slope"),  # in place
    "ThresholdBackward0": _cut(_aten.threshold_backward.default, "self", "threshold"),
    "HardtanhBackward0": _cut(_aten.hardtanh_backward.default, "self", "min_val", "max_val"),
    "ClampBackward1": _cut(_clamp, "self", "min", "max"),
    "ClampMinBackward0": _cut(_clamp, "self", "min"),
    "ClampMaxBackward0": _cut(lambda g, x, high: _clamp(g, x, None, high), "self", "max"),
    "_NodeBackward": (
        lambda node, depends, g: [_mlp.input_gradient(node, g), *[None] * (len(node.next_functions) - 1)],
        lambda node, depends: _mlp.is_chain(node) and not any(depends[by] for by, _ in node.next_functions[1:]),
    ),
    "AbsBackward0": (_abs, lambda node, depends: not node._saved_self.is_complex()),
    "AddcmulBackward0": (_as_recorded, _not_both(1, 2)),
    "AddbmmBackward0": (_as_recorded, _not_both(1, 2)),
    "DotBackward0": (_as_recorded, _not_both(0, 1)),
    "LinalgCrossBackward0": (_as_recorded, _not_both(0, 1)),
    "LerpBackward1": (_as_recorded, _constant(2)),
    "GatherBackward0": (_as_recorded, None),  # which saves what it takes from for its shape alone
    "IndexAddBackward0": (_as_recorded, None),
}
for _d in (2, 3):
    for _name, _operator, _saved in (
        (f"AvgPool{_d}D", f"avg_pool{_d}d", (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
        (f"AdaptiveAvgPool{_d}D", f"_adaptive_avg_pool{_d}d", ("self",)),
        (f"MaxPool{_d}DWithIndices", f"max_pool{_d}d_with_indices", (*_POOL, "dilation", "ceil_mode", "result1")),
        (f"AdaptiveMaxPool{_d}D", f"adaptive_max_pool{_d}d", ("self", "result1")),
    ):
        _OPERATIONS[f"{_name}Backward0"] = _cut(getattr(_aten, f"{_operator}_backward").default, *_saved)
for _d in (1, 2, 3):
    for _name in ("reflection", "replication"):
        _operator = getattr(_aten, f"{_name}_pad{_d}d_backward").default
        _OPERATIONS[f"{_name.title()}Pad{_d}DBackward0"] = _cut(_operator, "self", "padding")


def _operations(out: Tensor, start: Node) -> tuple[list[tuple[Node, VJP, list]], Depends, list[Node]]:
    """What was computed from x, which ``start`` has made, on the way to ``out``: each operation after those that it
    takes from, with its vector-Jacobian product, and if it is a Function what takes from it, without which it knows
    nothing in PyTorch 2.6; what depends on x; and the operations that are not piecewise linear.
    """
    root: Any = out.grad_fn
    depends: Depends = {start: True, None: False}
    order: list[tuple[Node, VJP, list]] = []
    users: dict[Node, list] = {root: [out]}
    obstacles: list[Node] = []
    stack = [root]
    while stack:
        node, of_x, ready = stack[-1], False, True
        for before, _ in node.next_functions:
            known = depends.get(before)
            if known:
                of_x = True
            elif known is None and before.next_functions:
                stack.append(before)
                ready = False
            else:  # a parameter
                depends[before] = False
        if ready:
            stack.pop()
            if node in depends:
                continue
            depends[node] = of_x
            if of_x:
                vjp, check = _OPERATIONS.get(type(node).__name__, (_as_recorded, _declared))
                order.append((node, vjp, users.setdefault(node, [])))
                for before, _ in node.next_functions:
                    if isinstance(before, BackwardCFunction):
                        users.setdefault(before, []).append(node)
                if check is not None and not check(node, depends):
                    obstacles.append(node)
    return order, depends, obstacles


def _pull(gradients: dict[tuple[Node, int], Tensor], order: list[tuple[Node, VJP, list]], depends: Depends) -> None:
    """Carry the gradients for the last operation back to x. Forget each with all that it has saved when it is done."""
    while order:
        node, vjp, _users = order.pop()
        del depends[node]
        outputs = len(node._input_metadata) if vjp is _as_recorded else 1
        given = [gradients.pop((node, output), None) for output in range(outputs)]
        if all(g is None for g in given):
            continue
        for edge, g in zip(node.next_functions, vjp(node, depends, *given), strict=True):
            if g is not None and depends[edge[0]]:
                gradients[edge] = gradients[edge] + g if edge in gradients else g


@contextmanager
def _layers_told_apart(critic: Callable[..., Tensor]) -> Iterator[list[tuple[int, int, str]]]:
    """Each call of a layer, inner ones first: the numbers of its first node and of the next one after it; its name.

    Of a class of critics only the first time, since it takes hooks on all layers.
    """
    calls: list[tuple[int, int, str]] = []
    begun: list[int] = []
    number, handles = torch.autograd._get_sequence_nr, []
    layers: dict[str, nn.Module] = {}
    if isinstance(critic, nn.Module) and type(critic) not in _located:
        _located.add(type(critic))
        layers = {n: layer for n, layer in critic.named_modules() if not isinstance(layer, torch.jit.ScriptModule)}
    whole = [f"{name}." * bool(name) for name, layer in layers.items() if getattr(layer, "one_node", False)]
    for name, layer in layers.items():
        if any(name != prefix[:-1] and name.startswith(prefix) for prefix in whole):
            continue
        text = f"{name} ({type(layer).__name__})" if name else "its forward"

        def leave(*_: Any, text: str = text) -> None:
            calls.append((begun.pop(), number(), text))

        handles.append(layer.register_forward_pre_hook(lambda *_: begun.append(number()), prepend=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


_ADVICE = {  # by the operation; the first that fits
    r"Mul|Mm|Bmm|Addmm|Baddbmm|Mv|Div|Convolution|PreluKernel": "one of its two factors must not depend on x",
    r".*(Batch|Layer|Group|Rms)Norm": "leave it out, or normalise the weights instead (spectral_norm, weight_norm)",
    r".*Softmax|.*Attention.*": "leave attention out",
    r".*": "use a piecewise linear operation of PyTorch instead, such as ReLU or LeakyReLU for an activation",
}


def _note(critic: Callable[..., Tensor], obstacles: list[Node], calls: list[tuple[int, int, str]]) -> None:
    name = getattr(critic, "__name__", type(critic).__name__)
    found: dict[str, str] = {}
    for node in obstacles:
        operation = re.sub(r"Backward\d*$", "", type(node).__name__)
        where = next((f" in {text}" for first, last, text in calls if first <= node._sequence_nr() < last), "")
        advice = next(advice for pattern, advice in _ADVICE.items() if re.fullmatch(pattern, operation))
        found.setdefault(operation, f"{operation}{where}: {advice}")
    if (key := (name, *sorted(found))) in _noted:
        return
    _noted.add(key)
    batch_norm = isinstance(critic, nn.Module) and any(isinstance(layer, _BatchNorm) for layer in critic.modules())
    _log.warning(
        "gradient_penalty differentiates %s twice, which is slower than the one pass that it takes for piecewise "
        "linear critics. In its way: %s%s",
        name,
        "; ".join(found.values()),
        "; its batch norm couples the examples, so that no gradient is that of one example alone" * batch_norm,
    )


def _scores(critic: Callable[..., Tensor], x: Tensor, *y: Tensor) -> Tensor:
    """The critic's output, one number per example."""
    try:
        out = critic(x, *y)
    except TypeError:
        if y and not _takes(critic, x, *y):
            raise ValueError(
                f"context must be None for a critic that takes none, {type(critic).__name__}, got shape "
                f"{tuple(y[0].shape)}"
            ) from None
        raise
    if not isinstance(out, Tensor):
        raise ValueError(f"critic must return a tensor of one number per example, got {type(out).__name__}")
    n, shape = x.shape[0], tuple(out.shape)
    if shape not in ((n,), (n, 1)):
        raise ValueError(f"critic must return one number per example, ({n},) or ({n}, 1), got shape {shape}")
    return out


def _as_written(critic: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What torch.compile was given, unless there are hooks on what it made."""
    hooked = getattr(critic, "_forward_hooks", None) or getattr(critic, "_forward_pre_hooks", None)
    return critic if hooked else getattr(critic, "_orig_mod", critic)


def _takes(critic: Callable[..., Tensor], *arguments: Tensor) -> bool:
    try:
        inspect.signature(critic.forward if isinstance(critic, nn.Module) else critic).bind(*arguments)
    except TypeError:
        return False
    return True


@_disable_dynamo  # torch.compiler.disable would import all of it here, for seconds
def _by_graph(critic: Callable[..., Tensor], x: Tensor, *y: Tensor, ours: bool, keep: bool) -> tuple[Any, Tensor]:
    x = x.detach().requires_grad_()
    # The critic may overwrite the result of an operation, unlike a leaf or a view of one.
    shown = _aten._unsafe_view.default(x, x.shape) if ours else x.clone()
    start = shown.grad_fn
    # What a compiler made of the critic, or of parts of it, has no second derivative.
    as_written = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with as_written, _layers_told_apart(critic) as calls:
        out = _scores(critic, shown, *y)
    del shown
    if out.grad_fn is None:
        raise ValueError("critic must depend on x, got an output without gradients")
    ones, last = torch.ones_like(out), (out.grad_fn, out.output_nr)
    order, depends, obstacles = _operations(out, start)
    if obstacles:
        _note(critic, obstacles, calls)
        return out, torch.autograd.grad(out, x, ones, create_graph=True)[0]
    scores = out if keep else None  # whose graph would hold all that `_pull` forgets
    gradients: dict[Any, Tensor] = {last: ones}
    del out, last
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():  # each as wide as it was
        _pull(gradients, order, depends)
    if (start, 0) not in gradients:
        raise ValueError("critic must depend on x, got an output that does not")
    return scores, gradients[start, 0]


@_disable_dynamo
def _without_graph(critic: Callable[..., Tensor], x: Tensor, *y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        x, *labels = (tensor.clone() if tensor.is_inference() else tensor for tensor in (x, *y))  # saved by autograd
        x = x.detach().requires_grad_()
        out = _scores(critic, x.clone(), *labels)
        return out.detach(), torch.autograd.grad(out, x, torch.ones_like(out))[0]


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    y = torch.where(input <= 0, negative_slope * input if negative_slope else 0.0, input)
    return input.copy_(y) if inplace else y


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _leaky_relu(input, 0.0, inplace)


class _ActivationsAsChoices(TorchFunctionMode):
    """The derivative of a choice has none in x. That of an activation has zeros, which compilers carry back to x."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = {F.relu: _relu, F.leaky_relu: _leaky_relu}.get(function, function)
        return function(*args, **(kwargs or {}))


def _transformed(critic: Callable[..., Tensor], x: Tensor, *y: Tensor) -> tuple[Tensor, Tensor]:
    """In torch.compile and the transforms of torch.func, where there is no graph to read."""

    def scores(x: Tensor) -> Tensor:
        with _ActivationsAsChoices():
            return _scores(critic, x.clone(), *y)

    out, pull = torch.func.vjp(scores, x.detach())  # type: ignore[misc]
    return out, pull(torch.ones_like(out))[0]


def input_gradient(critic: Callable[..., Tensor], x: Tensor, context: Tensor | None = None) -> Tensor:
    r"""The gradient of a critic in its input, :math:`\nabla_x f(x)`, differentiable in the critic's parameters.

    A critic whose operations are piecewise linear in x has a Jacobian that is locally constant: linear layers and
    convolutions of any kind, the ReLU family, pools, padding, resampling, dropout, reshapes, slices, sums, residual
    connections, and products with anything that does not depend on x, such as learned gains, normalised weights or
    embedded labels. Then the gradient is a chain of the transposed operations, whose backward pass is an ordinary one,
    and holds no graph of x. How the critic is written does not matter: what it did is read from autograd's graph. A
    critic with any other operation, such as a smooth activation, a normalisation of features, attention or an
    autograd.Function, is differentiated twice by autograd; the log says once which operation that was, in which layer,
    and what to do. Both have the same values, at the kinks of the activations too. An autograd.Function that is
    piecewise linear in its inputs, whose backward can be differentiated, says so by the class attribute
    ``piecewise_linear = True`` and is then a link of the chain as well. In torch.compile and in the
    transforms of torch.func, which have no such graph, every critic is differentiated twice, which costs little for
    ReLU and LeakyReLU; a batch norm in training breaks the graph of torch.compile. The result is not differentiable in
    x.

    Args:
        critic: f; ``critic(x)``, or ``critic(x, context)`` if there is one, is (N,) or (N, 1), and treats each example
            by itself. It is called once. What torch.compile made of it is called as it was before, and with the
            hooks that are on it. Hooks of its layers run; hooks on the gradients of tensors inside it only where it is
            differentiated twice.
        x: (N, ...), float32, float64, float16 or bfloat16.
        context: labels (N,), a context (N, C), or whatever the critic takes, with N rows.

    Returns:
        The gradient, of x's shape and dtype.

    Raises:
        ValueError: for x of another dtype or a context of another length, and if the critic does not return one number
            per example that depends on x.
        NotImplementedError: in torch.export, which has no gradients within a program.
    """
    return _input_gradient(critic, x, context)[1]


def scores_and_gradient(
    critic: Callable[..., Tensor], x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The critic's output, (N,) or (N, 1), and its `input_gradient`, by one call of the critic.

    The loss on the one and the penalty on the other, as R1 and R2 are (arXiv 2501.05441), then share a forward pass.
    Both are differentiable in the critic's parameters; arguments and errors are those of `input_gradient`.
    """
    return _input_gradient(critic, x, context, keep=True)


def scores_and_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    context: Tensor | None = None,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The critic's outputs for real and for fake examples, and the mean `gradient_penalty` between them.

    All that a step of WGAN-GP's critic needs (arXiv 1704.00028, algorithm 1). A linear layer's output at
    :math:`\epsilon x + (1 - \epsilon) \tilde x` is that mixture of its outputs at both ends, and costs no product:
    a critic that shows its layers by ``linear_chain(x)``, weights, biases and slope, as MLPs of `genfuse.nn` do, is one
    node of autograd's graph on a CPU with kernels. Every other critic is called with real and fake examples side by
    side, and once for the penalty. One seed gives the points that `gradient_penalty` takes.

    Args:
        critic, real, fake, context, target, one_sided, generator: as in `gradient_penalty`.

    Returns:
        The outputs for real and for fake examples, (N,) or (N, 1) each, and the penalty, ().

    Raises:
        ValueError: as `gradient_penalty`.
    """
    real, fake = real.detach(), fake.detach()
    _op.check_alike(real, "real", fake=(fake, tuple(real.shape)))
    critic = _as_written(critic)
    shows = context is None and hasattr(critic, "linear_chain") and not hasattr(critic, "_orig_mod")
    layers = critic.linear_chain(real) if shows else None  # type: ignore[attr-defined]
    if layers is not None and not torch.compiler.is_compiling():

        def draw() -> Tensor:
            ones = real.new_ones(real.shape[0], 1)
            return interpolate(ones, torch.zeros_like(ones), generator)[:, 0]

        found = _mlp.critic(torch.cat([real.flatten(1), fake.flatten(1)]), draw, *layers)
        if found is not None:
            out, gradient = found
            penalty = gradient_norm_penalty(gradient.view_as(real), target=target, one_sided=one_sided)
            of_real, of_fake = out.chunk(2)  # two, of no examples as well
            return of_real, of_fake, penalty
    both = () if context is None else (torch.cat([context, context]),)
    of_real, of_fake = _scores(critic, torch.cat([real, fake]), *both).chunk(2)
    settings: dict[str, Any] = {"target": target, "one_sided": one_sided, "generator": generator}
    return of_real, of_fake, gradient_penalty(critic, real, fake, context, **settings)


def _keeps_averages(critic: Callable[..., Tensor]) -> bool:
    """Whether a normalisation writes to its averages, as it may not within torch.func: the graph breaks there."""
    layers = critic.modules() if isinstance(critic, nn.Module) else ()
    return any(isinstance(layer, _NormBase) and layer.training and layer.track_running_stats for layer in layers)


def _input_gradient(
    critic: Callable[..., Tensor], x: Tensor, context: Tensor | None, ours: bool = False, keep: bool = False
) -> tuple[Any, Tensor]:
    """``ours`` is an x that nobody else reads, so that the critic may overwrite it. Scores may be None unless kept."""
    _op.check_alike(x, "x")
    if context is not None and context.shape[:1] != x.shape[:1]:
        raise ValueError(f"context must have a row for each of the {x.shape[0]} examples, got {tuple(context.shape)}")
    critic, labels = _as_written(critic), () if context is None else (context,)
    if getattr(torch.compiler, "is_exporting", bool)():  # which PyTorch 2.6 does not tell
        raise NotImplementedError(
            "torch.export has no gradients within a program: export the critic by itself, or trace the gradient of it "
            "by torch.fx.experimental.proxy_tensor.make_fx, or torch.compile"
        )
    compiling = torch.compiler.is_compiling()
    if _are_functorch_transforms_active() or (compiling and not _keeps_averages(critic)):
        return _transformed(critic, x, *labels)
    if not torch.is_grad_enabled():
        return _without_graph(critic, x, *labels)
    return _by_graph(critic, x, *labels, ours=ours, keep=keep)


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor | None = None,
    context: Tensor | None = None,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    at: Where = "interpolated",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""What a critic pays for the norm of its gradient, :math:`(\lVert\nabla_x f(x)\rVert_2 - t)^2`.

    WGAN-GP (arXiv 1704.00028, equation 3) at x = e real + (1 - e) fake with e ~ U(0, 1) for each example; with target
    0, R1 at real examples and R2 at fake ones (arXiv 1801.04406, equation 9). Multiply by lambda, or by gamma / 2. The
    gradient is that of `input_gradient`, which says of which critics it is made without double backward.

    Args:
        critic: f; ``critic(x)``, or ``critic(x, context)``, is (N,) or (N, 1).
        real, fake: examples (N, ...) of one shape, dtype and device, which get no gradient. "real" and "fake" need one.
        context: of both: labels (N,), a context (N, C), or whatever the critic takes.
        target, one_sided, reduction: as in `gradient_norm_penalty`.
        at: the points at which the gradient is taken.
        generator: of the e.

    Returns:
        (), or (N,) for reduction "none".

    Raises:
        ValueError: where examples are missing, or of another shape, dtype or device, and for a setting outside its
            range; and what `input_gradient` raises.
    """
    if at not in ("interpolated", "real", "fake"):
        raise ValueError(f'at must be "interpolated", "real" or "fake", got {at!r}')
    if fake is None and at != "real":
        raise ValueError(f'fake must be given with at="{at}", got None')
    if at == "interpolated":
        assert fake is not None
        x = interpolate(real.detach(), fake.detach(), generator)
    else:
        x = real if fake is None or at == "real" else fake
        _op.check_alike(x, at)
    _, gradient = _input_gradient(critic, x, context, ours=at == "interpolated")
    return gradient_norm_penalty(gradient, target=target, one_sided=one_sided, reduction=reduction)
