"""normflows patched is normflows: every option of what is replaced, in both dtypes, with gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

nf = pytest.importorskip("normflows", reason="normflows is not installed")

from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCDF, PiecewiseRationalQuadraticCoupling
from normflows.utils import splines

from genfuse.integrations import normflows as peer

UNCONSTRAINED = "utils.splines.unconstrained_rational_quadratic_spline"
CONSTRAINED = "utils.splines.rational_quadratic_spline"
LARGE = (2**14, 8)


def raw(*shape, bins, derivatives):
    return [torch.randn(*shape, n).requires_grad_() for n in (bins, bins, derivatives)]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "derivatives", "options", "left"),
    [
        ((64, 4), 7, {}, ""),
        ((64, 4), 7, {"tail_bound": 3}, ""),
        ((64, 4), 7, {"min_bin_width": 0.05, "min_bin_height": 0.1, "min_derivative": 0.2}, ""),
        ((64, 4), 7, {"tail_bound": torch.tensor([1.0, 2.0, 3.0, 0.5])}, ""),
        ((64, 4), 7, {"tail_bound": torch.tensor(2.0)}, ""),
        ((64, 4), 8, {"tails": "circular", "tail_bound": 2.0}, ""),
        ((64, 4), 8, {"tails": "circular", "tail_bound": torch.tensor([1.0, 2.0, 3.0, 0.5])}, ""),
        ((64, 4), 9, {"tails": ["linear", "circular", "circular", "linear"], "tail_bound": 2.0}, ""),
        ((64, 4), 9, {"tails": ("circular",) * 4, "tail_bound": torch.tensor([1.0, 2.0, 3.0, 0.5])}, ""),
        ((64, 4), 9, {"tails": ["linear"] * 4}, ""),
        ((2, 3, 5, 4), 7, {}, ""),
        ((2, 3, 5, 4), 8, {"tails": "circular"}, ""),
        ((0, 4), 7, {}, ""),
        ((64, 4), 9, {"tails": ["linear", "linear", None, "circular"]}, "tails that are neither linear nor circular"),
        ((64, 4), 7, {"tails": "square"}, "tails that are neither linear nor circular"),
        ((64, 4), 7, {"tail_bound": torch.full((64, 4), 2.0)}, "bound must be one or one for each"),
        (
            (64, 4),
            7,
            {"tail_bound": torch.tensor(2.0, requires_grad=True)},
            "tails that are not linear, or a bound in a tensor",
        ),
        ((64, 4), 7, {"min_bin_width": 0.2}, "min_width must be"),
        ((64, 4), 7, {"min_derivative": 0.0}, "min_derivative must be"),
    ],
)
def test_unconstrained_splines(shape, derivatives, options, left, inverse, same):
    x, given = (1.5 * torch.randn(shape)).requires_grad_(), raw(*shape, bins=8, derivatives=derivatives)
    learned = [t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    report = same(
        peer,
        lambda: splines.unconstrained_rational_quadratic_spline(x, *given, inverse=inverse, **options),
        x, *given, *learned,
        raises=left.startswith("min_width") or options.get("tails") == "square",
    )  # fmt: skip
    if left:
        assert next(iter(report.left[UNCONSTRAINED])).startswith(left)
    else:
        assert report.served == {UNCONSTRAINED: 1}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 7.0])
@pytest.mark.parametrize(
    ("derivatives", "tails"), [(8, "circular"), (9, ["circular"] * 3), (9, ["linear", "circular", "linear"])]
)
def test_points_outside_of_circular_splines_have_no_say(derivatives, tails, value, inverse, same):
    given = raw(2, 3, bins=8, derivatives=derivatives)
    x = torch.tensor([[0.3, value, 0.5], [value, 0.1, value]], dtype=given[0].dtype).requires_grad_()
    report = same(
        peer,
        lambda: splines.unconstrained_rational_quadratic_spline(x, *given, inverse=inverse, tails=tails),
        x, *given,
    )  # fmt: skip
    assert report.served == {UNCONSTRAINED: 1}


@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_derivatives_of_other_examples_are_the_errors_that_they_are_for_normflows(tails, same):
    given = raw(4, 5, bins=4, derivatives=3)
    given[2] = torch.randn(1, 5, 3 if tails == "linear" else 4)
    x = torch.linspace(-0.9, 0.9, 20).view(4, 5).to(given[0].dtype)
    run = lambda: splines.unconstrained_rational_quadratic_spline(x, *given, tails=tails)  # noqa: E731
    report = same(peer, run, *given, raises=True)
    assert report.left[UNCONSTRAINED] == {"widths, heights and derivatives of different shapes": 1}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("low", "high", "options", "left"),
    [
        (0, 1, {}, ""),
        (-2, 3, {"left": -2.0, "right": 3.0, "bottom": -2.0, "top": 3.0}, ""),
        (0.5, 1, {"left": 0.0, "right": 2.0, "bottom": 0.5, "top": 1.0}, ""),
        (0, 1, {"min_bin_width": 0.05, "min_bin_height": 0.1, "min_derivative": 0.2}, ""),
        (-0.5, 1.5, {}, "x must lie in"),
        (0, 1, {"min_bin_height": 0.2}, "min_height must be"),
        (
            0, 1, {"left": torch.zeros(64, 4), "right": 1.0, "bottom": 0.0, "top": 1.0},
            "left must be one or one for each",
        ),
    ],
)  # fmt: skip
def test_constrained_splines(low, high, options, left, inverse, same):
    x, given = (low + (high - low) * torch.rand(64, 4)).requires_grad_(), raw(64, 4, bins=8, derivatives=9)
    report = same(
        peer,
        lambda: splines.rational_quadratic_spline(x, *given, inverse=inverse, **options),
        x, *given, raises=bool(left),
    )  # fmt: skip
    if left:
        assert next(iter(report.left[CONSTRAINED])).startswith(left)
    else:
        assert report.served == {CONSTRAINED: 1}


def moved(layer, std=0.3):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize(
    ("kind", "options", "circular"),
    [
        (nf.flows.CoupledRationalQuadraticSpline, {}, False),
        (nf.flows.CoupledRationalQuadraticSpline, {"reverse_mask": True, "num_bins": 4, "tail_bound": 2}, False),
        (nf.flows.CoupledRationalQuadraticSpline, {"tails": "circular", "activation": nn.Tanh}, False),
        (nf.flows.CoupledRationalQuadraticSpline, {"dropout_probability": 0.4}, False),
        (nf.flows.CoupledRationalQuadraticSpline, {"tails": None}, False),
        (nf.flows.CircularCoupledRationalQuadraticSpline, {}, True),
        (nf.flows.CircularCoupledRationalQuadraticSpline, {"tail_bound": torch.tensor([1.0, 2, 3, 1, 2])}, True),
        (nf.flows.AutoregressiveRationalQuadraticSpline, {}, False),
        (nf.flows.AutoregressiveRationalQuadraticSpline, {"permute_mask": True, "num_bins": 3}, False),
        (nf.flows.CircularAutoregressiveRationalQuadraticSpline, {}, True),
    ],
)
def test_layers_of_splines_both_ways(kind, options, circular, context, same):
    given = (5, 2, 16, [0, 2]) if circular else (5, 2, 16)
    layer = moved(kind(*given, num_context_channels=context, **options))
    x = (torch.rand(24, 5) if options.get("tails", "") is None else 1.5 * torch.randn(24, 5)).requires_grad_()
    c = None if context is None else torch.randn(24, context)
    for verb in (layer.forward, layer.inverse):
        report = same(peer, lambda verb=verb: verb(x) if c is None else verb(x, c), x, layer)
        assert report.served


@pytest.mark.parametrize("tails", ["linear", "circular", None])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_splines_without_a_condition(tails, shape, same):
    layer = moved(PiecewiseRationalQuadraticCDF(shape, tails=tails, tail_bound=2.0), std=1.0)
    x = torch.rand(16, *shape).requires_grad_()
    for verb in (layer.forward, layer.inverse):
        assert same(peer, lambda verb=verb: verb(x), x, layer).served


class Convolution(nn.Conv2d):
    hidden_channels = 4

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x, context=None):
        return super().forward(x)


@pytest.mark.parametrize("verb", ["forward", "inverse"])
def test_couplings_of_splines_on_images(verb, same):
    layer = PiecewiseRationalQuadraticCoupling(torch.tensor([1, 0, 1]), Convolution, tails="linear", tail_bound=2.0)
    x = torch.randn(2, 3, 4, 5).requires_grad_()
    assert same(peer, lambda: getattr(layer, verb)(x), x, layer).served == {UNCONSTRAINED: 1}


@pytest.mark.parametrize("verb", ["forward", "inverse"])
@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize(
    ("options", "context", "left"),
    [
        ({}, None, ""),
        ({"num_blocks": 1, "activation": nn.ReLU()}, None, ""),
        ({}, 3, "a context in every block"),
        ({"num_blocks": 0}, None, ""),
        ({"num_blocks": 0, "use_residual_blocks": False}, None, ""),
        ({"num_blocks": 0}, 3, "a context in every block"),
        ({"activation": nn.ReLU(inplace=True)}, None, "residual blocks that overwrite what they add to"),
        ({"use_residual_blocks": False}, None, "no ReLU after the first layer"),
        ({"use_residual_blocks": False, "random_mask": True}, None, "no ReLU after the first layer"),
        ({"activation": F.elu}, None, "activations that are not ReLU"),
        ({"use_batch_norm": True}, None, "batch norm"),
        ({"dropout_probability": 0.5}, None, "dropout"),
    ],
)
def test_affine_autoregressive_layers(options, context, left, features, verb, same):
    layer = moved(nf.flows.MaskedAffineAutoregressive(features, 16, context_features=context, **options), std=0.25)
    if features == 1 and "use_batch_norm" in options:
        layer.eval()
    x = torch.randn(24, features).requires_grad_()
    c = None if context is None else torch.randn(24, context)
    report = same(peer, lambda: getattr(layer, verb)(x, c), x, layer)
    name = "Autoregressive.inverse" if verb == "inverse" else "MADE.forward"
    if left:
        assert left in report.left[name]
    else:
        assert report.served[name] == 1


def test_affine_elements_are_served_from_many_on(same):
    layer, x = nf.flows.MaskedAffineAutoregressive(8, 16), torch.randn(LARGE).requires_grad_()
    assert same(peer, lambda: layer(x), x, layer).served["MaskedAffineAutoregressive._elementwise_forward"] == 1
    params = torch.randn(LARGE[0], 16).requires_grad_()
    report = same(peer, lambda: layer._elementwise_inverse(x, params), x, params)
    assert report.served["MaskedAffineAutoregressive._elementwise_inverse"] == 1


@pytest.mark.parametrize(
    ("net", "find"),
    [
        (lambda: nf.nets.ResidualNet(3, 7, 16, activation=nn.ReLU()), lambda net: net.blocks[0].activation),
        (lambda: nf.nets.ResidualNet(3, 7, 16), lambda net: net.blocks[1].dropout),
        (lambda: nf.nets.MADE(3, 16, activation=nn.ReLU()), lambda net: net.blocks[0].activation),
        (lambda: nf.nets.MADE(3, 16), lambda net: net.blocks[1].dropout),
        (lambda: nf.nets.MADE(3, 16), lambda net: net.preprocessing),
    ],
)
def test_parts_that_somebody_listens_to_are_called(net, find, same):
    net, x = moved(net()), torch.randn(9, 3)
    find(net).register_forward_hook(lambda module, args, result: 2 * result)
    assert {"the network has hooks": 1} in same(peer, lambda: net(x), net).left.values()


def test_an_activation_in_place_overwrites_what_a_residual_block_adds_to(same):
    net, x = moved(nf.nets.ResidualNet(3, 7, 16, activation=nn.ReLU(inplace=True))), torch.randn(9, 3)
    report = same(peer, lambda: net(x), net)
    assert report.left == {"ResidualNet.forward": {"residual blocks that overwrite what they add to": 1}}


@pytest.mark.parametrize("tails", ["circular", "linear"])
def test_autoregressive_splines_with_tails(tails, same):
    layer = moved(MaskedPiecewiseRationalQuadraticAutoregressive(4, 16, tails=tails, tail_bound=2.0))
    x = torch.randn(24, 4).requires_grad_()
    report = same(peer, lambda: layer.inverse(x), x, layer)
    assert bool(report.left.get("Autoregressive.inverse")) == (tails == "circular")


@pytest.mark.parametrize("verb", ["forward", "inverse"])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv", None, "cube"])
@pytest.mark.parametrize("shape", [LARGE, (64, 16, 8, 16), (12, 6)])
def test_affine_couplings(shape, scale_map, verb, same):
    half = shape[1] // 2
    net = nn.Conv2d(half, (1 + bool(scale_map)) * half, 3, padding=1) if len(shape) == 4 else (
        nn.Linear(half, (1 + bool(scale_map)) * half)
    )  # fmt: skip
    layer = nf.flows.AffineCouplingBlock(net, scale=bool(scale_map), scale_map=scale_map)
    x = torch.randn(shape).requires_grad_()
    report = same(peer, lambda: getattr(layer, verb)(x), x, layer, raises=scale_map == "cube")
    name = f"AffineCoupling.{verb}"
    if scale_map in ("exp", "sigmoid", "sigmoid_inv") and shape != (12, 6):
        assert report.served[name] == 1
    else:
        assert report.left[name]


def test_masked_affine_flows_are_left_as_they_are(same):
    net = [nf.nets.MLP([4, 8, 4]) for _ in range(2)]
    layer, x = nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0, 1.0, 0.0]), *net), torch.randn(8, 4).requires_grad_()
    for verb in ("forward", "inverse"):
        report = same(peer, lambda verb=verb: getattr(layer, verb)(x), x, layer)
        assert report.left[f"MaskedAffineFlow.{verb}"]
        assert report.served == {"MLP.forward": 2}


@pytest.mark.parametrize("verb", ["forward", "inverse"])
@pytest.mark.parametrize("features", [1, 2, 6])
def test_lu_linear_layers(features, verb, same):
    layer = nf.flows.LULinearPermute(features, identity_init=False)
    x = torch.randn(8, features).requires_grad_()
    assert same(peer, lambda: getattr(layer, verb)(x), x, layer).served == {"_LULinear._create_lower_upper": 1}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, ""),
        ({"leaky": 0.2}, ""),
        ({"init_zeros": True}, ""),
        ({"output_fn": "sigmoid"}, "a network of somebody's own"),
        ({"output_fn": "clampexp", "score_scale": 2.0}, "a network of somebody's own"),
        ({"dropout": 0.3}, "a network of somebody's own"),
    ],
)
def test_multilayer_perceptrons(options, left, same):
    net, x = nf.nets.MLP([3, 8, 8, 5], **options), torch.randn(7, 3).requires_grad_()
    report = same(peer, lambda: net(x), x, net)
    assert bool(report.left) == bool(left)


def test_glow_is_glow(same):
    layer, x = nf.flows.GlowBlock(4, 8), torch.randn(2, 4, 4, 4).requires_grad_()
    same(peer, lambda: layer.inverse(x), x, layer)


def test_a_coupling_calls_its_network_once_also_where_no_operator_takes_the_result(same):
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    layer = nf.flows.AffineCoupling(net)
    z = [torch.randn(9000, 8), torch.randn(9000, 8)]
    with peer.patch(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(z)
    assert int(net[1].num_batches_tracked) == 1
    for scale_map in ("exp", "sigmoid", "sigmoid_inv"):
        layer = nf.flows.AffineCoupling(nn.Sequential(nn.Linear(8, 2), nn.Unflatten(1, (2, 1))), scale_map=scale_map)
        images = [torch.randn(9000, 8), torch.randn(9000, 1, 8)]
        for call in (layer.forward, layer.inverse):
            same(peer, lambda call=call, z=images: (call(z)[0][1], call(z)[1]), layer)


@pytest.mark.parametrize("change", ["hook", "another"])
def test_what_was_done_to_the_layers_of_a_perceptron_counts(change, same):
    net, x = nf.nets.MLP([3, 8, 3]), torch.randn(7, 3).requires_grad_()
    if change == "hook":
        net.net.register_forward_hook(lambda module, inputs, output: 3 * output)
    else:
        net.net = nn.Identity()
    assert same(peer, lambda: net(x), x).left


def test_an_inverse_of_another_number_of_features_is_refused_by_the_library():
    with peer.patch(), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        nf.flows.MaskedAffineAutoregressive(4, 8).inverse(torch.randn(5, 3))
