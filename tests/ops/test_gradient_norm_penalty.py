"""The penalty on gradients' norms: by example, at norm 0, in 16 bits, to second order, any layout, bad input."""

import pytest
import torch

from benchmarks.operators import OPERATORS
from genfuse import ops
from genfuse.ops import gradient_norm_penalty


@pytest.fixture(params=[False, True], ids=["two-sided", "one-sided"])
def one_sided(request):
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(5,), (4, 7), (3, 2, 5, 6), (2, 1, 1500)], ids=str)
def test_it_is_the_squared_distance_of_each_examples_norm(shape, reduction, one_sided, device, implementation):
    gradient = torch.randn(shape, dtype=torch.float64, device=device)
    norms = torch.stack([torch.linalg.vector_norm(example) for example in gradient])
    target = float(norms.median())
    excess = (norms - target).clamp(min=0) if one_sided else norms - target
    expected = {"mean": (excess**2).mean(), "sum": (excess**2).sum(), "none": excess**2}[reduction]
    result = gradient_norm_penalty(gradient, target=target, one_sided=one_sided, reduction=reduction)
    torch.testing.assert_close(result, expected)


def test_norms_are_of_examples_and_not_of_the_batch(device, implementation):
    # The batch's norm is 1 where no example's is: a penalty on it would be 0.
    gradient = torch.full((4, 9), (1 / 36) ** 0.5, device=device)
    assert float(torch.linalg.vector_norm(gradient)) == pytest.approx(1)
    assert float(gradient_norm_penalty(gradient)) == pytest.approx(0.25)


def test_target_0_is_the_squared_norm_with_gradient_2g(one_sided, device, implementation):
    gradient = torch.randn(3, 8, device=device) * torch.tensor([[1.0], [1e-15], [0.0]], device=device)
    gradient.requires_grad_()
    penalty = gradient_norm_penalty(gradient, target=0.0, one_sided=one_sided, reduction="sum")
    torch.testing.assert_close(penalty, (gradient**2).sum())
    (derivative,) = torch.autograd.grad(penalty, gradient)
    assert torch.equal(derivative, 2 * gradient)


def test_derivatives_at_norm_0_are_finite(one_sided, device, implementation):
    gradient = torch.zeros(2, 5, device=device, requires_grad=True)
    penalty = gradient_norm_penalty(gradient, one_sided=one_sided)
    assert penalty == (0 if one_sided else 1)
    (first,) = torch.autograd.grad(penalty, gradient, create_graph=True)
    assert not first.any()
    (second,) = torch.autograd.grad(first.sum(), gradient)
    assert second.isfinite().all()


def test_eps_limits_the_derivative_and_not_the_value(device, implementation):
    gradient = torch.full((1, 4), 5e-4, dtype=torch.float64, device=device, requires_grad=True)  # of norm 1e-3
    for eps in (1e-12, 1e-2):
        penalty = gradient_norm_penalty(gradient, eps=eps)
        torch.testing.assert_close(penalty.item(), (1 - 1e-3) ** 2)
        (derivative,) = torch.autograd.grad(penalty, gradient)
        torch.testing.assert_close(derivative, 2 * (1 - 1 / max(1e-3, eps)) * gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_derivatives_agree_with_finite_differences(target, reduction, one_sided, device, implementation):
    gradient = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    gradient *= torch.tensor([0.3, 0.6, 1.5, 2.0], device=device)[:, None, None] / gradient.flatten(1).norm(dim=1).view(
        4, 1, 1
    )
    settings = {"target": target, "one_sided": one_sided, "reduction": reduction}
    function = lambda g: gradient_norm_penalty(g, **settings)  # noqa: E731
    assert torch.autograd.gradcheck(function, gradient.requires_grad_())
    assert torch.autograd.gradgradcheck(function, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_second_derivatives_are_those_of_autograd(dtype, one_sided, device, implementation):
    torch.manual_seed(3)
    gradient, v = (torch.randn(6, 1100, device=device, dtype=dtype) * 0.04 for _ in range(2))
    factor = torch.randn(6, device=device)

    def derivatives(function, g, v, factor):
        g, v, factor = (t.detach().clone().requires_grad_() for t in (g, v, factor))
        (first,) = torch.autograd.grad(function(g), g, factor, create_graph=True)
        return torch.autograd.grad((first * v).sum(), (g, factor))

    ours = derivatives(lambda g: gradient_norm_penalty(g, one_sided=one_sided, reduction="none"), gradient, v, factor)
    eager = OPERATORS["gradient_norm_penalty"].eager
    truth = derivatives(
        lambda g: eager(g, one_sided=one_sided, reduction="none"), gradient.double(), v.double(), factor.double()
    )
    tolerance = {"atol": 8 * torch.finfo(dtype).eps, "rtol": 8 * torch.finfo(dtype).eps}
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_the_third_order_is_autograds():
    gradient = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def third(function):
        result = function(gradient)
        for _ in range(3):
            (result,) = torch.autograd.grad((result**2).sum(), gradient, create_graph=True)
        return result

    torch.testing.assert_close(third(gradient_norm_penalty), third(OPERATORS["gradient_norm_penalty"].eager))


def test_a_critics_weights_are_trained_through_it(device, implementation):
    # The penalty's own use: its gradient goes on through the graph that made the critic's gradient.
    critic = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(device).double()
    x = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)

    def of_weights(penalty):
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return torch.autograd.grad(penalty(gradient), list(critic.parameters())[:3])

    eager = OPERATORS["gradient_norm_penalty"].eager
    torch.testing.assert_close(of_weights(gradient_norm_penalty), of_weights(eager))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_squares_that_16_bits_cannot_hold_are_summed_in_float32(dtype, device, implementation):
    gradient = torch.full((3, 5000), 1000.0, dtype=dtype, device=device, requires_grad=True)
    penalty = gradient_norm_penalty(gradient, reduction="sum")
    assert penalty.dtype is torch.float32
    torch.testing.assert_close(penalty.double(), 3 * (gradient.double()[0].norm() - 1) ** 2, rtol=1e-5, atol=0)
    (derivative,) = torch.autograd.grad(penalty, gradient)
    assert derivative.dtype is dtype
    torch.testing.assert_close(derivative, torch.full_like(gradient, 2000.0), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    "layout", ["contiguous", "slice", "transposed", "channels last", "inner slice", "expanded examples", "expanded"]
)
def test_any_strides_give_the_same(layout, device, implementation):
    gradient = {
        "contiguous": torch.randn(5, 3, 4, 6, device=device),
        "slice": torch.randn(5, 12, device=device)[:, 3:7],
        "transposed": torch.randn(4, 5, device=device).t(),
        "channels last": torch.randn(5, 3, 4, 6, device=device).to(memory_format=torch.channels_last),
        "inner slice": torch.randn(5, 3, 4, 6, device=device)[..., 1:3],
        "expanded examples": torch.randn(4, device=device).expand(5, 4),
        "expanded": torch.randn(5, 1, device=device).expand(5, 4),
    }[layout].requires_grad_()
    copy = gradient.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    factor = torch.randn(5, device=device)
    ours, plain = (gradient_norm_penalty(g, reduction="none") for g in (gradient, copy))
    torch.testing.assert_close(ours, plain)
    of_ours, of_plain = (
        torch.autograd.grad(penalty, g, factor, create_graph=True)[0]
        for penalty, g in ((ours, gradient), (plain, copy))
    )
    torch.testing.assert_close(of_ours, of_plain)
    second = (torch.autograd.grad((of**2).sum(), g)[0] for of, g in ((of_ours, gradient), (of_plain, copy)))
    torch.testing.assert_close(*second)


def test_images_in_either_memory_format_are_not_copied(monkeypatch):
    copies = []
    monkeypatch.setattr(ops._op, "rows", lambda t, rows=ops._op.rows: copies.append(rows(t)[0] is not t) or rows(t))
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    flat = ops._op.flatten(images, ops._op.order(images))
    assert flat.data_ptr() == images.data_ptr()
    with ops.using("native"):
        gradient_norm_penalty(images)
        gradient_norm_penalty(torch.randn(6, 20)[:, 3:11])
    assert copies == [False, False]


def test_rows_too_large_for_the_caches_are_written_right():
    gradient = torch.randn(7, 100_003, requires_grad=True)  # rows of odd length start anywhere in a line
    wide = gradient.detach().double().requires_grad_()
    v = torch.randn_like(gradient)
    ours, truth = (torch.autograd.grad(gradient_norm_penalty(g), g, create_graph=True)[0] for g in (gradient, wide))
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-9)
    (ours,), (truth,) = torch.autograd.grad(ours, gradient, v), torch.autograd.grad(truth, wide, v.double())
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-9)


def test_any_number_of_threads_gives_the_same():
    gradient = torch.randn(50, 16_001, requires_grad=True)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            penalty = gradient_norm_penalty(gradient)
            results.append((penalty, *torch.autograd.grad(penalty, gradient)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (0,)], ids=str)
def test_nothing_has_the_penalty_that_autograd_gives_it(shape, device, implementation):
    gradient = torch.zeros(shape, device=device, requires_grad=True)
    examples = torch.ones(shape[0], device=device)  # of norm 0, one away from the target
    for reduction, expected in (("mean", examples.mean()), ("sum", examples.sum()), ("none", examples)):
        penalty = gradient_norm_penalty(gradient, reduction=reduction)
        torch.testing.assert_close(penalty, expected, equal_nan=True)
        assert torch.autograd.grad(penalty.sum(), gradient)[0].shape == shape


def test_one_bad_example_leaves_the_others_alone(one_sided, device, implementation):
    gradient = torch.randn(4, 5, device=device)
    good = gradient_norm_penalty(gradient, one_sided=one_sided, reduction="none")
    gradient[1, 2], gradient[2, 0] = torch.nan, -torch.inf
    bad = gradient_norm_penalty(gradient, one_sided=one_sided, reduction="none")
    assert torch.equal(bad[[0, 3]], good[[0, 3]])
    assert bad[1].isnan()
    assert bad[2] == torch.inf


def test_pytorchs_operator_check_passes_for_the_double_backward(device, implementation):
    gradient, v = torch.randn(2, 3, 65, device=device)
    norm = gradient.norm(dim=1)
    kernel = ops._op.KERNELS["gradient_norm_penalty_double_backward"]
    for reduction, gpenalty in (("mean", norm.sum()), ("none", norm)):
        torch.library.opcheck(kernel.operator, (v, gpenalty, gradient, norm, 1.0, False, reduction, 1e-12))


def test_it_compiles_into_one_graph():
    gradient = torch.randn(4, 2, 5, requires_grad=True)
    step = lambda g: gradient_norm_penalty(g, one_sided=True) * 10  # noqa: E731
    compiled = torch.compile(step, fullgraph=True)
    ours, eagerly = (torch.autograd.grad(f(gradient), gradient) for f in (compiled, step))
    torch.testing.assert_close(ours, eagerly)


@pytest.mark.parametrize(
    ("gradient", "settings", "message"),
    [
        (torch.zeros(()), {}, "gradient must have at least one axis, got a scalar"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, "gradient must be float32, .* got torch.int64"),
        (torch.zeros(2, 3), {"reduction": "batchmean"}, "reduction must be .* got 'batchmean'"),
        (torch.zeros(2, 3), {"target": -1.0}, "target must be .* at least 0, got -1.0"),
        (torch.zeros(2, 3), {"target": float("nan")}, "target must be .* got nan"),
        (torch.zeros(2, 3), {"eps": 0.0}, "eps must be above 0, got 0.0"),
    ],
)
def test_a_bad_argument_is_named(gradient, settings, message):
    with pytest.raises(ValueError, match=message):
        gradient_norm_penalty(gradient, **settings)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_are_addressed():
    n = 2**31 // 3 + 4096
    try:
        gradient = torch.zeros(3, n, dtype=torch.bfloat16)
        gradient[2, -1] = 3.0
        derivative = torch.autograd.grad(gradient_norm_penalty(gradient.requires_grad_()), gradient)[0]
    except RuntimeError as error:
        pytest.skip(f"needs 9 GB: {error}")
    assert float(derivative[2, -1]) == pytest.approx(2 / 3 * (3 - 1), rel=1e-2)
