"""`ops.mlp`, and the layers of flows whose network it is, beside PyTorch's own layers."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from genfuse import ops
from genfuse.nn import (
    AffineCoupling,
    AutoregressiveAffine,
    AutoregressiveSpline,
    MLPConditioner,
    ResidualMLP,
    SplineCoupling,
    mlp_critic,
)  # fmt: skip
from genfuse.ops import _layer, _mlp

by_kernels = pytest.mark.parametrize("implementation", ["native"], indirect=True)

NETWORKS = {
    "one layer": ([5, 7], {}),
    "one unit": ([1, 1, 1], {}),
    "wide": ([70, 64, 33, 86], {"slope": 0.2}),
    "critic": ([600, 40, 1], {}),
    "gated": ([5, 50, 50, 50, 50, 50, 17], {"residual": True, "gates": True}),
    "residual": ([5, 50, 33, 50, 50, 50, 17], {"residual": True, "added": True}),
    "masked": ([21, 64, 64, 42], {"counts": True, "added": True}),
    "masked, one input": ([1, 40, 1, 3], {"counts": "any"}),
    "masked at random": ([21, 64, 30, 64, 42], {"residual": True, "counts": "any"}),
}


def arguments(rows, widths, *, slope=0.0, residual=False, gates=False, added=False, counts=False):
    """Those of `ops.mlp` in float64: what is differentiated, and the rest."""
    torch.manual_seed(0)
    layers = list(pairwise(widths))
    leaves = {
        "x": torch.randn(rows, widths[0]),
        "weights": [torch.randn(b, a) / a**0.5 for a, b in layers],
        "biases": [torch.randn(b) for _, b in layers],
        "gates": [torch.rand(rows, widths[1]) for _ in range((len(layers) - 2) // 2)] if gates else [],
    } | ({"added": torch.randn(rows, widths[1])} if added else {})
    seen = [torch.randint(-2, a + 3, (b,)) if counts == "any" else torch.arange(b) * a // b + 1 for a, b in layers]
    return leaves, {"slope": slope, "residual": residual, "counts": torch.cat(seen) if counts else None}


def eager(x, weights, biases, gates=(), added=None, *, slope=0.0, residual=False, counts=None):
    """As one writes it."""
    if counts is not None:
        seen = counts.split([len(w) for w in weights])
        weights = [w * (torch.arange(w.shape[1]) < n[:, None]) for w, n in zip(weights, seen, strict=True)]
    h = F.linear(x, weights[0], biases[0])
    h = h if added is None else h + added
    rectify = partial(F.leaky_relu, negative_slope=slope) if slope else F.relu
    for i in range(1, len(weights) - 1, 2) if residual else range(1, len(weights)):
        if residual:
            inner = F.linear(rectify(h), weights[i], biases[i])
            inner = F.linear(rectify(inner), weights[i + 1], biases[i + 1])
            h = h + (inner * gates[i // 2] if gates else inner)
        else:
            h = F.linear(rectify(h), weights[i], biases[i])
    return F.linear(h, weights[-1], biases[-1]) if residual else h


def results(function, leaves, settings, dtype):
    cast = torch.utils._pytree.tree_map(lambda t: t.to(dtype).requires_grad_(), leaves)
    y = function(**cast, **settings)
    inputs = torch.utils._pytree.tree_leaves(cast)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, inputs, torch.randn(y.shape).to(dtype))]


def worst(found, truth):
    return max(
        float(((a.double() - b).abs().max() / b.detach().abs().max().clamp(min=1)).detach()) if b.numel() else 0.0
        for a, b in zip(found, truth, strict=True)
    )


@by_kernels
@pytest.mark.parametrize("rows", [0, 1, 3, 14, 70, 513])
@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_gradients_are_as_close_to_float64_as_eager_ones(name, rows, implementation):
    widths, options = NETWORKS[name]
    leaves, settings = arguments(rows, widths, **options)
    truth = results(eager, leaves, settings, torch.float64)
    ours, theirs = (results(f, leaves, settings, torch.float32) for f in (ops.mlp, eager))
    assert worst(ours, truth) <= 2 * worst(theirs, truth) + 16 * torch.finfo(torch.float32).eps
    assert worst(results(ops.mlp, leaves, settings, torch.float64), truth) < 1e-13


@by_kernels
def test_long_sums_keep_their_digits(implementation):
    leaves, settings = arguments(40_000, [1100, 3])
    truth = results(eager, leaves, settings, torch.float64)
    ours, theirs = (results(f, leaves, settings, torch.float32) for f in (ops.mlp, eager))
    assert worst(ours, truth) <= 2 * worst(theirs, truth) + 16 * torch.finfo(torch.float32).eps


@by_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_is_the_same_on_any_number_of_threads(threads, implementation):
    leaves, settings = arguments(700, [70, 130, 130, 9])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = results(ops.mlp, leaves, settings, torch.float32)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, results(ops.mlp, leaves, settings, torch.float32), strict=True):
        assert torch.equal(a, b)


@by_kernels
def test_strided_inputs_and_weights_are_read_as_they_are(implementation):
    leaves, settings = arguments(30, [8, 16, 4])
    expected = ops.mlp(**leaves, **settings)
    rows = torch.randn(30, 20)
    rows[:, 3:11] = leaves["x"]
    strided = {"x": rows[:, 3:11], "weights": [w.t().contiguous().t() for w in leaves["weights"]]}
    assert torch.equal(ops.mlp(**{**leaves, **strided}, **settings), expected)
    conjugated = torch._neg_view(-leaves["x"])
    torch.testing.assert_close(ops.mlp(**{**leaves, "x": conjugated}, **settings), expected)
    batched = ops.mlp(**{**leaves, "x": leaves["x"].view(5, 6, 8)}, **settings)
    assert torch.equal(batched, expected.view(5, 6, 4))


@by_kernels
def test_nan_and_infinity_reach_the_outputs(implementation):
    leaves, settings = arguments(3, [4, 40, 2])
    leaves["x"][1, 2], leaves["x"][2, 0] = float("nan"), float("inf")
    ours, theirs = (results(f, leaves, settings, torch.float32) for f in (ops.mlp, eager))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@by_kernels
@pytest.mark.parametrize("name", ["wide", "gated", "masked"])
def test_second_derivatives_are_pytorchs(name, implementation):
    widths, options = NETWORKS[name]
    leaves, settings = arguments(4, widths, **options)

    def second(function):
        cast = torch.utils._pytree.tree_map(lambda t: t.double().requires_grad_(), leaves)
        inputs = torch.utils._pytree.tree_leaves(cast)
        y = function(**cast, **settings)
        (gx,) = torch.autograd.grad(y.square().sum(), cast["x"], create_graph=True)
        return torch.autograd.grad(gx.square().sum(), inputs)

    for a, b in zip(second(ops.mlp), second(eager), strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_and_compilers_see_an_operator():
    leaves, settings = arguments(6, [3, 8, 2])
    x, weights, biases = (leaves[name] for name in ("x", "weights", "biases"))

    def scores(x, weights):
        return ops.mlp(x, weights, biases).square().sum()

    def plain(x, weights):
        return eager(x, weights, biases, **settings).square().sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(transform(scores)(x, weights), transform(plain)(x, weights))
    each = torch.func.vmap(torch.func.grad(scores), (0, None))
    torch.testing.assert_close(each(x, weights), torch.func.vmap(torch.func.grad(plain), (0, None))(x, weights))
    torch.testing.assert_close(torch.compile(scores, backend="aot_eager")(x, weights), plain(x, weights))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_modes_see_pytorchs_operators_and_profilers_the_kernels():
    leaves, settings = arguments(6, [3, 8, 2])
    expected = results(ops.mlp, leaves, settings, torch.float32)
    with Recorder() as recorder:
        found = results(ops.mlp, leaves, settings, torch.float32)
    assert "aten::addmm" in recorder.names
    with torch.profiler.profile() as profile:
        again = results(ops.mlp, leaves, settings, torch.float32)
    if _mlp._NATIVE:
        assert {"genfuse::mlp", "genfuse::mlp_backward"} <= {event.key for event in profile.key_averages()}
    for a, b, c in zip(expected, found, again, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)
    with FlopCounterMode(display=False) as counter:
        results(ops.mlp, leaves, settings, torch.float32)
    assert counter.get_total_flops() == 3 * 2 * 6 * (3 * 8 + 8 * 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slope": 1.0}, r"slope must be in \[0, 1\)"),
        ({"weights": []}, "as many layers"),
        ({"biases": [torch.zeros(9), torch.zeros(2)]}, r"biases\[0\] must have shape \(8,\)"),
        ({"x": torch.zeros(6, 4)}, r"weights\[0\] must have shape \(8, 4\)"),
        ({"added": torch.zeros(6, 9)}, "added must have shape"),
        ({"counts": torch.zeros(3, dtype=torch.int64)}, "counts must have shape"),
        ({"x": torch.zeros(())}, "x must have at least one axis"),
        ({"x": torch.zeros(6, 3).half()}, r"weights\[0\] must have x's dtype torch.float16"),
        ({"x": torch.zeros(6, 3).int()}, "x must be float32, .* got torch.int32"),
        ({"x": torch.zeros(6, 3, device="meta")}, r"weights\[0\] must be on x's device meta"),
        ({"x": torch.zeros(2, 3, 3), "added": torch.zeros(3, 2, 8)}, r"added must have shape \(2, 3, 8\)"),
        ({"weights": [torch.zeros(8, 3), torch.zeros(())]}, r"weights must be .* each, got \(8, 3\), \(\)"),
        ({"gates": [torch.zeros(6, 8)]}, "gates must be one for each residual block, got 1"),
        ({"residual": True, "weights": [torch.zeros(8, 3), torch.zeros(8, 8), torch.zeros(2, 8)],
          "biases": [torch.zeros(8), torch.zeros(8), torch.zeros(2)]}, "pairs of widths"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(changed, message):
    leaves, settings = arguments(6, [3, 8, 2])
    with pytest.raises(ValueError, match=message):
        ops.mlp(**{**leaves, **settings, **changed})


@by_kernels
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_a_critic_of_linear_layers_is_penalised_by_a_chain_of_products(slope, caplog, implementation):
    torch.manual_seed(0)
    critic = mlp_critic(9, (31, 17)).double()
    for layer in critic:
        if isinstance(layer, nn.LeakyReLU):
            layer.negative_slope = slope
    x, parameters = torch.randn(12, 9, dtype=torch.float64), list(critic.parameters())
    plain = nn.Sequential(*critic)

    def penalty(critic, gradient):
        scores, g = gradient(critic, x)
        loss = (scores * torch.arange(1, 13)[:, None]).mean() + (g.norm(2, 1) - 1).square().mean()
        return torch.autograd.grad(loss, parameters)

    def twice(critic, x):
        x = x.clone().requires_grad_()
        out = critic(x)
        return out, torch.autograd.grad(out.sum(), x, create_graph=True)[0]

    with Recorder():  # where it is PyTorch's own layers
        seen = penalty(critic, ops.scores_and_gradient)
    for a, b in zip(penalty(critic, ops.scores_and_gradient), seen, strict=True):
        torch.testing.assert_close(a, b)
    assert "twice" not in caplog.text
    for a, b in zip(penalty(critic, ops.scores_and_gradient), penalty(plain, twice), strict=True):
        torch.testing.assert_close(a, b)


def of_both(critic, real, fake, create_graph=False, **settings):
    """The loss of WGAN-GP's critic, what it is made of, and its gradients, by `ops.scores_and_penalty`."""
    generator = torch.Generator().manual_seed(3)
    out = ops.scores_and_penalty(critic, real, fake, generator=generator, **settings)
    weights = torch.arange(1.0, 1 + len(real), dtype=real.dtype)
    loss = (out[1].view(-1) * weights).mean() - out[0].mean() + 10 * out[2]
    return *out, *torch.autograd.grad(loss, list(critic.parameters()), create_graph=create_graph)


@by_kernels
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize(
    ("rows", "shape", "widths"),
    [(12, (9,), (31, 17)), (1, (9,), (5,)), (7, (1, 30, 20), (40, 33, 21)), (600, (3,), (2, 2))],
)
def test_the_first_layer_between_real_and_fake_examples_is_had_from_both_ends(
    rows, shape, widths, slope, implementation
):
    torch.manual_seed(0)
    critic = mlp_critic(math.prod(shape), widths).double()
    for layer in critic:
        if isinstance(layer, nn.LeakyReLU):
            layer.negative_slope = slope
    real, fake = torch.randn(2, rows, *shape, dtype=torch.float64)
    found = of_both(critic, real, fake, one_sided=slope > 0)
    assert "Critic" in type(found[0].grad_fn.next_functions[0][0]).__name__
    plain = nn.Sequential(*critic)  # which shows no layers
    wanted = of_both(plain, real, fake, one_sided=slope > 0)
    points = ops.interpolate(real, fake, torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        wanted[2], ops.gradient_norm_penalty(ops.input_gradient(plain, points), one_sided=slope > 0)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    parameters, again = list(critic.parameters()), []
    for each in (critic, plain):
        gradients = of_both(each, real, fake, one_sided=slope > 0, create_graph=True)[3:]
        for a, b in zip(gradients, wanted[3:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        again.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters, materialize_grads=True))
    for a, b in zip(*again, strict=True):  # second order, by the formula
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@by_kernels
def test_odd_critics_and_examples_have_the_scores_and_penalty_of_two_calls(implementation, caplog):
    torch.manual_seed(0)
    real, fake = torch.randn(9, 2, 12).transpose(0, 1)[..., ::2].double()  # (9, 6), strided
    critic = mlp_critic(6, (8, 5)).double()
    wanted = of_both(nn.Sequential(*critic), real, fake)

    def same(found):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)

    same(of_both(critic, real, fake))
    same(of_both(critic, torch._neg_view(-real), fake))
    with Recorder():
        same(of_both(critic, real, fake))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        same(of_both(critic, real, fake))
    assert "genfuse::mlp_critic" in {event.key for event in seen.key_averages()}
    calls = []
    with critic[1].register_forward_hook(lambda *_: calls.append(1)):
        same(of_both(critic, real, fake))
    assert len(calls) == 2
    assert "twice" not in caplog.text
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], -1), lambda t: t[..., 0]):
        same(of_both(critic, real, fake))  # saved tensors come back strided
    for frozen in [*critic.parameters()][::3]:
        frozen.requires_grad_(False)
    trained = [p for p in critic.parameters() if p.requires_grad]
    some = []
    for each in (critic, nn.Sequential(*critic)):
        out = ops.scores_and_penalty(each, real, fake, generator=torch.Generator().manual_seed(3))
        some.append(torch.autograd.grad(sum(o.sum() for o in out), trained))
    for a, b in zip(*some, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        assert not any(o.requires_grad for o in ops.scores_and_penalty(critic, real, fake))
    for wrong in (nn.Linear(5, 2), nn.Linear(5, 0)):
        with pytest.raises(ValueError, match="one number per example"):
            ops.scores_and_penalty(type(critic)(*critic[:-1], wrong.double()), real, fake)
    with pytest.raises(ValueError, match="one number per example"):
        ops.scores_and_penalty(type(critic)(*critic[1:]), real[:, None], fake[:, None])  # which are not flattened
    for each in (critic, nn.Sequential(*critic)):  # of no examples
        assert [o.shape for o in ops.scores_and_penalty(each, real[:0], fake[:0])] == [(0, 1), (0, 1), ()]
    with pytest.raises(ValueError, match=r"fake must have shape \(9, 6\), got \(4, 6\)"):
        ops.scores_and_penalty(critic, real, fake[:4])
    with pytest.raises(ValueError, match="weights\\[0\\]"):
        ops.scores_and_penalty(critic, real[:, :4], fake[:, :4])


LAYERS = {
    "affine": lambda c: AffineCoupling(MLPConditioner(3, 8, c, hidden=(16, 12)), split=3),
    "affine, last, squashed": lambda c: AffineCoupling(
        MLPConditioner(3, 8, c, hidden=(16,), squash=True), split=-3, scale="softclip"
    ),
    "affine, residual": lambda c: AffineCoupling(ResidualMLP(3, 8, c, hidden=(16, 16)), split=3),
    "spline": lambda c: SplineCoupling(ResidualMLP(3, 44, c, hidden=(16, 16)), split=3, bins=4),
    "spline, last": lambda c: SplineCoupling(MLPConditioner(3, 44, c, hidden=(16,)), split=-3, bins=4),
    "maf": lambda c: AutoregressiveAffine(7, (16, 20), context=c, scale="softclip", squash=True),
    "nsf-ar": lambda c: AutoregressiveSpline(7, (16, 16, 16), context=c, bins=4, residual=True),
}


@by_kernels
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_a_flow_is_one_node_with_the_gradients_of_its_parts(
    name, context, inverse, monkeypatch, implementation
):
    torch.manual_seed(0)
    layer = LAYERS[name](context).double()
    for weight in layer.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    x = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    c = torch.randn(11, context, dtype=torch.float64, requires_grad=True) if context else None
    cotangents = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    inputs = [x, *([c] if context else []), *layer.parameters()]

    def run():
        outputs = (layer.inverse if inverse else layer)(x, c)
        gradients = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
        some = sum(g.square().sum() for g in gradients if g is not None)
        return [*outputs, *gradients, *torch.autograd.grad(some, inputs, allow_unused=True)]

    once = (layer.inverse if inverse else layer)(x, c)
    found = torch.autograd.grad(once, inputs, cotangents, allow_unused=True)
    one_node = type(once[1].grad_fn).__name__ == "_LayerBackward"
    assert one_node or (inverse and name in ("maf", "nsf-ar")) or not _mlp._NATIVE
    with monkeypatch.context() as patch:
        patch.setattr(
            _layer,
            "_layer",
            lambda how, x, n, each: _layer._composed(
                how, (len(n.weights), 0.0, n.residual), n.counts, x, n.context, n.added, *n.weights, *n.biases, *n.gates
            ),
        )
        parts = run()
    for a, b in zip([*once, *found], parts, strict=False):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-10)
    for a, b in zip(run(), parts, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [torch.zeros(5, 2)], "biases": [torch.zeros(5)]}, r"weights\[0\] must have shape \(4, 2\)"),
        ({"weights": [torch.zeros(4, 3)]}, r"weights\[0\] must have shape \(4, 2\)"),
        ({"weights": []}, "as many layers"),
        ({"context": torch.zeros(2, 1)}, r"context must have shape \(3, 1\)"),
        ({"counts": torch.zeros(3, dtype=torch.int64)}, "counts must have shape"),
        ({"gates": [torch.zeros(3, 4)]}, "gates must be one for each residual block"),
        ({"biases": [torch.zeros(4).double()]}, "dtype"),
    ],
)
def test_a_network_that_does_not_fit_a_layer_is_refused(change, message):
    network = ops.Network([torch.zeros(4, 2)], [torch.zeros(4)])
    ops.affine_layer(torch.zeros(3, 4), network, 2)
    with pytest.raises(ValueError, match=message):
        ops.affine_layer(torch.zeros(3, 4), network._replace(**change), 2)
    with pytest.raises(ValueError, match=r"x must be \(N, D\)"):
        ops.affine_layer(torch.zeros(3, 4, 1), network, 2)


@pytest.mark.parametrize("split", [4, -4, 5, -1000])
def test_a_split_that_leaves_nothing_to_move_is_refused(split):
    settings = ops.SplineSettings(8, 3.0, "linear", False, 1e-3, 1e-3, 1e-3)
    for each, layer in ((2, ops.affine_layer), (23, partial(ops.spline_layer, settings=settings))):
        network = ops.Network([torch.zeros(4 * each, 4)], [torch.zeros(4 * each)])
        with pytest.raises(ValueError, match=f"split must be above -4 and below 4, .* got {split}"):
            layer(torch.zeros(3, 4), network, split)


@pytest.mark.parametrize("outputs", [1, 6])
def test_under_autocast_a_layer_may_have_another_dtype_but_no_other_size(outputs):
    x = torch.zeros(3, 4).bfloat16()
    with torch.autocast("cpu"):
        ops.affine_layer(x, ops.Network([torch.zeros(4, 2)], [torch.zeros(4)]), 2)
        with pytest.raises(ValueError, match=r"weights\[0\] must have shape \(4, 2\)"):
            ops.affine_layer(x, ops.Network([torch.zeros(outputs, 2)], [torch.zeros(outputs)]), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squashed_is_asinh_of_numbers_of_any_size(dtype):
    x = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-8, 1e-3, -0.5, 1, 3, -40, 1e8, -1e20, 1e37, torch.inf, torch.nan], dtype=dtype
    )
    found = _layer._see(x[:, None], None, slice(None), 0.0)[:, 0]
    torch.testing.assert_close(
        found, x.double().asinh().to(dtype), equal_nan=True, atol=0, rtol=4 * torch.finfo(dtype).eps
    )


@by_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bernoulli_nll_is_the_cross_entropy(dtype, implementation):
    torch.manual_seed(0)
    logits = (torch.randn(7, 3, 50) * 8).to(dtype).requires_grad_()
    x = torch.rand(7, 3, 50).to(dtype)

    def truth(logits, x):
        return F.binary_cross_entropy_with_logits(logits.double(), x.double(), reduction="none").flatten(1).sum(1)

    found, expected = ops.bernoulli_nll(logits, x), truth(logits, x)
    eps = torch.finfo(torch.float32 if dtype is torch.bfloat16 else dtype).eps
    assert (found.double() - expected).abs().max() <= 8 * eps * expected.max()
    g = torch.arange(1.0, 8.0)
    ours = torch.autograd.grad(found, logits, g.to(found.dtype))[0]
    theirs = torch.autograd.grad(expected, logits, g.double())[0]
    assert (ours.double() - theirs.double()).abs().max() <= 16 * torch.finfo(dtype).eps


@by_kernels
def test_bernoulli_nll_keeps_what_is_small(implementation):
    logits, x = torch.tensor([[20.0, 30.0], [-20.0, 80.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    truth = F.binary_cross_entropy_with_logits(logits.double(), x.double(), reduction="none").sum(1)
    torch.testing.assert_close(ops.bernoulli_nll(logits, x).double(), truth, rtol=1e-6, atol=0)


def test_a_layer_of_no_features_learns_nothing():
    settings = ops.SplineSettings(8, 3.0, "linear", False, 1e-3, 1e-3, 1e-3)
    context, x = torch.randn(3, 2), torch.randn(3, 0)
    network = ops.Network([torch.randn(0, 2).requires_grad_()], [torch.randn(0).requires_grad_()], context=context)
    for layer in (ops.affine_layer, partial(ops.spline_layer, settings=settings)):
        y, logdet = layer(x, network, 0)
        assert y.shape == (3, 0)
        assert logdet.tolist() == [0.0] * 3


def test_layers_of_a_context_of_no_columns_have_gradients():
    context = torch.randn(4, 0, requires_grad=True)
    network = ops.Network([torch.randn(5, 1), torch.randn(4, 5)], [torch.zeros(5), torch.zeros(4)], context=context)
    assert torch.autograd.grad(ops.affine_layer(torch.randn(4, 3), network, 1)[0].sum(), context)[0].shape == (4, 0)


def test_no_features_of_several_axes_make_the_bias():
    bias = torch.randn(4)
    assert torch.equal(ops.mlp(torch.randn(2, 3, 0), [torch.randn(4, 0)], [bias]), bias.expand(2, 3, 4))


@by_kernels
def test_gradients_of_biases_over_many_rows_keep_their_digits(implementation):
    x, weight, bias = torch.full((200_000, 2), 0.7), torch.randn(3, 2), torch.zeros(3, requires_grad=True)
    y = ops.mlp(x, [weight], [bias])
    (found,) = torch.autograd.grad(y, bias, torch.full_like(y, 0.7))
    torch.testing.assert_close(found, torch.full((3,), 200_000 * 0.7), rtol=4 * 2**-23, atol=0)
