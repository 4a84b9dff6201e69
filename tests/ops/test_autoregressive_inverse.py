"""The one-sweep inverse against the sequential one, its gradients, layouts, bad input."""

import pytest
import torch
import torch.nn.functional as F

from genfuse import ops
from genfuse.nn import AutoregressiveAffine, AutoregressiveSpline
from genfuse.ops import affine_coupling, autoregressive_inverse, rational_quadratic_spline
from genfuse.ops._autoregressive_inverse import Settings

TRANSFORMS = {
    **{scale: {"scale": scale} for scale in ("tanh", "exp", "sigmoid")},
    **{tails: {"bins": 5, "tails": tails, "damping": 0.5} for tails in ("linear", "circular", "none")},
}
every_transform = pytest.mark.parametrize("kind", TRANSFORMS)
every_implementation = pytest.mark.parametrize("implementation", ["native", "reference"], indirect=True)


def problem(kind, n=7, d=5, hidden=(16, 12), context=True, dtype=torch.float64, device="cpu", size=0.3):
    """Arguments of the operator, for a network that the layers make."""
    torch.manual_seed(0)
    make = AutoregressiveSpline if "bins" in TRANSFORMS[kind] else AutoregressiveAffine
    settings = {name: value for name, value in TRANSFORMS[kind].items() if name != "damping"}  # which the layer decides
    made = make(d, hidden, context=int(context), **settings).made.to(device, dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=size)
    return {
        "y": (2.9 * (2 * torch.rand(n, d, device=device) - 1)).to(dtype),
        "weights": [w.detach() for w in made.weights()],
        "biases": [b.detach() for b in made.biases()],
        "bounds": made.bounds,
        "context": torch.randn(n, hidden[0], dtype=dtype, device=device) if context else None,
        **TRANSFORMS[kind],
    }


def network(x, weights, biases, context):
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, w, b) + (context if i == 0 and context is not None else 0)
        x = x.relu() if i < len(weights) - 1 else x
    return x


def sequential(y, weights, biases, bounds, context=None, **settings):
    """D passes of the whole network, each of which makes one more coordinate known."""
    x, logdet = torch.zeros_like(y), None
    for _ in range(y.shape[1]):
        params = network(x, weights, biases, context)
        if "bins" in settings:
            x, logdet = rational_quadratic_spline(y, params.view(*y.shape, -1), bound=3.0, inverse=True, **settings)
        else:
            x, logdet = affine_coupling(y, params, 0, inverse=True, **settings)
    return x, logdet


def differentiable(arguments):
    """The arguments as leaves, and the leaves; of weights only what is inside the mask counts."""
    weights = [w.clone().requires_grad_() for w in arguments["weights"]]
    leaves = [t.clone().requires_grad_() for t in (arguments["y"], arguments["context"], *arguments["biases"])]
    y, context, *biases = leaves
    inside = [w * (w != 0) for w in weights]
    return {**arguments, "y": y, "context": context, "weights": inside, "biases": biases}, [*leaves, *weights]


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
    torch.library.opcheck(operator, (a["y"], a["context"], a["weights"], a["biases"], bounds, *settings))


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
    "a scale": ({"scale": "linear"}, "scale must be one of tanh, exp, sigmoid, got 'linear'"),
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
    with ops.use("triton"), pytest.raises(RuntimeError, match="autoregressive_inverse has no triton implementation"):
        autoregressive_inverse(**problem("tanh"))
