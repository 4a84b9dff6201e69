"""Affine couplings: log-determinants, inverses, what passes through, layouts, bad input."""

import pytest
import torch

from benchmarks.operators import OPERATORS
from genfuse import ops
from genfuse.ops import affine_coupling
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
        x, params = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
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


def test_rows_of_a_conditioners_output_are_not_copied(monkeypatch, implementation):
    wide = torch.randn(6, 20)
    copies = []
    monkeypatch.setattr(ops._op, "rows", lambda t, rows=ops._op.rows: copies.append(rows(t)[0] is not t) or rows(t))
    affine_coupling(torch.randn(6, 8)[:, :4], wide[:, 3:11], 0)
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
    expected = {"tanh": raw.tanh(), "exp": raw, "sigmoid": torch.nn.functional.logsigmoid(raw + 2)}[scale]
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.zeros(4, 7)}, r"params must have shape \(4, 8\), got \(4, 7\)"),
        ({"params": torch.zeros(4, 8).double()}, r"params must have x's dtype torch.float32, got torch.float64"),
        ({"mask_or_split": 8}, r"mask_or_split must be from -7 to 7, x's number of features, got 8"),
        ({"mask_or_split": -8}, r"mask_or_split must be from -7 to 7, x's number of features, got -8"),
        ({"mask_or_split": torch.ones(7)}, r"must be an int or a bool tensor on cpu, got torch.float32"),
        ({"mask_or_split": torch.ones(6, dtype=torch.bool)}, r"the shape of an example, \(7,\).*got \(6,\)"),
        ({"scale": "relu"}, r"scale must be one of tanh, exp, sigmoid, got 'relu'"),
        ({"x": torch.zeros(7)}, r"x must be \(..., D\) with at least two axes"),
        ({"x": torch.zeros(4, 7, dtype=torch.int64)}, r"x must be float32"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = {"x": torch.zeros(4, 7), "params": torch.zeros(4, 8), "mask_or_split": 3, "scale": "tanh"}
    with pytest.raises(ValueError, match=message):
        affine_coupling(**{**good, **change})
