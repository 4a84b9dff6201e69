"""Masked autoregressive layers: their property by Jacobian, log-determinants, round trips, start, bad input."""

import pytest
import torch
from torch.nn.utils import parametrizations, prune

from genfuse.nn import MADE, AutoregressiveAffine, AutoregressiveSpline, Composite, Inverse

LAYERS = {
    "tanh": lambda *sizes, **kw: AutoregressiveAffine(*sizes, scale="tanh", **kw),
    "exp": lambda *sizes, **kw: AutoregressiveAffine(*sizes, scale="exp", **kw),
    "sigmoid": lambda *sizes, **kw: AutoregressiveAffine(*sizes, scale="sigmoid", **kw),
    "softclip": lambda *sizes, **kw: AutoregressiveAffine(*sizes, scale="softclip", **kw),
    "squashed": lambda *sizes, **kw: AutoregressiveAffine(*sizes, squash=True, **kw),
    "squashed-spline": lambda *sizes, **kw: AutoregressiveSpline(*sizes, bins=5, squash=True, **kw),
    "linear": lambda *sizes, **kw: AutoregressiveSpline(*sizes, bins=5, **kw),
    "circular": lambda *sizes, **kw: AutoregressiveSpline(*sizes, bins=5, tails="circular", **kw),
    "none": lambda *sizes, **kw: AutoregressiveSpline(*sizes, bins=5, tails="none", **kw),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_shape = pytest.mark.parametrize(
    ("features", "hidden"), [(1, (4,)), (5, (16, 12)), (6, (3,)), (4, (9, 2, 7))], ids=str
)


def layer(kind, features, hidden, context=0, dtype=torch.float64, size=0.3):
    made = LAYERS[kind](features, hidden, context=context).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=size)
    return made


def points(n, features, context=0, dtype=torch.float64):
    return 2.9 * (2 * torch.rand(n, features, dtype=dtype) - 1), torch.randn(
        n, context, dtype=dtype
    ) if context else None


@every_shape
@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize("context", [0, 2])
def test_outputs_of_a_feature_depend_on_exactly_the_features_before_it(features, hidden, by_feature, context):
    made = MADE(features, hidden, 3, context=context, by_feature=by_feature).double()
    x, c = points(64, features, context)
    jacobian = torch.autograd.functional.jacobian(lambda x: made(x, c).sum(0), x).abs().sum(1)  # (outputs, D)
    jacobian = jacobian.view(features, 3, -1).sum(1) if by_feature else jacobian.view(3, features, -1).sum(0)
    assert not jacobian.triu().any()
    if min(hidden) >= features:  # a layer that is narrower cannot tell all features apart
        assert (jacobian.tril(-1) > 0).sum() == features * (features - 1) // 2
        if context:
            at_context = torch.autograd.functional.jacobian(lambda c: made(x, c).sum(0), c).abs().sum((1, 2))
            assert at_context.all()


@every_layer
@every_shape
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_logdet_is_that_of_the_autograd_jacobian(kind, features, hidden, context, way):
    function = getattr(layer(kind, features, hidden, context), way)
    x, c = points(3, features, context)
    _, logdet = function(x, c)
    for i in range(3):
        own = None if c is None else c[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda row, own=own: function(row[None], own)[0][0], x[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet)


@every_layer
@every_shape
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_the_inverse_undoes_the_layer(kind, features, hidden, context, dtype, tolerance):
    transform = layer(kind, features, hidden, context, dtype)
    x, c = points(100, features, context, dtype)
    y, logdet = transform(x, c)
    again, back = transform.inverse(y, c)
    torch.testing.assert_close(again, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(back, -logdet, rtol=0, atol=10 * tolerance)


@every_layer
def test_a_flow_of_784_features_round_trips(kind):
    transform = layer(kind, 784, (256, 256), dtype=torch.float32, size=0.01)
    x, _ = points(3, 784, dtype=torch.float32)
    torch.testing.assert_close(transform.inverse(transform(x)[0])[0], x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["tanh", "exp", "linear", "circular", "none"])
def test_a_layer_starts_near_the_identity(kind):
    x, c = points(50, 6, 2, torch.float32)
    y, logdet = LAYERS[kind](6, (32, 32), context=2)(x, c)
    torch.testing.assert_close(y, x, rtol=0, atol=0.05)
    assert logdet.abs().max() < 0.1


@every_layer
def test_the_mask_holds_under_an_optimizer_that_decays_and_carries_momentum(kind):
    transform = layer(kind, 4, (8, 8))
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.05, weight_decay=0.1)
    x, _ = points(32, 4)
    for _ in range(5):
        optimizer.zero_grad()
        y, logdet = transform(x)
        (y.square().sum(1) / 2 - logdet).mean().backward()
        optimizer.step()
    jacobian = torch.autograd.functional.jacobian(lambda x: transform.made(x).sum(0), x).abs().sum(1)
    outputs = (
        jacobian.view(2, 4, 4).sum(0)
        if kind in ("tanh", "exp", "sigmoid", "softclip", "squashed")
        else jacobian.view(4, -1, 4).sum(1)
    )
    assert not outputs.triu().any()


@pytest.mark.parametrize("kind", ["squashed", "squashed-spline"])
@every_shape
@pytest.mark.parametrize("context", [0, 2])
def test_the_sweep_sees_features_as_squashed_as_the_network_does(kind, features, hidden, context):
    transform = layer(kind, features, hidden, context)
    x, c = 5 * points(9, features, context)[0], points(9, features, context)[1]
    assert (x.abs() > 5).any()
    y, logdet = transform(x, c)
    again, back = transform.inverse(y, c)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(back, -logdet, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda y: transform.inverse(y, c), y.detach().requires_grad_())


@every_layer
def test_a_flow_trained_through_its_inverse_has_the_gradients_of_finite_differences(kind):
    transform = Inverse(layer(kind, 3, (5,), 2))
    x, c = points(2, 3, 2)
    names, values = zip(*transform.named_parameters(), strict=True)

    def function(x, c, *values):
        return torch.func.functional_call(transform, dict(zip(names, values, strict=True)), (x, c))

    arguments = (x.requires_grad_(), c.requires_grad_(), *values)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@every_layer
def test_a_reversible_composite_trains_through_both_ways(kind):
    layers = [layer(kind, 4, (8,), 2), Inverse(layer(kind, 4, (8,), 2))]
    x, c = points(5, 4, 2)
    gradients = []
    for reversible in (False, True):
        flow = Composite(layers, reversible=reversible)
        y, logdet = flow(x, c)
        gradients.append(torch.autograd.grad(y.sin().sum() + logdet.sum(), list(flow.parameters())))
    for plain, memory_free in zip(*gradients, strict=True):
        torch.testing.assert_close(memory_free, plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["tanh", "linear"])
def test_under_autocast_both_ways_compute_in_the_inputs_type(kind):
    transform = layer(kind, 5, (16,), 2, torch.float32, size=0.1)
    x, c = points(20, 5, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logdet = transform(x, c)
        again, back = transform.inverse(y, c)
    assert {t.dtype for t in (y, logdet, again, back)} == {torch.float32}
    torch.testing.assert_close(again, x, rtol=0, atol=0.05)  # the network itself was rounded to 16 bits


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MADE(0, (4,), 2), "features must be at least 1, got 0"),
        (lambda: MADE(3, (), 2), r"hidden must be at least one positive width, got \(\)"),
        (lambda: MADE(3, (4, 0), 2), r"hidden must be at least one positive width, got \(4, 0\)"),
        (
            lambda: AutoregressiveAffine(3, (4,), scale="linear"),
            "scale must be one of tanh, exp, sigmoid, softclip, got 'linear'",
        ),
        (
            lambda: MADE(3, (4, 4, 4), 2, residual=True, squash=True),
            "squash is for networks without residual blocks",
        ),
        (lambda: AutoregressiveSpline(3, (4,), bins=0), "bins must be .*at least 1, got 0"),
        (
            lambda: AutoregressiveSpline(3, (4,), tails="flat"),
            "tails must be one of linear, none, circular, got 'flat'",
        ),
    ],
)
def test_settings_that_make_no_layer_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_context_that_is_missing_or_not_foreseen_is_refused():
    x, c = torch.randn(2, 3), torch.randn(2, 4)
    for way in ("forward", "inverse"):
        with pytest.raises(ValueError, match=r"context: this network was made for a context \(N, 4\), got None"):
            getattr(AutoregressiveAffine(3, (4,), context=4), way)(x)
        with pytest.raises(ValueError, match=r"context: this network was made for no context, got \(2, 4\)"):
            getattr(AutoregressiveAffine(3, (4,)), way)(x, c)


@pytest.mark.parametrize("change", [
    lambda layer: layer.register_forward_hook(lambda layer, given, out: 0.5 * out),
    lambda layer: layer.register_forward_pre_hook(lambda layer, given: (0.5 * given[0],)),
    lambda layer: setattr(layer, "forward", lambda x: 2 * type(layer).forward(layer, x)),
])  # fmt: skip
@pytest.mark.parametrize("kind", [AutoregressiveAffine, AutoregressiveSpline])
def test_the_inverse_refuses_layers_whose_hooks_do_more_than_make_a_weight(kind, change):
    for which in range(4):
        layer = kind(4, (8, 8), context=3)
        change([*layer.made.layers, layer.made.context][which])
        with pytest.raises(ValueError, match="hooks or a forward that do more than make its weight"):
            layer.inverse(torch.randn(5, 4), torch.randn(5, 3))


def test_the_inverse_takes_weights_that_hooks_make_and_listeners_hear_nothing_wrong():
    layer = AutoregressiveAffine(4, (8, 8), context=3).double()
    for each in layer.made.layers:
        prune.random_unstructured(each, "weight", amount=0.3)
    parametrizations.weight_norm(layer.made.context)
    layer.made.layers[0].register_forward_hook(lambda layer, given, out: None)
    x, context = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x, context)[0], context)[0], x)
