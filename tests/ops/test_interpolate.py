"""Points between real and fake: on the line, uniform along it, the same everywhere, derivatives, bad input."""

import pytest
import scipy.stats
import torch

from genfuse import ops
from genfuse.ops import _philox, interpolate

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def pair(*shape, dtype=torch.float64, device="cpu"):
    real, fake = torch.randn((2, *shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return real.to(device, dtype), fake.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (9, 3), (4, 2, 5, 6), (3, 1500)], ids=str)
def test_one_seed_gives_the_same_points_by_every_implementation(shape, dtype, device, implementation):
    real, fake = pair(*shape, dtype=dtype, device=device)
    points = interpolate(real, fake, torch.Generator(device).manual_seed(1))
    seed = _philox.seed(real, torch.Generator(device).manual_seed(1))
    epsilon = _philox.uniform(seed, shape[:1]).view(-1, *[1] * (len(shape) - 1))
    expected = epsilon * real.double() + (1 - epsilon) * fake.double()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(points.double(), expected, rtol=tolerance, atol=tolerance)
    assert points.dtype is dtype
    assert torch.equal(points, interpolate(real, fake, torch.Generator(device).manual_seed(1)))
    assert not torch.equal(points, interpolate(real, fake, torch.Generator(device).manual_seed(2)))


def test_every_example_has_one_uniform_epsilon(device, implementation):
    n = 500 if implementation == "triton" else 5000
    points = interpolate(torch.ones(n, 3, device=device), torch.zeros(n, 3, device=device))
    assert torch.equal(points[:, 0], points[:, 2])
    assert scipy.stats.kstest(points[:, 0].cpu().numpy(), "uniform").pvalue > 1e-3
    centred = points[:, 0] - 0.5
    for lag in range(1, 5):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 5 / 12 / n**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_points_lie_between_real_and_fake(dtype, device, implementation):
    real, fake = pair(100, 8, dtype=dtype, device=device)
    points, slack = interpolate(real, fake).double(), 2 * torch.finfo(dtype).eps
    low, high = torch.minimum(real, fake).double(), torch.maximum(real, fake).double()
    assert (points >= low - slack * low.abs()).all()
    assert (points <= high + slack * high.abs()).all()


def test_a_given_epsilon_is_the_share_of_real(device, implementation):
    real, fake = pair(3, 2, 2, device=device)
    points = interpolate(real, fake, epsilon=torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64, device=device))
    torch.testing.assert_close(points, torch.stack([fake[0], real[1], 0.25 * real[2] + 0.75 * fake[2]]))


def test_derivatives_of_first_and_second_order(device, implementation):
    real, fake = (t.requires_grad_() for t in pair(3, 2, 2, device=device))
    epsilon = torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)

    def drawn(real, fake):
        return interpolate(real, fake, torch.Generator(device).manual_seed(0))

    def given(real, fake, epsilon):
        return interpolate(real, fake, epsilon=epsilon)

    for function, leaves in ((drawn, (real, fake)), (given, (real, fake, epsilon))):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda fake: drawn(real.detach(), fake), fake)


def test_the_backward_pass_makes_the_same_epsilon_again(device, implementation):
    real, fake = (t.requires_grad_() for t in pair(5, 3, dtype=torch.float32, device=device))
    of_real, of_fake = torch.autograd.grad(interpolate(real, fake).sum(), (real, fake))
    torch.testing.assert_close(of_real + of_fake, torch.ones_like(real))
    torch.testing.assert_close(of_real * real + of_fake * fake, interpolate(real, fake, epsilon=of_real[:, 0].detach()))


@pytest.mark.parametrize("layout", ["slice", "transposed", "channels last", "mixed", "expanded"])
def test_any_strides_give_the_same(layout, device, implementation):
    last = {"memory_format": torch.channels_last}
    images = pair(4, 3, 5, 6, device=device)
    real, fake = {
        "slice": [t[:, 1:3] for t in pair(4, 5, device=device)],
        "transposed": [t.t() for t in pair(5, 4, device=device)],
        "channels last": [t.to(**last) for t in images],
        "mixed": [images[0].to(**last), images[1]],
        "expanded": [t.expand(4, 5) for t in pair(5, device=device)],
    }[layout]
    real.requires_grad_()
    points = interpolate(real, fake, torch.Generator(device).manual_seed(0))
    plain = interpolate(
        real.clone(memory_format=torch.contiguous_format), fake.contiguous(), torch.Generator(device).manual_seed(0)
    )
    torch.testing.assert_close(points, plain)
    torch.testing.assert_close(*(torch.autograd.grad((p**2).sum(), real) for p in (points, plain)))


def test_images_keep_their_memory_format_and_nothing_of_their_size_is_made_beside_the_result():
    real, fake = (t.to(memory_format=torch.channels_last) for t in pair(4, 3, 32, 32, dtype=torch.float32))
    with ops.using("native"), torch.profiler.profile(profile_memory=True) as profile:
        points = interpolate(real, fake)
    assert points.is_contiguous(memory_format=torch.channels_last)
    allocated = [event.cpu_memory_usage for event in profile.events() if event.cpu_parent is None]
    assert sum(use for use in allocated if use > 0) < 1.5 * points.nbytes


def test_any_number_of_threads_gives_the_same():
    real, fake = pair(301, 777, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        points = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            points.append(interpolate(real, fake, torch.Generator().manual_seed(0)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(points[0], points[1])
    assert torch.equal(points[0], points[2])


def test_it_compiles_into_one_graph_and_draws_as_eager_calls_do():
    real, fake = (t.requires_grad_() for t in pair(4, 2, 3, dtype=torch.float32))
    step = lambda real, fake: interpolate(real, fake) * 2  # noqa: E731
    compiled = torch.compile(step, fullgraph=True)
    torch.manual_seed(0)
    first = compiled(real, fake)
    torch.manual_seed(0)
    eagerly = step(real, fake)
    torch.testing.assert_close(first, eagerly)
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), (real, fake)), torch.autograd.grad(eagerly.sum(), (real, fake))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 3), torch.zeros(4, 2)), r"fake must have shape \(4, 3\), got \(4, 2\)"),
        ((torch.zeros(4, 3), torch.zeros(4, 3).half()), "fake must have real's dtype torch.float32, got torch.float16"),
        ((torch.zeros(4, 3, dtype=torch.uint8),) * 2, "real must be float32, .* got torch.uint8"),
        ((torch.zeros(()),) * 2, "real must have at least one axis"),
        ((torch.zeros(4, 3),) * 2 + (torch.zeros(4, 1),), r"epsilon must have shape \(4,\), got \(4, 1\)"),
        ((torch.zeros(4, 3),) * 2 + (torch.zeros(4).double(),), "epsilon must have real's dtype torch.float32, got"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    real, fake, *epsilon = arguments
    with pytest.raises(ValueError, match=message):
        interpolate(real, fake, epsilon=epsilon[0] if epsilon else None)
