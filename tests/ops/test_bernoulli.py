"""Bernoulli draws: the same by every implementation, as likely as they should be, never impossible ones."""

import pytest
import scipy.stats
import torch

from genfuse import ops
from genfuse.ops import _philox, bernoulli


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1025,), (7, 8, 33)], ids=str)
def test_one_seed_gives_the_same_draws_by_every_implementation(shape, dtype, device, implementation):
    p = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    drawn = bernoulli(p, generator=torch.Generator(device).manual_seed(1))
    with ops.using("reference"):
        assert torch.equal(drawn, bernoulli(p, generator=torch.Generator(device).manual_seed(1)))
    assert drawn.dtype is dtype
    assert drawn.shape == p.shape


def test_each_probability_is_met(device, implementation):
    n = 4000 if implementation == "triton" else 100_000
    levels = torch.arange(256, device=device) / 255
    ones = bernoulli(levels[:, None].expand(256, n)).sum(1).cpu().numpy()
    tails = [scipy.stats.binomtest(int(k), n, float(p)).pvalue for k, p in zip(ones[1:-1], levels[1:-1], strict=True)]
    assert min(tails) > 1e-6
    assert scipy.stats.kstest(tails, "uniform").pvalue > 1e-3
    assert ones[0] == 0
    assert ones[-1] == n


def test_certain_draws_are_certain(device, implementation):
    # The largest word, whose uniform is 1 in float32, comes up once in 4 billion: take p on both sides of [0, 1].
    p = torch.tensor([-1.0, 0.0, 1.0, 2.0, float("nan"), float("inf"), -float("inf")], device=device).repeat(100, 1)
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0], device=device)
    assert torch.equal(bernoulli(p), expected.expand_as(p))


def test_neighbours_are_independent():
    x = bernoulli(torch.full((1000, 1000), 0.5)).flatten() - 0.5
    for lag in range(1, 9):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 0.25 * 4 / 1000


def test_any_strides_and_any_number_of_threads_give_the_same():
    p = torch.rand(301, 77)
    threads = torch.get_num_threads()
    try:
        drawn = []
        for n, layout in ((1, p), (2, p.t().contiguous().t()), (3, torch.stack([p, p], -1)[..., 0])):
            torch.set_num_threads(n)
            drawn.append(bernoulli(layout, generator=torch.Generator().manual_seed(2)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_it_compiles_into_one_graph_and_draws_as_eager_calls_do():
    p = torch.rand(64, 65, requires_grad=True)
    compiled = torch.compile(lambda p: bernoulli(p) * 2, fullgraph=True)
    torch.manual_seed(0)
    first, second = compiled(p), compiled(p)
    torch.manual_seed(0)
    assert torch.equal(first, bernoulli(p) * 2)
    assert not torch.equal(first, second)
    assert not first.requires_grad


def test_a_dtype_without_probabilities_is_refused():
    with pytest.raises(ValueError, match=r"p must be float32, .* got torch.uint8"):
        bernoulli(torch.ones(3, dtype=torch.uint8))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_are_addressed():
    n = 2**31 + 4096
    try:
        p = torch.full((n,), 0.5, dtype=torch.bfloat16)
        drawn = bernoulli(p, generator=torch.Generator().manual_seed(0))
    except RuntimeError as error:
        pytest.skip(f"needs 9 GB: {error}")
    seed = _philox.seed(p, torch.Generator().manual_seed(0))
    words = torch.stack(_philox.philox(torch.arange(2**31 // 4, n // 4), seed), dim=-1)
    expected = ((words.double() + 0.5) * 2.0**-32).float() <= 0.5
    assert torch.equal(drawn[2**31 :] == 1, expected.flatten())
