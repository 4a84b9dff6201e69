"""Points between two batches: one share an example, the same by every implementation, uniform."""

import pytest
import scipy.stats
import torch

from genfuse import ops
from genfuse.ops import interpolate


def batches(shape, dtype=torch.float64, device="cpu"):
    make = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=make).to(device, dtype) for _ in range(2)]


def shares(real, fake, x):
    return (x - fake) / (real - fake)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 5), (6, 1025), (9, 3, 4, 5)], ids=str)
def test_one_seed_gives_the_same_points_by_every_implementation(shape, dtype, device, implementation):
    real, fake = batches(shape, dtype, device)
    x = interpolate(real, fake, torch.Generator(device).manual_seed(1))
    with ops.use("reference"):
        torch.testing.assert_close(x, interpolate(real, fake, torch.Generator(device).manual_seed(1)))
    assert x.dtype is dtype
    assert x.shape == real.shape


def test_an_example_has_one_share_and_the_shares_are_uniform(device, implementation):
    n = 300 if implementation == "triton" else 20_000
    real, fake = torch.ones(n, 3, device=device), torch.zeros(n, 3, device=device)
    x = interpolate(real, fake).cpu()
    assert torch.equal(x, x[:, :1].expand(-1, 3))
    assert scipy.stats.kstest(x[:, 0].numpy(), "uniform").pvalue > 1e-3
    neighbours = torch.corrcoef(torch.stack([x[1:, 0], x[:-1, 0]]))[0, 1]
    assert abs(neighbours) < 0.2


def test_points_lie_between_their_examples(device, implementation):
    real, fake = batches((40, 7), device=device)
    share = shares(real, fake, interpolate(real, fake))
    torch.testing.assert_close(share, share[:, :1].expand(-1, 7))
    assert 0 < share.min() < share.max() <= 1


def test_gradients_are_the_shares(device, implementation):
    real, fake = (t.requires_grad_() for t in batches((4, 3), device=device))
    x = interpolate(real, fake)
    greal, gfake = torch.autograd.grad(x, (real, fake), torch.ones_like(x))
    torch.testing.assert_close(greal, shares(real, fake, x).detach())
    torch.testing.assert_close(greal + gfake, torch.ones_like(x))


def test_any_strides_give_the_same(device, implementation):
    real, fake = batches((6, 4, 5, 3), device=device)
    seeds = [torch.Generator(device).manual_seed(2) for _ in range(3)]
    plain = interpolate(real, fake, seeds[0])
    channels_last = interpolate(real.contiguous(memory_format=torch.channels_last), fake, seeds[1])
    gaps = torch.zeros(12, 4, 5, 3, dtype=real.dtype, device=device)
    gaps[::2] = fake
    assert torch.equal(plain, channels_last)
    assert torch.equal(plain, interpolate(real, gaps[::2], seeds[2]))


def test_manual_seed_and_the_generator_rule_it(device):
    real, fake = batches((8, 2), device=device)
    torch.manual_seed(3)
    first, second = interpolate(real, fake), interpolate(real, fake)
    torch.manual_seed(3)
    assert torch.equal(first, interpolate(real, fake))
    assert not torch.equal(first, second)


def test_it_compiles_into_one_graph():
    real, fake = batches((8, 2))
    torch.manual_seed(0)
    compiled = torch.compile(lambda a, b: interpolate(a, b) * 2, fullgraph=True)(real, fake)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled, interpolate(real, fake) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fake": torch.zeros(4, 3)}, r"fake must have shape \(4, 2\), got \(4, 3\)"),
        ({"fake": torch.zeros(4, 2).double()}, "fake must have real's dtype torch.float32, got torch.float64"),
        ({"fake": torch.zeros(4, 2, device="meta")}, "fake must be on real's device cpu, got meta"),
        ({"real": torch.zeros(()), "fake": torch.zeros(())}, "real must have at least one axis"),
        ({"real": torch.zeros(2).int(), "fake": torch.zeros(2).int()}, "real must be float32, .* got torch.int32"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        interpolate(**{"real": torch.zeros(4, 2), "fake": torch.zeros(4, 2), **change})
