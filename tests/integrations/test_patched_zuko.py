"""zuko patched is zuko: every option of what is replaced, in both dtypes, with gradients."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

zuko = pytest.importorskip("zuko", reason="zuko is not installed")

from zuko.transforms import ComposedTransform, MonotonicAffineTransform, MonotonicRQSTransform

from genfuse.integrations import _networks
from genfuse.integrations import zuko as peer

SPLINE, AFFINE = "MonotonicRQSTransform", "MonotonicAffineTransform"


def verbs(transform, x):
    """All that a transform can be asked for."""
    y, ladj = transform.call_and_ladj(x)
    again = transform.inv(x)
    return y, ladj, transform(x), again, transform.log_abs_det_jacobian(x, y), *transform.inv.call_and_ladj(x)


def spline(shape, bins=5):
    return [torch.randn(*shape, n).requires_grad_() for n in (bins, bins, bins - 1)]


@pytest.mark.parametrize(
    ("x", "shape", "options", "left"),
    [
        ((64, 5), (64, 5), {}, ""),
        ((64, 5), (64, 5), {"bound": 2.0}, ""),
        ((64, 5), (64, 5), {"bound": 2, "slope": 0.1}, ""),
        ((64, 5), (64, 5), {"slope": 1e-6}, ""),
        ((64, 5), (64, 5), {"cache_size": 1}, ""),
        ((64, 5), (5,), {}, ""),
        ((64, 5), (1, 5), {}, ""),
        ((3, 4, 5), (4, 1), {}, ""),
        ((64,), (64,), {}, ""),
        ((0, 5), (0, 5), {}, ""),
        ((5,), (64, 5), {}, "parameters of more elements than the tensor has"),
        ((), (), {}, "x must have"),
        ((64, 5), (64, 5), {"slope": 3.0}, "slope must be between 0 and 1"),
        ((64, 5), (64, 5), {"bound": torch.tensor(2.0)}, "a class of somebody's own, or a bound in a tensor"),
    ],
)
def test_splines(x, shape, options, left, same):
    x, raw = (2 * torch.randn(x)).requires_grad_(), spline(shape)
    report = same(peer, lambda: verbs(MonotonicRQSTransform(*raw, **options), x), x, *raw)
    if left:
        assert {why[: len(left)] for reasons in report.left.values() for why in reasons} == {left}
    else:
        assert set(report.served) == {SPLINE}
        assert not report.left


@pytest.mark.parametrize("bins", [1, 2, 16])
def test_splines_of_one_tensor_are_not_put_together(bins, same):
    x, phi = torch.randn(32, 4).requires_grad_(), torch.randn(32, 4 * (3 * bins - 1)).requires_grad_()
    parts = [(bins,), (bins,), (bins - 1,)]

    def run():
        raw = zuko.utils.unpack((phi * 1).unflatten(-1, (4, -1)), parts)
        return verbs(MonotonicRQSTransform(*raw), x)

    assert set(same(peer, run, x, phi).served) == {SPLINE}


@pytest.mark.parametrize(
    ("x", "shape", "options", "left"),
    [
        ((64, 5), (64, 5), {}, ""),
        ((64, 5), (64, 5), {"slope": 0.2}, ""),
        ((64, 5), (64, 5), {"cache_size": 1}, ""),
        ((64, 5), (5,), {}, ""),
        ((3, 4, 5), (4, 1), {}, ""),
        ((0, 5), (0, 5), {}, ""),
        ((64, 5), (64, 5), {"slope": 1.5}, "slope goes with softclip"),
    ],
)
def test_affine_transforms(x, shape, options, left, same):
    x, raw = torch.randn(x).requires_grad_(), [torch.randn(shape).requires_grad_() for _ in range(2)]
    report = same(peer, lambda: verbs(MonotonicAffineTransform(*raw, **options), x), x, *raw)
    assert report.left[AFFINE] if left else (set(report.served) == {AFFINE} and not report.left)


def test_an_affine_transform_of_more_elements_broadcasts_as_before(same):
    x, raw = torch.randn(5), [torch.randn(64, 5).requires_grad_() for _ in range(2)]
    same(peer, lambda: MonotonicAffineTransform(*raw)(x), *raw)
    same(peer, lambda: MonotonicAffineTransform(*raw).call_and_ladj(x), *raw, raises=True)


@pytest.mark.parametrize(
    ("make", "attributes"),
    [
        (lambda: MonotonicRQSTransform(*spline((4, 3))), ("horizontal", "vertical", "derivatives", "bins")),
        (lambda: MonotonicAffineTransform(torch.randn(4), torch.randn(4)), ("shift", "log_scale", "scale")),
    ],
)
def test_attributes_names_and_kinds_are_those_of_zuko(make, attributes, dtype):
    torch.manual_seed(0)
    theirs = make()
    torch.manual_seed(0)
    with peer.patch():
        ours = make()
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    for name in attributes:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
    with pytest.raises(AttributeError):
        _ = ours.nonsense
    x = torch.randn(4, 3) if attributes[0] == "horizontal" else torch.randn(4)
    torch.testing.assert_close(ours(x), theirs(x))  # made under the patch, it works without it
    torch.testing.assert_close(copy.copy(ours)(x), theirs(x))


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 3, 5), (1, 3, 5), (4, 3, 4)],
        [(3, 5), (4, 3, 5), (4, 3, 4)],
        [(4, 3, 5), (4, 3, 5), (3, 4)],
        [(4, 3, 5), (4, 3, 4), (4, 3, 5)],
        [(4, 3, 5), (4, 3, 6), (4, 3, 3)],
        [(4, 3, 4), (4, 3, 4), (4, 3, 5)],
    ],
)
def test_shapes_that_are_not_those_of_one_tensor_are_left(shapes, same):
    raw = [torch.randn(shape).requires_grad_() for shape in shapes]
    x = torch.linspace(-4.99, 4.99, 12).view(4, 3).to(raw[0].dtype)
    sizes = [shape[-1] for shape in shapes]
    report = same(peer, lambda: MonotonicRQSTransform(*raw)(x), *raw, raises=sizes in ([5, 4, 5], [5, 6, 3]))
    assert report.left == {SPLINE: {"widths, heights and derivatives of different shapes": 1}}


TRANSFORMS = [
    (MonotonicAffineTransform, lambda: [torch.randn(4, 3), torch.randn(4, 3)], "shift"),
    (MonotonicRQSTransform, lambda: [t.detach() for t in spline((4, 3))], "derivatives"),
]


@pytest.mark.parametrize(("kind", "parameters", "name"), TRANSFORMS)
def test_tensors_that_are_written_to_later_do_not_count(kind, parameters, name, same):
    x = torch.randn(4, 3)

    def run(*, first):
        raw = parameters()
        transform = kind(*raw)
        first(transform)
        for t in raw:
            t.add_(1.0)  # a shift does count
        return transform(x), getattr(transform, name)

    for first in (lambda transform: transform(x), lambda transform: getattr(transform, name)):
        assert same(peer, partial(run, first=first)).served


@pytest.mark.parametrize(("kind", "parameters", "name"), TRANSFORMS)
def test_what_a_network_returned_is_not_copied_so_that_writes_to_it_are_an_error(kind, parameters, name, dtype):
    phi = torch.cat(parameters(), -1).requires_grad_() * 1
    x = torch.randn(4, 3)
    with peer.patch():
        transform = kind(*phi.split([t.shape[-1] for t in parameters()], -1))
        assert transform._raw[0].data_ptr() == phi.data_ptr()
        transform(x)
        with torch.no_grad():
            phi.add_(1.0)
        for call in (transform, transform.inv, transform.call_and_ladj, lambda x: getattr(transform, name)):
            with pytest.raises(RuntimeError, match=f"{kind.__name__} were written to after .* make the transform anew"):
                call(x)
        assert kind(*parameters())(x).shape == x.shape


def test_what_a_network_returns_in_inference_mode_is_not_copied_either():
    with peer.patch(), torch.inference_mode():
        phi = torch.randn(4, 3, 14)
        assert MonotonicRQSTransform(*phi.split([5, 5, 4], -1))._raw[0].data_ptr() == phi.data_ptr()
        whole = torch.zeros(3)
        transform = MonotonicAffineTransform(torch.zeros(3), whole)
        whole += 1
        assert transform(whole).tolist() == [1.0] * 3


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize(("kind", "parameters", "name"), TRANSFORMS)
def test_gradients_are_those_of_where_a_transform_was_made(kind, parameters, name, leaf, same):
    raw, x = [t.requires_grad_() for t in parameters()], torch.randn(4, 3)
    given = raw if leaf else [t + 0 for t in raw]

    def run(made, read):
        with torch.set_grad_enabled(made):
            transform = kind(*given)
        with read():
            getattr(transform, name)
        return transform(x), getattr(transform, name)

    for made in (True, False):
        for read in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            assert same(peer, lambda case=(made, read): run(*case), *raw).served
            theirs = [t.requires_grad for t in run(made, read)]
            with peer.patch():
                assert [t.requires_grad for t in run(made, read)] == theirs


@pytest.mark.parametrize(("kind", "parameters", "name"), TRANSFORMS)
def test_an_attribute_that_is_set_counts(kind, parameters, name, same):
    x, raw = torch.randn(4, 3).requires_grad_(), parameters()

    def run():
        transform = kind(*raw, cache_size=1)
        inverse, y = transform.inv, transform(x)
        assert transform(x) is y
        setattr(transform, name, getattr(transform, name) + 1)
        assert transform(x) is y  # of the cache, which stays
        assert transform.inv is inverse
        assert type(transform) is kind
        return y, transform(x * 1), transform.call_and_ladj(x * 2)[1]

    same(peer, run, x)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("cache_size", [0, 1])
def test_transforms_are_copied_and_pickled_as_those_of_zuko(cache_size, again, same):
    x, given = torch.randn(4, 3), [parameters() for _, parameters, _ in TRANSFORMS]

    def run():
        made = [kind(*raw, cache_size=cache_size) for (kind, _, _), raw in zip(TRANSFORMS, given, strict=True)]
        copied = [again(each) for each in made]
        assert [(type(each), each._cache_size) for each in copied] == [(kind, cache_size) for kind, _, _ in TRANSFORMS]
        return *(each(x) for each in copied), again(ComposedTransform(*made))(x)

    same(peer, run)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "parameters", "name"), TRANSFORMS)
def test_dtypes_of_16_bits_stay(kind, parameters, name, half):
    x, raw = torch.randn(4, 3).to(half), [t.to(half) for t in parameters()]

    def dtypes(*raw):
        return [t.dtype for t in verbs(kind(*raw), x)]

    theirs = [dtypes(*raw), dtypes(*(t.float() for t in raw))]
    with peer.patch():
        assert [dtypes(*raw), dtypes(*(t.float() for t in raw))] == theirs
        assert peer.report().served


@pytest.mark.parametrize(("kind", "parameters", "name"), TRANSFORMS[1:])
@pytest.mark.parametrize("listen", ["hook", "retained"])
def test_the_gradient_of_a_part_that_is_waited_for_is_there(kind, parameters, name, listen, same):
    phi, x = torch.cat(parameters(), -1).requires_grad_(), torch.randn(4, 3)

    def run():
        parts = (phi * 1).split([5, 5, 4], -1)
        if listen == "hook":
            parts[0].register_hook(lambda g: 2 * g)
            return kind(*parts)(x)
        parts[1].retain_grad()
        y = kind(*parts)(x)
        y.sum().backward(retain_graph=True, inputs=[parts[1]])
        return y, parts[1].grad

    same(peer, run, phi)


def test_a_class_of_somebodys_own_stays_what_it_is(same):
    class Shifted(MonotonicRQSTransform):
        def _call(self, x):
            return super()._call(x) + 1

    x, raw = torch.randn(8, 3), spline((8, 3))
    report = same(peer, lambda: Shifted(*raw)(x), *raw)
    assert not report.served
    assert report.left


FLOWS = {
    "NSF": (zuko.flows.NSF, {"bins": 4}, ""),
    "NSF of another slope": (zuko.flows.NSF, {"slope": 0.05}, ""),
    "NSF of couplings": (zuko.flows.NSF, {"passes": 2}, ""),
    "NSF in three passes": (zuko.flows.NSF, {"passes": 3, "randperm": True}, ""),
    "NSF of residual blocks": (zuko.flows.NSF, {"residual": True}, "residual blocks, or a network of somebody's own"),
    "MAF": (zuko.flows.MAF, {}, ""),
    "MAF in any order": (zuko.flows.MAF, {"randperm": True, "hidden_features": (32, 16, 8)}, ""),
    "MAF of one hidden layer": (zuko.flows.MAF, {"hidden_features": (7,)}, ""),
    "MAF of ELU": (zuko.flows.MAF, {"activation": nn.ELU}, "activations that are not ReLU"),
    "MAF of a partial": (
        zuko.flows.MAF, {"univariate": partial(MonotonicAffineTransform, slope=0.1), "shapes": [(), ()]}, "",
    ),
    "MAF of splines that are bounded": (
        zuko.flows.MAF,
        {"univariate": partial(MonotonicRQSTransform, bound=2.0), "shapes": [(3,), (3,), (2,)]}, "",
    ),
    "MAF of a function": (
        zuko.flows.MAF, {"univariate": lambda a, b: MonotonicAffineTransform(a, b), "shapes": [(), ()]},
        "a masked network of <lambda>",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("features", "context"), [(2, 0), (5, 3)])
@pytest.mark.parametrize("name", FLOWS)
def test_autoregressive_flows_and_their_samples(name, features, context, same):
    kind, options, left = FLOWS[name]
    flow = kind(features, context, transforms=2, **{"hidden_features": (16, 16), **options})
    x, c = torch.randn(12, features).requires_grad_(), torch.randn(12, context).requires_grad_() if context else None

    def run():
        found = flow(c)
        points, density = found.rsample_and_log_prob((3,))
        return found.log_prob(x), points, density, found.rsample()

    report = same(peer, run, x, flow, *([] if c is None else [c]))
    inverse = "AutoregressiveTransform._inverse"
    assert report.left[inverse] == {left: 4} if left else report.served[inverse] == 4
    same(peer, lambda: flow(None if c is None else c[:1]).transform.inv(x[0]), x)
    same(peer, lambda: flow(None if c is None else c[:0]).log_prob(x[:0]), x, raises=True)


@pytest.mark.parametrize("kind", [zuko.flows.MAF, zuko.flows.NSF])
def test_no_elements_are_as_many_as_zuko_returns(kind, same):
    flow, conditional = kind(3, transforms=2), kind(3, 2, transforms=1)
    for run in (
        lambda: flow().sample((0,)),
        lambda: flow().sample((2, 0)),
        lambda: flow().transform.inv(torch.zeros(0, 3)),
        lambda: conditional(torch.zeros(0, 2)).transform.inv(torch.zeros(3)),
    ):
        report = same(peer, run, flow)
        assert set(report.left["AutoregressiveTransform._inverse"]) == {"no elements"}


@pytest.mark.parametrize("columns", [4, 6])
def test_graphs_of_features_and_of_contexts(columns, same):
    adjacency = torch.eye(4, columns).bool()
    adjacency[0, 2] = adjacency[2, 3] = adjacency[1, 0] = True  # 3 before 2 before 0 before 1
    adjacency[1, 4:] = True
    layer = zuko.flows.MaskedAutoregressiveTransform(4, 2, adjacency=adjacency, hidden_features=(16, 16))
    x, c = torch.randn(9, 4).requires_grad_(), torch.randn(9, 2).requires_grad_()
    report = same(peer, lambda: (layer(c).inv(x), layer(c)(x)), x, c, layer)
    assert report.served["AutoregressiveTransform._inverse"] == 1


def test_too_few_passes_stay_too_few(same):
    layer = zuko.flows.MaskedAutoregressiveTransform(3, passes=2, order=[0, 5, 9])
    x = torch.randn(9, 3)
    report = same(peer, lambda: layer().inv(x), layer)
    assert report.left["AutoregressiveTransform._inverse"] == {"fewer passes than the inverse takes": 1}


def test_what_masks_hide_of_many_rows_is_not_multiplied(same, monkeypatch):
    seen, mlp = [], _networks.ops.mlp
    monkeypatch.setattr(_networks.ops, "mlp", lambda *args, **options: seen.append(options) or mlp(*args, **options))
    flow = zuko.flows.MAF(5, transforms=2, hidden_features=(64, 64))
    x = torch.randn(_networks.ROWS, 5)
    with peer.patch():
        flow().log_prob(x)
        few = [options.get("counts") for options in seen]
        flow().log_prob(x[1:])
    weights = sum(layer.weight.numel() for layer in flow.transform.transforms[0].hyper if hasattr(layer, "weight"))
    assert all(0.3 * weights < counts.sum() < 0.7 * weights for counts in few)
    assert len(few) == 2
    assert not any("counts" in options for options in seen[2:])
    monkeypatch.undo()
    same(peer, lambda: flow().log_prob(x), flow)


def test_what_is_kept_of_masks_in_inference_mode_serves_training(dtype):
    flow, x = zuko.flows.NSF(3, transforms=2), torch.randn(_networks.ROWS, 3)
    with peer.patch():
        with torch.inference_mode():
            flow().log_prob(x)
            flow().sample((4,))
        (-flow().log_prob(x).mean() + flow().rsample((4,)).sum()).backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_masks_of_stacked_models_are_their_own(dtype):
    class Layer(nn.Module):
        def __init__(self, order):
            super().__init__()
            self.layer = zuko.flows.MaskedAutoregressiveTransform(4, order=order)

        def forward(self, x):
            return torch.cat([self.layer()(x), self.layer().inv(x)])

    layers = [Layer(order) for order in ([0, 1, 2, 3], [3, 1, 0, 2])]
    params, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(_networks.ROWS, 4)
    run = torch.func.vmap(lambda *state: torch.func.functional_call(layers[0], state, (x,)))
    wanted = run(params, buffers)
    torch.testing.assert_close(wanted, torch.stack([layer(x) for layer in layers]))
    with peer.patch():
        torch.testing.assert_close(run(params, buffers), wanted)


def test_masks_that_are_loaded_count(same):
    torch.manual_seed(0)
    layer, other = (zuko.flows.MaskedAutoregressiveTransform(4, order=order) for order in ([0, 1, 2, 3], [3, 1, 0, 2]))
    x = torch.randn(9, 4)
    same(peer, lambda: layer().inv(x), layer)
    layer.load_state_dict(other.state_dict())
    report = same(peer, lambda: (layer().inv(x), layer()(x)), layer)
    assert report.served["AutoregressiveTransform._inverse"] == 1


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(
    ("kind", "options", "served"),
    [
        (zuko.flows.NICE, {}, {AFFINE, "MLP.forward"}),
        (zuko.flows.RealNVP, {"randmask": True, "hidden_features": (9,)}, {AFFINE, "MLP.forward"}),
        (zuko.flows.RealNVP, {"activation": nn.LeakyReLU}, {AFFINE, "MLP.forward"}),
        (zuko.flows.RealNVP, {"activation": nn.Tanh}, {AFFINE}),
        (zuko.flows.RealNVP, {"normalize": True}, {AFFINE}),
        (
            zuko.flows.RealNVP, {"univariate": MonotonicRQSTransform, "shapes": [(4,), (4,), (3,)]},
            {SPLINE, "MLP.forward"},
        ),
    ],
)  # fmt: skip
def test_couplings(kind, options, served, context, same):
    flow = kind(4, context, transforms=2, **options)
    x, c = torch.randn(12, 4).requires_grad_(), torch.randn(12, context).requires_grad_() if context else None

    def run():
        points, density = flow(c).rsample_and_log_prob((3,))
        return flow(c).log_prob(x), points, density

    assert set(same(peer, run, x, flow, *([] if c is None else [c])).served) == served


@pytest.mark.parametrize("context", [0, 3])
def test_circular_splines_and_those_of_one_feature(context, same):
    c = torch.randn(12, context) if context else None
    flow = zuko.flows.NCSF(3, context, transforms=2)
    x = (math.pi * (2 * torch.rand(12, 3) - 1)).requires_grad_()
    report = same(peer, lambda: (flow(c).log_prob(x), flow(c).transform.inv(x)), x, flow)
    assert report.served[SPLINE]
    assert report.left["AutoregressiveTransform._inverse"] == {"a masked network of CircularRQSTransform": 2}
    one = zuko.flows.NSF(1, context, transforms=2)
    assert same(peer, lambda: one(c).log_prob(x[:, :1]), x, one).served[SPLINE]


def test_other_flows_of_zuko_are_as_they_were(same):
    x = torch.randn(6, 3)
    for kind in (zuko.flows.GF, zuko.flows.BPF, zuko.flows.SOSPF, zuko.flows.NAF):
        flow = kind(3, transforms=1)
        same(peer, lambda flow=flow: flow().log_prob(x), flow)


def test_a_compiled_flow_is_the_flow():
    flow, x = zuko.flows.NSF(3, transforms=2), torch.randn(8, 3)
    wanted = flow().log_prob(x)
    with peer.patch():
        found = torch.compile(lambda x: flow().log_prob(x), backend="eager")(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [zuko.flows.MAF, zuko.flows.NSF])
def test_a_network_without_hidden_layers_samples(kind, same):
    flow, y = kind(3, transforms=1, hidden_features=()), torch.randn(5, 3)
    assert same(peer, lambda: flow().transform.inv(y), flow).left


def test_shapes_alone_and_traces_of_a_flow_that_has_not_run():
    flow, y = zuko.flows.MAF(3, transforms=1), torch.randn(140, 3)
    with peer.patch():
        for f in (lambda y: flow().log_prob(y), lambda y: flow().transform.inv(y)):
            traced = make_fx(f)(y)
            torch.testing.assert_close(traced(y), f(y))
        shapes = zuko.flows.MAF(3, transforms=1).to("meta")
        assert shapes().transform.inv(y.to("meta")).shape == y.shape
