"""ActNorm: log-determinants, inverses, reductions that are stable and the same on any number of threads, bad input."""

import pytest
import torch

from benchmarks.operators import OPERATORS
from genfuse.ops import actnorm

eager = OPERATORS["actnorm"].eager

either_way = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
every_shape = pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5), (3, 4, 2, 3), (2, 3, 1, 1), (2, 1, 9, 8)], ids=str)


def arguments(shape, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    features = shape[1] if len(shape) == 4 else shape[-1]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in (shape, (features,), (features,))]


@either_way
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 2, 2)], ids=str)
def test_logdet_is_that_of_the_autograd_jacobian(shape, inverse, device, implementation):
    x, log_scale, shift = arguments(shape, device=device)
    _, logdet = actnorm(x, log_scale, shift, inverse=inverse)
    function = lambda one: actnorm(one[None], log_scale, shift, inverse=inverse)[0].flatten()  # noqa: E731
    for example, ours in zip(x, logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(function, example).flatten(1)
        torch.testing.assert_close(ours, torch.linalg.slogdet(jacobian).logabsdet)


@every_shape
def test_the_inverse_undoes_it(shape, device, implementation):
    x, *parameters = arguments(shape, device=device)
    y, logdet = actnorm(x, *parameters)
    assert logdet.shape == (shape[:1] if len(shape) == 4 else shape[:-1])
    again, back = actnorm(y, *parameters, inverse=True)
    torch.testing.assert_close(again, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, -logdet, rtol=1e-12, atol=1e-12)


@either_way
@every_shape
def test_values_and_gradients_are_those_of_the_formula(shape, inverse, device, implementation):
    results = []
    for function in (actnorm, eager):
        leaves = [t.requires_grad_() for t in arguments(shape, device=device)]
        y, logdet = function(*leaves, inverse=inverse)
        results.append((y, logdet, *torch.autograd.grad((y.sin().sum(), logdet.sin().sum()), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@either_way
def test_derivatives_of_first_and_second_order_for_images(inverse, device, implementation):
    leaves = tuple(t.requires_grad_() for t in arguments((2, 2, 1, 2), device=device))
    function = lambda *t: actnorm(*t, inverse=inverse)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("shape", [(70, 600), (5, 3, 25, 30), (33, 40, 2, 2)], ids=str)
def test_blocks_and_chunks_join_up(shape, device, implementation):
    leaves = [t.requires_grad_() for t in arguments(shape, device=device)]
    ours, theirs = (torch.autograd.grad([o.sum() for o in function(*leaves)], leaves) for function in (actnorm, eager))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(20_000, 3), (64, 3, 16, 16)], ids=str)
def test_gradients_of_float32_parameters_lose_nothing_in_the_sum(shape, device):
    leaves = [t.requires_grad_() for t in arguments(shape, torch.float32, device)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    ours, theirs = (torch.autograd.grad(actnorm(*t)[0].square().sum(), t) for t in (leaves, exact))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("shape", [(5000, 33), (40, 5, 17, 11)], ids=str)
def test_gradients_are_the_same_to_the_last_bit_on_any_number_of_threads(shape):
    leaves = [t.requires_grad_() for t in arguments(shape, torch.float32)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y, logdet = actnorm(*leaves)
            results.append(torch.autograd.grad((y, logdet), leaves, (y.detach(), logdet.detach())))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 9), (3, 4, 2, 5)], ids=str)
def test_parameters_of_16_bit_input_may_be_float32(shape, dtype, device, implementation):
    x, *parameters = (t.requires_grad_() for t in arguments(shape, dtype, device))
    wide = [t.detach().float().requires_grad_() for t in parameters]
    (y, logdet), (same, same_logdet) = actnorm(x, *wide), actnorm(x, *parameters)
    assert y.dtype is dtype
    assert logdet.dtype is torch.float32
    assert torch.equal(y, same)
    assert torch.equal(logdet, same_logdet)
    gradients = torch.autograd.grad(y.sum(), [x, *wide])
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    exact = eager(x.float(), *wide)[0].sum()
    torch.testing.assert_close(gradients[1:], torch.autograd.grad(exact, wide))


@pytest.mark.parametrize("layout", ["slice", "transposed", "channels", "channels last"])
def test_any_strides_give_the_same(layout, device, implementation):
    x = {
        "slice": torch.randn(5, 12)[:, 3:7],
        "transposed": torch.randn(4, 5).t(),
        "channels": torch.randn(2, 9, 3, 3)[:, 2:6],
        "channels last": torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    }[layout].to(device)
    both = torch.randn(4, 2, device=device)
    parameters = [t.requires_grad_() for t in (both[:, 0], both[:, 1])]
    results = []
    for data in (x, x.clone(memory_format=torch.contiguous_format)):
        data = data.detach().requires_grad_()
        y, logdet = actnorm(data, *parameters)
        results.append((y, *torch.autograd.grad(y.square().sum() + logdet.mean(), [data, *parameters])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)], ids=str)
def test_images_without_elements_work(shape, device, implementation):
    leaves = [t.requires_grad_() for t in arguments(shape, device=device)]
    y, logdet = actnorm(*leaves)
    assert (logdet == 0).all()
    for gradient, leaf in zip(torch.autograd.grad(y.sum() + logdet.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 2, 2)], ids=str)
def test_one_bad_row_leaves_the_others_alone(shape, device, implementation):
    x, *parameters = arguments(shape, device=device)
    good = actnorm(x, *parameters)
    x.view(4, -1)[1, 2] = float("nan")
    bad = actnorm(x, *parameters)
    for a, b in zip(bad, good, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
    assert bad[0][1].isnan().sum() == 1


def test_it_compiles_into_one_graph():
    leaves = [t.requires_grad_() for t in arguments((3, 4, 2, 2), torch.float32)]

    def step(*leaves):
        y, logdet = actnorm(*leaves)
        return y.square().sum() + logdet.sum()

    compiled = torch.compile(step, fullgraph=True)
    ours, eagerly = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step))
    torch.testing.assert_close(ours, eagerly)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_scale": torch.zeros(3)}, r"log_scale must have shape \(7,\), got \(3,\)"),
        ({"shift": torch.zeros(4, 7)}, r"shift must have shape \(7,\), got \(4, 7\)"),
        ({"shift": torch.zeros(7).double()}, r"shift must have x's dtype torch.float32, got torch.float64"),
        ({"x": torch.zeros(2, 5, 7, 7)}, r"log_scale must have shape \(5,\), got \(7,\)"),
        ({"x": torch.zeros(7)}, r"x must be \(..., D\) with at least two axes"),
        ({"x": torch.zeros(4, 7, dtype=torch.int64)}, r"x must be float32"),
        ({"log_scale": torch.zeros(7, device="meta")}, r"log_scale must be on x's device cpu, got meta"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = {"x": torch.zeros(4, 7), "log_scale": torch.zeros(7), "shift": torch.zeros(7)}
    with pytest.raises(ValueError, match=message):
        actnorm(**{**good, **change})


def test_gradients_that_cancel_over_thousands_of_examples_keep_their_digits(device, implementation):
    if implementation == "reference":
        pytest.skip("PyTorch's own sums, which on a CPU lose them")
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)).to(device)
    log_scale, shift = (torch.zeros(8, device=device, requires_grad=True) for _ in range(2))
    y, logdet = actnorm(x, log_scale, shift)
    gy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)  # partial sums are a thousand times the sum
    glogdet = torch.linspace(-1, 1, 4096, device=device)
    of_scale, of_shift = torch.autograd.grad([y, logdet], [log_scale, shift], [gy, glogdet])
    exact = (gy.double() * x.double() + glogdet.double()[:, None]).sum(0)
    torch.testing.assert_close(of_scale.double(), exact, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(of_shift.double(), gy.double().sum(0), rtol=1e-6, atol=2e-5)


@either_way
@pytest.mark.parametrize("shape", [(2, 3, 40, 41), (1000, 3)], ids=str)
def test_gradients_of_log_determinants_that_cancel_leave_the_others_their_digits(
    shape, inverse, device, implementation
):
    leaves = [t.requires_grad_() for t in arguments(shape, device=device)]
    y, logdet = actnorm(*leaves, inverse=inverse)
    cotangents = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view(y.shape)
    of_logdet = torch.tensor([-1e4, 1e4], dtype=y.dtype, device=device).repeat(len(logdet) // 2)
    of_both = torch.autograd.grad((y, logdet), leaves, (cotangents, of_logdet))[1]
    alone = torch.autograd.grad(actnorm(*leaves, inverse=inverse)[0], leaves, cotangents)[1]
    torch.testing.assert_close(of_both, alone, rtol=1e-12, atol=1e-12)
