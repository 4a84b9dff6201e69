"""`ops.group_norm` beside PyTorch's own layers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfuse import ops
from genfuse.nn import UNet

by_kernels = pytest.mark.parametrize("implementation", ["native"], indirect=True)

SHAPES = {  # of x, with the number of groups
    "images": ((3, 16, 7, 5), 4),
    "more channels than a block": ((1, 600, 3, 3), 8),
    "one cell": ((4, 7, 1, 1), 1),
    "sequences": ((2, 6, 9), 3),
    "large": ((2, 24, 40, 28), 8),
}


def eager(x, groups, scale, shift, *, eps=1e-5, silu=False):
    """As one writes it."""
    scale, shift = (t[(..., *(None,) * (x.dim() - 2))] for t in (scale, shift))
    z = F.group_norm(x, groups, eps=eps) * scale + shift
    return F.silu(z) if silu else z


def arguments(shape, each, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype) * 3 + 5
    of_each = shape[:2] if each else shape[1:2]
    return x, torch.randn(of_each, dtype=dtype), torch.randn(of_each, dtype=dtype)


def results(function, arguments, dtype):
    x, scale, shift = (t.to(dtype).requires_grad_() for t in arguments)
    y = function(x, scale, shift)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, (x, scale, shift), torch.randn(y.shape).to(dtype))]


def errors(found, truth):
    return [float(((a.double() - b).abs().max() / b.abs().max()).detach()) for a, b in zip(found, truth, strict=True)]


@by_kernels
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_are_as_close_to_float64_as_eager_ones(name, each, silu, implementation):
    shape, groups = SHAPES[name]
    given = arguments(shape, each)
    ours, theirs = (lambda x, *rest, f=f: f(x, groups, *rest, silu=silu) for f in (ops.group_norm, eager))
    truth = results(theirs, given, torch.float64)
    pairs = zip(*(errors(results(f, given, torch.float32), truth) for f in (ours, theirs)), strict=True)
    assert all(a <= 2 * b + 16 * torch.finfo(torch.float32).eps for a, b in pairs)
    assert max(errors(results(ours, given, torch.float64), truth)) < 1e-13


@by_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_16_bits_are_computed_in_float32(dtype, wide, implementation):
    x, scale, shift = (t.to(dtype) for t in arguments((2, 8, 6, 5), each=True))
    scale, shift = (t.float() if wide else t for t in (scale, shift))
    y = ops.group_norm(x, 4, scale, shift, silu=True)
    truth = eager(x.double(), 4, scale.double(), shift.double(), silu=True)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), truth, atol=1e-6, rtol=torch.finfo(dtype).eps)


@by_kernels
def test_any_strides_are_read_right_and_results_have_channels_side_by_side(implementation):
    x, scale, shift = arguments((3, 8, 6, 5), each=True, dtype=torch.float32)
    y = ops.group_norm(x, 2, scale, shift)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expanded = scale[:1].expand(3, -1)
    for given in (
        (x.to(memory_format=torch.channels_last), scale, shift),
        (torch.cat([x, x], 1)[:, :8], torch.stack([scale, shift], -1)[..., 0], shift),
        (torch._neg_view(-x), torch._neg_view(-scale), shift),
    ):
        assert torch.equal(ops.group_norm(given[0], 2, *given[1:]), y)
    torch.testing.assert_close(ops.group_norm(x, 2, expanded, shift), eager(x, 2, expanded, shift))


@by_kernels
@pytest.mark.parametrize("shape", [(0, 8, 2, 2), (2, 8, 0, 3)])
def test_nothing_gives_nothing(shape, implementation):
    y, *gradients = results(lambda *a: ops.group_norm(a[0], 2, *a[1:]), arguments(shape, each=True), torch.float32)
    assert y.shape == gradients[0].shape == shape
    assert not any(g.any() for g in gradients)


@by_kernels
def test_what_is_not_a_number_or_far_from_0_is_as_in_pytorch(implementation):
    x, scale, shift = arguments((4, 4, 3, 3), each=False, dtype=torch.float32)
    x[1, 2, 0, 0], x[2, 0, 1, 1], scale[3], shift[1] = float("nan"), float("inf"), 1e4, -1e4
    ours, theirs = (
        results(lambda x, *rest, f=f: f(x, 2, *rest, silu=True), (x, scale, shift), torch.float32)
        for f in (ops.group_norm, eager)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True, rtol=1e-5, atol=1e-30)


@by_kernels
@pytest.mark.parametrize("value", [0.1, 100.3, 12345.6, 1e6])
@pytest.mark.parametrize("cells", [(5, 7), (14, 14)], ids=str)
def test_what_is_constant_becomes_0(value, cells, implementation):
    x = torch.full((2, 8, *cells), value)
    assert not ops.group_norm(x, 2, torch.ones(8), torch.zeros(8)).any()


@by_kernels
@pytest.mark.parametrize("first", [30.0, 100.0, 1e4])
def test_a_group_that_begins_with_an_outlier_keeps_its_digits(first, implementation):
    x = torch.randn(1, 1, 64, 64)
    x[0, 0, 0, 0] = first

    def results(x):
        scale, shift = x.new_ones(1).requires_grad_(), x.new_zeros(1)
        y = ops.group_norm(x, 1, scale, shift)
        return y, torch.autograd.grad((y * torch.linspace(-1, 1, 4096).to(x).view(x.shape)).sum(), scale)[0]

    for ours, exact in zip(results(x), results(x.double()), strict=True):
        assert (ours - exact).abs().max() <= 16 * 2**-23 * exact.abs().max()


@by_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads, implementation):
    given = arguments((8, 32, 24, 24), each=True)
    ours = partial(results, lambda x, *rest: ops.group_norm(x, 8, *rest, silu=True), given, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = ours()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, ours(), strict=True))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *a: f(*a).sin().sum(), (0, 1, 2)),
    "jacrev": lambda f: torch.func.jacrev(f, 2),
    "jacfwd": lambda f: torch.func.jacfwd(f, 0),
    "hessian": lambda f: torch.func.hessian(lambda *a: f(*a).sin().sum(), 1),
    "vmap": lambda f: torch.func.vmap(f, (None, 0, 0)),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda *a: f(*a).sin().sum(), 1), (None, 0, 0)),
    "twice": lambda f: lambda *a: torch.autograd.functional.hessian(lambda x: f(x, *a[1:]).sin().sum(), a[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_composes(name):
    x, scale, shift = arguments((2, 4, 3), each=True)
    if "vmap" in name:
        scale, shift = scale.expand(3, 2, 4) * torch.arange(1.0, 4.0)[:, None, None].double(), shift.expand(3, 2, 4)
    found, truth = (
        TRANSFORMS[name](lambda x, *rest, f=f: f(x, 2, *rest, silu=True))(x, scale, shift)
        for f in (ops.group_norm, eager)
    )
    torch.testing.assert_close(found, truth)


def test_arguments_that_do_not_fit_are_named():
    x, scale, shift = arguments((2, 6, 3, 3), each=False, dtype=torch.float32)
    for given, message in {
        (x[0, 0], 2, scale, shift): "x must be",
        (x, 4, scale, shift): "divide the 6 channels",
        (x, 2, scale[:5], shift): "scale",
        (x, 2, scale, shift.double()): "shift",
        (x, 2, scale, shift.expand(3, 6)): "shift",
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.group_norm(*given)
    with pytest.raises(ValueError, match="do not divide"):
        torch.ops.genfuse.group_norm(x.flatten(2), x.new_ones(2, 6), x.new_ones(2, 6), 2, 1e-5, True)


def test_a_u_net_is_what_pytorchs_layers_compute(monkeypatch):
    torch.manual_seed(0)
    network = UNet(3, (8, 16), attention=(1,)).double()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.2)
    x, log_sigma = torch.randn(2, 3, 9, 7).double(), torch.randn(2).double()
    found = torch.autograd.grad(network(x, log_sigma).square().sum(), list(network.parameters()))
    monkeypatch.setattr(ops, "group_norm", eager)
    truth = torch.autograd.grad(network(x, log_sigma).square().sum(), list(network.parameters()))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@by_kernels
def test_of_no_channels_nothing_is_made(implementation):
    assert ops.group_norm(torch.randn(2, 0, 3, 3), 1, torch.ones(0), torch.zeros(0)).shape == (2, 0, 3, 3)


@by_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silu_of_what_is_far_below_0_is_0(implementation, dtype):
    shift = torch.tensor([-3e38, -1e30, -100.0], dtype=dtype, requires_grad=True)
    y = ops.group_norm(torch.randn(1, 3, 2, dtype=dtype), 1, torch.zeros(3, dtype=dtype), shift, silu=True)
    (gradient,) = torch.autograd.grad(y.sum(), shift)
    assert max(y.abs().max(), gradient.abs().max()) < 1e-33


@by_kernels
@pytest.mark.parametrize("groups", [1, 300])
def test_many_cells_of_many_channels_cost_no_digits(groups, implementation):
    x, g = torch.rand(1, 300, 128, 128) + 3, torch.rand(1, 300, 128, 128) + 1
    scale, shift = torch.ones(300), torch.zeros(300)

    def found(dtype):  # but the gradient of the scale, of which little is left
        x_, scale_, shift_ = (t.to(dtype).requires_grad_() for t in (x, scale, shift))
        y = ops.group_norm(x_, groups, scale_, shift_)
        return [y, torch.autograd.grad(y, shift_, g.to(dtype))[0]]

    assert max(errors(found(torch.float32), found(torch.float64))) < 8 * torch.finfo(torch.float32).eps
