"""Affine couplings: log-determinants, inverses, what passes through, layouts, bad input."""

import math

import pytest
import torch

from benchmarks.operators import OPERATORS
from genfuse import ops
from genfuse.ops import _affine_coupling, affine_coupling
from genfuse.ops._affine_coupling import SCALES

eager = OPERATORS["affine_coupling"].eager

every_scale = pytest.mark.parametrize("scale", SCALES)
either_way = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def arguments(kind, n=4, d=7, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    selection = {"split": 3, "last": -3}.get(kind, 0) or torch.tensor(
        [True, False, False, True, True, False, True], device=device
    )
    params = torch.randn(n, 2 * (d if kind == "mask" else d - 3), dtype=dtype, device=device)
    return torch.randn(n, d, dtype=dtype, device=device), params, selection


@every_scale
@either_way
@pytest.mark.parametrize("kind", ["split", "last", "mask"])
def test_logdet_is_that_of_the_autograd_jacobian(kind, scale, inverse, device, implementation):
    x, params, selection = arguments(kind, device=device)
    y, logdet = affine_coupling(x, params, selection, scale=scale, inverse=inverse)
    for i in range(len(x)):

        def function(row, own=params[i : i + 1]):
            return affine_coupling(row[None], own, selection, scale=scale, inverse=inverse)[0][0]

        jacobian = torch.autograd.functional.jacobian(function, x[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet)
        torch.testing.assert_close(function(x[i]), y[i])


@every_scale
@pytest.mark.parametrize("kind", ["split", "last", "mask"])
def test_the_inverse_undoes_it(kind, scale, device, implementation):
    x, params, selection = arguments(kind, n=50, device=device)
    y, logdet = affine_coupling(x, params, selection, scale=scale)
    again, back = affine_coupling(y, params, selection, scale=scale, inverse=True)
    torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, -logdet, rtol=1e-12, atol=1e-12)


@every_scale
@either_way
@pytest.mark.parametrize("kind", ["split", "last", "mask"])
def test_values_and_gradients_are_those_of_the_formula(kind, scale, inverse, device, implementation):
    x, params, selection = arguments(kind, n=3, dtype=torch.float32, device=device)
    results = []
    for function in (affine_coupling, eager):
        leaves = [t.clone().requires_grad_() for t in (x, params)]
        y, logdet = function(*leaves, selection, scale=scale, inverse=inverse)
        results.append((y, logdet, *torch.autograd.grad((y.sin().sum(), logdet.sin().sum()), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@every_scale
@either_way
@pytest.mark.parametrize("kind", ["split", "last", "mask"])
def test_derivatives_of_first_and_second_order(kind, scale, inverse, device, implementation):
    x, params, selection = arguments(kind, n=2, device=device)
    leaves = (x.requires_grad_(), params.requires_grad_())
    function = lambda *t: affine_coupling(*t, selection, scale=scale, inverse=inverse)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_what_passes_through_is_the_same_to_the_last_bit(device, implementation):
    x, params, mask = arguments("mask", n=9, dtype=torch.float32, device=device)
    params[:, :7][:, mask], params[:, 7:][:, mask] = float("nan"), float("inf")  # of no effect
    y, logdet = affine_coupling(x, params, mask)
    assert torch.equal(y[:, mask], x[:, mask])
    assert y.isfinite().all()
    assert logdet.isfinite().all()
    leaves = [t.clone().requires_grad_() for t in (x, params)]
    gx, gparams = torch.autograd.grad(affine_coupling(*leaves, mask)[0].sum(), leaves)
    assert torch.equal(gx[:, mask], torch.ones_like(gx[:, mask]))
    assert (gparams[:, :7][:, mask] == 0).all()
    assert (gparams[:, 7:][:, mask] == 0).all()


def test_a_split_is_a_mask_of_the_first_features(device, implementation):
    x, params, _ = arguments("mask", n=5, device=device)
    mask = torch.arange(7, device=device) < 3
    moved = torch.cat([params[:, 3:7], params[:, 10:]], 1)
    for a, b in zip(affine_coupling(x, params, mask), affine_coupling(x, moved, 3), strict=True):
        torch.testing.assert_close(a, b)


def test_a_negative_split_is_a_mask_of_the_last_features(device, implementation):
    x, params, _ = arguments("mask", n=5, device=device)
    mask = torch.arange(7, device=device) >= 4
    moved = torch.cat([params[:, :4], params[:, 7:11]], 1)
    for a, b in zip(affine_coupling(x, params, mask), affine_coupling(x, moved, -3), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("selection", ["channels", "checkerboard", "whole mask"])
def test_images_are_coupled_along_their_channels(selection, device, implementation):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, device=device)
    checkerboard = (torch.arange(5)[:, None] + torch.arange(6)).remainder(2).bool().to(device)
    chosen = {"channels": 1, "checkerboard": checkerboard, "whole mask": checkerboard.expand(4, 5, 6)}[selection]
    params = torch.randn(3, 6 if selection == "channels" else 8, 5, 6, dtype=torch.float64, device=device)
    y, logdet = affine_coupling(x, params, chosen)
    raw, shift = params.chunk(2, 1)
    if selection == "channels":
        s = raw.tanh()
        expected = torch.cat([x[:, :1], x[:, 1:] * s.exp() + shift], 1)
    else:
        s = torch.where(checkerboard, 0, raw.tanh())
        expected = torch.where(checkerboard, x, x * s.exp() + shift)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(logdet, s.sum((1, 2, 3)))


@pytest.mark.parametrize("layout", ["slice", "transposed", "channels last", "batch of batches"])
def test_any_strides_give_the_same(layout, device, implementation):
    torch.manual_seed(0)
    if layout == "channels last":
        x, params = torch.randn(2, 4, 3, 3, device=device), torch.randn(2, 4, 3, 3, device=device)
        x, params = (t.to(device).contiguous(memory_format=torch.channels_last) for t in (x, params))
    elif layout == "batch of batches":
        x, params = torch.randn(2, 3, 8, device=device)[..., :4], torch.randn(2, 3, 9, device=device)[..., 5:]
    elif layout == "slice":
        both = torch.randn(5, 12, device=device)
        x, params = both[:, :4], both[:, 6:10]
    else:
        x, params = torch.randn(4, 5, device=device).t(), torch.randn(4, 5, device=device).t()
    for a, b in zip(
        affine_coupling(x, params, 2),
        affine_coupling(x.clone(memory_format=torch.contiguous_format), params.contiguous(), 2),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_rows_of_a_conditioners_output_are_not_copied(monkeypatch, device, implementation):
    wide = torch.randn(6, 20, device=device)
    copies = []
    monkeypatch.setattr(ops._op, "rows", lambda t, rows=ops._op.rows: copies.append(rows(t)[0] is not t) or rows(t))
    affine_coupling(torch.randn(6, 8, device=device)[:, :4], wide[:, 3:11], 0)
    assert not any(copies)


@pytest.mark.parametrize("split", [0, 4])
def test_all_or_nothing_may_pass_through(split, device, implementation):
    x, params = torch.randn(3, 4, device=device), torch.randn(3, 8 - 2 * split, device=device)
    y, logdet = affine_coupling(x, params, split)
    assert torch.equal(y, x) == (split == 4)
    assert bool((logdet == 0).all()) == (split == 4)


@every_scale
def test_extreme_parameters_stay_within_their_bounds(scale, device, implementation):
    raw = torch.tensor([-1e4, -200.0, -88.0, 0.0, 60.0, 1e4], device=device)
    params = torch.stack([raw, torch.zeros_like(raw)], -1)
    _, logdet = affine_coupling(torch.ones(6, 1, device=device), params, 0, scale=scale)
    expected = {
        "tanh": raw.tanh(),
        "exp": raw,
        "sigmoid": torch.nn.functional.logsigmoid(raw + 2),
        "softclip": raw / (1 + (raw / math.log(1e-3)).abs()),
    }[scale]
    torch.testing.assert_close(logdet, expected, rtol=1e-6, atol=1e-7)


def test_one_bad_row_leaves_the_others_alone(device, implementation):
    x, params, split = arguments("split", dtype=torch.float32, device=device)
    good = affine_coupling(x, params, split)
    x[1, 5] = float("nan")
    for a, b in zip(affine_coupling(x, params, split), good, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
    assert affine_coupling(x, params, split)[0][1, 5].isnan()


def test_it_compiles_into_one_graph():
    x, params, mask = arguments("mask", dtype=torch.float32)
    leaves = (x.requires_grad_(), params.requires_grad_())

    def step(x, params):
        y, logdet = affine_coupling(x, params, mask)
        return (y**2).sum() + logdet.sum()

    compiled = torch.compile(step, fullgraph=True)
    ours, eagerly = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step))
    for a, b in zip(ours, eagerly, strict=True):
        torch.testing.assert_close(a, b)


def results(function, leaves):
    """Outputs and gradients, for cotangents that differ from element to element."""
    outputs = function(*leaves)
    cotangents = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


OPTIONS = {
    "tanh": {},
    "factor": {"scale": "tanh"},
    "exp": {"scale": "exp"},
    "floor": {"scale": "sigmoid", "slope": 1e-3},
    "softclip": {"scale": "softclip", "slope": 1e-2},
}


@either_way
@pytest.mark.parametrize("by_element", [False, True], ids=["by row", "by element"])
@pytest.mark.parametrize("kind", ["all", "split", "last", "mask", "one", "long"])
@pytest.mark.parametrize("layout", ["halves", "beside", "pair", "views"])
def test_every_layout_and_option_is_the_formula(layout, kind, by_element, inverse, device, implementation):
    n, d = {"one": (1030, 1), "long": (2, 600)}.get(kind, (5, 7))
    if implementation == "triton" and device == "cpu":
        n = min(n, 5)
    _, _, where = arguments(kind, device=device)
    where = where if kind in ("split", "last", "mask") else 0
    moved = d if isinstance(where, torch.Tensor) else d - abs(where)
    make = torch.Generator().manual_seed(2)
    for name, options in OPTIONS.items():
        x, params, factor = (
            torch.randn(size, generator=make, dtype=torch.float64).to(device).requires_grad_()
            for size in ((n, d), (n, moved, 2), (moved,))
        )
        leaves = [x, params, *([factor] if name == "factor" else [])]

        def ours(x, params, *factor, options=options):
            raw, shift = params.unbind(-1)
            if layout == "pair":
                raw, shift = raw.contiguous(), shift.contiguous()
            given = {"halves": torch.cat([raw, shift], -1), "beside": params}.get(layout, (raw, shift))
            factor = {"factor": factor[0]} if factor else {}
            return affine_coupling(x, given, where, by_element=by_element, inverse=inverse, **options, **factor)

        def plain(x, params, *factor, name=name):
            a, t = params.unbind(-1)
            s = {
                "tanh": a.tanh(),
                "factor": sum(factor) * a.tanh(),
                "exp": a,
                "floor": (torch.sigmoid(a + 2) + 1e-3).log(),
                "softclip": a / (1 + (a / math.log(1e-2)).abs()),
            }[name]
            if isinstance(where, torch.Tensor):
                s, t = s * ~where, t * ~where
            pad = (max(where, 0), max(-where, 0)) if isinstance(where, int) else (0, 0)
            s, t = torch.nn.functional.pad(s, pad), torch.nn.functional.pad(t, pad)
            y, s = ((x - t) / s.exp(), -s) if inverse else (x * s.exp() + t, s)
            return y, s if by_element else s.sum(-1)

        for a, b in zip(results(ours, leaves), results(plain, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_factor_of_an_image_is_one_of_each_channel(device, implementation):
    x, params = torch.randn(2, 4, 3, 3, device=device), torch.randn(2, 4, 3, 3, device=device)
    factor = torch.tensor([0.5, 2.0], device=device).view(2, 1, 1).requires_grad_()
    y, logdet = affine_coupling(x, params, 2, factor=factor, by_element=True)
    s = factor * params[:, :2].tanh()
    torch.testing.assert_close(y[:, 2:], x[:, 2:] * s.exp() + params[:, 2:])
    torch.testing.assert_close(logdet, torch.cat([torch.zeros_like(s), s], 1))
    (ours,) = torch.autograd.grad(y.sum() + 2 * logdet.sum(), factor)
    (plain,) = torch.autograd.grad((x[:, 2:] * s.exp()).sum() + 2 * s.sum(), factor)
    torch.testing.assert_close(ours, plain)


@either_way
def test_one_example_is_a_row_and_vmap_goes_over_examples(inverse, device, implementation):
    x, params, split = arguments("split", device=device)
    whole = affine_coupling(x, params, split, inverse=inverse)
    torch.testing.assert_close(affine_coupling(x[0], params[0], split, inverse=inverse), (whole[0][0], whole[1][0]))
    each = torch.vmap(lambda x, params: affine_coupling(x, params, split, inverse=inverse))(x, params)
    torch.testing.assert_close(each, whole)


def test_views_of_a_networks_output_are_not_copied(monkeypatch, device):
    params = torch.randn(6, 8, 2, device=device)
    seen = []
    problem = _affine_coupling._problem_of_pair
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, contiguous=torch.Tensor.contiguous: seen.append(t) or t)
    problem(torch.randn(6, 8, device=device), *params.unbind(-1), "exp", 0.0, True, False)
    assert not seen


@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softclip_is_zukos_transform(dtype, inverse, device, implementation):
    zuko = pytest.importorskip("zuko", reason="zuko is an oracle")
    x, raw, shift = (torch.randn(9, 5, dtype=dtype, device=device).mul(3).requires_grad_() for _ in range(3))

    def theirs(x, raw, shift):
        transform = zuko.transforms.MonotonicAffineTransform(shift, raw)
        return (transform.inv if inverse else transform).call_and_ladj(x)

    def ours(x, raw, shift):
        return affine_coupling(x, (raw, shift), scale="softclip", by_element=True, inverse=inverse)

    for a, b in zip(results(ours, [x, raw, shift]), results(theirs, [x, raw, shift]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype is torch.float32 else 1e-10, atol=1e-5)


@either_way
def test_a_sigmoid_with_a_floor_is_nflows_coupling(inverse, device, implementation):
    coupling = pytest.importorskip("nflows.transforms.coupling", reason="nflows is an oracle")
    x = torch.randn(6, 5, dtype=torch.float64, device=device).requires_grad_()
    params = torch.randn(6, 6, dtype=torch.float64, device=device).requires_grad_()
    layer = coupling.AffineCouplingTransform([0, 0, 1, 1, 1], lambda i, o: lambda x, context: params).to(device)

    def theirs(x, params):
        return layer.inverse(x) if inverse else layer(x)

    def ours(x, params):
        shift, raw = params.chunk(2, 1)
        return affine_coupling(x, (raw, shift), 2, scale="sigmoid", slope=1e-3, inverse=inverse)

    for a, b in zip(results(ours, [x, params]), results(theirs, [x, params]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("raw", [9.0, 10.0, 88.0, 1e4, math.inf])
@pytest.mark.parametrize("columns", [1, 7, 16, 33])
def test_a_saturated_scale_has_no_gradient(raw, columns, device, implementation):
    x = torch.ones(2, columns, device=device)
    params = torch.full((2, 2 * columns), raw, device=device).requires_grad_()
    with torch.no_grad():
        params[1] *= -1
    y, logdet = affine_coupling(x, params, 0, factor=torch.full((columns,), 3.0, device=device))
    torch.testing.assert_close(logdet.cpu(), columns * torch.tensor([3.0, -3.0]), rtol=1e-7, atol=0)
    (gradient,) = torch.autograd.grad(logdet.sum() + y[:, :0].sum(), params)
    assert float(gradient.abs().max()) <= 1e-6  # of tanh at 9, 1 - 6e-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.zeros(4, 7)}, r"params must have shape \(4, 8\), got \(4, 7\)"),
        ({"params": torch.zeros(4, 8).double()}, r"params must have x's dtype torch.float32, got torch.float64"),
        ({"mask_or_split": 8}, r"mask_or_split must be from -7 to 7, x's number of features, got 8"),
        ({"mask_or_split": -8}, r"mask_or_split must be from -7 to 7, x's number of features, got -8"),
        ({"mask_or_split": torch.ones(7)}, r"must be an int or a bool tensor on cpu, got torch.float32"),
        ({"mask_or_split": torch.ones(6, dtype=torch.bool)}, r"the shape of an example, \(7,\).*got \(6,\)"),
        ({"scale": "relu"}, r"scale must be one of tanh, exp, sigmoid, softclip, got 'relu'"),
        ({"slope": 0.1}, r"slope goes with softclip, above 0 and below 1, or sigmoid, from 0; got 0.1 with tanh"),
        ({"scale": "softclip", "slope": 0.0}, r"slope goes with softclip, above 0"),
        ({"scale": "exp", "factor": torch.ones(4)}, r"factor goes with scale tanh, got exp"),
        ({"factor": torch.ones(3)}, r"factor must have the shape of what moves, \(4,\), or expand to it; got \(3,\)"),
        ({"factor": torch.ones(4).half()}, r"factor must be a torch.float32 tensor on cpu, got torch.float16"),
        ({"params": (torch.zeros(4, 4), torch.zeros(4, 3))}, r"params\[1\] must have shape \(4, 4\), got \(4, 3\)"),
        ({"params": torch.zeros(4, 3, 2)}, r"params must have shape \(4, 4, 2\), got \(4, 3, 2\)"),
        ({"params": (torch.zeros(4, 4),) * 3}, r"params must be a tensor, or a tuple of .*, got 3 tensors"),
        ({"mask_or_split": True}, r"mask_or_split must be an int or a bool tensor, got True"),
        ({"mask_or_split": 2.0}, r"mask_or_split must be an int or a bool tensor, got 2.0"),
        ({"x": torch.zeros(())}, r"x must have at least one axis"),
        ({"x": torch.zeros(4, 7, dtype=torch.int64)}, r"x must be float32"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = {"x": torch.zeros(4, 7), "params": torch.zeros(4, 8), "mask_or_split": 3, "scale": "tanh"}
    with pytest.raises(ValueError, match=message):
        affine_coupling(**{**good, **change})


def test_pairs_beside_each_other_of_a_single_example_are_read_where_they_lie(implementation):
    x, params = torch.tensor([1.0, 2.0, 3.0]), (torch.arange(21.0).view(3, 7) / 10)[:, :2].requires_grad_()
    y, logdet = affine_coupling(x, params, scale="exp")
    torch.testing.assert_close(y, x * params[:, 0].exp() + params[:, 1])
    torch.testing.assert_close(logdet, params[:, 0].sum())
    (first,) = torch.autograd.grad(y.sum(), params, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), params)[0][:, 0], x * params[:, 0].exp())


def test_parameters_of_rows_that_overlap_get_gradients_of_their_own(implementation):
    x, base = torch.randn(30, 4).double(), torch.randn(31 * 4).double().requires_grad_()
    found = affine_coupling(x, base.unfold(0, 8, 4), by_element=True)
    truth = affine_coupling(x, base.unfold(0, 8, 4).clone(), by_element=True)
    ours, wanted = (torch.autograd.grad(y.sum() + s.square().sum(), base)[0] for y, s in (found, truth))
    torch.testing.assert_close(ours, wanted)


def test_log_determinants_by_element_of_no_features_are_none(implementation):
    y, logdet = affine_coupling(torch.zeros(9, 0), torch.zeros(9, 0), by_element=True)
    assert y.shape == logdet.shape == (9, 0)
