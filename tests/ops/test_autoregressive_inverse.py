"""The one-sweep inverse against the sequential one, its gradients, layouts, bad input."""

import pytest
import torch
import torch.nn.functional as F

from genfuse import ops
from genfuse.nn import AutoregressiveAffine, AutoregressiveSpline
from genfuse.ops import _affine_coupling, _rational_quadratic_spline, autoregressive_inverse
from genfuse.ops._autoregressive_inverse import Settings, by_layer

TRANSFORMS = {
    **{scale: {"scale": scale} for scale in ("tanh", "exp", "sigmoid")},
    **{tails: {"bins": 5, "tails": tails, "damping": 0.5} for tails in ("linear", "circular", "none")},
}
every_transform = pytest.mark.parametrize("kind", TRANSFORMS)
every_implementation = pytest.mark.parametrize("implementation", ["native", "reference"], indirect=True)


def problem(kind, n=7, d=5, hidden=(16, 12), context=True, dtype=torch.float64, device="cpu", size=0.3, residual=False):
    """Arguments of the operator, for a network that the layers make."""
    torch.manual_seed(0)
    make = AutoregressiveSpline if "bins" in TRANSFORMS[kind] else AutoregressiveAffine
    settings = {name: value for name, value in TRANSFORMS[kind].items() if name != "damping"}  # which the layer decides
    made = make(d, hidden, context=int(context), residual=residual, **settings).made.to(device, dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=size)
    return {
        "y": (2.9 * (2 * torch.rand(n, d, device=device) - 1)).to(dtype),
        "weights": [w.detach() for w in made.weights()],
        "biases": [b.detach() for b in made.biases()],
        "bounds": made.bounds,
        "context": torch.randn(n, hidden[0], dtype=dtype, device=device) if context else None,
        **({"residual": True} if residual else {}),
        **TRANSFORMS[kind],
    }


def network(x, weights, biases, context, residual=False):
    first, *hidden, last = zip(weights, biases, strict=True)
    x = F.linear(x, *first) + (0 if context is None else context)
    if residual:
        for one, two in zip(hidden[::2], hidden[1::2], strict=True):
            x = x + F.linear(F.linear(x.relu(), *one).relu(), *two)
        return F.linear(x, *last)
    for layer in [*hidden, last]:
        x = F.linear(x.relu(), *layer)
    return x


def sequential(
    y, weights, biases, bounds, context=None, residual=False, scale="tanh", bins=0, tails="linear", damping=1,
    slope=None, factor=None,
):  # fmt: skip
    """D passes of the whole network in plain PyTorch, each of which makes one more coordinate known."""
    x, logdet = torch.zeros_like(y), None
    for _ in range(y.shape[1]):
        params = network(x, weights, biases, context, residual)
        if bins:
            least = 1e-3 if slope is None else 0.0
            settings = (bins, (-3.0, 3.0, -3.0, 3.0), tails, True, least, least, least, damping, slope or 0.0)
            x, logdet = _rational_quadratic_spline.formula(y, params.reshape(*y.shape, -1), None, *settings)
        else:
            least = (1e-3 if scale == "softclip" else 0.0) if slope is None else slope
            x, logdet = _affine_coupling.formula(y, params, factor, None, 0, scale, least, False, False, True)
    return x, logdet


def differentiable(arguments):
    """The arguments as leaves, and the leaves; of weights only what is inside the mask counts."""
    weights = [w.clone().requires_grad_() for w in arguments["weights"]]
    y, *biases = (t.clone().requires_grad_() for t in (arguments["y"], *arguments["biases"]))
    context = None if arguments["context"] is None else arguments["context"].clone().requires_grad_()
    inside = [w * (w != 0) for w in weights]
    leaves = [t for t in (y, context, *biases, *weights) if t is not None]
    return {**arguments, "y": y, "context": context, "weights": inside, "biases": biases}, leaves


@every_implementation
@every_transform
@pytest.mark.parametrize(
    ("n", "d", "hidden"),
    [(1, 1, (1,)), (7, 5, (16, 12)), (33, 6, (3,)), (65, 43, (64, 50, 70)), (16, 9, (300,)), (3, 784, (64, 32))],
    ids=str,
)
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_one_sweep_is_the_sequential_inverse(kind, n, d, hidden, context, dtype, tolerance, device, implementation):
    if d == 784 and (kind not in ("tanh", "linear") or dtype is torch.float64):
        pytest.skip("784 passes take a while: one of each transform will do")
    arguments = problem(kind, n, d, hidden, context, dtype, device, size=min(0.3, 1 / max(hidden)))
    x, logdet = autoregressive_inverse(**arguments)
    expected, expected_logdet = sequential(**arguments)
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logdet, expected_logdet, rtol=10 * tolerance, atol=10 * tolerance)


@every_implementation
@every_transform
def test_gradients_are_those_of_the_sequential_inverse(kind, device, implementation):
    arguments = problem(kind, device=device)
    results = []
    for function in (autoregressive_inverse, sequential):
        own, leaves = differentiable(arguments)
        x, logdet = function(**own)
        results.append(torch.autograd.grad(x.sin().sum() + logdet.sin().sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


BLOCKS = [(4,), (16, 12, 16), (5, 9, 5, 3, 5)]


@every_implementation
@pytest.mark.parametrize("kind", ["tanh", "linear"])
@pytest.mark.parametrize("hidden", BLOCKS, ids=str)
@pytest.mark.parametrize("context", [False, True])
def test_a_residual_network_is_undone_and_differentiated_too(kind, hidden, context, device, implementation):
    arguments = problem(kind, 37, 6, hidden, context, device=device, residual=True)
    results = []
    for function in (autoregressive_inverse, sequential):
        own, leaves = differentiable({**arguments, "context": arguments["context"] if context else None})
        x, logdet = function(**own)
        results.append((x, logdet, *torch.autograd.grad(x.sin().sum() + logdet.sin().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_implementation
@pytest.mark.parametrize(
    "options",
    [{"scale": "softclip"}, {"scale": "softclip", "slope": 0.1}, {"scale": "sigmoid", "slope": 1e-3}, {"slope": 1e-3}],
    ids=str,
)
def test_scales_and_raw_parameters_of_other_libraries_are_undone_too(options, device, implementation):
    arguments = {**problem("tanh" if "scale" in options else "linear", 37, 6, device=device), **options}
    results = []
    for function in (autoregressive_inverse, sequential):
        own, leaves = differentiable(arguments)
        x, logdet = function(**own)
        results.append((x, logdet, *torch.autograd.grad(x.sin().sum() + logdet.sin().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@every_implementation
@pytest.mark.parametrize("order", [1, 2])
def test_a_learned_factor_of_log_scales_gets_its_gradient(order, device, implementation):
    arguments = problem("tanh", 37, 6, device=device)
    results = []
    for function in (autoregressive_inverse, sequential):
        own, leaves = differentiable(arguments)
        factor = torch.linspace(0.2, 1.7, 6, dtype=torch.float64, device=device, requires_grad=True)
        x, logdet = function(**own, factor=factor)
        found = torch.autograd.grad(x.sin().sum() + logdet.sin().sum(), [factor, *leaves], create_graph=order == 2)
        if order == 2:
            found = torch.autograd.grad(sum(g.sin().sum() for g in found), [factor, *leaves])
        results.append((x, logdet, *found))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@every_implementation
@pytest.mark.parametrize(("n", "d", "hidden"), [(33, 6, (3,)), (65, 43, (64, 50, 70)), (16, 9, (300,))], ids=str)
def test_gradients_of_any_size_are_those_of_the_sequential_inverse(n, d, hidden, device, implementation):
    arguments = problem("tanh", n, d, hidden, device=device, size=min(0.3, 1 / max(hidden)))
    results = []
    for function in (autoregressive_inverse, sequential):
        own, leaves = differentiable(arguments)
        x, logdet = function(**own)
        results.append(torch.autograd.grad(x.sin().sum() + logdet.sin().sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@every_implementation
@every_transform
def test_derivatives_agree_with_finite_differences(kind, device, implementation):
    arguments = problem(kind, 2, 3, (5, 4), device=device)

    def function(*values):
        own = dict(arguments, weights=list(values[2:5]), biases=list(values[5:]), y=values[0], context=values[1])
        own["weights"] = [w * (m != 0) for w, m in zip(own["weights"], arguments["weights"], strict=True)]
        return autoregressive_inverse(**own)

    values = [arguments["y"], arguments["context"], *arguments["weights"], *arguments["biases"]]
    values = [v.clone().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_second_derivatives_are_right_where_one_argument_is_made_of_another():
    arguments = problem("tanh", 2, 3, (5, 4))

    def function(y):
        return autoregressive_inverse(**{**arguments, "y": y, "context": (y @ y.new_ones(3, 5)).sin()})

    assert torch.autograd.gradgradcheck(function, arguments["y"].requires_grad_())


def test_entries_outside_the_mask_get_no_gradient():
    arguments = problem("linear")
    weights = [w.requires_grad_() for w in arguments["weights"]]
    x, logdet = autoregressive_inverse(**arguments)
    for w, g in zip(weights, torch.autograd.grad(x.sum() + logdet.sum(), weights), strict=True):
        assert not g[w == 0].any()
        assert g[w != 0].any()


@every_implementation
@pytest.mark.parametrize("kind", ["tanh", "linear"])
def test_no_rows_give_no_rows(kind, device, implementation):
    own, leaves = differentiable(problem(kind, n=0, device=device))
    x, logdet = autoregressive_inverse(**own)
    assert (x.shape, logdet.shape) == ((0, 5), (0,))
    gradients = torch.autograd.grad(x.sum() + logdet.sum(), leaves)
    assert not any(g.any() for g in gradients)


@every_implementation
@every_transform
def test_a_row_with_nan_leaves_the_others_alone(kind, device, implementation):
    arguments = problem(kind, n=40, dtype=torch.float32, device=device)
    expected, expected_logdet = autoregressive_inverse(**arguments)
    arguments["y"][3, 1] = torch.nan
    x, logdet = autoregressive_inverse(**arguments)
    others = torch.arange(40, device=device) != 3
    assert torch.equal(x[others], expected[others])
    assert torch.equal(logdet[others], expected_logdet[others])
    assert torch.isfinite(x[3, 0])
    assert x[3, 2:].isnan().all()


@every_implementation
@pytest.mark.parametrize("kind", ["tanh", "linear"])
def test_any_strides_are_read_as_they_are(kind, device, implementation):
    arguments = problem(kind, n=40, device=device)
    expected = autoregressive_inverse(**arguments)
    strided = {
        "y": arguments["y"].t().contiguous().t(),
        "context": torch.cat([arguments["context"]] * 2, 1)[:, :16],
        "weights": [w.t().contiguous().t() for w in arguments["weights"]],
        "biases": [torch.stack([b, b], 1)[:, 0] for b in arguments["biases"]],
    }
    for ours, theirs in zip(autoregressive_inverse(**{**arguments, **strided}), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["tanh", "linear"])
def test_16_bits_are_computed_in_float32(kind, dtype, device):
    arguments = problem(kind, dtype=dtype, device=device)
    x, logdet = autoregressive_inverse(**arguments)
    assert (x.dtype, logdet.dtype) == (dtype, torch.float32)
    to = [t if not isinstance(t, torch.Tensor) else t.float() for t in arguments.values()]
    wide = dict(zip(arguments, to, strict=True))
    wide["weights"], wide["biases"] = ([t.float() for t in arguments[name]] for name in ("weights", "biases"))
    expected, expected_logdet = autoregressive_inverse(**wide)
    assert torch.equal(x, expected.to(dtype))
    assert torch.equal(logdet, expected_logdet)


@every_implementation
@pytest.mark.parametrize("kind", ["tanh", "linear"])
def test_pytorchs_operator_check_passes(kind, device, implementation):
    a = problem(kind, dtype=torch.float32, device=device)
    settings = Settings("tanh", 5 if kind == "linear" else 0, 3.0, "linear", 1e-3, 1e-3, 1e-3, 1.0)
    bounds = [b for starts in a["bounds"] for b in starts]
    operator = torch.ops.genfuse.autoregressive_inverse.default
    torch.library.opcheck(operator, (a["y"], a["context"], None, a["weights"], a["biases"], bounds, *settings))


def _scalar(function):
    """A function of everything that may be differentiated, or be one of many."""

    def scalar(y, context, weights, biases):
        x, logdet = function(y, context, weights, biases)
        return x.sin().sum() + logdet.sin().sum()

    return scalar


def _per_sample(f, y, context, weights, biases):
    def one(y, context, weights, biases):
        return _scalar(f)(y[None], context[None], weights, biases)

    return torch.func.vmap(torch.func.grad(one, (0, 1, 2, 3)), (0, 0, None, None))(y, context, weights, biases)


def _ensemble(f, y, context, weights, biases):
    scale = torch.tensor([1.0, 0.5, -0.7], dtype=y.dtype)
    stacked = [[torch.stack([s * t for s in scale]) for t in ts] for ts in (weights, biases)]
    return torch.func.vmap(f, (None, None, 0, 0))(y, context, *stacked)


def _batched(f, y, context, weights, biases):
    leaves = [y, context, *weights, *biases]
    x, _ = f(*_leaves(leaves, weights))
    return torch.autograd.grad(x, leaves, torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape), is_grads_batched=True)


def _leaves(flat, weights):
    for t in flat:
        t.requires_grad_()
    return flat[0], flat[1], flat[2 : 2 + len(weights)], flat[2 + len(weights) :]


def _duals(f, y, context, weights, biases):
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(t, t.cos()) for t in (y, context, *weights, *biases)]
        outputs = f(dual[0], dual[1], dual[2 : 2 + len(weights)], dual[2 + len(weights) :])
        return [t for o in outputs for t in torch.autograd.forward_ad.unpack_dual(o)]


def _checkpointed(f, y, context, weights, biases):
    flat = [y, context, *weights, *biases]
    arguments = _leaves(flat, weights)
    loss = torch.utils.checkpoint.checkpoint(_scalar(f), *arguments, use_reentrant=False)
    return torch.autograd.grad(loss, flat)


def _traced(f, y, context, weights, biases):
    n = len(weights)
    traced = torch.jit.trace(lambda y, c, *flat: f(y, c, flat[:n], flat[n:]), (y, context, *weights, *biases))
    return traced(y.flip(0), context, *weights, *biases)


class _Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, y, context, weights, biases):
        return self.f(y, context, weights, biases)


EVERYTHING = (0, 1, 2, 3)
FUNCTION_TRANSFORMS = {
    "grad": lambda f, *a: torch.func.grad(_scalar(f), EVERYTHING)(*a),
    "vjp": lambda f, *a: torch.func.vjp(f, *a)[1]((a[0].cos(), a[0][:, 0].cos())),
    "jvp": lambda f, *a: torch.func.jvp(
        f, a, (a[0].cos(), a[1].cos(), [w.sin() for w in a[2]], [b.cos() for b in a[3]])
    ),
    "jacrev": lambda f, *a: torch.func.jacrev(f, EVERYTHING)(*a),
    "jacfwd": lambda f, *a: torch.func.jacfwd(f, EVERYTHING)(*a),
    "hessian": lambda f, *a: torch.func.hessian(_scalar(f), (0, 1, 3))(*a),
    "vmap over y": lambda f, *a: torch.func.vmap(f, (0, None, None, None))(torch.stack([a[0], a[0] / 2]), *a[1:]),
    "vmap over context": lambda f, *a: torch.func.vmap(lambda c: f(a[0], c, *a[2:]))(torch.stack([a[1], -a[1]])),
    "vmap over stacked weights": _ensemble,
    "vmap of grad": _per_sample,
    "vmap of vmap": lambda f, *a: torch.func.vmap(lambda s: _ensemble(f, s * a[0], *a[1:]))(torch.arange(2).double()),
    "grads of a batch": _batched,
    "jacobian by vectors": lambda f, *a: torch.autograd.functional.jacobian(
        lambda y, c: f(y, c, *a[2:]), a[:2], vectorize=True
    ),
    "duals": _duals,
    "checkpoint": _checkpointed,
    "jit.trace": _traced,
    "make_fx": lambda f, *a: torch.fx.experimental.proxy_tensor.make_fx(torch.func.grad(_scalar(f), EVERYTHING))(*a)(
        *a
    ),
    "export": lambda f, *a: torch.export.export(_Module(f), a).module()(*a),
    "compiled": lambda f, *a: torch.compile(f, backend="aot_eager", fullgraph=True)(*a),
    "compiled grad": lambda f, *a: torch.compile(
        torch.func.grad(_scalar(f), EVERYTHING), backend="aot_eager", fullgraph=True
    )(*a),
    "compiled vmap": lambda f, *a: torch.compile(
        torch.func.vmap(f, (0, None, None, None)), backend="aot_eager", fullgraph=True
    )(torch.stack([a[0], a[0] / 2]), *a[1:]),
    "compiled jvp": lambda f, *a: torch.compile(
        lambda y: torch.func.jvp(lambda y: f(y, *a[1:]), (y,), (y.cos(),)), backend="aot_eager", fullgraph=True
    )(a[0]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("kind", "hidden"), [("tanh", (5, 4)), ("linear", (5,)), ("sigmoid", (4, 3, 4))], ids=str)
@pytest.mark.parametrize("transform", FUNCTION_TRANSFORMS)
def test_under_every_transform_it_is_as_the_formula(transform, kind, hidden):
    arguments = problem(kind, 3, 3, hidden, residual=len(hidden) == 3)
    masks = [w != 0 for w in arguments["weights"]]
    values = [arguments.pop(name) for name in ("y", "context", "weights", "biases")]

    def called(function):
        def f(y, context, weights, biases):
            weights = [w * m for w, m in zip(weights, masks, strict=True)]
            return function(y=y, context=context, weights=weights, biases=list(biases), **arguments)

        own = [[t.clone() for t in v] if isinstance(v, list) else v.clone() for v in values]
        return torch.utils._pytree.tree_leaves(FUNCTION_TRANSFORMS[transform](f, *own))

    ours, formula = called(autoregressive_inverse), called(sequential)
    assert len(ours) == len(formula) > 0
    for o, t in zip(ours, formula, strict=True):
        torch.testing.assert_close(o, t, rtol=1e-9, atol=1e-9)


def test_an_odd_tensor_among_the_weights_goes_the_general_way():
    arguments = problem("tanh")
    expected = autoregressive_inverse(**arguments)
    weights, biases = arguments["weights"], arguments["biases"]
    strided = [torch.stack([w, w], -1)[..., 0] for w in weights], [torch.stack([b, b], -1)[:, 0] for b in biases]
    columns = [w.t().contiguous().t() for w in weights], biases
    negated = weights, [torch._neg_view(-b) for b in biases]
    lone = [*weights[:2], torch._neg_view(-weights[2])], biases
    for odd in (strided, columns, negated, lone):
        own = dict(arguments, weights=odd[0], biases=odd[1])
        for ours, right in zip(autoregressive_inverse(**own), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=0, atol=0)


def test_the_backward_operator_passes_pytorchs_check():
    operator = torch.ops.genfuse.autoregressive_inverse_backward.default
    a = problem("tanh", hidden=(16, 12, 16), residual=True)
    n, d = a["y"].shape
    made = [torch.randn(k, n, dtype=torch.float64) for k in (d, 2 * d, 2 * d, *map(len, a["biases"][:-1]))]
    bounds = [b for starts in a["bounds"] for b in starts]
    torch.library.opcheck(operator, (*made[:3], made[3:], a["weights"], bounds, True))
    ours = operator(*made[:3], made[3:], a["weights"], bounds, True)
    with ops.using("reference"):
        reference = operator(*made[:3], made[3:], a["weights"], bounds, True)
    for o, r in zip(ours, reference, strict=True):
        torch.testing.assert_close(o, r)
    degrees = [k for starts in by_layer(bounds, 3) for k in range(d) for _ in range(starts[k], starts[k + 1])]
    assert ours[1].tolist() == [1, 2, 3, 4, 5, *degrees, *(k for k in range(d) for _ in range(2))]


def test_compiled_by_torch_it_gives_the_same():
    arguments = problem("tanh", dtype=torch.float32)
    compiled = torch.compile(autoregressive_inverse, backend="aot_eager", fullgraph=True)
    results = []
    for function in (autoregressive_inverse, compiled):
        own, leaves = differentiable(arguments)
        x, logdet = function(**own)
        results.append((x, logdet, *torch.autograd.grad(x.sum() + logdet.sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


BAD = {
    "y of three axes": ({"y": torch.zeros(2, 3, 5)}, r"y must be \(N, D\), got shape \(2, 3, 5\)"),
    "integers": ({"y": torch.zeros(7, 5, dtype=torch.int64)}, "y must be float32"),
    "a weight's shape": (
        {"weights": [torch.zeros(16, 5).double(), torch.zeros(12, 15).double(), torch.zeros(10, 12).double()]},
        r"weights\[1\] must have shape \(12, 16\), got \(12, 15\)",
    ),
    "a last layer of another transform": ({"bins": 5}, r"weights\[2\] must have shape \(70, 12\), got \(10, 12\)"),
    "a context's shape": ({"context": torch.zeros(7, 5)}, r"context must have shape \(7, 16\), got \(7, 5\)"),
    "a context's dtype": (
        {"context": torch.zeros(7, 16)},
        "context must have y's dtype torch.float64, got torch.float32",
    ),
    "too few biases": ({"biases": []}, "weights and biases must be one more than bounds.*got 3, 0 and 2"),
    "no hidden layer": ({"bounds": []}, "bounds must be of at least one hidden layer, got none"),
    "bounds of another D": (
        {"bounds": [[0, 16], [0, 12]]},
        r"bounds\[0\] must be 6 numbers that start at 0 and never fall, got \[0, 16\]",
    ),
    "bounds that fall": ({"bounds": [[0, 4, 2, 8, 12, 16]] * 2}, r"bounds\[0\] must be 6 numbers.*never fall"),
    "blocks that do not fit": (
        {"residual": True},
        "bounds of a residual network must be of one hidden layer and pairs of them",
    ),
    "too many layers": (
        {"weights": [torch.zeros(1)] * 65, "biases": [torch.zeros(1)] * 65, "bounds": [[0, 1, 1, 1, 1, 1]] * 64},
        "weights must be of at most 64 layers, got 65",
    ),
    "a scale": ({"scale": "linear"}, "scale must be one of tanh, exp, sigmoid, softclip, got 'linear'"),
    "bins": ({"bins": -1}, "bins must be at least 1, got -1"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what):
    change, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        autoregressive_inverse(**{**problem("tanh"), **change})


def test_what_is_outside_the_box_is_refused_where_there_is_no_outside():
    arguments = problem("none")
    arguments["y"][2, 1] = 3.5
    with pytest.raises(ValueError, match=r'y must lie in \[-3, 3\] with tails="none", got 3.5'):
        autoregressive_inverse(**arguments)


def test_without_a_kernel_in_triton_it_does_not_hide_those_of_others(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    assert "triton" in ops.available("cpu")
    with ops.using("triton"), pytest.raises(RuntimeError, match="autoregressive_inverse has no triton implementation"):
        autoregressive_inverse(**problem("tanh"))
