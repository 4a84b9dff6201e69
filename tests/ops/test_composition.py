"""Operators times transforms: each is held against the eager formula in float64, by every implementation."""

from contextlib import suppress
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from test_mlp import eager as mlp_eager
from test_operators import ODD
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.operators import OPERATORS
from genfuse import ops
from genfuse.ops import _lu_product

MASK = [True, False, False, True, True]


def _normal(*shape, scale=1.0):
    return scale * torch.randn(
        *shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]), dtype=torch.float64
    )


def _with_noise(function, noise, **fixed):
    return lambda *tensors: function(*tensors[:-1], **{noise: tensors[-1]}, **fixed)


def _selected(function, selection, **fixed):
    """A mask is made where it is used, as a tracer's fake tensors mix with no others."""
    make = torch.tensor if isinstance(selection, list) else int
    return lambda *tensors: function(*tensors, make(selection), **fixed)


def _eager(name, **fixed):
    eager = OPERATORS[name].eager
    eager = getattr(eager, "func", eager)
    return lambda *tensors, **more: eager(*tensors, **fixed, **more)


def _network(function, layers, added=False, seen=None, **settings):
    """mlp of x, its weights, its biases, what is added to the first layer if anything is, and gates."""

    def network(x, *tensors):
        weights, biases, rest = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        more = {"added": rest[0], "gates": rest[1:]} if added else {}
        counts = None if seen is None else torch.tensor(seen)
        return function(x, list(weights), list(biases), **more, counts=counts, **settings)

    return network


def _layer(transform):
    """A layer of a flow of x, a context, two weights and two biases, of which two features pass through; and eager."""
    settings = ops.SplineSettings(3, (-2.0, 2.0, -2.0, 2.0), "linear", True, 1e-3, 1e-3, 1e-3, 1.0, 0.0)

    def layer(x, context, w1, w2, b1, b2):
        network = ops.Network([w1, w2], [b1, b2], context=context, limit=0.0)
        if transform == "spline":
            return ops.spline_layer(x, network, 2, settings)
        return ops.affine_layer(x, network, 2, scale="exp")

    def parts(x, context, w1, w2, b1, b2):
        params = mlp_eager(torch.cat([x[:, :2].asinh(), context], 1), [w1, w2], [b1, b2])
        if transform == "affine":
            return _eager("affine_coupling", scale="exp")(x, params, 2)
        params = params.view(len(x), x.shape[1] - 2, -1)
        y, logdet = _eager("rational_quadratic_spline", bins=3, bound=2.0, inverse=True)(x[:, 2:], params)
        return torch.cat([x[:, :2], y], 1), logdet

    return layer, parts


def _group_norm(x, scale, shift):
    var, mean = torch.var_mean(x.unflatten(1, (2, -1)), (2, 3, 4), correction=0, keepdim=True)
    normalised = ((x.unflatten(1, (2, -1)) - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
    z = normalised * scale[..., None, None] + shift[..., None, None]
    return z * z.sigmoid()


def _lu(function):
    def product(triangles, log_diagonal, *rest):
        order, signs = torch.tensor([2, 0, 1]), torch.tensor([1, -1, 1]).to(log_diagonal)
        return function(triangles, log_diagonal, *rest, signs, order.argsort(), order)

    return product


def _mixed(function):
    """Of what a network makes of two numbers of two components, one of which may be missing, and of two blocks."""

    def log_prob(raw, low, gap):
        missing = torch.tensor([[0.0, 0.0], [0.0, float("nan")], [0.0, 0.0]]).to(low)
        chosen, block = torch.tensor([[0, 2], [1, 4], [1, 3]]), torch.tensor([0, 0, 1, 1, 1])
        return function(raw, low + missing, low + missing + gap.square() + 0.2, chosen, block)

    return log_prob


def _first_layer(weight):
    x = torch.arange(20.0).sin().to(weight).view(4, 5)
    return x, lambda x: F.linear(x, weight, 0.1 * torch.ones_like(weight[:, 0]))


def _penalty(w1, w2):
    x, first = _first_layer(w1)
    return ops.gradient_penalty(lambda x: F.linear(F.leaky_relu(first(x), 0.2), w2), x, at="real")


def _penalty_by_hand(w1, w2):
    x, first = _first_layer(w1)
    slopes = torch.where(first(x) > 0, 1.0, torch.full_like(w2, 0.2))
    return (((w2 * slopes) @ w1).norm(2, 1) - 1).square().mean()


def _listed_formula(x, scale, many, power):
    return sum((x * m).sin() ** power for m in many), x if scale is None else (x.mT * scale).sum(0)


# A third party's, with what a schema may have: lists, what may be missing, and a result that may be an argument.
_listed = ops.fused(
    "example::listed(Tensor x, Tensor? scale, Tensor[] many, int power) -> (Tensor, Tensor)",
    formula=_listed_formula,
    results=lambda x, scale, many, power: (
        x.new_empty(x.shape), x.new_empty(x.shape if scale is None else x.shape[:1]),
    ),
)  # fmt: skip


# Function, the same in plain PyTorch, and tensors for four examples of five features. By `per example` arguments whose
# first axis is of examples, which vmap goes over.
CASES = {
    "actnorm": (ops.actnorm, _eager("actnorm"), (_normal(4, 5), _normal(5), _normal(5, scale=0.3))),
    "actnorm inverse, images": (
        partial(ops.actnorm, inverse=True),
        _eager("actnorm", inverse=True),
        (_normal(3, 2, 2, 3), _normal(2), _normal(2, scale=0.3)),
    ),
    **{
        f"affine_coupling {scale}{' inverse' if inverse else ''}": (
            _selected(ops.affine_coupling, selection, scale=scale, inverse=inverse),
            _selected(_eager("affine_coupling"), selection, scale=scale, inverse=inverse),
            (_normal(4, 5), _normal(4, features)),
        )
        for scale, inverse, selection, features in (
            ("tanh", False, 2, 6),
            ("exp", True, -2, 6),
            ("sigmoid", False, MASK, 10),
        )
    },
    **{
        f"diffuse {target}": (
            _with_noise(ops.diffuse, "noise", target=target),
            _with_noise(_eager("diffuse"), "noise", target=target),
            (_normal(4, 5), _normal(4), _normal(4, scale=0.4), _normal(4, 5, scale=2)),
        )
        for target in ("noise", "v", "velocity", "x0")
    },
    **{
        f"gradient_norm_penalty {reduction}": (
            partial(ops.gradient_norm_penalty, reduction=reduction, one_sided=one_sided),
            _eager("gradient_norm_penalty", reduction=reduction, one_sided=one_sided),
            (_normal(4, 5),),
        )
        for reduction, one_sided in (("mean", False), ("none", True))
    },
    "interpolate": (
        _with_noise(ops.interpolate, "epsilon"),
        _with_noise(_eager("interpolate"), "epsilon"),
        (_normal(4, 5), _normal(4, 5, scale=2), _normal(4).sigmoid()),
    ),
    **{
        f"rational_quadratic_spline{' inverse' if inverse else ''}": (
            partial(ops.rational_quadratic_spline, bins=3, bound=2.0, inverse=inverse),
            _eager("rational_quadratic_spline", bins=3, bound=2.0, inverse=inverse),
            (_normal(2, 3, scale=0.9), _normal(2, 3, 8)),
        )
        for inverse in (False, True)
    },
    "reparameterize_kl": (
        _with_noise(ops.reparameterize_kl, "noise"),
        _with_noise(_eager("reparameterize_kl"), "noise"),
        (_normal(4, 5), _normal(4, 5, scale=0.5), _normal(4, 5, scale=2)),
    ),
    "reparameterize_kl, two samples": (
        _with_noise(ops.reparameterize_kl, "noise", samples=2),
        _with_noise(_eager("reparameterize_kl"), "noise", samples=2),
        (_normal(4, 5), _normal(4, 5, scale=0.5), _normal(2, 4, 5)),
    ),
    "standard_normal_log_prob": (
        ops.standard_normal_log_prob,
        _eager("standard_normal_log_prob"),
        (_normal(4, 5), _normal(4)),
    ),
    "bernoulli_nll": (
        ops.bernoulli_nll,
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1),
        (_normal(4, 5, scale=3), _normal(4, 5).sigmoid()),
    ),
    "mlp": (
        *(_network(f, 2, slope=0.2, seen=[5, 3, 1, 0, 5, 2, 6, 6, 3]) for f in (ops.mlp, mlp_eager)),
        (_normal(4, 5), _normal(6, 5, scale=0.5), _normal(3, 6, scale=0.5), _normal(6), _normal(3)),
    ),
    "mlp residual": (
        *(_network(f, 4, added=True, residual=True) for f in (ops.mlp, mlp_eager)),
        (
            _normal(4, 5), *(_normal(*size, scale=0.5) for size in ((6, 5), (7, 6), (6, 7), (3, 6))),
            _normal(6), _normal(7), _normal(6), _normal(3), _normal(4, 6), _normal(4, 6, scale=0.7),
        ),
    ),
    **{
        f"{transform}_layer": (
            *_layer(transform),
            (
                _normal(3, 4, scale=0.9), _normal(3, 2), _normal(6, 4, scale=0.5), _normal(2 * each, 6, scale=0.5),
                _normal(6), _normal(2 * each),
            ),
        )
        for transform, each in (("affine", 2), ("spline", 8))
    },
    "group_norm": (
        lambda x, s, t: ops.group_norm(x, 2, s, t, silu=True),
        _group_norm,
        (_normal(3, 4, 2, 3), _normal(3, 4), _normal(3, 4)),
    ),
    "lu_product": (_lu(ops.lu_product), _lu(_lu_product.formula), (_normal(3, 3), _normal(3, scale=0.5))),
    "lu_affine": (
        _lu(ops.lu_affine),
        _lu(_lu_product.affine_formula),
        (_normal(3, 3), *(_normal(3, scale=scale) for scale in (0.5, 0.3, 1.0, 2.0))),
    ),
    "mixed_log_prob": (
        _mixed(ops.mixed_log_prob), _mixed(_eager("mixed_log_prob")), (_normal(3, 17), _normal(3, 2), _normal(2)),
    ),
    "gradient_penalty": (_penalty, _penalty_by_hand, (_normal(6, 5), _normal(1, 6))),
    "a third party's": (
        lambda x, scale, a, b: _listed(x, scale, [a, b], 2),
        lambda x, scale, a, b: _listed_formula(x, scale, [a, b], 2),
        (_normal(4, 5), _normal(4), _normal(4, 5, scale=2), _normal(4, 5, scale=0.3)),
    ),
}  # fmt: skip


def _loss(function):
    """A number made of all results, curved in each."""
    return lambda *tensors: sum((o.sin() * (1.5 + o)).sum() for o in pytree.tree_leaves(function(*tensors)))


def _every(tensors):
    return tuple(range(len(tensors)))


def _stacked(tensors):
    return tuple(torch.stack([t, 0.5 * t + 0.1, t - 0.3]) for t in tensors)


def _by_each(function, tensors):
    """vmap over each argument by itself, and over all of them."""
    many = _stacked(tensors)
    found = [vmap(function)(*many)]
    for i in range(len(tensors)):
        axes = tuple(0 if j == i else None for j in range(len(tensors)))
        found.append(
            vmap(function, axes)(*(m if j == i else t for j, (t, m) in enumerate(zip(tensors, many, strict=True))))
        )
    return found


def _autograd(function, tensors, **how):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(_loss(function)(*leaves), leaves, **how)


def _batched_cotangents(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = [o for o in pytree.tree_leaves(function(*leaves)) if o.requires_grad]
    cotangents = [_normal(3, *o.shape) for o in outputs]
    return torch.autograd.grad(
        outputs, leaves, cotangents, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )


def _zero_cotangents(function, tensors):
    """Zeros that have no memory, as forward mode makes them."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = [o for o in pytree.tree_leaves(function(*leaves)) if o.requires_grad]
    zeros = [torch._efficientzerotensor(o.shape, dtype=o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, leaves, zeros, allow_unused=True, materialize_grads=True)


def _dual(function, tensors):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, (t + 1).cos()) for t in tensors]
        return [forward_ad.unpack_dual(o).tangent for o in pytree.tree_leaves(function(*duals))]


def _dual_of_gradient(function, tensors):
    """Forward over reverse by hand."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.clone().requires_grad_(), (t + 1).cos()) for t in tensors]
        gradients = torch.autograd.grad(_loss(function)(*duals), duals)
        return [forward_ad.unpack_dual(g).tangent for g in gradients]


def _checkpointed(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    loss = torch.utils.checkpoint.checkpoint(_loss(function), *leaves, use_reentrant=False)
    return torch.autograd.grad(loss, leaves)


def _third_order(function, tensors):
    (result,) = [_loss(function)]
    for _ in range(3):
        result = (lambda f: lambda *t: sum((g**2).sum() for g in grad(f, _every(t))(*t)))(result)
    return result(*tensors)


def _per_sample(function, tensors):
    return vmap(grad(_loss(function), _every(tensors)))(*_stacked(tensors))


TRANSFORMS = {
    "grad": lambda f, t: grad(_loss(f), _every(t))(*t),
    "vjp": lambda f, t: (lambda out, pull: (out, pull(pytree.tree_map(torch.cos, out))))(*vjp(f, *t)),
    "jvp": lambda f, t: jvp(f, t, tuple((x + 1).cos() for x in t)),
    "jacrev": lambda f, t: jacrev(f, _every(t))(*t),
    "jacfwd": lambda f, t: jacfwd(f, _every(t))(*t),
    "hessian": lambda f, t: hessian(_loss(f), _every(t))(*t),
    "reverse over forward": lambda f, t: jacrev(jacfwd(_loss(f), _every(t)), _every(t))(*t),
    "reverse over reverse": lambda f, t: jacrev(jacrev(_loss(f), _every(t)), _every(t))(*t),
    "third order": _third_order,
    "vmap": _by_each,
    "vmap of vmap": lambda f, t: vmap(vmap(f))(*_stacked(_stacked(t))),
    "per-sample gradients": _per_sample,
    "vmap of jvp": lambda f, t: vmap(lambda *x: jvp(f, x, tuple((y + 1).cos() for y in x)))(*_stacked(t)),
    "vmap of hessian": lambda f, t: vmap(hessian(_loss(f), _every(t)))(*_stacked(t)),
    "vmap of jacrev": lambda f, t: vmap(jacrev(f, _every(t)))(*_stacked(t)),
    "vmap of vjp": lambda f, t: vmap(lambda *x: vjp(_loss(f), *x)[1](x[0].sum()))(*_stacked(t)),
    "gradient of vmap": lambda f, t: grad(_loss(vmap(f)), _every(t))(*_stacked(t)),
    "autograd": _autograd,
    "is_grads_batched": _batched_cotangents,
    "zero cotangents": _zero_cotangents,
    "functional.jacobian": lambda f, t: torch.autograd.functional.jacobian(f, t, vectorize=True),
    "functional.jacobian, forward": lambda f, t: torch.autograd.functional.jacobian(
        f, t, vectorize=True, strategy="forward-mode"
    ),
    "functional.hessian": lambda f, t: torch.autograd.functional.hessian(_loss(f), t, vectorize=True),
    "functional.hessian, forward": lambda f, t: torch.autograd.functional.hessian(
        _loss(f), t, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "dual numbers": _dual,
    "dual numbers of a gradient": _dual_of_gradient,
    "checkpoint": _checkpointed,
}
COMPILED = ["grad", "jvp", "jacrev", "hessian", "third order", "vmap", "per-sample gradients", "vmap of jvp"]
ONE_EACH = [
    "actnorm", "affine_coupling tanh", "diffuse v", "gradient_norm_penalty none", "interpolate",
    "rational_quadratic_spline", "rational_quadratic_spline inverse", "reparameterize_kl", "standard_normal_log_prob",
    "bernoulli_nll", "mlp residual", "affine_layer", "spline_layer", "group_norm", "lu_product",
    "lu_affine", "mixed_log_prob", "a third party's",
]  # fmt: skip


def assert_close(ours, expected):
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(b.abs().max()) if b.numel() else 1.0)
            )


@pytest.fixture
def kernels(request):
    if request.param not in ops.available("cpu"):
        pytest.skip("no compiled kernels")
    with ops.using(request.param):
        yield request.param


@lru_cache(1)  # both implementations, one after the other, are held against the same
def _of_formula(case, transform):
    _, eager, tensors = CASES[case]
    return TRANSFORMS[transform](eager, tensors)


@pytest.mark.parametrize("kernels", ["native", "reference"], indirect=True)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_transform_of_an_operator_is_that_of_its_formula(case, transform, kernels):
    function, _, tensors = CASES[case]
    expected = _of_formula(case, transform)
    assert_close(TRANSFORMS[transform](function, tensors), expected)


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("case", ONE_EACH)
def test_a_transform_compiles_into_one_graph(case, transform):
    function, eager, tensors = CASES[case]
    torch.compiler.reset()
    plain = lambda *t: function(*t)  # noqa: E731, as the compiler cannot read a partial function's name
    compiled = torch.compile(lambda *t: TRANSFORMS[transform](plain, t), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tensors), TRANSFORMS[transform](eager, tensors))


@pytest.mark.parametrize("how", ["static", "dynamic", "checkpointed"])
@pytest.mark.parametrize("case", ONE_EACH)
def test_a_training_step_compiles_into_one_graph(case, how):
    function, eager, tensors = CASES[case]
    torch.compiler.reset()
    leaves = [t.clone().requires_grad_() for t in tensors]
    loss = _loss(function)
    if how == "checkpointed":
        loss = partial(torch.utils.checkpoint.checkpoint, loss, use_reentrant=False)
    loss = torch.compile(loss, fullgraph=True, dynamic=how == "dynamic", backend="aot_eager")(*leaves)
    assert_close(torch.autograd.grad(loss, leaves), TRANSFORMS["autograd"](eager, tensors))


def _images(n, dtype=torch.float64):
    return torch.randn(n, 2, n + 3, 4, dtype=dtype), torch.randn(n, 2, n + 3, 4, dtype=dtype)


SIZED = {  # of other sizes, for each n, than what was compiled first
    "interpolate": (
        lambda a, b: ops.interpolate(a, b, epsilon=torch.linspace(0, 1, a.shape[0], dtype=a.dtype)),
        _images,
    ),
    "interpolate, channels last": (
        lambda a, b: ops.interpolate(a, b, epsilon=torch.linspace(0, 1, a.shape[0], dtype=a.dtype)),
        lambda n: [t.contiguous(memory_format=torch.channels_last) for t in _images(n)],
    ),
    "gradient_norm_penalty": (lambda a, b: ops.gradient_norm_penalty(a * b), _images),
    "bounds of each coordinate": (
        lambda x, params: ops.rational_quadratic_spline(x, params, bins=3, bound=(1.5, 2.0, 2.5)),
        lambda n: (_normal(n, 3), _normal(n, 3, 8)),
    ),
    "tails of each coordinate": (
        lambda x, params: ops.rational_quadratic_spline(
            x, params, bins=3, bound=4.0, tails=("linear", "none", "circular")
        ),
        lambda n: (_normal(n, 3).clamp(-3, 3), _normal(n, 3, 10)),
    ),
    "group_norm": (lambda a, b: ops.group_norm(a, 2, b[0, :, 0, 0], b[0, :, 0, 1]), _images),
}


@pytest.mark.parametrize("case", SIZED)
def test_one_graph_serves_all_sizes(case):
    function, make = SIZED[case]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 5, 7):
        given = make(n)
        assert_close(compiled(*given), function(*given))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.group_norm(x.view(-1, 4, 6, 1), 2, torch.ones(4), torch.zeros(4)),
        lambda x: ops.actnorm(x.view(-1, 6, 4).mT.flatten(1)[:, :6], torch.ones(6), torch.zeros(6)),
        lambda x: ops.standard_normal_log_prob(x.view(-1, 6, 4).mT),
        lambda x: ops.affine_coupling(x[:, :6], x[:, 6:12], 3),
        lambda x: ops.bernoulli_nll(x[:, ::2], x[:, 1::2].sigmoid()),
    ],
)
def test_how_many_examples_there_are_may_be_known_only_when_it_runs(function):
    torch.compiler.reset()
    chosen = lambda x, keep: function(x[keep.nonzero()[:, 0]])  # noqa: E731
    x, keep = torch.randn(5, 24), torch.tensor([1, 0, 1, 1, 0])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_close(torch.compile(chosen, fullgraph=True, backend="aot_eager")(x, keep), chosen(x, keep))


@pytest.mark.parametrize("case", ONE_EACH)
def test_an_exported_program_computes_and_learns_the_same(case):
    function, eager, tensors = CASES[case]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return _loss(function)(*tensors)

    program = torch.export.export(Module(), tensors).module()
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert_close(torch.autograd.grad(program(*leaves), leaves), TRANSFORMS["autograd"](eager, tensors))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("case", ONE_EACH)
def test_make_fx_traces_the_operator_and_its_gradient(case, mode):
    function, eager, tensors = CASES[case]
    graph = make_fx(lambda *t: TRANSFORMS["autograd"](function, t), tracing_mode=mode)(*tensors)
    others = tuple(t * 0.9 for t in tensors)
    assert_close(graph(*others), TRANSFORMS["autograd"](eager, others))


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_jit_trace_computes_and_learns_the_same(case):
    function, eager, tensors = CASES[case]
    traced = torch.jit.trace(_loss(function), tensors, check_trace=False)
    others = [(t * 0.9).requires_grad_() for t in tensors]
    assert_close(torch.autograd.grad(traced(*others), others), TRANSFORMS["autograd"](eager, others))


HOOKS = {
    "negated lazily": (lambda t: -t, torch._neg_view),
    "strided": (lambda t: torch.stack([t, t + 1], -1), lambda t: t[..., 0]),
}


@pytest.mark.parametrize("odd", ["negated lazily", "strided", "transposed", "expanded", "left of a transform"])
@pytest.mark.parametrize("case", CASES)
def test_an_odd_tensor_in_any_place_is_what_it_stands_for_in_all_gradients(case, odd):
    function, eager, tensors = CASES[case]
    for i in range(len(tensors)):
        made = ODD[odd](tensors[i])
        plain = made.detach().clone(memory_format=torch.contiguous_format)
        given = [(value if j == i else t for j, t in enumerate(tensors)) for value in (made, plain)]
        found = []
        for f, own in zip((function, eager), given, strict=True):
            leaves = [t if t is made else t.clone().requires_grad_() for t in own]
            outputs = [o for o in pytree.tree_leaves(f(*leaves)) if o.requires_grad]
            others = [leaf for j, leaf in enumerate(leaves) if j != i]
            loss = sum((o.sin() * (1.5 + o)).sum() for o in outputs)
            found.append(torch.autograd.grad(loss, others, materialize_grads=True) if outputs and others else ())
        assert_close(*found)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("case", CASES)
def test_what_hooks_return_for_saved_tensors_is_read_as_it_stands(case, hook):
    function, eager, tensors = CASES[case]
    pack, unpack = ((lambda t, f=f: f(t) if t.is_floating_point() else t) for f in HOOKS[hook])
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = _autograd(function, tensors)
    assert_close(found, _autograd(eager, tensors))


@pytest.mark.parametrize("case", CASES)
def test_an_argument_that_is_overwritten_before_its_derivative_is_refused_or_does_not_matter(case):
    function, eager, tensors = CASES[case]
    expected = _autograd(eager, tensors)
    for i in range(len(tensors)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        inner = [1 * leaf for leaf in leaves]
        loss = _loss(function)(*inner)
        with torch.no_grad():
            inner[i].mul_(1.5)
        versions = pytest.raises(RuntimeError, match="modified by an inplace operation")
        with suppress(pytest.fail.Exception), versions:
            assert_close(torch.autograd.grad(loss, leaves, materialize_grads=True), expected)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case not in ("affine_coupling sigmoid", "mlp", "lu_product", "lu_affine", "mixed_log_prob")
    ],
)
def test_on_meta_an_operator_tells_shapes_and_dtypes(case):
    function, eager, tensors = CASES[case]
    with torch.device("meta"):
        found = pytree.tree_leaves(function(*(t.to("meta").requires_grad_() for t in tensors)))
    expected = pytree.tree_leaves(eager(*tensors))
    assert [(t.shape, t.dtype, t.device.type) for t in found] == [(t.shape, t.dtype, "meta") for t in expected]


DRAWN = {
    "bernoulli": lambda x: ops.bernoulli(x.sigmoid()),
    "diffuse": lambda x: ops.diffuse(x, 0.0, 1.0)[0],
    "interpolate": lambda x: ops.interpolate(x, 1 - x),
    "reparameterize_kl": lambda x: ops.reparameterize_kl(x, torch.zeros_like(x))[0],
}


@pytest.mark.parametrize("name", DRAWN)
def test_noise_under_vmap_follows_its_randomness(name):
    x = _normal(8).expand(3, 4, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(DRAWN[name])(x)
    same = vmap(DRAWN[name], randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = vmap(DRAWN[name], randomness="different")(x)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_noise_under_compiled_vmap_follows_its_randomness(randomness, batched):
    p = torch.full((3, 50), 0.5)

    def draw(p, one):
        return ops.bernoulli(p if batched else one), p.sum()

    torch._dynamo.reset()
    compiled = torch.compile(vmap(draw, (0, None), randomness=randomness), backend="aot_eager", fullgraph=True)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            compiled(p, p[0])
    else:
        drawn = compiled(p, p[0])[0]
        assert torch.equal(drawn[0], drawn[1]) == (randomness == "same")


def test_different_noise_under_vmap_is_traced_with_symbolic_sizes():
    make_fx(vmap(lambda x: ops.bernoulli(x), randomness="different"), tracing_mode="symbolic")(torch.rand(3, 4))


@pytest.mark.parametrize("name", DRAWN)
def test_a_transform_without_vmap_draws_as_a_plain_call_does(name):
    x = _normal(4, 8)
    torch.manual_seed(3)
    plain = DRAWN[name](x)
    torch.manual_seed(3)
    transformed, _ = jvp(DRAWN[name], (x,), (x,))
    assert_close(transformed, plain)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", DRAWN)
def test_make_fx_traces_what_draws_as_it_draws(name, mode):
    x = _normal(4, 8)
    graph = make_fx(DRAWN[name], tracing_mode=mode)(x)
    torch.manual_seed(3)
    plain = DRAWN[name](0.9 * x)
    torch.manual_seed(3)
    assert_close(graph(0.9 * x), plain)
    assert not torch.equal(graph(x), graph(x))


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["default", "given"])
def test_what_draws_takes_fake_tensors(generator):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(_normal(4, 8))
        assert isinstance(ops.bernoulli(fake, generator=generator), FakeTensor)
        assert isinstance(ops.diffuse(fake, 0.0, 1.0, generator=generator)[1], FakeTensor)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("tails", ["none", ("none", "linear", "circular")], ids=["none", "of each"])
def test_make_fx_and_meta_take_splines_that_look_at_their_arguments(tails, mode):
    x, params = _normal(2, 3, scale=0.3), _normal(2, 3, 10)
    spline = partial(ops.rational_quadratic_spline, bins=3, bound=2.0, tails=tails)
    graph = make_fx(lambda *t: spline(*t), tracing_mode=mode)(x, params)
    assert_close(graph(0.9 * x, params), spline(0.9 * x, params))
    assert spline(x.to("meta"), params.to("meta"))[1].shape == (2,)


def test_an_operator_whose_results_are_drawn_is_traced_with_its_noise():
    p = torch.full((2, 50), 0.5)
    traced = torch.jit.trace(ops.bernoulli, (p,), check_trace=False)
    draws = torch.stack([traced(p) for _ in range(40)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert 0.4 < draws.mean() < 0.6
