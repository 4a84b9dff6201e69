"""Layers of flows: log-determinants, round trips, their start, and input that is empty, strided, NaN or of 16 bits."""

import copy
import itertools
import math
from functools import partial
from types import MethodType

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, transforms

from benchmarks._measure import Side, peak_memory
from genfuse.errors import SettingsError
from genfuse.nn import (
    MADE,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    AutoregressiveAffine,
    AutoregressiveSpline,
    Composite,
    ConvConditioner,
    Dequantize,
    Flatten,
    Inverse,
    Logit,
    LULinear,
    MLPConditioner,
    MultiscaleSplit,
    Permutation,
    Planar,
    Radial,
    ResidualMLP,
    SplineCoupling,
    Squeeze,
    Transform,
    checkerboard,
    split_size,
)

VECTOR, CHANNELS, BOARD = (5,), (3, 2, 2), (2, 3, 2)
MASK = torch.tensor([True, False, False, True, False])


def split(context: int) -> Transform:
    prior = AffineCoupling(ConvConditioner(2, 4, context, (4,)), split=2, scale="exp")
    rest = [AffineCoupling(ConvConditioner(1, 2, context, (4,)), split=1), Flatten((2, 2, 2))]
    return MultiscaleSplit(prior, Composite(rest), (4, 2, 2))


def stack(context: int) -> Transform:
    coupling = AffineCoupling(MLPConditioner(2, 6, context, (8,)), split=2)
    return Composite([ActNorm(5), LULinear(5), coupling, Permutation.reversed(5), Inverse(Planar(5, context))])


LAYERS = {  # shape of an example, and what makes the layer for a context of so many features
    "affine-tanh": (VECTOR, lambda c: AffineCoupling(MLPConditioner(2, 6, c, (8,)), split=2, scale="tanh")),
    "affine-exp": (VECTOR, lambda c: AffineCoupling(MLPConditioner(2, 6, c, (8, 8)), split=2, scale="exp")),
    "affine-sigmoid": (VECTOR, lambda c: AffineCoupling(ResidualMLP(2, 6, c, (8, 8)), split=2, scale="sigmoid")),
    "affine-last": (VECTOR, lambda c: AffineCoupling(MLPConditioner(2, 6, c, (8,)), split=-2)),
    "additive-last": (VECTOR, lambda c: AdditiveCoupling(MLPConditioner(2, 3, c, (8,)), split=-2)),
    "spline-last": (VECTOR, lambda c: SplineCoupling(ResidualMLP(2, 3 * 14, c, (8,)), split=-2, bins=5, bound=2.0)),
    "affine-mask": (VECTOR, lambda c: AffineCoupling(MLPConditioner(5, 10, c, (8,)), mask=MASK)),
    "affine-channels": (CHANNELS, lambda c: AffineCoupling(ConvConditioner(1, 4, c, (4,), residual=True), split=1)),
    "affine-checkerboard": (
        BOARD,
        lambda c: AffineCoupling(ConvConditioner(2, 4, c, (4,)), mask=checkerboard(3, 2, True)),
    ),
    "additive": (VECTOR, lambda c: AdditiveCoupling(MLPConditioner(2, 3, c, (8,)), split=2)),
    "additive-mask": (VECTOR, lambda c: AdditiveCoupling(MLPConditioner(5, 5, c, (8,)), mask=MASK)),
    "additive-channels": (CHANNELS, lambda c: AdditiveCoupling(ConvConditioner(1, 2, c, (4,)), split=1)),
    "additive-checkerboard": (
        BOARD,
        lambda c: AdditiveCoupling(ConvConditioner(2, 2, c, (4,), residual=True), mask=checkerboard(3, 2, False)),
    ),
    "spline": (VECTOR, lambda c: SplineCoupling(ResidualMLP(2, 3 * 14, c, (8,)), split=2, bins=5, bound=2.0)),
    "spline-channels": (CHANNELS, lambda c: SplineCoupling(ConvConditioner(1, 2 * 11, c, (4,)), split=1, bins=4)),
    "autoregressive-affine": (VECTOR, lambda c: AutoregressiveAffine(5, (8,), context=c)),
    "autoregressive-spline": (VECTOR, lambda c: AutoregressiveSpline(5, (8,), context=c, bins=5)),
    "permutation": (VECTOR, lambda c: Permutation.random(5)),
    "permutation-channels": (CHANNELS, lambda c: Permutation(torch.tensor([1, 2, 0]))),
    "lu": (VECTOR, lambda c: LULinear(5)),
    "lu-rotation": (VECTOR, lambda c: LULinear(5, "rotation")),
    "lu-channels": (CHANNELS, lambda c: LULinear(3, "rotation")),
    "actnorm": (VECTOR, lambda c: ActNorm(5)),
    "actnorm-channels": (CHANNELS, lambda c: ActNorm(3)),
    "squeeze": ((2, 2, 4), lambda c: Squeeze()),
    "flatten": (CHANNELS, lambda c: Flatten(CHANNELS)),
    "split": ((4, 2, 2), split),
    "logit": (VECTOR, lambda c: Logit(0.05)),
    "planar": (VECTOR, lambda c: Planar(5, c)),
    "planar-1": ((1,), lambda c: Planar(1, c)),
    "radial": (VECTOR, lambda c: Radial(5, c)),
    "radial-1": ((1,), lambda c: Radial(1, c)),
    "inverse": (VECTOR, lambda c: Inverse(AffineCoupling(MLPConditioner(2, 6, c, (8,)), split=2))),
    "composite": (VECTOR, stack),
    "nothing": (VECTOR, lambda c: Composite([])),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
with_and_without_context = pytest.mark.parametrize("context", [0, 3])


def scrambled(transform: torch.nn.Module, dtype: torch.dtype = torch.float64, size: float = 0.3):
    """In evaluation mode, with noise on all parameters, so that none is where it starts."""
    transform.to(dtype).eval()
    with torch.no_grad():
        for p in transform.parameters():
            p += size * torch.randn_like(p)
    return transform


def layer(kind, context=0, dtype=torch.float64):
    return scrambled(LAYERS[kind][1](context), dtype)


def examples(kind, n, context=0, dtype=torch.float64):
    x = torch.randn(n, *LAYERS[kind][0], dtype=dtype)
    return x.sigmoid() if kind == "logit" else x, torch.randn(n, context, dtype=dtype) if context else None


def both_ways(kind, n, context=0, dtype=torch.float64):
    """For each direction the function and its arguments."""
    transform = layer(kind, context, dtype)
    x, c = examples(kind, n, context, dtype)
    return [(transform, x, c), (transform.inverse, transform(x, c)[0].detach(), c)]


def logdet_by_autograd(function, x, *rest):
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x, *rest)[0].flatten(), x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


@every_layer
@with_and_without_context
def test_logdet_is_that_of_the_autograd_jacobian(kind, context):
    for function, x, c in both_ways(kind, 3, context):
        _, logdet = function(x, c)
        assert logdet.shape == (3,)
        for i in range(3):
            expected = logdet_by_autograd(function, x[i : i + 1], c if c is None else c[i : i + 1])
            torch.testing.assert_close(logdet[i], expected, rtol=0, atol=1e-10)


@every_layer
@with_and_without_context
def test_second_gradients_are_those_of_finite_differences(kind, context):
    for function, *arguments in both_ways(kind, 2, context):
        arguments = [t.requires_grad_() for t in arguments if t is not None]
        assert torch.autograd.gradgradcheck(function, arguments, atol=1e-4, fast_mode=True)


# Conditioning is the limit in float32: a scrambled spline has slopes near its least, 1e-3, and gets 10 times the bound.
# Planar and radial layers near the limit of what is invertible are in a test of their own.
@every_layer
@with_and_without_context
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_the_inverse_undoes_the_layer(kind, context, dtype, tolerance):
    transform = layer(kind, context, dtype)
    if "spline" in kind and dtype is torch.float32:
        tolerance *= 10
    x, c = examples(kind, 200, context, dtype)
    y, logdet = transform(x, c)
    again, back = transform.inverse(y, c)
    assert again.shape == x.shape
    assert {t.dtype for t in (y, logdet, again, back)} == {dtype}
    torch.testing.assert_close(again, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(back, -logdet, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if layer(kind, 3)(*examples(kind, 2, 3))[0].requires_grad])
def test_every_parameter_and_the_context_have_a_gradient(kind):
    transform = layer(kind, 3)
    x, c = examples(kind, 20, 3)
    y, logdet = transform(x, c.requires_grad_())
    (y.sin().sum() + logdet.sum()).backward()
    for name, p in transform.named_parameters():
        assert p.grad is not None and p.grad.any(), name  # noqa: PT018
    uses_context = not kind.startswith(("lu", "actnorm"))
    assert (c.grad is not None) == uses_context


@every_layer
def test_zero_rows(kind):
    for function, x, _ in both_ways(kind, 2):
        y, logdet = function(x[:0].clone().requires_grad_())
        assert y.shape == (0, *function(x)[0].shape[1:])
        assert logdet.shape == (0,)
        (y.sum() + logdet.sum()).backward()


class OneWay(torch.nn.Module):
    """A layer's forward, or its inverse, as a module."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.inverse = getattr(function, "__self__", function), function.__class__ is MethodType

    def forward(self, x, context=None):
        return (self.layer.inverse if self.inverse else self.layer)(x, context)


@every_layer
def test_exported_or_traced_a_layer_takes_batches_of_any_size(kind):
    for function, *given in both_ways(kind, 4, 3):
        given = tuple(given)
        sizes = tuple({0: torch.export.Dim("n")} for _ in given)
        with torch.no_grad():
            exported = torch.export.export(OneWay(function), given, dynamic_shapes=sizes).module()
            traced = torch.jit.trace(OneWay(function), given, check_trace=False)
            for one in (tuple(t[:1] for t in given), tuple(torch.cat([t, t, t]) for t in given)):
                for made in (exported, traced):
                    torch.testing.assert_close(made(*one), function(*one), rtol=0, atol=1e-10)


@every_layer
def test_strides_do_not_matter(kind):
    for function, x, _ in both_ways(kind, 4):
        strided = x.movedim(0, -1).contiguous().movedim(-1, 0)
        every_other = x.repeat_interleave(2, 0)[::2]
        for other in (strided, every_other):
            assert not other.is_contiguous() or x[0].numel() == 1
            for got, expected in zip(function(other), function(x), strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@every_layer
def test_a_row_of_nan_stays_the_only_one(kind):
    for function, x, _ in both_ways(kind, 5):
        clean, logdet = function(x)
        x[2] = math.nan
        y, broken = function(x)
        others = torch.tensor([0, 1, 3, 4])
        torch.testing.assert_close(y[others], clean[others], rtol=0, atol=1e-12)
        torch.testing.assert_close(broken[others], logdet[others], rtol=0, atol=1e-12)
        assert y[2].isnan().all()


# The sweep of autoregressive layers computes in full precision, which test_autoregressive.py allows for.
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if not kind.startswith("autoregressive")])
def test_under_autocast_the_inverse_is_that_of_what_was_done(kind):
    transform = layer(kind, 3, torch.float32)
    x, c = examples(kind, 50, 3, torch.float32)
    exact, _ = transform(x, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logdet = transform(x, c)
        again, back = transform.inverse(y, c)
    assert {t.dtype for t in (y, logdet, again, back)} == {torch.float32}
    torch.testing.assert_close(y, exact, rtol=0.05, atol=0.3 if "spline" in kind else 0.05)
    # Conditioners see the same numbers in both directions, but for those behind another layer.
    torch.testing.assert_close(again, x, rtol=0, atol=0.05 if kind in ("composite", "split") else 1e-4)


STACKED = [kind for kind in LAYERS if kind not in ("squeeze", "flatten", "split", "logit", "nothing")]


@pytest.mark.parametrize("kind", STACKED)
def test_a_hundred_layers_stay_finite(kind):
    shape, make = LAYERS[kind]
    flow = scrambled(Composite([make(0) for _ in range(100)]), torch.float32, size=0.03)
    x = torch.randn(20, *shape, requires_grad=True)
    y, logdet = flow(x)
    (y.square().flatten(1).sum(1) / 2 - logdet).mean().backward()
    assert y.isfinite().all()
    assert logdet.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, *flow.parameters()))
    again, back = flow.inverse(torch.randn_like(x))
    assert again.isfinite().all()
    assert back.isfinite().all()


# Composites that do not keep activations.


def gradients(flow, x, context):
    x = x.clone().requires_grad_()
    context = context if context is None else context.clone().requires_grad_()
    flow.zero_grad()
    y, logdet = flow(x) if context is None else flow(x, context)
    (y.sin().sum() + logdet.sum()).backward()
    return [t.grad for t in (x, context, *flow.parameters()) if t is not None and t.grad is not None]


@every_layer
@with_and_without_context
def test_reversible_gradients_are_the_ordinary_ones(kind, context):
    layers = [layer(kind, context) for _ in range(1 if kind in ("squeeze", "flatten", "split", "logit") else 3)]
    x, c = examples(kind, 7, context)
    plain, memory_free = (gradients(Composite(layers, reversible=way), x, c) for way in (False, True))
    assert len(plain) == len(memory_free)
    for a, b in zip(memory_free, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_reversible_gradients_of_shared_and_of_frozen_weights():
    coupling = layer("affine-tanh")
    x, _ = examples("affine-tanh", 7)
    for frozen in (False, True):
        coupling.conditioner.last.bias.requires_grad_(not frozen)
        layers = [coupling, Permutation.reversed(5), coupling]
        for a, b in zip(*(gradients(Composite(layers, reversible=way), x, None) for way in (False, True)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def second_gradients(flow, x, context):
    """Of all arguments and weights, of a function of all their gradients."""
    wanted = [t.clone().requires_grad_() for t in (x, context) if t is not None]
    y, logdet = flow(*wanted)
    wanted += [p for p in flow.parameters() if p.requires_grad]
    first = torch.autograd.grad(
        y.sin().sum() + logdet.sin().sum(), wanted, create_graph=True, allow_unused=True, materialize_grads=True
    )
    mixed = sum((g + g.square()).sum() for g in first)
    return torch.autograd.grad(mixed, wanted, allow_unused=True, materialize_grads=True)


@every_layer
@with_and_without_context
def test_reversible_second_gradients_are_the_ordinary_ones(kind, context):
    layers = [layer(kind, context) for _ in range(1 if kind in ("squeeze", "flatten", "split", "logit") else 3)]
    x, c = examples(kind, 5, context)
    plain, memory_free = (second_gradients(Composite(layers, reversible=way), x, c) for way in (False, True))
    for a, b in zip(memory_free, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_reversible_second_gradients_where_the_input_is_made_of_the_context_and_of_the_same_weights():
    coupling = layer("affine-tanh", 5)
    (x, c), found = examples("affine-tanh", 7, 5), []
    for way in (False, True):
        flow = Composite([coupling, Permutation.reversed(5)], reversible=way)

        class Twice(torch.nn.Module):
            def forward(self, x, context, flow=flow):
                y, logdet = flow(x * context, context)
                z, more = flow(y, context)
                return z, logdet + more

        twice = Twice()
        twice.flow = flow
        found.append([*gradients(twice, x, c), *second_gradients(twice, x, c)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_reversible_hessians_are_the_ordinary_ones_batched_or_not():
    layers = [layer("affine-tanh") for _ in range(3)]
    x, _ = examples("affine-tanh", 2)
    found = []
    for way in (False, True):
        flow = Composite(layers, reversible=way)
        for vectorize in (False, True):
            hessian = torch.autograd.functional.hessian(lambda z, f=flow: f(z)[1].sum(), x, vectorize=vectorize)
            found.append(hessian)
    assert found[0].abs().max() > 1e-3
    for hessian in found[1:]:
        torch.testing.assert_close(hessian, found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("create_graph", [False, True])
def test_reversible_weights_that_were_changed_before_the_backward_pass_are_noticed(create_graph):
    flow = Composite([layer("affine-tanh") for _ in range(3)], reversible=True)
    y, logdet = flow(examples("affine-tanh", 7)[0])
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + logdet.sum()).backward(create_graph=create_graph)


def test_reversible_gradients_are_those_of_weights_given_for_one_call():
    layers = [layer("affine-tanh") for _ in range(2)]
    x, found = examples("affine-tanh", 7)[0], []
    other = {name: 1.5 * p.detach() for name, p in Composite(layers).named_parameters()}
    for way in (False, True):
        flow = Composite([*layers, layers[0]], reversible=way)  # which has some weights twice
        given = {name: t.clone().requires_grad_() for name, t in other.items()}
        y, logdet = torch.func.functional_call(flow, given, (x,))
        loss, wanted = y.sin().sum() + logdet.sum(), list(given.values())
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        graphed = torch.autograd.grad(loss, wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in graphed), wanted)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_reversible_composite_is_traced_with_its_gradients():
    flow, (x, _) = Composite([layer("affine-tanh") for _ in range(2)], reversible=True), examples("affine-tanh", 7)
    for a, b in zip(gradients(torch.jit.trace(flow, x), x, None), gradients(flow, x, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_reversible_gradients_under_autocast():
    layers = [layer("affine-tanh", 3, torch.float32) for _ in range(3)]
    x, c = examples("affine-tanh", 50, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, memory_free = (gradients(Composite(layers, reversible=way), x, c) for way in (False, True))
    exact = gradients(Composite(layers), x, c)
    for a, b, without in zip(memory_free, plain, exact, strict=True):
        error = torch.linalg.vector_norm(a - b)
        assert error <= 0.3 * torch.linalg.vector_norm(without - b)  # the rounding is the same in both


def test_reversible_memory_does_not_grow_with_depth():
    x = torch.randn(4096, 4)

    def peak(depth, reversible):
        layers = [AffineCoupling(MLPConditioner(2, 4, hidden=(16,)), split=2) for _ in range(depth)]
        flow = Composite(layers, reversible=reversible)
        return peak_memory(Side(lambda: flow(x)[1].sum().backward()), "cpu")

    assert peak(24, True) < 1.2 * peak(6, True)
    assert peak(24, False) > 3 * peak(6, False)


# Linear layers.


@pytest.mark.parametrize("start", ["permutation", "rotation"])
@pytest.mark.parametrize("features", [1, 2, 7])
def test_lu_logdet_is_that_of_the_assembled_matrix(start, features):
    linear = scrambled(LULinear(features, start))
    eye = torch.eye(features, dtype=torch.float64)
    weight = (linear(eye)[0] - linear.bias).T
    x = torch.randn(4, features, 3, 2, dtype=torch.float64)
    y, logdet = linear(x)
    torch.testing.assert_close(y, torch.einsum("dc,nchw->ndhw", weight, x) + linear.bias[:, None, None])
    logabsdet = torch.linalg.slogdet(weight).logabsdet
    torch.testing.assert_close(linear(eye)[1], logabsdet.expand(features))
    torch.testing.assert_close(logdet, (6 * logabsdet).expand(4))


@pytest.mark.parametrize("start", ["permutation", "rotation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_are_made_of_the_default_type(start, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layers = [LULinear(5, start), AutoregressiveAffine(5, (8,)), AutoregressiveSpline(5, (8,))]
    finally:
        torch.set_default_dtype(before)
    flow, x = Composite(layers), torch.randn(3, 5, dtype=dtype)
    assert {t.dtype for t in (*flow.parameters(), *flow.buffers()) if t.is_floating_point()} == {dtype}
    y, logdet = flow(x)
    assert y.dtype is dtype
    assert logdet.isfinite().all()


@pytest.mark.parametrize("features", [1, 2, 33])
def test_lu_starts_as_a_permutation_or_a_rotation(features):
    eye = torch.eye(features)
    weight, logdet = LULinear(features)(eye)
    assert torch.equal(weight.sort(0).values, eye.sort(0).values)
    assert torch.equal(weight.sum(1), torch.ones(features))
    assert not logdet.any()
    weight, logdet = LULinear(features, "rotation")(eye)
    torch.testing.assert_close(weight @ weight.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(logdet, torch.zeros(features), rtol=0, atol=1e-5)
    if features > 2:
        assert (weight.abs() > 1e-3).float().mean() > 0.9
        assert not torch.equal(weight, LULinear(features, "rotation")(eye)[0])


def test_a_permutation_is_differentiable_to_second_order():
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    permutation = Permutation(torch.tensor([2, 0, 3, 1]))
    assert torch.equal(permutation(x)[0], x[:, [2, 0, 3, 1]])
    assert torch.autograd.gradgradcheck(lambda x: permutation(x)[0] ** 2, x)


# Activation normalisation.


@pytest.mark.parametrize("shape", [(20, 6), (4, 6, 4, 8)])
def test_actnorm_and_the_linear_map_after_it_are_one_product_with_the_results_of_both(shape):
    torch.manual_seed(0)
    norm, linear, x = ActNorm(6), LULinear(6, "rotation"), torch.randn(shape) * 3 + 1
    together = Composite([norm, linear])
    together(x)  # starts the norm
    assert norm.started

    def apart():
        z, first = norm(x)
        y, second = linear(z)
        return y, first + second

    weights = list(together.parameters())
    torch.nn.init.normal_(linear.bias)
    torch.nn.init.normal_(norm.shift)
    found, wanted = together(x), apart()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    g = torch.randn(shape)
    ours, theirs = (torch.autograd.grad((of[0] * g).sum() + of[1].sum(), weights) for of in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.inverse(found[0])[0], x, rtol=1e-3, atol=1e-4)
    seen = []
    with norm.register_forward_hook(lambda *_: seen.append(norm)):
        torch.testing.assert_close(together(x), wanted)
    assert seen == [norm]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(together(x), apart())


@pytest.mark.parametrize("shape", [(5,), (5, 4, 3)], ids=str)
def test_the_first_batch_in_training_normalises_activations(shape):
    norm = ActNorm(5)
    scale = torch.tensor([1e-3, 1.0, 30.0, 0.2, 5.0]).view(5, *[1] * (len(shape) - 1))
    x = torch.randn(300, *shape) * scale + 1000 * scale
    y = norm(x)[0].movedim(1, 0).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(5), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.std(1, correction=0), torch.ones(5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_a_constant_feature_is_only_shifted(value):
    norm = ActNorm(2)
    x = torch.randn(1000, 2)
    x[:, 1] = value
    y, logdet = norm(x)
    torch.testing.assert_close(y[:, 1], torch.zeros(1000), rtol=0, atol=1e-6 * abs(value))
    torch.testing.assert_close(logdet[0], -x[:, 0].std(correction=0).log())


def test_activation_normalisation_starts_once_and_in_training_alone():
    norm = ActNorm(3).eval()
    norm(5 + torch.randn(20, 3))
    assert not norm.shift.any()
    norm.train()
    norm(torch.randn(0, 3))
    assert not norm.started
    norm(5 + torch.randn(20, 3))
    assert norm.shift.all()
    state = {name: t.clone() for name, t in norm.state_dict().items()}
    loaded = ActNorm(3)
    loaded.load_state_dict(state)
    for again in (norm, loaded):
        again(9 + torch.randn(20, 3))
        assert all(torch.equal(state[name], t) for name, t in again.state_dict().items())


def test_a_normalisation_that_is_trained_by_its_inverse_is_not_started_by_data_later():
    norm = ActNorm(3)
    norm.inverse(torch.randn(5, 3))
    norm(9 + torch.randn(20, 3))
    assert not norm.shift.any()
    looked_at = ActNorm(3)
    with torch.no_grad():
        looked_at.inverse(torch.randn(5, 3))
    looked_at(9 + torch.randn(20, 3))
    assert looked_at.shift.all()


# Conditioners.


@pytest.mark.parametrize(
    "make",
    [
        lambda c: MLPConditioner(4, 6, c, (16, 8)),
        lambda c: MLPConditioner(4, 6, c, ()),
        lambda c: ResidualMLP(4, 6, c, (16, 16)),
        lambda c: ConvConditioner(4, 6, c, (8,)),
        lambda c: ConvConditioner(4, 6, c, (8, 8), residual=True),
    ],
    ids=["mlp", "linear", "residual", "convolutional", "residual-convolutional"],
)
def test_a_conditioner_starts_near_zero_and_depends_on_all_that_it_is_shown(make):
    shape = (4, 5, 3) if isinstance(make(0), ConvConditioner) else (4,)
    x, context = torch.randn(2, *shape), torch.randn(2, 3)
    for size, given in ((0, ()), (3, (context,))):
        assert make(size)(x, *given).abs().max() < 0.05
        network = scrambled(make(size), torch.float32)
        shown = [t.clone().requires_grad_() for t in (x, *given)]
        out = network(*shown)
        assert out.shape == (2, 6, *shape[1:])
        (g,) = torch.autograd.grad(out[0].sum(), shown[-1])
        assert g[0].all()
        assert not g[1].any()


@pytest.mark.parametrize("residual", [False, True])
def test_the_context_of_images_may_be_an_image(residual):
    network = scrambled(ConvConditioner(1, 2, 3, (4,), residual=residual))
    x, context = torch.randn(2, 1, 4, 5).double(), torch.randn(2, 3).double()
    everywhere = context[:, :, None, None].expand(2, 3, 4, 5).clone()
    torch.testing.assert_close(network(x, everywhere), network(x, context))
    everywhere[0, :, 0, 0] += 1
    changed = (network(x, everywhere) - network(x, context)).abs().sum(1) > 1e-9
    assert changed[0, 0, 0]
    assert not changed[0, 3, 4]
    assert not changed[1].any()


@pytest.mark.parametrize(
    ("network", "how", "seen"),
    [
        (partial(MLPConditioner, 4, 8, hidden=(8,)), {"squash": True}, torch.asinh),
        (partial(ResidualMLP, 4, 8, hidden=(8,)), {"squash": True}, torch.asinh),
        (partial(MADE, 4, (8,), 2), {"squash": True}, lambda x: x.clamp(-5, 5)),
    ],
    ids=["mlp", "residual", "made"],
)
def test_a_network_sees_features_squashed_and_the_context_as_it_is(network, how, seen):
    squashed, plain = scrambled(network(context=3, **how)), network(context=3).double()
    plain.load_state_dict(squashed.state_dict())
    x, context = 9 * torch.randn(5, 4).double(), 9 * torch.randn(5, 3).double()
    assert torch.equal(squashed(x, context), plain(seen(x), context))
    assert not torch.equal(squashed(x, context), plain(x, context))


def test_dropout_is_for_training_alone():
    network = scrambled(ResidualMLP(2, 3, hidden=(64, 64), dropout=0.5), torch.float32)
    x = torch.randn(4, 2)
    assert torch.equal(network(x), network(x))
    network.train()
    assert not torch.equal(network(x), network(x))


# Planar and radial layers near the limits of what is invertible.


def planar(w, u, b) -> Planar:
    transform = Planar(len(w)).double()
    with torch.no_grad():
        transform.parameters_.copy_(torch.tensor([*w, *u, b]))
    return transform


def radial(centre, a, s) -> Radial:
    """With a and s = a + b from their raw values."""
    transform = Radial(len(centre)).double()
    with torch.no_grad():
        transform.parameters_.copy_(torch.tensor([*centre, a, s]))
    return transform


EXTREME = {
    "w u near -1": planar([2.0, 1.0], [-8.0, -1.0], 0.5),
    "w u very near -1": planar([3.0, 0.0], [-10.0, 2.0], 0.0),
    "large u": planar([1.0, 1.0], [100.0, -30.0], 0.1),
    "large w": planar([1e3, -1e3], [0.5, 0.4], -2.0),
    "small w": planar([1e-7, 0.0], [1.0, 1.0], 0.3),
    "planar of one": planar([4.0], [-4.0], 1.0),
    "large b": radial([0.5, -0.5], 0.0, 500.0),
    "b near -a": radial([0.5, -0.5], 3.0, -15.0),
    "b very near -a": radial([0.0, 0.0], 10.0, -30.0),
    "small a": radial([0.0, 1.0], -8.0, 1.0),
    "radial of one": radial([0.3], 2.0, -12.0),
    "radial of one, large b": radial([0.3], -3.0, 50.0),
}


def cover(transform, n=400):
    """Points along the line on which the layer bends most, from far to very near."""
    raw = transform.parameters_.detach()
    features = (len(raw) - 1) // 2 if isinstance(transform, Planar) else len(raw) - 2
    far = torch.logspace(-6, 1.5, n // 2, dtype=torch.float64)
    t = torch.cat([-far.flip(0), far])[:, None]
    if isinstance(transform, Radial):
        return raw[:features] + t * torch.ones(features) / features**0.5
    w, b = raw[:features], raw[-1]
    return (t - b) * w / w.square().sum()


@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_layers_are_inverted(kind):
    transform = EXTREME[kind]
    x = cover(transform)
    y, logdet = transform(x)
    again, back = transform.inverse(y)
    for t in (y, logdet, again, back):
        assert t.isfinite().all()
    # The slope may be near 0, where x cannot be told from y; but what comes back must lead to the same y.
    scale = float(y.detach().abs().max())
    torch.testing.assert_close(transform(again)[0], y, rtol=0, atol=1e-11 * max(1, scale))
    for y in (torch.randn(50, x.shape[1]).double(), 1e3 * torch.randn(50, x.shape[1]).double()):
        again, _ = transform.inverse(y)
        torch.testing.assert_close(transform(again)[0], y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_layers_have_the_logdet_of_the_autograd_jacobian(kind):
    transform = EXTREME[kind]
    x = cover(transform, 20)
    _, logdet = transform(x)
    for i in range(len(x)):
        expected = logdet_by_autograd(transform, x[i : i + 1])
        # autograd's own entries, near 1, cancel to what is left of the slope
        torch.testing.assert_close(logdet[i], expected, rtol=0, atol=1e-11 * max(1, math.exp(-expected)))


@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_layers_are_finite_in_float32(kind):
    transform = type(EXTREME[kind])(len(cover(EXTREME[kind])[0]))
    transform.load_state_dict(EXTREME[kind].state_dict())
    x = cover(EXTREME[kind]).float().requires_grad_()
    for function, at in ((transform, x), (transform.inverse, transform(x)[0].detach().requires_grad_())):
        y, logdet = function(at)
        assert y.isfinite().all()
        assert logdet.isfinite().all()
        for g in torch.autograd.grad(y.sum() + logdet.sum(), (at, *transform.parameters())):
            assert not g.isnan().any()


@pytest.mark.parametrize(("kind", "features"), list(itertools.product(("planar", "radial"), (1, 3))))
def test_inverses_of_planar_and_radial_layers_have_gradients_of_finite_differences(kind, features):
    transform = scrambled({"planar": Planar, "radial": Radial}[kind](features, 2))
    y, c = (torch.randn(4, size, dtype=torch.float64, requires_grad=True) for size in (features, 2))
    names, values = zip(*transform.named_parameters(), strict=True)

    def function(y, c, *values):
        own = {f"transform.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Inverse(transform), own, (y, c))

    assert torch.autograd.gradcheck(function, (y, c, *values))


# From levels to real numbers.


class Shift(Transform):
    """Noise moved so far that its sigmoid is exactly 0 or 1."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x, context=None):
        return x + self.by, x.new_zeros(len(x))


def test_the_bound_is_exact_where_the_density_is_constant_in_each_bin():
    p = torch.rand(4, 4, dtype=torch.float64)
    p /= p.sum()
    k = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    v, log_weight = Dequantize(4)(k.double() / 3)
    assert torch.equal((v * 4).floor(), k.double())
    density = 16 * p[tuple((v * 4).long().T)]  # of v, constant over each bin of 1/4 by 1/4
    torch.testing.assert_close(density.log() + log_weight, p.flatten().log())


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_weights_average_to_the_probability_of_the_bin(kind, monkeypatch):
    """P(x) is the integral of the density over x's bin, and the mean logarithm of a weight is a bound below it."""
    levels, n, far = 3, 200, 16
    # all noise that there may be, in small cells, in place of draws
    unit = (torch.arange(n).double() + 0.5) / n
    noise = torch.cartesian_prod(*[unit if kind == "uniform" else far * (2 * unit - 1)] * 2)
    gaussian = (2 * far / n) ** 2 * Normal(0, 1).log_prob(noise).sum(1).exp()
    weight = torch.full_like(gaussian, 1 / n**2) if kind == "uniform" else gaussian
    draw = {"uniform": "rand", "variational": "randn"}[kind]
    monkeypatch.setattr(torch, draw, lambda *_, **__: noise.repeat(9, 1).view(-1, 1, 1, 2))
    networks = [ConvConditioner(1, 2, 1, (8,)) for _ in range(2)]
    flow = Composite([AffineCoupling(net, mask=checkerboard(1, 2, i == 0)) for i, net in enumerate(networks)])
    dequantizer = scrambled(Dequantize(levels, flow if kind == "variational" else None), size=0.2)
    k = torch.cartesian_prod(torch.arange(levels), torch.arange(levels)).double()
    x = (k / (levels - 1)).view(-1, 1, 1, 2)
    with torch.no_grad():
        v, log_weight = dequantizer(x.repeat_interleave(n * n, 0))
    log_density = (math.pi / 2 * (math.pi * v).sin()).log().flatten(1).sum(1)  # on [0, 1]^2
    log_p = (log_density + log_weight).view(9, n * n)
    exact = ((math.pi * k / levels).cos() - (math.pi * (k + 1) / levels).cos()).div(2).prod(1)
    torch.testing.assert_close((weight * log_p.exp()).sum(1), exact, rtol=1e-3, atol=0)
    assert ((weight * log_p).sum(1) < exact.log()).all()


@pytest.mark.parametrize("levels", [2, 3, 256])
@pytest.mark.parametrize("noise", [None, Shift(-200.0), Shift(200.0)], ids=["uniform", "0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dequantised_values_stay_on_their_level(levels, noise, dtype):
    x = (torch.arange(levels, dtype=dtype) / (levels - 1)).repeat(50)[:, None]
    dequantizer = Dequantize(levels, noise)
    v, log_weight = dequantizer(x)
    assert (v >= 0).all()
    assert (v < 1).all()
    assert torch.equal(dequantizer.inverse(v), x)
    assert log_weight.isfinite().all()


def test_variational_noise_is_weighted_by_its_density():
    """log q(u | x) of logistic-normal noise, which PyTorch's distributions know."""
    dequantizer, x = Dequantize(4, Shift(0.7)), torch.tensor([[0.0, 1 / 3], [1.0, 2 / 3]], dtype=torch.float64)
    v, log_weight = dequantizer(x)
    u = v * 4 - (x * 3).round()
    q = TransformedDistribution(Normal(torch.tensor(0.7).double(), 1), transforms.SigmoidTransform())
    torch.testing.assert_close(log_weight, -q.log_prob(u).sum(1) - 2 * math.log(4))


# Settings that make no layer.


def test_settings_that_make_no_layer_are_refused():
    with pytest.raises(SettingsError, match="a coupling needs at least 2 features, or channels, got 1"):
        split_size(1)
    for a in (0.0, 0.5, -1.0):
        with pytest.raises(SettingsError, match=f"the logit's margin must be between 0 and 0.5, got {a}"):
            Logit(a)
    wrong = AffineCoupling(MLPConditioner(5, 10, hidden=(8,)), mask=torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="mask"):
        wrong(torch.randn(2, 5))
    with pytest.raises(ValueError, match="scale"):
        AffineCoupling(MLPConditioner(2, 6), split=2, scale="softplus")(torch.randn(2, 5))


def test_a_layer_says_which_way_it_does_not_have():
    with pytest.raises(NotImplementedError, match="Shift has no inverse"):
        Shift(1.0).inverse(torch.randn(2, 3))
    with pytest.raises(NotImplementedError, match="Transform has no forward"):
        Transform()(torch.randn(2, 3))


def test_the_log_determinant_of_a_logit_is_exact_far_out_in_float64():
    y = torch.tensor([[-30.0], [-21.0], [0.5], [21.0], [30.0]], dtype=torch.float64)
    exact = y.abs() + 2 * (-y.abs()).exp().log1p() + math.log(0.9)
    torch.testing.assert_close(-Logit(0.05).inverse(y)[1], exact[:, 0], rtol=1e-14, atol=0)


def test_a_normalisation_that_is_loaded_anew_starts_anew():
    layer = ActNorm(3)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(50, 3))
    layer.load_state_dict(before)
    y, _ = layer(5 + torch.randn(50, 3))
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
