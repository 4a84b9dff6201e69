"""Operators times transforms: each is held against the eager formula in float64, by every implementation."""

from functools import partial

import pytest
import torch
import torch.utils._pytree as pytree
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.operators import OPERATORS
from genfuse import ops

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
}


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
]  # fmt: skip


def assert_close(ours, expected):
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(b.abs().max()) if b.numel() else 1.0)
            )


@pytest.fixture(params=["native", "reference"])
def kernels(request):
    if request.param not in ops.available("cpu"):
        pytest.skip("no compiled kernels")
    with ops.using(request.param):
        yield request.param


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_transform_of_an_operator_is_that_of_its_formula(case, transform, kernels):
    function, eager, tensors = CASES[case]
    expected = TRANSFORMS[transform](eager, tensors)
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


@pytest.mark.parametrize("name", DRAWN)
def test_a_transform_without_vmap_draws_as_a_plain_call_does(name):
    x = _normal(4, 8)
    torch.manual_seed(3)
    plain = DRAWN[name](x)
    torch.manual_seed(3)
    transformed, _ = jvp(DRAWN[name], (x,), (x,))
    assert_close(transformed, plain)


def test_an_operator_whose_results_are_drawn_is_traced_with_its_noise():
    p = torch.full((2, 50), 0.5)
    traced = torch.jit.trace(ops.bernoulli, (p,), check_trace=False)
    draws = torch.stack([traced(p) for _ in range(40)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert 0.4 < draws.mean() < 0.6
