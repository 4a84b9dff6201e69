"""`ops.mixed_log_prob` beside distributions of scipy and PyTorch."""

import numpy as np
import pytest
import torch
from scipy import stats

from genfuse import ops

by_kernels = pytest.mark.parametrize("implementation", ["native"], indirect=True)

BLOCK = torch.tensor([0, 0, 1, 1, 1, 1])


def arguments(examples=7, numbers=2, dtype=torch.float64, samples=()):
    make = torch.Generator().manual_seed(0)
    raw = torch.randn(*samples, examples, 9 * numbers + 6, generator=make, dtype=torch.float64)
    low = torch.randn(examples, numbers, generator=make, dtype=torch.float64)
    high = low + torch.rand(examples, numbers, generator=make, dtype=torch.float64)
    chosen = torch.tensor([[i % 2, 2 + i % 4] for i in range(examples)]).view(examples, 2)
    return raw.to(dtype), low.to(dtype), high.to(dtype), chosen, BLOCK


@by_kernels
def test_it_is_the_sum_of_a_logistic_mixtures_mass_and_of_a_softmax(implementation):
    raw, low, high, chosen, block = arguments()
    expected = torch.distributions.Categorical(logits=raw[:, 18:20]).log_prob(chosen[:, 0])
    expected += torch.distributions.Categorical(logits=raw[:, 20:]).log_prob(chosen[:, 1] - 2)
    for p in range(2):
        logits, mu, scale = raw[:, 9 * p : 9 * p + 9].numpy().reshape(7, 3, 3).transpose(1, 0, 2)
        of = stats.logistic(mu, np.exp(7 * np.tanh((scale - 1) / 7)))
        mass = of.cdf(high[:, [p]].numpy()) - of.cdf(low[:, [p]].numpy())
        expected += torch.from_numpy(np.log((np.exp(logits) * mass).sum(1) / np.exp(logits).sum(1)))
    torch.testing.assert_close(ops.mixed_log_prob(raw, low, high, chosen, block), expected)


@by_kernels
def test_a_number_that_is_missing_has_no_part_in_the_result_or_the_gradient(implementation):
    raw, low, high, chosen, block = arguments()
    low[2, 1], high[2, 1] = float("nan"), float("nan")
    found = ops.mixed_log_prob(raw.requires_grad_(), low, high, chosen, block)
    (gradient,) = torch.autograd.grad(found.sum(), raw)
    alone = torch.cat([raw[:, :9], raw[:, 18:]], 1)
    torch.testing.assert_close(found[2], ops.mixed_log_prob(alone, low[:, :1], high[:, :1], chosen, block)[2])
    assert not gradient[2, 9:18].any()
    assert gradient[torch.arange(7) != 2].all()


@by_kernels
def test_samples_that_lead_the_examples_share_their_columns(implementation):
    raw, *rest = arguments(samples=(4, 3))
    found = ops.mixed_log_prob(raw, *rest)
    assert found.shape == (4, 3, 7)
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(found[i, j], ops.mixed_log_prob(raw[i, j], *rest))


@by_kernels
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.3, 0.99, 1.01, 30.0])
@pytest.mark.parametrize("at", [-300.0, -20.0, 0.0, 20.0, 300.0])
def test_narrow_wide_and_far_intervals_keep_their_digits(gap, at, implementation):
    raw = torch.tensor([[0.0, 0.0, 1.0]])  # one component of location 0 and scale 1
    low = torch.tensor([[at]])
    high = low + gap
    nothing = torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)

    def results(dtype):
        leaf = raw.to(dtype).requires_grad_()
        found = ops.mixed_log_prob(leaf, low.to(dtype), high.to(dtype), *nothing)
        return found, torch.autograd.grad(found, leaf)[0]

    if float(high - low) > 0:  # which float32 knows no other numbers between
        for a, b in zip(results(torch.float32), results(torch.float64), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


@by_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads, implementation):
    raw, *rest = arguments(3000, 5, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (threads, before):
            torch.set_num_threads(count)
            leaf = raw.clone().requires_grad_()
            log_prob = ops.mixed_log_prob(leaf, *rest)
            found.append((log_prob, *torch.autograd.grad(log_prob.sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@by_kernels
@pytest.mark.parametrize("wrong", [-1, 6, 2**62])
def test_a_choice_that_is_not_there_is_refused(wrong, implementation):
    raw, low, high, chosen, block = arguments()
    chosen[4, 1] = wrong
    with pytest.raises(RuntimeError, match=rf"chosen must be from 0 to 5, got {wrong}|out of bounds"):
        ops.mixed_log_prob(raw, low, high, chosen, block)


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
def test_a_choice_of_another_block_is_refused(implementation):
    raw, low, high, chosen, block = arguments()
    chosen[2] = chosen[2].flip(0)
    with pytest.raises(RuntimeError, match=r"chosen must be a choice of block 0 in column 0, got \d, of block 1"):
        ops.mixed_log_prob(raw, low, high, chosen, block)


@by_kernels
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6])
def test_logits_that_share_an_offset_keep_their_digits(offset, implementation):
    raw, *rest = arguments(7, 5, torch.float32)
    raw = raw.clone()
    raw[:, :5] += offset  # of the first number

    def results(*given):
        leaf = given[0].clone().requires_grad_()
        found = ops.mixed_log_prob(leaf, *given[1:])
        return found, torch.autograd.grad(found.sum(), leaf)[0]

    wide = (t.double() if t.is_floating_point() else t for t in (raw, *rest))
    for a, b in zip(results(raw, *rest), results(*wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["native", "reference"], indirect=True)
def test_a_number_with_one_edge_has_the_logistic_distribution_below_or_above_it(implementation):
    raw, low, high, chosen, block = arguments()
    raw, inf = raw[:, :9].clone().requires_grad_(), float("inf")
    none = chosen[:, :0], block[:0]
    below = ops.mixed_log_prob(raw, torch.full_like(low[:, :1], -inf), high[:, :1], *none)
    logits, mu, log_scale = ops.logistic_mixture(raw, 1)
    shares = torch.nn.functional.logsigmoid((high[:, :1, None] - mu) * torch.exp(-log_scale))
    expected = (shares + logits.log_softmax(-1)).logsumexp(-1)[:, 0]
    torch.testing.assert_close(below, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), raw, retain_graph=True) for each in (below, expected)))
    above = ops.mixed_log_prob(raw, high[:, :1], torch.full_like(low[:, :1], inf), *none)
    torch.testing.assert_close(below.exp() + above.exp(), torch.ones_like(above))
    assert torch.autograd.grad(above.sum(), raw)[0].isfinite().all()


@by_kernels
@pytest.mark.parametrize("change", [lambda b: b.flip(0), lambda b: b - 1, lambda b: b + 1, lambda b: 2 * b])
def test_blocks_that_do_not_rise_one_by_one_from_0_are_refused(change, implementation):
    raw, low, high, chosen, block = arguments()
    with pytest.raises(RuntimeError, match=r"block must rise from 0 by steps of 1"):
        ops.mixed_log_prob(raw, low, high, chosen, change(block))


def test_arguments_that_do_not_fit_are_named():
    raw, low, high, chosen, block = arguments()
    for given, message in {
        (raw[0], low, high, chosen, block): r"must be \(..., N, 3 K P \+ S\)",
        (raw[:, :-1], low, high, chosen, block): "3 K 2",
        (raw[:-1], low, high, chosen, block): "raw must be",
        (raw, low, high[:-1], chosen, block): "high must have shape",
        (raw, low, high.float(), chosen, block): "high must have raw's dtype",
        (raw, low, high, chosen[:-1], block): "chosen must be int64",
        (raw, low, high, chosen.int(), block): "chosen must be int64",
        (raw, low, high, chosen, block.int()): "block must be int64",
        (raw[:, 18:], low, high, chosen, block): "raw must be",
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.mixed_log_prob(*given)
    with pytest.raises(ValueError, match=r"raw must be \(..., 3 K P\) for columns P = 4, got \(8, 30\)"):
        ops.logistic_mixture(torch.zeros(8, 30), 4)
    with pytest.raises(ValueError, match=r"block must have shape \(5,\), got \(4,\)"):
        ops.block_log_softmax(torch.zeros(8, 5), block[:4], 2)


@by_kernels
def test_a_block_of_which_nothing_is_chosen_is_refused(implementation):
    raw, low, high, chosen, block = arguments()
    with pytest.raises(RuntimeError, match=r"chosen must have a column for each of the 2 blocks, got 1"):
        ops.mixed_log_prob(raw, low, high, chosen[:, :1], block)


@by_kernels
def test_sums_over_many_columns_keep_their_digits(implementation):
    raw, low = torch.full((1, 3 * 20_000), 0.7), torch.full((1, 20_000), 0.1)
    given = low, low + 0.3, torch.empty(1, 0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    found, truth = (
        ops.mixed_log_prob(raw.to(d), *(t.to(d) for t in given[:2]), *given[2:]) for d in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(found.double(), truth, rtol=16 * 2**-23, atol=0)


def test_anomaly_detection_finds_nothing_in_blocks_that_there_are_not():
    raw, low, high, chosen, block = arguments()
    with ops.using("reference"), torch.autograd.set_detect_anomaly(True):
        ops.mixed_log_prob(raw.requires_grad_(), low, high, chosen, block).sum().backward()
    assert raw.grad.isfinite().all()
