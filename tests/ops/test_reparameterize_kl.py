"""The reparameterised sample and its KL divergence: noise, extremes, shapes, bad input."""

import sys

import pytest
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

from benchmarks.operators import OPERATORS
from genfuse import ops
from genfuse.ops import reparameterize_kl

eager = OPERATORS["reparameterize_kl"].eager


def noise_of(shape, dtype=torch.float32, device="cpu", seed=0, **kwargs):
    zero = torch.zeros(shape, dtype=dtype, device=device)
    return reparameterize_kl(zero, zero, generator=torch.Generator(device).manual_seed(seed), **kwargs)[0]


def leaves(*shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    return (torch.randn(2, *shape, dtype=dtype).to(device).unbind()[i].clone().requires_grad_() for i in range(2))


def test_kl_is_that_of_torch_distributions(device, implementation):
    mu, logvar = leaves(7, 33, dtype=torch.float64, device=device)
    _, kl = reparameterize_kl(mu, logvar)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(torch.zeros_like(mu), 1.0)).sum(-1)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(ops.kl_per_dimension(mu, logvar).sum(-1), expected)


@pytest.mark.parametrize("shape", [(3, 8), (5, 7), (2, 1025)], ids=str)
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_seed_gives_the_same_noise_by_every_implementation(shape, samples, dtype, device, implementation):
    noise = noise_of(shape, dtype, device, samples=samples)
    with ops.using("reference"):
        expected = noise_of(shape, torch.float64, samples=samples)
        # On a GPU the seed comes from another generator, which gives other seeds.
        if device == "cuda":
            expected = noise_of(shape, torch.float64, device, samples=samples)
    tolerance = 2e-6 if dtype is torch.float32 else 1e-14
    torch.testing.assert_close(noise.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_noise_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    shape = (301, 77)  # rows that begin within a counter, and enough of them for several threads
    mu, logvar = (t.detach() for t in leaves(*shape))
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            m, lv = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
            z, kl = reparameterize_kl(m, lv, generator=torch.Generator().manual_seed(5))
            results.append((z, kl, *torch.autograd.grad((z**2).sum() + kl.sum(), (m, lv))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_million_normals_are_normal():
    noise = noise_of((1000, 1000), torch.float32).flatten()
    x = noise.double().numpy()
    n = x.size
    assert abs(x.mean()) < 4 / n**0.5
    assert abs((x**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    for lag in range(1, 9):  # neighbours share a counter, or a radius
        assert abs((x[lag:] * x[:-lag]).mean()) < 4 / n**0.5


def test_the_tails_are_as_long_as_32_bits_allow():
    x = noise_of((4096, 1024), torch.float32).abs()
    expected = x.numel() * 2 * scipy.stats.norm.sf(4.5)
    assert abs(int((x > 4.5).sum()) - expected) < 5 * expected**0.5
    assert 4.7 < float(x.max()) < 6.7


@pytest.mark.parametrize("samples", [None, 4])
def test_the_backward_pass_makes_the_same_noise_again(samples, device, implementation):
    mu, logvar = leaves(6, 19, device=device)
    z, _ = reparameterize_kl(mu, logvar, samples=samples)
    (glogvar,) = torch.autograd.grad(z.sum(), logvar)
    by_sample = 0.5 * (z - mu)  # dz/dlogvar = sigma eps / 2
    torch.testing.assert_close(glogvar, by_sample if samples is None else by_sample.sum(0), rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_z_is_stored_but_z():
    mu, logvar = leaves(4, 16)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        z, _ = reparameterize_kl(mu, logvar, samples=50)
    assert max(t.numel() for t in stored) == mu.numel() < z.numel()


@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_extreme_variances_give_what_the_reference_gives(value, device, implementation):
    mu = torch.ones(2, 5, device=device, requires_grad=True)
    logvar = torch.full((2, 5), value, device=device, requires_grad=True)
    generator = torch.Generator(device).manual_seed(0)
    z, kl = reparameterize_kl(mu, logvar, generator=generator)
    noise = noise_of((2, 5), device=device)
    expected_z, expected_kl = eager(mu, logvar, noise=noise)
    torch.testing.assert_close(z, expected_z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl, expected_kl)
    # The KL overflows at +100, the sample does not: its gradient is finite and must not meet inf times 0.
    for gradient, expected in zip(
        torch.autograd.grad(z.sum(), (mu, logvar)),
        torch.autograd.grad(expected_z.sum(), (mu, logvar)),
        strict=True,
    ):
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_pass_through_as_in_the_formula(bad, device, implementation):
    mu, logvar = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    mu[1, 3], logvar[2, 5] = bad, bad
    noise = torch.randn(4, 9, device=device)
    for got, expected in zip(reparameterize_kl(mu, logvar, noise=noise), eager(mu, logvar, noise=noise), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_halves_of_one_output_are_read_where_they_lie(device, implementation, monkeypatch):
    both = torch.randn(6, 10, device=device)
    mu, logvar = both.chunk(2, dim=-1)
    copies = []
    monkeypatch.setattr(ops._op, "rows", lambda t, rows=ops._op.rows: copies.append(rows(t)[0] is not t) or rows(t))
    noise = torch.randn(6, 5, device=device)
    got = reparameterize_kl(mu, logvar, noise=noise)
    assert not any(copies)
    for a, b in zip(got, eager(mu, logvar, noise=noise), strict=True):
        torch.testing.assert_close(a, b)


def strided(name):
    base = torch.randn(4, 6, 10)
    return {
        "transposed": base.transpose(0, 2),
        "every other column": base[..., ::2],
        "every other row": base[:, ::2],
        "expanded": base[:1].expand(4, 6, 10),
        "negative-free slice": base[1:, 2:, 3:],
        "one column": base[..., :1],
        "flat": base[0, 0],
    }[name]


@pytest.mark.parametrize(
    "layout",
    ["transposed", "every other column", "every other row", "expanded", "negative-free slice", "one column", "flat"],
)
def test_any_strides_give_the_same(layout, device, implementation):
    torch.manual_seed(0)
    mu, logvar = strided(layout).to(device), strided(layout).to(device)
    noise = torch.randn(mu.shape, device=device)
    results = []
    for copy in (False, True):
        m, lv = (t.clone(memory_format=torch.contiguous_format) if copy else t for t in (mu, logvar))
        m, lv = m.detach().requires_grad_(), lv.detach().requires_grad_()
        z, kl = reparameterize_kl(m, lv, noise=noise)
        results.append((z, kl, *torch.autograd.grad((z.sin().sum(), kl.sin().sum()), (m, lv))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[0][0].is_contiguous()


def test_several_samples_are_independent_and_share_one_kl(device, implementation):
    mu, logvar = torch.zeros(64, 64, device=device), torch.zeros(64, 64, device=device)
    z, kl = reparameterize_kl(mu, logvar, samples=3)
    assert z.shape == (3, 64, 64)
    assert kl.shape == (64,)
    correlation = torch.corrcoef(z.reshape(3, -1))
    assert float((correlation - torch.eye(3, device=device)).abs().max()) < 0.06


def test_given_noise_is_used_and_differentiated():
    mu, logvar = leaves(3, 4, dtype=torch.float64)
    noise = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    function = lambda *args: reparameterize_kl(*args[:2], samples=2, noise=args[2])  # noqa: E731
    assert torch.autograd.gradcheck(function, (mu, logvar, noise))
    assert torch.autograd.gradgradcheck(function, (mu, logvar, noise))


def test_only_one_of_the_outputs_need_be_used():
    mu, logvar = leaves(3, 4)
    z, kl = reparameterize_kl(mu, logvar)
    assert torch.equal(torch.autograd.grad(z.sum(), mu, retain_graph=True)[0], torch.ones(3, 4))
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), mu)[0], mu.detach())


def test_half_precision_is_kept_in_z_and_not_in_the_kl(device, implementation):
    for dtype in (torch.float16, torch.bfloat16):
        z, kl = reparameterize_kl(
            torch.ones(2, 600, dtype=dtype, device=device), torch.zeros(2, 600, dtype=dtype, device=device)
        )
        assert z.dtype is dtype
        assert kl.dtype is torch.float32
        assert torch.equal(kl, torch.full((2,), 300.0, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_pytorch_does(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    nothing = torch.zeros_like(every)
    z, _ = reparameterize_kl(every, nothing, noise=nothing)
    # NaN payloads may differ, and -0 + 0 is 0; all else is the same number again.
    assert torch.equal(z.float().nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))
    wide = torch.cat([torch.randn(4096) * 10.0**k for k in range(-9, 6)]).view(15, 4096)
    halves = wide.to(dtype)
    z, _ = reparameterize_kl(halves, torch.zeros_like(halves), noise=halves)
    torch.testing.assert_close(z, (halves.float() * 2).to(dtype), rtol=0, atol=0)


def test_it_compiles_into_one_graph(device):
    mu, logvar = leaves(16, 65, device=device)
    noise = torch.randn(16, 65, device=device)

    def step(mu, logvar, noise):
        z, kl = reparameterize_kl(mu, logvar, noise=noise)
        return (z**2).sum() + kl.sum()

    compiled = torch.compile(step, fullgraph=True)
    ours = torch.autograd.grad(compiled(mu, logvar, noise), (mu, logvar))
    eagerly = torch.autograd.grad(step(mu, logvar, noise), (mu, logvar))
    for a, b in zip(ours, eagerly, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_draws_are_those_of_eager_calls_and_agree_with_their_backward_pass():
    mu, logvar = leaves(8, 33)
    compiled = torch.compile(lambda mu, logvar: reparameterize_kl(mu, logvar)[0], fullgraph=True)
    torch.manual_seed(3)
    first, second = compiled(mu, logvar), compiled(mu, logvar)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(first, reparameterize_kl(mu, logvar)[0])
    (glogvar,) = torch.autograd.grad(first.sum(), logvar)
    torch.testing.assert_close(glogvar, 0.5 * (first - mu), rtol=1e-4, atol=1e-5)


def test_it_works_under_autocast_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    mu, logvar = leaves(4, 8)
    weight = torch.randn(8, 8, requires_grad=True)

    def step(mu, logvar):
        return reparameterize_kl(mu @ weight, logvar @ weight)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step(mu, logvar).dtype is torch.bfloat16
    torch.manual_seed(0)
    plain = torch.autograd.grad(step(mu, logvar).square().sum(), (mu, logvar))
    torch.manual_seed(0)
    again = torch.autograd.grad(checkpoint(step, mu, logvar, use_reentrant=False).square().sum(), (mu, logvar))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: {"mu": m, "logvar": m[:2]}, r"logvar must have shape \(3, 4\), got \(2, 4\)"),
        (lambda m: {"mu": m, "logvar": m.double()}, r"logvar must have mu's dtype torch.float32, got torch.float64"),
        (lambda m: {"mu": m, "logvar": m.to("meta")}, r"logvar must be on mu's device cpu, got meta"),
        (lambda m: {"mu": m.int(), "logvar": m.int()}, r"mu must be float32, .* got torch.int32"),
        (lambda m: {"mu": m[0, 0], "logvar": m[0, 0]}, r"mu must have at least one axis"),
        (lambda m: {"mu": m, "logvar": m, "samples": 0}, r"samples must be None or at least 1, got 0"),
        (
            lambda m: {"mu": m, "logvar": m, "samples": 2, "noise": m},
            r"noise must have shape \(2, 3, 4\), got \(3, 4\)",
        ),
        (lambda m: {"mu": m, "logvar": m, "noise": m.half()}, r"noise must have mu's dtype"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        reparameterize_kl(**arguments(torch.zeros(3, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_seed_stays_on_the_gpu_and_a_graph_can_be_captured():
    mu, logvar = torch.zeros(8, 64, device="cuda"), torch.zeros(8, 64, device="cuda")
    reparameterize_kl(mu, logvar)  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a synchronisation would fail the capture
        z, _ = reparameterize_kl(mu, logvar)
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z)


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
def test_gradients_over_many_samples_keep_their_digits(implementation):
    if "emulated" in sys.modules:
        pytest.skip("the CUDA kernel adds samples up in float32: in double it would spill registers")
    mu = torch.zeros(1, 3, requires_grad=True)
    z, _ = ops.reparameterize_kl(mu, torch.zeros(1, 3), samples=50_000)
    (found,) = torch.autograd.grad(z, mu, torch.full_like(z, 0.7))
    torch.testing.assert_close(found, torch.full((1, 3), 50_000 * 0.7), rtol=16 * 2**-23, atol=0)
