"""nflows patched is nflows: every option of what is replaced, in both dtypes, with gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("nflows", reason="nflows is not installed")

from nflows import transforms
from nflows.nn.nets import ResidualNet
from nflows.transforms import made, splines
from torch._subclasses import FakeTensor, FakeTensorMode

from genfuse.integrations import _nsf
from genfuse.integrations import nflows as peer

UNCONSTRAINED = "transforms.splines.rational_quadratic.unconstrained_rational_quadratic_spline"
CONSTRAINED = "transforms.splines.rational_quadratic.rational_quadratic_spline"


def raw(*shape, bins, derivatives):
    return [torch.randn(*shape, n).requires_grad_() for n in (bins, bins, derivatives)]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "bins", "options", "left"),
    [
        ((64, 5), 8, {}, ""),
        ((64, 5), 8, {"tail_bound": 3.0}, ""),
        ((64, 5), 8, {"tail_bound": 3}, ""),
        ((64, 5), 1, {"tail_bound": 2.0}, ""),
        ((64, 5), 8, {"min_bin_width": 0.05, "min_bin_height": 0.1, "min_derivative": 0.2}, ""),
        ((4, 3, 2, 5), 8, {}, ""),
        ((40,), 8, {}, ""),
        ((0, 5), 8, {}, ""),
        ((64, 0), 8, {}, ""),
        ((64, 5), 8, {"min_bin_width": 0.0, "min_bin_height": 0.0}, ""),
        ((64, 5), 8, {"min_bin_width": 0.2}, "min_width must be"),
        ((64, 5), 8, {"min_bin_height": 0.2}, "min_height must be"),
        ((64, 5), 8, {"min_derivative": 0.0}, "min_derivative must be"),
        ((64, 5), 8, {"tails": "circular"}, "tails that are"),
        ((64, 5), 8, {"tail_bound": torch.tensor(3.0)}, "tails that are not linear, or a bound in a tensor"),
    ],
)
def test_unconstrained_splines(shape, bins, options, left, inverse, same):
    x = (1.5 * torch.randn(shape)).requires_grad_()
    given = raw(*shape, bins=bins, derivatives=bins - 1)
    report = same(
        peer,
        lambda: splines.unconstrained_rational_quadratic_spline(x, *given, inverse=inverse, **options),
        x, *given,
        raises=left.startswith(("min_width", "min_height")) or "tails" in options,
    )  # fmt: skip
    if left:
        assert next(iter(report.left[UNCONSTRAINED])).startswith(left)
    else:
        assert report.served == {UNCONSTRAINED: 1}
        assert not report.left


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("low", "high", "options", "left"),
    [
        (0, 1, {}, ""),
        (-2, 3, {"left": -2.0, "right": 3.0, "bottom": -2.0, "top": 3.0}, ""),
        (0.5, 1, {"left": 0.0, "right": 2.0, "bottom": 0.5, "top": 1.0}, ""),
        (0, 1, {"min_bin_width": 0.05, "min_bin_height": 0.1, "min_derivative": 0.2}, ""),
        (0, 1.5, {}, "inputs outside of the box"),
        (-1, 1, {}, "inputs outside of the box"),
        (0, 1, {"bottom": 1.0, "top": 0.0}, "box must be finite"),
        (0, 1, {"min_bin_width": 0.2}, "min_width must be"),
        (0, 1, {"min_derivative": 0.0}, "min_derivative must be"),
    ],
)
def test_constrained_splines(low, high, options, left, inverse, same):
    x = (low + (high - low) * torch.rand(64, 5)).requires_grad_()
    given = raw(64, 5, bins=8, derivatives=9)
    raises = left.startswith(("inputs outside", "min_width")) or (inverse and left.startswith("box"))
    report = same(
        peer,
        lambda: splines.rational_quadratic_spline(x, *given, inverse=inverse, **options),
        x, *given, raises=raises,
    )  # fmt: skip
    if left:
        assert next(iter(report.left[CONSTRAINED])).startswith(left)
    else:
        assert report.served == {CONSTRAINED: 1}


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor([[0.5, float("nan"), 0.5]])], ids=["no rows", "NaN"])
def test_what_nflows_refuses_it_refuses_patched(x, same):
    given = raw(len(x), 3, bins=4, derivatives=5)
    report = same(peer, lambda: splines.rational_quadratic_spline(x.to(given[0].dtype), *given), *given, raises=True)
    assert report.left


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 4), (3, 5)])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_parameters_of_other_examples_are_the_errors_that_they_are_for_nflows(of, shape, same):
    given = raw(4, 5, bins=4, derivatives=3)
    given[of] = raw(*shape, bins=4, derivatives=3)[of]
    x = torch.linspace(-0.9, 0.9, 20).view(4, 5).to(given[0].dtype)
    report = same(peer, lambda: splines.unconstrained_rational_quadratic_spline(x, *given), *given, raises=True)
    assert report.left[UNCONSTRAINED] == {"widths, heights and derivatives of different shapes": 1}


def residual(inputs, outputs):
    return ResidualNet(inputs, outputs, hidden_features=16)


def conditional(inputs, outputs):
    return ResidualNet(inputs, outputs, hidden_features=16, context_features=3)


class Convolution(nn.Conv2d):
    hidden_channels = 4

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x, context=None):
        return super().forward(x)


class Own(nn.Linear):
    def forward(self, x, context=None):
        return super().forward(x)


@pytest.mark.parametrize("verb", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("shape", "network", "options"),
    [
        ((32, 5), residual, {"tails": "linear", "tail_bound": 3.0}),
        ((32, 5), conditional, {"tails": "linear", "tail_bound": 3.0}),
        ((32, 5), residual, {"tails": "linear", "num_bins": 3, "apply_unconditional_transform": True}),
        ((32, 5), residual, {"tails": "linear", "min_bin_width": 0.05, "min_bin_height": 0.02, "min_derivative": 0.1}),
        ((0, 5), residual, {"tails": "linear"}),
        ((32, 5), residual, {"tails": None}),
        ((32, 5), residual, {"tails": None, "apply_unconditional_transform": True}),
        ((4, 5, 2, 3), Convolution, {"tails": "linear", "tail_bound": 2.0}),
        (
            (4, 5, 2, 3), Convolution,
            {"tails": "linear", "apply_unconditional_transform": True, "img_shape": [2, 3]},
        ),
    ],
)  # fmt: skip
def test_couplings_of_splines(shape, network, options, verb, same):
    mask = torch.tensor([1, 0, 0, 1, 1])
    layer = transforms.PiecewiseRationalQuadraticCouplingTransform(mask, network, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = (torch.rand(shape) if options["tails"] is None else 2 * torch.randn(shape)).requires_grad_()
    context = torch.randn(len(x), 3) if network is conditional else None
    report = same(peer, lambda: getattr(layer, verb)(x, context), x, layer, raises=not len(x))
    assert any("spline" in name or "coupling" in name for name in report.served) or not len(x)


@pytest.mark.filterwarnings("error")
def test_the_warning_of_a_network_without_a_width_stays(dtype):
    layer = transforms.PiecewiseRationalQuadraticCouplingTransform(torch.tensor([1, 0]), Own, tails="linear")
    with peer.patch(), pytest.warns(UserWarning, match="initialization might be bad"):
        layer(torch.randn(4, 2))
    assert peer.report().served == {UNCONSTRAINED: 1}


def test_a_coupling_with_a_method_of_its_own_keeps_it(same):
    class Shifted(transforms.PiecewiseRationalQuadraticCouplingTransform):
        def _piecewise_cdf(self, inputs, transform_params, inverse=False):
            outputs, logabsdet = super()._piecewise_cdf(inputs, transform_params, inverse)
            return outputs + 1, logabsdet

    layer = Shifted(torch.tensor([1, 0, 1]), residual, tails="linear")
    x = torch.randn(16, 3)
    report = same(peer, lambda: layer(x), layer)
    assert report.served == {UNCONSTRAINED: 1, "ResidualNet.forward": 1}


@pytest.mark.parametrize("verb", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("kind", "shape", "left"),
    [
        (transforms.AffineCouplingTransform, (2**14, 8), ""),
        (transforms.AffineCouplingTransform, (1024, 16, 2, 4), ""),
        (transforms.AffineCouplingTransform, (32, 8), "fewer than 65,536 elements"),
        (transforms.AdditiveCouplingTransform, (2**15, 8), "AdditiveCouplingTransform has a method of its own"),
    ],
)
def test_affine_couplings(kind, shape, left, verb, same):
    def network(inputs, outputs):
        return (Own if len(shape) == 2 else Convolution)(inputs, outputs)

    layer, x = kind(torch.arange(shape[1]) % 2, network), torch.randn(shape).requires_grad_()
    report = same(peer, lambda: getattr(layer, verb)(x), x, layer)
    name = f"AffineCouplingTransform._coupling_transform_{verb}"
    assert next(iter(report.left[name])).startswith(left) if left else report.served[name] == 1


@pytest.mark.parametrize("verb", ["forward", "inverse"])
@pytest.mark.parametrize(("features", "context"), [(1, 3), (5, None), (5, 3)])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_residual_blocks": False}, {}),
        ({"use_residual_blocks": False, "num_blocks": 1, "random_mask": True}, {}),
        ({"use_residual_blocks": True}, {"context": "a context in every block"}),
        ({"use_residual_blocks": True, "num_blocks": 1, "activation": nn.ReLU()}, {"context": "a context in every"}),
        ({"use_residual_blocks": False, "activation": F.elu}, {"": "activations that are not ReLU"}),
        ({"use_residual_blocks": True, "activation": torch.tanh}, {"": "activations that are not ReLU"}),
        ({"use_residual_blocks": False, "use_batch_norm": True}, {"": "batch norm"}),
        ({"use_residual_blocks": True, "use_batch_norm": True}, {"": "batch norm"}),
        ({"use_residual_blocks": False, "dropout_probability": 0.5}, {"": "dropout"}),
        ({"use_residual_blocks": False, "tails": None}, {"inverse": "tails that are not linear"}),
        ({"use_residual_blocks": False, "num_bins": 3, "min_bin_width": 0.1, "min_derivative": 0.2}, {}),
        ({"use_residual_blocks": False, "num_blocks": 0}, {}),
        ({"num_blocks": 0}, {"context": "a context in every block"}),
        ({"use_residual_blocks": False, "activation": nn.ReLU(inplace=True)}, {}),
        ({"activation": nn.ReLU(inplace=True)}, {"": "residual blocks that overwrite what they add to"}),
    ],
)
def test_autoregressive_splines(options, why, features, context, verb, same):
    options = {"tails": "linear", "tail_bound": 2.0, **options}
    layer = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        features, 16, context_features=context, **options
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.25)
    if features == 1 and options.get("use_batch_norm"):
        layer.eval()  # in training, units that see nothing are divided by a deviation of 0
    x = (torch.rand(24, features) if options["tails"] is None else torch.randn(24, features)).requires_grad_()
    c = None if context is None else torch.randn(24, context)
    report = same(peer, lambda: getattr(layer, verb)(x, c), x, layer)
    reason = why.get("") or (why.get("context") if context else "") or (verb == "inverse" and why.get("inverse"))
    name = "AutoregressiveTransform.inverse" if verb == "inverse" else "MADE.forward"
    if reason:
        assert any(found.startswith(reason) for found in report.left[name])
    else:
        assert report.served[name] == 1
        assert not report.left


def test_an_evaluated_dropout_is_none_and_no_rows_are_left(same):
    layer = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        3, 8, tails="linear", dropout_probability=0.5
    ).eval()
    x = torch.randn(5, 3)
    assert same(peer, lambda: layer.inverse(x), layer).served == {"AutoregressiveTransform.inverse": 1}
    assert same(peer, lambda: layer.inverse(x[:0]), layer).left["AutoregressiveTransform.inverse"]


@pytest.mark.parametrize("dropout", [nn.Identity(), nn.Dropout(0.5), nn.AlphaDropout(0.5)])
def test_another_dropout_counts(dropout, same):
    net, x = ResidualNet(3, 7, 16).eval(), torch.randn(9, 3)
    net.blocks[0].dropout = dropout.train()
    assert same(peer, lambda: net(x), net).left == {"ResidualNet.forward": {"dropout": 1}}


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("part", ["activation", "dropout", "context_layer", "linear"])
@pytest.mark.parametrize("kind", ["residual network", "residual", "feedforward"])
def test_parts_that_somebody_listens_to_are_called(kind, part, context, same):
    if kind == "residual network":
        net = ResidualNet(3, 7, 16, context_features=context, activation=nn.ReLU())
    else:
        net = made.MADE(3, 16, context, use_residual_blocks=kind == "residual", activation=nn.ReLU())
    x, c = torch.randn(9, 3), None if context is None else torch.randn(9, context)
    block = net.blocks[0]
    listened = block.linear_layers[0] if part == "linear" and hasattr(block, "linear_layers") else (
        getattr(block, part, getattr(net, part, None))
    )  # fmt: skip
    if listened is None:
        pytest.skip("there is no such part")
    listened.register_forward_hook(lambda module, args, result: 2 * result)
    report = same(peer, lambda: net(x, c), net)
    assert set().union(*report.left.values()) <= {"the network has hooks", "a context in every block"}
    assert report.left
    calls = []
    listened.register_forward_hook(lambda *args: calls.append(1))
    net(x, c)
    alone = len(calls)
    with peer.patch():
        net(x, c)
    assert len(calls) == 2 * alone


def test_an_activation_after_the_first_layer_that_somebody_listens_to_is_called(same):
    net, x = made.MADE(3, 16, num_blocks=0, use_residual_blocks=False, activation=nn.ReLU()), torch.randn(9, 3)
    net.activation.forward = lambda x: x - 1
    assert same(peer, lambda: net(x), net).left == {"MADE.forward": {"a network of somebody's own": 1}}


def test_affine_autoregressive_layers_are_left_for_their_softplus(same):
    layer = transforms.MaskedAffineAutoregressiveTransform(3, 8)
    x = torch.randn(5, 3)
    assert "softplus" in str(same(peer, lambda: layer(x), layer))
    report = same(peer, lambda: layer.inverse(x), layer)
    assert report.left["AutoregressiveTransform.inverse"] == {
        "MaskedAffineAutoregressiveTransform, which has no operator": 1
    }


@pytest.mark.parametrize("verb", ["forward", "inverse", "weight"])
@pytest.mark.parametrize("features", [1, 2, 6])
@pytest.mark.filterwarnings("ignore:torch.triangular_solve")
def test_lu_linear_layers(features, verb, same):
    layer, x = transforms.LULinear(features, identity_init=False), torch.randn(8, features).requires_grad_()
    what = (layer,) if verb == "weight" else (x, layer)
    report = same(peer, lambda: getattr(layer, verb)(*([] if verb == "weight" else [x])), *what)
    assert report.served == {"LULinear._create_lower_upper": 1}


@pytest.mark.filterwarnings("ignore:torch.triangular_solve")
def test_what_lu_linear_layers_keep_is_fit_for_training(dtype):
    def layer(features):
        return transforms.LULinear(features), torch.randn(2, features)

    _nsf._places.cache_clear()
    with peer.patch():
        with torch.inference_mode():
            lu, x = layer(3)
            lu(x)
        lu, x = layer(3)
        lu(x)[0].sum().backward()
        with FakeTensorMode():
            lu, x = layer(4)
            assert type(lu(x)[0]) is FakeTensor
        lu, x = layer(4)
        torch.func.grad(lambda state: torch.func.functional_call(lu, state, x)[0].sum())(dict(lu.named_parameters()))
        assert _nsf._places.cache_info().currsize == 1
        lu(x)[0].sum().backward()
        assert all(p.grad is not None for p in lu.parameters())
        compiled = torch.compile(lu, backend="eager")(x)
    torch.testing.assert_close(compiled, lu(x))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, ""),
        ({"num_blocks": 0}, ""),
        ({"activation": nn.ReLU()}, ""),
        ({"activation": nn.ReLU(inplace=True)}, "residual blocks that overwrite what they add to"),
        ({"num_blocks": 3, "activation": torch.relu}, ""),
        ({"activation": torch.tanh}, "activations that are not ReLU"),
        ({"use_batch_norm": True}, "batch norm"),
        ({"dropout_probability": 0.3}, "dropout"),
    ],
)
@pytest.mark.parametrize("context", [None, 2])
def test_residual_networks(options, left, context, same):
    net = ResidualNet(3, 7, 16, context_features=context, **options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, c = torch.randn(9, 3).requires_grad_(), None if context is None else torch.randn(9, context).requires_grad_()
    report = same(peer, lambda: net(x, c), net, *([x] if c is None else [x, c]))
    assert report.left == {"ResidualNet.forward": {left: 1}} if left else report.served == {"ResidualNet.forward": 1}


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize(
    ("context_features", "inputs", "context"),
    [(None, 3, (9, 2)), (None, 1, (9, 2)), (2, 3, (9, 3)), (2, 2, (9, 3)), (2, 3, (8, 2)), (2, 3, (2,)), (2, 3, None)],
)
def test_contexts_that_a_residual_network_does_not_take(context_features, inputs, context, blocks, same):
    net = ResidualNet(3, 7, 16, context_features=context_features, num_blocks=blocks)
    x, c = torch.randn(9, inputs), None if context is None else torch.randn(context)
    fits = inputs + (c.shape[-1] if c is not None else 0) == net.initial_layer.in_features and c.shape[:-1] == (9,)
    same(peer, lambda: net(x, c), net, raises=not fits or blocks == 1)


def test_a_linear_layer_of_somebodys_own_is_called(same):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net, x = ResidualNet(3, 7, 16), torch.randn(9, 3)
    net.blocks[0].linear_layers[0] = Doubled(16, 16)
    assert same(peer, lambda: net(x), net).left == {"ResidualNet.forward": {"a network of somebody's own": 1}}


def test_the_end_of_a_large_box_is_no_error_of_an_index():
    given = raw(1, 1, bins=4, derivatives=3)
    end = torch.tensor([[64.0]])
    with pytest.raises(RuntimeError, match="index 4 is out of bounds"):
        splines.unconstrained_rational_quadratic_spline(end, *given, tail_bound=64.0)
    with peer.patch():
        y, _ = splines.unconstrained_rational_quadratic_spline(end, *given, tail_bound=64.0)
    torch.testing.assert_close(y, end)


def test_compiled_and_batched_it_is_the_same():
    layer = transforms.PiecewiseRationalQuadraticCouplingTransform(torch.tensor([1, 0, 1]), residual, tails="linear")
    x = torch.randn(6, 3)
    wanted = layer(x)
    with peer.patch():
        compiled = torch.compile(layer, backend="eager")(x)
        batched = torch.func.vmap(lambda row: layer(row[None]))(x)
    for found in (compiled, (batched[0][:, 0], batched[1][:, 0])):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
