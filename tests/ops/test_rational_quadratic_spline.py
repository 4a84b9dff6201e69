"""Rational-quadratic splines: their own Jacobian, round trips, tails, knots, extremes, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from genfuse import ops
from genfuse.ops import rational_quadratic_spline

EXTRA = {"linear": -1, "none": 1, "circular": 0}


def example(tails="linear", shape=(7, 5), bins=8, dtype=torch.float64, scale=1.0, device="cpu"):
    """x within (-3, 3), raw parameters, and the settings that go with them."""
    make = torch.Generator().manual_seed(1)
    x = 6 * torch.rand(shape, generator=make, dtype=torch.float64) - 3
    params = scale * torch.randn((*shape, 3 * bins + EXTRA[tails]), generator=make, dtype=torch.float64)
    settings = {"bins": bins, "bound": 3.0, "tails": tails}
    return x.to(device, dtype).requires_grad_(), params.to(device, dtype).requires_grad_(), settings


def knots(raw, minimum=1e-3, bound=3.0):
    """Where bins begin and end, by the definition."""
    share = raw.exp() / raw.exp().sum(-1, keepdim=True)
    size = minimum + (1 - minimum * raw.shape[-1]) * share
    return 2 * bound * F.pad(size.cumsum(-1), (1, 0)) - bound


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [1, 2, 8, 21])
@pytest.mark.parametrize("tails", EXTRA)
def test_the_logdet_is_that_of_the_jacobian(tails, bins, inverse, device, implementation):
    x, params, settings = example(tails, bins=bins, device=device)
    y, logdet = rational_quadratic_spline(x, params, **settings, inverse=inverse)
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # the Jacobian is diagonal
    assert bool((slope > 0).all())
    torch.testing.assert_close(logdet, slope.log().sum(-1), rtol=1e-9, atol=1e-9)
    rows = torch.autograd.functional.jacobian(
        lambda x: rational_quadratic_spline(x, params[0], **settings, inverse=inverse)[0], x[0].detach()
    )
    torch.testing.assert_close(torch.linalg.slogdet(rows)[1], logdet[0].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", EXTRA)
def test_derivatives_agree_with_finite_differences(tails, inverse, order, device, implementation):
    x, params, settings = example(tails, (2, 3), bins=3, device=device)
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    function = lambda x, p: rational_quadratic_spline(x, p, **settings, inverse=inverse)  # noqa: E731
    # In place of each element of the Jacobian, projections of it: Triton's interpreter takes long for a call.
    assert check(function, (x, params), fast_mode=implementation == "triton")


@pytest.mark.parametrize("tails", EXTRA)
def test_knots_go_to_knots_with_their_derivatives(tails, device, implementation):
    _, params, settings = example(tails, (4, 1), bins=5, device=device)
    x, y = knots(params[..., :5])[:, 0].detach(), knots(params[..., 5:10])[:, 0].detach()
    inner = 1e-3 + F.softplus(params[..., 10:])[:, 0].detach()
    one = torch.ones_like(inner[:, :1])
    d = {"linear": torch.cat([one, inner, one], -1), "none": inner, "circular": torch.cat([inner, inner[:, :1]], -1)}
    # Every knot of a row is a row of its own, with that row's parameters.
    at = x.clamp(-3, 3).reshape(-1, 1).requires_grad_()
    got, _ = rational_quadratic_spline(at, params.repeat_interleave(6, 0), **settings)
    torch.testing.assert_close(got, y.reshape(-1, 1), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(got.sum(), at)
    torch.testing.assert_close(slope.view(4, 6), d[tails], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tails", EXTRA)
def test_the_inverse_is_one(tails, device, implementation):
    x, params, settings = example(tails, (50, 9), device=device)
    y, forward = rational_quadratic_spline(x, params, **settings)
    back, inverse = rational_quadratic_spline(y, params, **settings, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-8)


def test_it_is_monotonic(device, implementation):
    _, params, settings = example(shape=(1, 6), dtype=torch.float32, scale=3.0, device=device)
    n = 101 if implementation == "triton" and device == "cpu" else 1001
    x = torch.linspace(-4, 4, n, device=device)[:, None].expand(n, 6)
    for inverse in (False, True):
        y, _ = rational_quadratic_spline(x, params.expand(n, 6, -1), **settings, inverse=inverse)
        assert float(y.detach().diff(dim=0).min()) > -2e-6  # to rounding


@pytest.mark.parametrize("inverse", [False, True])
def test_linear_tails_are_the_identity(inverse, device, implementation):
    x, params, settings = example(device=device)
    inf = float("inf")
    outside = torch.tensor([3.0000001, -3.1, 100.0, inf, -inf], device=device, dtype=x.dtype).expand(7, 5)
    outside = outside.clone().requires_grad_()
    y, logdet = rational_quadratic_spline(outside, params, **settings, inverse=inverse)
    assert torch.equal(y, outside)
    assert torch.equal(logdet, torch.zeros_like(logdet))
    gx, gparams = torch.autograd.grad(y.sum() + logdet.sum(), (outside, params))
    assert torch.equal(gx, torch.ones_like(gx))
    assert torch.equal(gparams, torch.zeros_like(gparams))


@pytest.mark.parametrize("inverse", [False, True])
def test_circular_tails_go_on_periodically(inverse, device, implementation):
    x, params, settings = example("circular", device=device)
    y, logdet = rational_quadratic_spline(x, params, **settings, inverse=inverse)
    for turns in (-2, 1):
        further, same = rational_quadratic_spline(x + 6 * turns, params, **settings, inverse=inverse)
        torch.testing.assert_close(further, y + 6 * turns)
        torch.testing.assert_close(same, logdet)
    ends = torch.tensor([-3.0, 3.0], device=device, dtype=x.dtype)[:, None].requires_grad_()
    at_ends, _ = rational_quadratic_spline(ends, params[:1, :1].expand(2, 1, -1), **settings, inverse=inverse)
    assert torch.equal(at_ends, ends)
    (slopes,) = torch.autograd.grad(at_ends.sum(), ends)
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("scale", range(1, 9))
def test_the_inverse_in_float32_is_as_good_as_float64_rounded(scale, device, implementation):
    n = (16, 32) if implementation == "triton" and device == "cpu" else (2048, 32)
    y, params, settings = example(shape=n, dtype=torch.float32, scale=float(scale), device=device)
    x, logdet = rational_quadratic_spline(y, params, **settings, inverse=True)
    again, _ = rational_quadratic_spline(x, params, **settings)
    with ops.using("reference"):
        wide, wide_params = y.double(), params.double()
        exact, _ = rational_quadratic_spline(wide, wide_params, **settings, inverse=True)
        rounded, _ = rational_quadratic_spline(exact.float().double(), wide_params, **settings)
    assert float((again - y).abs().max()) <= 4 * float((rounded - wide).abs().max())
    assert bool(logdet.isfinite().all())
    gradients = torch.autograd.grad((x + logdet[:, None]).sum(), (y, params))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", EXTRA)
def test_gradients_are_finite_inside_outside_and_on_the_knots(tails, inverse, device, implementation):
    for dtype in (torch.float32, torch.float64):
        _, params, settings = example(tails, (4, 1), bins=5, dtype=dtype, scale=3.0, device=device)
        raw = params[..., 5:10] if inverse else params[..., :5]
        at = knots(raw)[:, 0].detach().clamp(-3, 3)
        if tails != "none":
            at = torch.cat([at[:, 1:], torch.tensor([[3.5], [-40.0], [3.0], [-3.0]], device=device, dtype=dtype)], -1)
        at = at.reshape(-1, 1).requires_grad_()
        many = params.repeat_interleave(len(at) // 4, 0)
        y, logdet = rational_quadratic_spline(at, many, **settings, inverse=inverse)
        gradients = torch.autograd.grad(y.sum() + logdet.sum(), (at, params), create_graph=True)
        again = torch.autograd.grad(sum(g.sum() for g in gradients), (at, params))
        assert all(bool(t.isfinite().all()) for t in (y, logdet, *gradients, *again))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_no_finite_parameters_make_a_nan(size, inverse, device, implementation):
    x, params, settings = example(shape=(64, 5), dtype=torch.float32, scale=size, device=device)
    y, logdet = rational_quadratic_spline(x, params, **settings, inverse=inverse)
    assert not bool(y.isnan().any())
    assert not bool(logdet.isnan().any())
    assert float(y.abs().max()) <= 3


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", EXTRA)
def test_damping_is_a_factor_of_raw_widths_and_heights(tails, inverse, device, implementation):
    x, params, settings = example(tails, scale=3.0, device=device)
    factor = torch.ones_like(params)
    factor[..., : 2 * settings["bins"]] = 0.25
    damped = rational_quadratic_spline(x, params, **settings, inverse=inverse, damping=0.25)
    multiplied = rational_quadratic_spline(x, params * factor, **settings, inverse=inverse)
    for results in zip(damped, multiplied, strict=True):
        torch.testing.assert_close(*results)
    both = [torch.autograd.grad([y.sum(), 2 * logdet.sum()], [x, params]) for y, logdet in (damped, multiplied)]
    for gradients in zip(*both, strict=True):
        torch.testing.assert_close(*gradients)


def test_a_nan_stays_where_it_is(device, implementation):
    x, params, settings = example(dtype=torch.float32, device=device)
    clean, clean_logdet = rational_quadratic_spline(x, params, **settings)
    x, params = x.detach().clone(), params.detach().clone()
    x[1, 2] = params[3, 4, 5] = float("nan")
    y, logdet = rational_quadratic_spline(x, params, **settings)
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[1, 2] = bad[3, 4] = True
    assert torch.equal(y.isnan(), bad)
    torch.testing.assert_close(y[~bad], clean.detach()[~bad])
    rest = [0, 2, 4, 5, 6]
    torch.testing.assert_close(logdet[rest], clean_logdet.detach()[rest])


def test_16_bit_parameters_are_read_as_they_are(device, implementation):
    for dtype in (torch.bfloat16, torch.float16):
        x, params, settings = example(dtype=dtype, device=device)
        y, logdet = rational_quadratic_spline(x, params, **settings)
        expected, expected_logdet = rational_quadratic_spline(x.float(), params.float(), **settings)
        assert y.dtype is dtype
        assert logdet.dtype is torch.float32
        torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)
        torch.testing.assert_close(logdet, expected_logdet, rtol=1e-4, atol=1e-4)
        # As under autocast: only the conditioner is of 16 bits.
        y, logdet = rational_quadratic_spline(x.float(), params, **settings)
        torch.testing.assert_close((y, logdet), (expected, expected_logdet))
        (gparams,) = torch.autograd.grad(y.sum(), params)
        assert gparams.dtype is dtype


def test_slices_of_a_conditioners_output_are_not_copied(monkeypatch, device, implementation):
    x, params, settings = example(shape=(6, 4), device=device)
    both = torch.cat([params.flatten(1), params.flatten(1)], -1)
    sliced = both[:, 4 * 23 :].view(6, 4, 23)
    assert not sliced.is_contiguous()
    copies = []
    monkeypatch.setattr(ops._op, "rows", lambda t, rows=ops._op.rows: copies.append(rows(t)[0] is not t) or rows(t))
    got = rational_quadratic_spline(x, sliced, **settings)
    assert not any(copies)
    torch.testing.assert_close(got, rational_quadratic_spline(x, params, **settings))


def test_any_strides_give_the_same(device, implementation):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 6, generator=make, dtype=torch.float64).to(device).transpose(0, 2)[..., ::2]
    params = torch.randn(23, 3, 4, 6, generator=make, dtype=torch.float64).to(device).permute(3, 2, 1, 0)
    results = []
    for copy in (False, True):
        u, p = ((t.contiguous() if copy else t).detach().requires_grad_() for t in (x, params))
        y, logdet = rational_quadratic_spline(u, p, bins=8, bound=3.0)
        results.append((y, logdet, *torch.autograd.grad(y.sin().sum() + logdet.sin().sum(), (u, p))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[0][0].is_contiguous()


def results(function, leaves):
    """Outputs and gradients, for cotangents that differ from element to element."""
    outputs = function(*leaves)
    cotangents = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


BOXES = {
    "bound": {"bound": 3.0},
    "box": {"box": (-1.0, 2.0, 0.5, 1.5)},
    "bounds": {"bound": [0.5, 1.0, 3.0]},
    "boxes": {"box": (torch.tensor([-1.0, -2, 0]), torch.tensor([1.0, 0, 2]), 0.5, [1.5, 2.5, 3.5])},
}


def by_the_paper(x, params, sides, tails, slope, minimum):
    """One coordinate, x (N,) and params (N, P): equations 4 and 5 between the knots, by the definition."""
    left, right, bottom, top = sides
    a, b, c = params.split([8, 8, params.shape[-1] - 16], -1)
    if slope:
        limit = -math.log(slope)
        a, b, c = a / (1 + 2 * a.abs() / limit), b / (1 + 2 * b.abs() / limit), c / (1 + c.abs() / limit)
    d = c.exp() if slope else minimum + F.softplus(c)
    one = torch.ones_like(d[:, :1])
    inner = d[:, :7] if d.shape[1] == 7 else d[:, 1:8]
    d = {"linear": lambda: torch.cat([one, inner, one], 1), "circular": lambda: torch.cat([d[:, :8], d[:, :1]], 1)}.get(
        tails, lambda: d
    )()
    turns = ((x - left) / (right - left)).floor().detach() if tails == "circular" else torch.zeros_like(x)
    at = x - turns * (right - left)
    xs, ys = (
        F.pad((minimum + (1 - 8 * minimum) * raw.softmax(-1)).cumsum(-1), (1, 0)) * (high - low) + low
        for raw, low, high in ((a, left, right), (b, bottom, top))
    )
    k = torch.searchsorted(xs.detach(), at.detach()[:, None], right=True).clamp(1, 8) - 1
    x0, x1, y0, y1, d0, d1 = (t.gather(1, k + i)[:, 0] for t, i in ((xs, 0), (xs, 1), (ys, 0), (ys, 1), (d, 0), (d, 1)))
    s, z = (y1 - y0) / (x1 - x0), (at - x0) / (x1 - x0)
    below = s + (d0 + d1 - 2 * s) * z * (1 - z)
    y = y0 + (y1 - y0) * (s * z**2 + d0 * z * (1 - z)) / below + turns * (top - bottom)
    logdet = (s**2 * (d1 * z**2 + 2 * s * z * (1 - z) + d0 * (1 - z) ** 2) / below**2).log()
    if tails == "linear":
        y = torch.where(x < left, x - left + bottom, torch.where(x > right, x - right + top, y))
        logdet = torch.where((x < left) | (x > right), 0.0, logdet)
    return y, logdet


@pytest.mark.parametrize("slope", [None, 1e-3], ids=["softplus", "as zuko"])
@pytest.mark.parametrize("tails", [*EXTRA, "each"])
@pytest.mark.parametrize("box", BOXES)
def test_every_box_and_tail_is_the_papers_equation(box, tails, slope, device, implementation):
    given = BOXES[box]
    b = given.get("bound")
    sides = given.get("box") or (-torch.tensor(b), b, -torch.tensor(b), b)
    sides = [torch.as_tensor(side, dtype=torch.float64, device=device).expand(3) for side in sides]
    of = ["linear", "none", "circular"] if tails == "each" else [tails] * 3
    make, rows = torch.Generator().manual_seed(3), 2 if implementation == "triton" else 6  # which interprets each row
    share = torch.rand(rows, 3, generator=make, dtype=torch.float64)
    share = torch.where(torch.tensor([t == "none" for t in of]), share, 1.6 * share - 0.3).to(device)
    width = 3 * 8 + (1 if tails == "each" else EXTRA[tails])
    x = (sides[0] + (sides[1] - sides[0]) * share).requires_grad_()
    params = torch.randn(rows, 3, width, generator=make, dtype=torch.float64).to(device).requires_grad_()
    options = {"bins": 8, "slope": slope, "tails": of if tails == "each" else tails, "by_element": True, **given}

    def plain(x, params):
        columns = [
            by_the_paper(x[:, i], params[:, i], [s[i] for s in sides], t, slope, 0.0 if slope else 1e-3)
            for i, t in enumerate(of)
        ]
        return tuple(torch.stack(c, 1) for c in zip(*columns, strict=True))

    wanted = results(plain, [x, params])
    for ours, theirs in zip(
        results(lambda *t: rational_quadratic_spline(*t, **options), [x, params]), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    y, logdet = wanted[0].detach().requires_grad_(), wanted[1]
    back, inverse = rational_quadratic_spline(y, params, **options, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse, -logdet, rtol=1e-8, atol=1e-8)
    few = (y[:1].detach().requires_grad_(), params[:1].detach().requires_grad_())
    back = lambda *t: rational_quadratic_spline(*t, **options, inverse=True)  # noqa: E731
    assert torch.autograd.gradcheck(back, few, fast_mode=implementation == "triton")


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("where", [0, 8, 16, 20], ids=["width", "height", "first derivative", "derivative"])
def test_nan_parameters_have_the_same_gradients_everywhere(where, inverse, device, implementation):
    x, params, settings = example(shape=(3, 4), device=device)
    params = params.detach().clone()
    params[1, 2, where] = float("nan")
    leaves = [x, params.requires_grad_()]
    function = lambda *t: rational_quadratic_spline(*t, **settings, inverse=inverse)  # noqa: E731
    ours = results(function, leaves)
    with ops.using("reference"):
        wanted = results(function, leaves)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert bool(ours[2][[0, 2]].isfinite().all())


def test_bins_of_least_size_0_make_no_nan(device, implementation):
    for dtype, inverse in [(d, i) for d in (torch.float32, torch.float64) for i in (False, True)]:
        x, params, settings = example(shape=(16, 5), dtype=dtype, scale=100.0, device=device)
        given = {**settings, "min_width": 0.0, "min_height": 0.0, "inverse": inverse}
        made = results(lambda x, p, given=given: rational_quadratic_spline(x, p, **given), [x, params])
        assert not any(bool(t.isnan().any()) for t in made[:2])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_a_slope_it_is_zukos_spline(dtype, inverse, device, implementation):
    zuko = pytest.importorskip("zuko", reason="zuko is an oracle")
    x, params, _ = example(dtype=dtype, scale=2.0, device=device)
    x = (1.5 * x).detach().requires_grad_()

    def theirs(x, params):
        transform = zuko.transforms.MonotonicRQSTransform(*params.split([8, 8, 7], -1), bound=3.0)
        return (transform.inv if inverse else transform).call_and_ladj(x)

    def ours(x, params):
        return rational_quadratic_spline(x, params, bins=8, bound=3.0, slope=1e-3, by_element=True, inverse=inverse)

    for a, b in zip(results(ours, [x, params]), results(theirs, [x, params]), strict=True):
        limit = 1e-4 if dtype is torch.float32 else 1e-9
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_box_of_four_sides_is_nflows_spline(inverse, device, implementation):
    module = pytest.importorskip("nflows.transforms.splines.rational_quadratic", reason="nflows is an oracle")
    x = torch.rand(6, 5, dtype=torch.float64, device=device).requires_grad_()
    params = torch.randn(6, 5, 25, dtype=torch.float64, device=device).requires_grad_()
    low, high = (-1.0, 2.0), (-0.5, 1.5)
    sides = (*low, *high)

    def theirs(x, params):
        left, right, bottom, top = sides
        raw = params.split([8, 8, 9], -1)
        return module.rational_quadratic_spline(x, *raw, inverse, left, right, bottom, top)

    def ours(x, params):
        return rational_quadratic_spline(x, params, bins=8, box=sides, tails="none", inverse=inverse, by_element=True)

    for a, b in zip(results(ours, [x, params]), results(theirs, [x, params]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_bounds_and_tails_of_each_coordinate_are_normflows(device, implementation):
    module = pytest.importorskip("normflows.utils.splines", reason="normflows is an oracle")
    bound = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=device)
    x = ((2 * torch.rand(6, 3, dtype=torch.float64, device=device) - 1) * bound).requires_grad_()
    params = torch.randn(6, 3, 25, dtype=torch.float64, device=device).requires_grad_()
    tails = ["linear", "circular", "linear"]

    def theirs(x, params):
        raw = params.split([8, 8, 9], -1)
        return module.unconstrained_rational_quadratic_spline(x, *raw, tails=tails, tail_bound=bound)

    def ours(x, params):
        return rational_quadratic_spline(x, params, bins=8, bound=bound, tails=tails, by_element=True)

    for a, b in zip(results(ours, [x, params]), results(theirs, [x, params]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.skipif(ops._op._C is None, reason="no compiled kernels")
def test_the_result_does_not_depend_on_the_number_of_threads():
    x, params, settings = example(shape=(3001, 7), dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y, logdet = rational_quadratic_spline(x, params, **settings)
            results.append((y, logdet, *torch.autograd.grad(y.sum() + logdet.sum(), (x, params))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", EXTRA)
def test_it_compiles_into_one_graph(tails, inverse):
    x, params, settings = example(tails)

    def step(x, params):
        y, logdet = rational_quadratic_spline(x, params, **settings, inverse=inverse)
        return (y**2).sum() + logdet.sum()

    ours = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, params), (x, params))
    for a, b in zip(ours, torch.autograd.grad(step(x, params), (x, params)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_spline_without_tails_refuses_what_lies_outside(device, implementation):
    x, params, settings = example("none", dtype=torch.float32, device=device)
    x = x.detach().clone()
    x[0, 0] = 3.5
    with pytest.raises(ValueError, match=r'x must lie in \[-3, 3\] with tails="none", got 3.5'):
        rational_quadratic_spline(x, params, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.zeros(3, 4, 24)}, r"params must have shape \(3, 4, 23\), got \(3, 4, 24\)"),
        ({"params": torch.zeros(3, 4, 23).double()}, r"params must have x's dtype torch.float32, got torch.float64"),
        ({"params": torch.zeros(3, 4, 23, device="meta")}, r"params must be on x's device cpu, got meta"),
        ({"x": torch.zeros(3, 4).int()}, r"x must be float32, .* got torch.int32"),
        ({"x": torch.zeros(())}, r"x must have at least one axis"),
        ({"bins": 0}, r"bins must be at least 1, got 0"),
        ({"bins": 8.0}, r"bins must be a whole number, got 8.0"),
        ({"bound": -1.0}, r"bound must be positive and finite, got -1.0"),
        ({"tails": "box"}, r"tails must be one of linear, none, circular, got 'box'"),
        ({"min_width": 0.2}, r"min_width must be from 0 to 1 / bins = 0.125, got 0.2"),
        ({"min_height": -0.1}, r"min_height must be from 0"),
        ({"min_derivative": 0.0}, r"min_derivative must be between 0 and 1, got 0.0"),
        ({"slope": 1.0}, r"slope must be between 0 and 1, got 1.0"),
        ({"slope": 0.0}, r"slope must be between 0 and 1, got 0.0"),
        ({"bound": None}, r"one of bound and box must be given"),
        ({"bound": None, "box": (-1, 1, 2)}, r"box must be four sides.*got \(-1, 1, 2\)"),
        ({"bound": None, "box": 2.0}, r"box must be four sides.*got 2.0"),
        ({"tails": None}, r"tails must be one of .*, or a sequence of these; got None"),
        ({"box": (0, 1, 0, 1)}, r"one of bound and box must be given"),
        ({"bound": None, "box": (1, 0, 0, 1)}, r"box must be finite, left of right and bottom below top, got \(1.0"),
        ({"bound": [1.0, 2.0]}, r"bound must be one or one for each of 4 coordinates, got \(2,\)"),
        ({"bound": [1.0, 2.0, 0.0, 1.0]}, r"bound must be positive and finite, in every coordinate"),
        ({"tails": ["linear", "box", "none", "none"]}, r"tails must be one of linear, none, circular, got 'box'"),
        ({"tails": "mixed"}, r"tails must be one of linear, none, circular, got 'mixed'"),
        ({"min_derivative": 1.0}, r"min_derivative must be between 0 and 1, got 1.0"),
        ({"damping": 0.0}, r"damping must be positive and finite, got 0.0"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    arguments = {"x": torch.zeros(3, 4), "params": torch.zeros(3, 4, 23), "bins": 8, "bound": 3.0}
    with pytest.raises(ValueError, match=message):
        rational_quadratic_spline(**{**arguments, **change})


def test_slopes_above_20_are_exact_in_float64():
    slopes = torch.linspace(15, 35, 9, dtype=torch.float64)
    params = torch.cat([torch.zeros(16, dtype=torch.float64), slopes]).expand(9, -1)
    x = torch.linspace(-3, 3, 9, dtype=torch.float64)  # the knots, where the logarithm of a slope is all there is
    with ops.using("reference"):
        logdet = ops.rational_quadratic_spline(x[:, None], params[:, None], bins=8, bound=3.0, tails="none")[1]
    exact = [math.log(1e-3 + s + math.log1p(math.exp(-s))) for s in slopes.tolist()]
    torch.testing.assert_close(logdet, torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0)


def test_bounds_of_each_of_no_coordinates(implementation):
    for x in (torch.zeros(3, 0), torch._neg_view(torch.zeros(3, 0))):
        y, logdet = ops.rational_quadratic_spline(x, torch.zeros(3, 0, 5), bins=2, bound=torch.ones(0))
        assert y.shape == (3, 0)
        assert logdet.tolist() == [0.0] * 3
