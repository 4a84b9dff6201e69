"""Multilayer perceptrons whose forward and backward pass are one call each."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn import functional as F

from genfuse.ops import _interpolate, _op

MOST_LAYERS = 24  # portable.h's list has room for flags of all their tensors
# PyTorch's own products are as quick elsewhere, or this was never run there.
_NATIVE = hasattr(_op._C, "mlp") and "AVX" in _op.build_info()["simd"]


def _network(
    x: Tensor, added: Tensor | None, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    gates: Sequence[Tensor], slope: float, residual: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """y, and what each hidden layer hands on followed by what gates multiply."""
    if counts is not None:
        seen = counts.split([len(w) for w in weights])
        weights = [
            w * (torch.arange(w.shape[1], device=w.device) < n[:, None]).to(w.dtype)  # which 2.6's ONNX asks for
            for w, n in zip(weights, seen, strict=True)
        ]
    layers = list(zip(weights, biases, strict=True))
    kept: list[Tensor] = []
    inner: list[Tensor] = []

    def rectify(a: Tensor) -> Tensor:
        kept.append(F.leaky_relu(a, slope) if slope else F.relu(a))
        return kept[-1]

    h = F.linear(x, *layers[0])  # (N, H)
    h = h if added is None else h + added
    if residual:
        for i, (first, second) in enumerate(zip(layers[1:-1:2], layers[2:-1:2], strict=True)):
            block = F.linear(rectify(F.linear(rectify(h), *first)), *second)
            if len(gates):
                inner.append(block)
                block = block * gates[i]
            h = h + block
        return F.linear(h, *layers[-1]), [*kept, h, *inner]
    for layer in layers[1:]:
        h = F.linear(rectify(h), *layer)
    return h, kept


def formula(*given: Any) -> tuple[Tensor, Tensor]:
    y, kept = _network(*given)
    return y, torch.cat([k.flatten() for k in kept]) if kept else y.new_empty(0)


def _widths(weights: Sequence[Tensor]) -> list[int]:
    try:
        return [weights[0].shape[1], *(w.shape[0] for w in weights)]
    except IndexError:
        shapes = ", ".join(str(tuple(w.shape)) for w in weights)
        raise ValueError(f"weights must be (outputs, inputs) each, got {shapes}") from None


def _results(
    x: Tensor, added: Tensor | None, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    gates: Sequence[Tensor], *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = x.shape[0]
    units = sum([b.shape[0] for b in biases[:-1]]) + len(gates) * biases[0].shape[0]
    return x.new_empty((rows, biases[-1].shape[0])), x.new_empty(rows * units)


def _problem(
    x: Tensor, added: Tensor | None, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    gates: Sequence[Tensor], slope: float, residual: bool,
) -> tuple:  # fmt: skip
    x, stride = _op.rows(x)
    added, added_stride = (None, 0) if added is None else _op.rows(added)
    return (
        _op.DTYPES[x.dtype], x, stride, x.shape[0], added, added_stride, [w.contiguous() for w in weights],
        [b.contiguous() for b in biases], [g.contiguous() for g in gates], _widths(weights),
        None if counts is None else counts.contiguous(), slope, residual,
    )  # fmt: skip


def _takes(
    x: Tensor, added: Tensor | None, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    gates: Sequence[Tensor], slope: float, residual: bool,
) -> tuple:  # fmt: skip
    ((rows, columns), dtype), n = _op.matrix(x), len(weights)
    if dtype is not _op.wide(x) or not 0 < n <= MOST_LAYERS:
        raise ValueError(f"x must be float32 or float64, and layers 1 to {MOST_LAYERS}; got {dtype} and {n}")
    widths = [columns, *(w.shape[0] for w in weights)]
    _check_blocks(widths, len(gates), residual)
    hidden = (rows, widths[1]), dtype
    return (
        _op.matrix(x), hidden, ((sum(widths[1:]),), torch.int64), [((b, a), dtype) for a, b in pairwise(widths)],
        [((b,), dtype) for b in widths[1:]], [hidden] * len(gates),
    )  # fmt: skip


def _check_blocks(widths: Sequence[int], gates: int, residual: bool) -> None:
    """Raise a ValueError unless hidden layers make residual blocks, one for each gate, where there are to be any."""
    hidden = list(widths[1:-1])
    if residual and (len(hidden) % 2 == 0 or any(h != hidden[0] for h in hidden[2::2])):
        raise ValueError(
            "hidden layers of a residual network must be one width and pairs of widths, of which the second is the "
            f"first width again; got {hidden}"
        )
    if gates and (not residual or gates != len(hidden) // 2):
        raise ValueError(f"gates must be one for each residual block, got {gates}")


def _differentiated(needed: Sequence[bool], gy: Tensor, *given: Any) -> list[Tensor | None]:
    """PyTorch's gradients of x, added, counts, weights, biases and gates, to be differentiated again in grad mode."""
    return _op.needed_gradients(lambda *given: _network(*given)[0], (gy,), given, needed)


def _backward_formula(gy: Tensor, hidden: Tensor, *given: Any) -> Tensor:
    *given, needed = given  # type: ignore[assignment]
    found = _differentiated([*needed[:2], False, *needed[2:]], gy, *given)
    return torch.cat([f.flatten() for f in found if f is not None])


def _backward_results(
    gy: Tensor, hidden: Tensor, x: Tensor, added: Tensor | None, counts: Tensor | None, weights: Sequence[Tensor],
    biases: Sequence[Tensor], gates: Sequence[Tensor], slope: float, residual: bool, needed: Sequence[bool],
) -> Tensor:  # fmt: skip
    every = (x, added, *weights, *biases, *gates)
    return x.new_empty(sum([t.numel() for t, wanted in zip(every, needed, strict=True) if wanted and t is not None]))


def _backward_in_one(*given: Any) -> None:
    """The kernel of the gradients with its results in one tensor, as an operator must have them."""
    *problem, (x, added, _, weights, biases, gates, *_, needed), flat, device, stream = given
    _op._C.mlp_backward(*problem, _parts(flat, (x, added, *weights, *biases, *gates), needed), device, stream)


_CPU = SimpleNamespace(mlp=_op._C.mlp, mlp_backward=_backward_in_one) if _NATIVE else None


def _parts(flat: Tensor, every: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Of a tensor of gradients that are needed, each, and None for others."""
    start, found = 0, list[Tensor | None]()
    for t, is_needed in zip(every, needed, strict=True):
        if is_needed and t is not None:
            found.append(flat[start : start + t.numel()].view(t.shape))
            start += t.numel()
        else:
            found.append(None)
    return found


def _backward_takes(gy: Tensor, hidden: Tensor, *given: Any) -> tuple:
    wanted = _takes(*given[:-1])
    y, kept = _results(*given[:-1])
    many = 2 + sum(map(len, given[3:6]))
    if len(given[-1]) != many:
        raise ValueError(f"needed must be {many} flags, got {len(given[-1])}")
    return (y.shape, y.dtype), (kept.shape, kept.dtype), *wanted


# The gradients that are needed, of x, added, weights, biases and gates, one after the other.
_gradients = _op.fused(
    "mlp_backward(Tensor gy, Tensor hidden, Tensor x, Tensor? added, Tensor? counts, Tensor[] weights, "
    "Tensor[] biases, Tensor[] gates, float slope, bool residual, bool[] needed) -> Tensor",
    formula=_backward_formula,
    results=_backward_results,
    problem=lambda gy, hidden, *given: (*_problem(*given[:-1]), gy.contiguous(), hidden.contiguous(), given),
    native=_CPU,
    takes=_backward_takes,
)


def _backward(needed: Sequence[bool], cotangents: Sequence[Tensor], *given: Any, outputs: Any) -> Sequence[Any]:
    x, added, _, weights, biases, gates, *_ = given
    every = (x, added, *weights, *biases, *gates)
    needed, gy = needed[: 1 + len(every)], cotangents[0]
    if torch.is_grad_enabled() or _op.transformed() or _op.without_memory(gy):
        return _differentiated(needed, gy, *given)
    wanted = [*needed[:2], *needed[3:]]
    parts = _parts(_gradients(gy, *outputs, *given, wanted), every, wanted)
    found = [None if g is None else g.clone() for g in parts]  # a weight's would hold the memory of x's
    return [*found[:2], None, *found[2:]]


# Of x (N, D), what is added to the first layer (N, H), how many inputs each unit sees, weights, biases, and gates.
_fused = _op.fused(
    "mlp(Tensor x, Tensor? added, Tensor? counts, Tensor[] weights, Tensor[] biases, Tensor[] gates, "
    "float slope, bool residual) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=_problem,
    native=_CPU,
    backward=_backward,
    keep=(1,),
    constant=lambda *given: (1,),
    takes=_takes,
)


_KERNEL = _op.KERNELS["mlp"]


class _Node(torch.autograd.Function):
    """The whole network: with its many tensors, half a small one's time is spent on the way to the kernel and back."""

    @staticmethod
    def forward(ctx: Any, settings: tuple, x: Tensor, added: Any, counts: Any, *parameters: Tensor) -> Tensor:
        given = _nested(settings, x, added, counts, parameters)
        y, hidden = made = _results(*given)
        _op._C.mlp(*_problem(*given), *made, -1, 0)
        ctx.save_for_backward(x, added, counts, hidden, *parameters)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        x, added, counts, hidden, *parameters = saved = ctx.saved_tensors
        given = _nested(ctx.settings, x, added, counts, parameters)
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or _op.without_memory(gy) or not _op.plain((gy, *saved)):
            return None, *_backward(needed, (gy,), *given, outputs=(hidden,))
        found: list[Tensor | None] = [
            _op.like(t) if wanted else None
            for t, wanted in zip((x, added, *parameters), (*needed[:2], *needed[3:]), strict=True)
        ]
        _op._C.mlp_backward(*_problem(*given), gy.contiguous(), hidden.contiguous(), found, -1, 0)
        return None, *found[:2], None, *found[2:]


class _Chain(torch.autograd.Function):
    """The gradient of a plain network for x, which is linear in gy and in each weight."""

    @staticmethod
    def forward(ctx: Any, slope: float, gy: Tensor, hidden: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(gy, hidden, x, *parameters)
        ctx.slope = slope
        gx, ctx.kept = _op.like(x), torch.empty_like(hidden)
        _op._C.mlp_chain(*_Chain.problem(ctx, gy, hidden, x, *parameters), gx, ctx.kept, -1, 0)
        return gx

    @staticmethod
    def problem(ctx: Any, gy: Tensor, hidden: Tensor, x: Tensor, *parameters: Tensor) -> tuple:
        given = _nested((len(parameters) // 2, ctx.slope, False), x, None, None, parameters)
        return *_problem(*given), gy.contiguous(), hidden.contiguous()

    @staticmethod
    def backward(ctx: Any, ggx: Tensor) -> tuple:
        gy, hidden, x, *parameters = saved = ctx.saved_tensors
        weights, needed = parameters[: len(parameters) // 2], ctx.needs_input_grad[1:]
        wanted = [needed[0], *needed[3 : 3 + len(weights)]]
        rest = (None,) * len(weights)
        if torch.is_grad_enabled() or _op.without_memory(ggx) or not _op.plain((ggx, *saved)):
            again = lambda gy, *weights: _chain(gy, hidden, weights, ctx.slope)  # noqa: E731
            found = _op.needed_gradients(again, (ggx,), (gy, *weights), wanted)
        else:
            found = [_op.like(t) if is_wanted else None for t, is_wanted in zip((gy, *weights), wanted, strict=True)]
            problem = _Chain.problem(ctx, gy, hidden, x, *parameters)
            _op._C.mlp_chain_backward(*problem, ggx.contiguous(), ctx.kept, found, -1, 0)
        return None, found[0], None, None, *found[1:], *rest


def _chain(gy: Tensor, hidden: Tensor, weights: Sequence[Tensor], slope: float) -> Tensor:
    values = hidden.split([gy.shape[0] * len(w) for w in weights[:-1]])
    g = gy @ weights[-1]
    for w, value in zip(reversed(weights[:-1]), reversed(values), strict=True):
        g = torch.where(value.view_as(g) <= 0, g * slope, g) @ w
    return g


def is_chain(node: Any) -> bool:
    """Whether a node of autograd's graph is a network whose gradient for x is a chain of products."""
    known = getattr(node, "_forward_cls", None) is _Node  # and not somebody's Function of that name
    return known and not node.settings[2] and node.saved_tensors[1] is None and node.saved_tensors[2] is None


def input_gradient(node: Any, g: Tensor) -> Tensor:
    """The gradient for x of the network of a node that `is_chain`, differentiable in g and the weights."""
    x, _, _, hidden, *parameters = node.saved_tensors
    n, slope, _ = node.settings
    x, hidden = x.detach(), hidden.detach().contiguous()
    if _op.plain((g, hidden, x, *parameters)):
        return _Chain.apply(slope, g.contiguous(), hidden, x, *parameters)
    return _chain(g, hidden, parameters[:n], slope)


class _Critic(torch.autograd.Function):
    """Scores of real and fake examples, and the gradient between them, whose first layer is had from both ends."""

    @staticmethod
    def forward(ctx: Any, slope: float, x: Tensor, epsilon: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        n, units = len(epsilon), sum(len(b) for b in parameters[len(parameters) // 2 : -1])
        made = [x.new_empty(2 * n, 1), x.new_empty(n, x.shape[1]), x.new_empty(3 * n * units), x.new_empty(n * units)]
        _op._C.mlp_critic(*_Critic.problem(slope, x, epsilon, parameters), *made, -1, 0)
        ctx.save_for_backward(x, epsilon, *made[2:], *parameters)
        ctx.slope = slope
        return made[0], made[1]

    @staticmethod
    def problem(slope: float, x: Tensor, epsilon: Tensor, parameters: Sequence[Tensor]) -> tuple:
        dtype, x, stride, _, *rest = _problem(*_nested((len(parameters) // 2, slope, False), x, None, None, parameters))
        return dtype, x, stride, len(epsilon), *rest, epsilon.contiguous()

    @staticmethod
    def backward(ctx: Any, gy: Tensor, ggx: Tensor) -> tuple:
        x, epsilon, hidden, kept, *parameters = saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or _op.without_memory(gy, ggx) or not _op.plain((gy, ggx, *saved)):
            n = len(parameters) // 2
            again = lambda *every: critic_formula(x, epsilon, every[:n], every[n:], ctx.slope)  # noqa: E731
            return None, None, None, *_op.needed_gradients(again, (gy, ggx), parameters, needed)
        found = [_op.like(t) if wanted else None for t, wanted in zip(parameters, needed, strict=True)]
        given = (t.contiguous() for t in (gy, ggx, hidden, kept))
        _op._C.mlp_critic_backward(*_Critic.problem(ctx.slope, x, epsilon, parameters), *given, found, -1, 0)
        return None, None, None, *found


def critic_formula(
    x: Tensor, epsilon: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float
) -> tuple[Tensor, Tensor]:
    """Scores (2N, 1) of x (2N, D), and the gradient (N, D) at points between row i and row N + i."""
    n, kept = epsilon.shape[0], []
    real, fake = F.linear(x, weights[0], biases[0]).split(n)  # (N, H)
    h = torch.cat([real, fake, _interpolate.formula(real, fake, None, epsilon)])
    for w, b in zip(weights[1:], biases[1:], strict=True):
        h = F.leaky_relu(h, slope) if slope else F.relu(h)
        kept.append(h[2 * n :].flatten())
        h = F.linear(h, w, b)
    return h[: 2 * n], _chain(x.new_ones(n, 1), torch.cat(kept), weights, slope)


_apply = super(torch.autograd.Function, _Node).apply


def critic(
    x: Tensor, epsilon: Callable[[], Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float
) -> tuple[Tensor, Tensor] | None:
    """`critic_formula` by kernels, differentiable in weights and biases, of what ``epsilon`` draws; None, and nothing
    is drawn, where there are no kernels for it."""
    one_score = len(weights) > 1 and len(weights[-1]) == 1 and len(x) > 0
    if not one_score or not _by_kernel(x, weights) or not _op.plain((x, *weights, *biases), or_profiled=True):
        return None
    _check(x, None, None, weights, biases, (), slope, False)
    shares = epsilon()
    with record_function("genfuse::mlp_critic") if _op.profiled() else nullcontext():
        try:
            return _judge(slope, x, shares, *weights, *biases)
        except BufferError:  # as in `mlp`
            return critic_formula(x, shares, weights, biases, slope)


_judge = super(torch.autograd.Function, _Critic).apply


def _by_kernel(x: Tensor, weights: Sequence[Tensor]) -> bool:
    fused = x.is_cpu and x.dtype in (torch.float32, torch.float64) and len(weights) <= MOST_LAYERS
    seen = _op.modes._is_in_torch_dispatch_mode  # by a mode, such as a counter of operations, that knows PyTorch's own
    return fused and not seen and _KERNEL.chosen["cpu"] is _KERNEL.native and not torch.is_autocast_enabled("cpu")


def _nested(settings: tuple, x: Tensor, added: Any, counts: Any, parameters: Sequence[Tensor]) -> tuple:
    n, slope, residual = settings
    return x, added, counts, parameters[:n], parameters[n : 2 * n], parameters[2 * n :], slope, residual


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    slope: float = 0.0,
    residual: bool = False,
    added: Tensor | None = None,
    gates: Sequence[Tensor] = (),
    counts: Tensor | None = None,
) -> Tensor:
    r"""Apply linear layers with an activation between them.

    .. math::
        h_1 = W_1 x + b_1, \qquad h_{i+1} = W_{i+1}\, a(h_i) + b_{i+1}, \qquad a(h) = \max(h, \text{slope} \cdot h)

    On a CPU of x86-64 with AVX2 or AVX-512, in float32 and float64, the whole network is one kernel forward and one
    backward, with matrix products of its own. Elsewhere, and under autocast, it is PyTorch's layers one by one.
    Differentiable to any order; what is above the first is PyTorch's.

    Args:
        x: (..., D).
        weights: of each layer, (outputs, inputs), as `torch.nn.Linear` has them.
        biases: of each layer, (outputs,).
        slope: of the activation below 0: 0 for ReLU, above it LeakyReLU.
        residual: whether hidden layers after the first are in pairs that make blocks
            :math:`h + W_2\, a(W_1\, a(h) + b_1) + b_2`, without activation after the last one (arXiv 1603.05027).
        added: what is added to the first layer before its activation, (..., H), such as a linear map of a context.
        gates: factors of what each residual block adds, (..., H) each.
        counts: of each unit of all layers, one layer after the other, how many of its inputs it sees, the first ones;
            the other weights count as 0 and are not multiplied: int64, (outputs of all layers,).

    Returns:
        The last layer's outputs, (..., outputs).

    Raises:
        ValueError: for layers whose sizes, dtypes or devices do not go together, a slope that is not in [0, 1), blocks
            that do not fit, or a number of gates that is not that of the blocks.
    """
    if not 0 <= slope < 1:
        raise ValueError(f"slope must be in [0, 1), got {slope}")
    if len(weights) == 0 or len(weights) != len(biases):  # a compiler cannot trace the truth of a tuple
        raise ValueError(f"weights and biases must be of as many layers, at least 1; got {len(weights)}, {len(biases)}")
    if x.dim() != 2:
        hidden = (*x.shape[:-1], _widths(weights)[1])
        others = {"added": added, **{f"gates[{i}]": g for i, g in enumerate(gates)}}
        _op.check_alike(x, "x", **{name: (t, hidden) for name, t in others.items() if t is not None})
        rows = math.prod(x.shape[:-1])
        flat = [None if t is None else t.reshape(rows, t.shape[-1]) for t in (x, added, *gates)]
        settings = {"slope": slope, "residual": residual, "counts": counts}
        y = mlp(flat[0], weights, biases, added=flat[1], gates=flat[2:], **settings)  # type: ignore[arg-type]
        return y.view(*x.shape[:-1], y.shape[-1])
    given = (x, added, counts, weights, biases, gates, slope, residual)
    _check(*given)
    if not _by_kernel(x, weights):
        return _network(*given)[0]
    tensors = x, added, counts, *weights, *biases, *gates
    if not _op.compiling() and _op.plain(tensors, or_profiled=True):
        try:
            with record_function("genfuse::mlp") if _op.profiled() else nullcontext():
                return _apply((len(weights), slope, residual), *tensors)
        except BufferError:  # a tensor without memory, such as what is left of a transform that has ended
            pass
    return _fused(*given[:3], list(weights), list(biases), list(gates), slope, residual)[0]


def _check(
    x: Tensor, added: Tensor | None, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    gates: Sequence[Tensor], slope: float, residual: bool,
) -> None:  # fmt: skip
    """Raise a ValueError that names the first argument which does not go with x."""
    widths = _widths(weights)
    if residual or len(gates):
        _check_blocks(widths, len(gates), residual)
    _check_layers(x, [x.shape[1], *widths[1:]], added, counts, weights, biases, gates)


def _check_layers(
    x: Tensor, widths: Sequence[int], added: Tensor | None, counts: Tensor | None, weights: Sequence[Tensor],
    biases: Sequence[Tensor], gates: Sequence[Tensor], **others: tuple,
) -> None:  # fmt: skip
    """Raise a ValueError that names the first tensor which layers of these widths cannot take. Under autocast they may
    have other dtypes than x."""
    shapes, hidden, (dtype, device) = others, (x.shape[0], widths[1]), (x.dtype, x.device)
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        inputs, outputs = widths[i], widths[i + 1]
        fits = w.shape == (outputs, inputs) and b.shape == (outputs,) and w.dtype is dtype is b.dtype
        if not fits or w.device != device or b.device != device:
            shapes.update({f"weights[{i}]": (w, (outputs, inputs)), f"biases[{i}]": (b, (outputs,))})
    shapes.update({} if added is None else {"added": (added, hidden)})
    shapes.update({f"gates[{i}]": (g, hidden) for i, g in enumerate(gates)})
    shapes.update({} if counts is None else {"counts": (counts, (sum(widths[1:]),), torch.int64)})
    if shapes and not x.is_meta and torch.is_autocast_enabled(device.type):
        shapes = {name: (t, shape, *also, t.dtype) for name, (t, shape, *also) in shapes.items()}
    if shapes or dtype not in _op.DTYPES:
        _op.check_alike(x, "x", **shapes)
