"""Standard-normal log-density plus log-determinant: values, layouts, bad rows, bad input."""

import math

import pytest
import torch
from scipy import stats

from genfuse import ops
from genfuse.ops import standard_normal_log_prob


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 7), (2, 1500)], ids=str)
@pytest.mark.parametrize("with_logdet", [True, False], ids=["logdet", "none"])
def test_it_is_the_log_density_of_a_standard_normal(shape, with_logdet, device, implementation):
    z = torch.randn(shape, dtype=torch.float64, device=device)
    logdet = torch.randn(shape[:-1], dtype=torch.float64, device=device) if with_logdet else None
    expected = torch.from_numpy(stats.norm.logpdf(z.cpu()).sum(-1, keepdims=True)[..., 0]).to(device)
    torch.testing.assert_close(standard_normal_log_prob(z, logdet), expected + (logdet if with_logdet else 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_16_bit_input_are_float32(dtype, device, implementation):
    z = torch.randn(3, 4000, device=device).to(dtype)
    logdet = torch.randn(3, device=device).to(dtype)
    result = standard_normal_log_prob(z, logdet)
    assert result.dtype is torch.float32
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(-1) + logdet
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(standard_normal_log_prob(z, logdet.float()), result)


def test_derivatives_of_first_and_second_order(device, implementation):
    z = torch.randn(2, 1, 3, dtype=torch.float64, device=device, requires_grad=True)
    logdet = torch.randn(2, 1, dtype=torch.float64, device=device, requires_grad=True)
    for leaves in ((z, logdet), (z,)):
        assert torch.autograd.gradcheck(standard_normal_log_prob, leaves)
        assert torch.autograd.gradgradcheck(standard_normal_log_prob, leaves)


@pytest.mark.parametrize("layout", ["slice", "transposed", "batch of batches", "expanded"])
def test_any_strides_give_the_same(layout, device, implementation):
    z = {
        "slice": torch.randn(5, 12, device=device)[:, 3:7],
        "transposed": torch.randn(4, 5, device=device).t(),
        "batch of batches": torch.randn(2, 3, 8, device=device)[..., :4],
        "expanded": torch.randn(4, device=device).expand(5, 4),
    }[layout].requires_grad_()
    logdet = torch.randn((), device=device).expand(z.shape[:-1])
    copy = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    ours, plain = standard_normal_log_prob(z, logdet), standard_normal_log_prob(copy, logdet.contiguous())
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours.mean(), z), torch.autograd.grad(plain.mean(), copy))


def test_no_columns_leave_the_logdet(device, implementation):
    logdet = torch.randn(3, device=device)
    assert torch.equal(standard_normal_log_prob(torch.empty(3, 0, device=device), logdet), logdet)


def test_one_bad_row_leaves_the_others_alone(device, implementation):
    z, logdet = torch.randn(4, 5, device=device), torch.randn(4, device=device)
    good = standard_normal_log_prob(z, logdet)
    z[1, 2], z[2, 0] = math.nan, -math.inf
    bad = standard_normal_log_prob(z, logdet)
    assert torch.equal(bad[[0, 3]], good[[0, 3]])
    assert bad[1].isnan()
    assert bad[2] == -math.inf


def test_it_compiles_into_one_graph():
    leaves = (torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True))
    step = lambda z, logdet: standard_normal_log_prob(z, logdet).mean()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True)
    ours, eagerly = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step))
    torch.testing.assert_close(ours, eagerly)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 3), torch.zeros(3)), r"logdet must have shape \(4,\), got \(3,\)"),
        ((torch.zeros(4, 3), torch.zeros(4, 1)), r"logdet must have shape \(4,\), got \(4, 1\)"),
        ((torch.zeros(4, 3), torch.zeros(4).double()), r"logdet must have z's dtype torch.float32, got torch.float64"),
        (
            (torch.zeros(4, 3).half(), torch.zeros(4).double()),
            r"logdet must have z's dtype torch.float16 or torch.float32, got torch.float64",
        ),
        ((torch.zeros(4, 3, dtype=torch.int64),), r"z must be float32"),
        ((torch.zeros(()),), r"z must have at least one axis"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        standard_normal_log_prob(*arguments)


def test_the_rows_of_a_slice_are_not_copied(monkeypatch):
    copies = []
    monkeypatch.setattr(ops._op, "rows", lambda t, rows=ops._op.rows: copies.append(rows(t)[0] is not t) or rows(t))
    with ops.using("native"):
        standard_normal_log_prob(torch.randn(6, 20)[:, 3:11])
    assert copies == [False]


def test_a_logdet_alone_has_a_gradient_beside_what_inference_mode_made():
    with torch.inference_mode():
        z = torch.randn(3, 4)
    logdet = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(standard_normal_log_prob(z, logdet).sum(), logdet)
    assert gradient.tolist() == [1.0] * 3
