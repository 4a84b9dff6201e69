"""The forward process of diffusion: noise, targets, gradients of schedules, shapes, bad input."""

import math

import pytest
import scipy.stats
import torch

from benchmarks.operators import OPERATORS
from genfuse import ops
from genfuse.ops import diffuse
from genfuse.ops._diffuse import TARGETS

eager = OPERATORS["diffuse"].eager.func


def example(*shape, dtype=torch.float32, device="cpu"):
    """Data, and a schedule of which every example has its own place."""
    make = torch.Generator().manual_seed(1)
    x0, t = torch.randn(shape, generator=make), torch.rand(shape[0], generator=make)
    return tuple(v.to(device, dtype) for v in (x0, (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()))


def noise_of(shape, dtype=torch.float32, device="cpu", seed=0):
    zero = torch.zeros(shape, dtype=dtype, device=device)
    return diffuse(zero, 0.0, 1.0, generator=torch.Generator(device).manual_seed(seed))[1]


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (700, 2), (5, 7), (2, 1025), (3, 2, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_seed_gives_the_same_noise_by_every_implementation(shape, dtype, device, implementation):
    noise = noise_of(shape, dtype, device)
    with ops.using("reference"):
        expected = noise_of(shape, torch.float64, device)
    tolerance = 2e-6 if dtype is torch.float32 else 1e-14
    torch.testing.assert_close(noise.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_noise_is_numbered_as_that_of_other_operators():
    zero = torch.zeros(7, 33)
    z, _ = ops.reparameterize_kl(zero, zero, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise_of((7, 33)), z)


def test_a_million_noises_are_normal():
    x = noise_of((1000, 1000)).flatten().double().numpy()
    assert abs(x.mean()) < 4e-3
    assert abs((x**2).mean() - 1) < 4e-3 * 2**0.5
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3


def test_the_noisy_sample_has_the_moments_of_the_forward_process():
    x0, (alpha, sigma) = torch.full((3, 200_000), 2.0), torch.tensor([[1.0, 0.8, 0.1], [0.0, 0.6, 40.0]])
    x_t, _ = diffuse(x0, alpha, sigma)
    assert torch.equal(x_t[0], x0[0])
    for row, a, s in zip(x_t[1:].double().numpy(), alpha[1:].tolist(), sigma[1:].tolist(), strict=True):
        assert scipy.stats.kstest(row, "norm", args=(2 * a, s)).pvalue > 1e-3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (4, 3, 8, 9), (700, 2)], ids=str)
def test_each_target_is_that_of_the_noise_in_the_sample(target, shape, device, implementation):
    x0, alpha, sigma = example(*shape, device=device)
    x_t, got = diffuse(x0, alpha, sigma, target=target, generator=torch.Generator(device).manual_seed(3))
    noise = noise_of(shape, device=device, seed=3)
    expected_x_t, expected = eager(x0, alpha, sigma, target=target, noise=noise)
    torch.testing.assert_close(x_t, expected_x_t)
    torch.testing.assert_close(got, expected)
    assert x_t.is_contiguous()


def test_data_and_noise_come_back_from_the_sample_and_v():
    """Salimans & Ho (arXiv 2202.00512), appendix D: x0 = alpha x_t - sigma v, eps = sigma x_t + alpha v."""
    x0, alpha, sigma = example(8, 20, dtype=torch.float64)
    x_t, v = diffuse(x0, alpha, sigma, target="v", generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha[:, None], sigma[:, None]
    torch.testing.assert_close(alpha * x_t - sigma * v, x0)
    torch.testing.assert_close(sigma * x_t + alpha * v, noise_of((8, 20), torch.float64))


def test_the_velocity_is_the_derivative_of_a_straight_path():
    x0, t = torch.randn(5, 9, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    x_t, velocity = diffuse(x0, 1 - t, t, target="velocity", generator=torch.Generator().manual_seed(0))
    noise = noise_of((5, 9), torch.float64)
    _, derivative = torch.func.jvp(lambda t: eager(x0, 1 - t, t, noise=noise)[0], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(velocity, derivative)
    torch.testing.assert_close(x_t + (1 - t)[:, None] * velocity, noise)


def test_a_target_that_is_there_already_is_not_stored_again():
    x0, alpha, sigma = example(3, 2, 4)
    noise = torch.randn_like(x0)
    assert diffuse(x0, alpha, sigma, target="x0")[1] is x0
    assert diffuse(x0, alpha, sigma, noise=noise)[1] is noise


def test_nothing_is_stored_for_the_backward_pass_but_the_arguments():
    x0, alpha, sigma = (t.requires_grad_() for t in example(4, 50))
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        _, noise = diffuse(x0, alpha, sigma)
    assert {t.data_ptr() for t in stored if t.numel() == x0.numel()} == {x0.data_ptr()}
    assert not noise.requires_grad


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("given", [False, True])
def test_derivatives_agree_with_finite_differences(target, given):
    inputs = [t.requires_grad_() for t in example(3, 2, 2, dtype=torch.float64)]
    if given:
        inputs.append(torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True))

    def function(x0, alpha, sigma, noise=None):
        torch.manual_seed(0)
        return diffuse(x0, alpha, sigma, target=target, noise=noise)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_gradients_are_those_of_the_formula_where_one_output_is_used(target, used, device, implementation):
    arguments = [t.requires_grad_() for t in example(5, 1030, device=device)]
    ours = diffuse(*arguments, target=target, generator=torch.Generator(device).manual_seed(2))
    theirs = eager(*arguments, target=target, noise=noise_of((5, 1030), device=device, seed=2))
    results = []
    for outputs in (ours, theirs):
        output = outputs[used.index(True)]
        if output.requires_grad:
            wanted = torch.autograd.grad(output.sin().sum(), arguments, materialize_grads=True)
            results.append(wanted)
    for a, b in zip(*results, strict=True) if results else ():
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
    assert len(results) == (0 if used == (False, True) and target == "noise" else 2)


def strided(name):
    base = torch.randn(6, 4, 10)
    return {
        "transposed": base.transpose(0, 2),
        "every other column": base[..., ::2],
        "every other row": base[::2],
        "part of every row": base.flatten(1)[:, 3:24],
        "expanded": base[:1].expand(6, 4, 10),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one axis": base[:, 0, 0],
    }[name]


@pytest.mark.parametrize(
    "layout",
    ["transposed", "every other column", "every other row", "part of every row", "expanded", "channels last",
     "one axis"],
)  # fmt: skip
def test_any_strides_give_the_same(layout, device, implementation):
    torch.manual_seed(0)
    x0 = strided(layout).to(device)
    schedule = torch.rand(2, 2 * len(x0), device=device)[:, ::2]
    results = []
    for copy in (False, True):
        arguments = [t.contiguous() if copy else t for t in (x0, *schedule)]
        arguments = [t.detach().requires_grad_() for t in arguments]
        x_t, v = diffuse(*arguments, target="v", generator=torch.Generator(device).manual_seed(0))
        results.append((x_t, v, *torch.autograd.grad(x_t.sin().sum() + v.cos().sum(), arguments)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[0][0].is_contiguous()


def test_the_number_of_threads_changes_nothing():
    threads = torch.get_num_threads()
    arguments = [t.requires_grad_() for t in example(301, 77)]
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            x_t, v = diffuse(*arguments, target="v", generator=torch.Generator().manual_seed(5))
            results.append((x_t, v, *torch.autograd.grad((x_t**2).sum() + v.sum(), arguments)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_number_serves_all_examples_and_a_learned_one_gets_its_gradient(device, implementation):
    x0, *_ = example(4, 6, device=device)
    noise = torch.randn_like(x0)
    learned = torch.tensor(0.5, device=device, requires_grad=True)
    x_t, _ = diffuse(x0, learned, 2, noise=noise)
    torch.testing.assert_close(x_t, 0.5 * x0 + 2 * noise)
    torch.testing.assert_close(torch.autograd.grad(x_t.sum(), learned)[0], x0.sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_and_inf_pass_through_as_in_the_formula(bad, target, device, implementation):
    x0, alpha, sigma = example(4, 9, device=device)
    noise = torch.randn_like(x0)
    x0[1, 3], noise[2, 5] = bad, bad
    got = diffuse(x0, alpha, sigma, target=target, noise=noise)
    for a, b in zip(got, eager(x0, alpha, sigma, target=target, noise=noise), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_computed_in_float32_under_a_float32_schedule(dtype, device, implementation):
    x0, alpha, sigma = example(3, 40, device=device)
    x0, noise = x0.to(dtype), torch.randn(3, 40, device=device).to(dtype)
    for alpha_, sigma_ in ((alpha, sigma), (alpha.to(dtype), sigma.to(dtype))):
        x_t, v = diffuse(x0, alpha_, sigma_, target="v", noise=noise)
        expected = eager(x0.float(), alpha_.float(), sigma_.float(), target="v", noise=noise.float())
        for a, b in zip((x_t, v), expected, strict=True):
            assert a.dtype is dtype
            # One rounding, which Triton's interpreter makes towards zero.
            torch.testing.assert_close(a.float(), b, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_shapes_without_elements_work(target, device, implementation):
    for shape in ((0, 3, 4), (3, 0, 4), (0, 0), (0,)):
        arguments = [t.requires_grad_() for t in (torch.empty(shape, device=device),
                                                  *torch.ones(2, shape[0], device=device).unbind())]  # fmt: skip
        x_t, of_target = diffuse(*arguments, target=target)
        assert x_t.shape == of_target.shape == shape
        gradients = torch.autograd.grad(x_t.sum(), arguments)
        assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_into_one_graph_and_draws_as_eager_calls_do(target):
    arguments = [t.requires_grad_() for t in example(8, 3, 5)]

    def step(x0, alpha, sigma):
        x_t, of_target = diffuse(x0, alpha, sigma, target=target)
        return x_t, of_target * 1

    compiled = torch.compile(step, fullgraph=True)
    results = []
    for function in (compiled, step):
        torch.manual_seed(3)
        x_t, of_target = function(*arguments)
        results.append((x_t, of_target, *torch.autograd.grad((x_t * of_target.detach()).sum(), arguments)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(compiled(*arguments)[0], results[0][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": torch.ones(2)}, r"alpha must have shape \(3,\), got \(2,\)"),
        ({"sigma": torch.ones(3, 1)}, r"sigma must have shape \(3,\), got \(3, 1\)"),
        ({"sigma": torch.ones(3).double()}, r"sigma must have x0's dtype torch.float32, got torch.float64"),
        ({"alpha": torch.ones(3, device="meta")}, r"alpha must be on x0's device cpu, got meta"),
        ({"noise": torch.ones(3, 5)}, r"noise must have shape \(3, 4\), got \(3, 5\)"),
        ({"noise": torch.ones(3, 4).half()}, r"noise must have x0's dtype torch.float32, got torch.float16"),
        ({"x0": torch.ones(3, 4).int()}, r"x0 must be float32, .* got torch.int32"),
        ({"x0": torch.tensor(1.0)}, r"x0 must have at least one axis"),
        ({"target": "eps"}, r"target must be one of x0, noise, v, velocity, got 'eps'"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    arguments = {"x0": torch.zeros(3, 4), "alpha": torch.ones(3), "sigma": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        diffuse(**{**arguments, **change})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_seed_stays_on_the_gpu_and_a_graph_can_be_captured():
    x0 = torch.zeros(8, 64, device="cuda")
    schedule = torch.ones(2, 8, device="cuda").unbind()
    diffuse(x0, *schedule)  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a synchronisation would fail the capture
        x_t, _ = diffuse(x0, *schedule)
    graph.replay()
    first = x_t.clone()
    graph.replay()
    assert not torch.equal(first, x_t)
