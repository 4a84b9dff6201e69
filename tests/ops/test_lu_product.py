"""`ops.lu_product` beside the matrices that it stands for."""

import pytest
import torch

from genfuse import ops

by_kernels = pytest.mark.parametrize("implementation", ["native"], indirect=True)


def arguments(size, dtype=torch.float64):
    torch.manual_seed(0)
    order = torch.randperm(size)
    triangles, log_diagonal = torch.randn(size, size, dtype=dtype) / max(1, size) ** 0.5, torch.randn(size, dtype=dtype)
    return triangles, log_diagonal, torch.randn(size, dtype=dtype).sign(), order.argsort(), order


def eager(triangles, log_diagonal, signs, back, order):
    """By whole matrices."""
    size = len(triangles)
    lower = triangles.tril(-1) + torch.eye(size, dtype=triangles.dtype)
    upper = triangles.triu(1) + torch.diag(signs * log_diagonal.exp())
    permutation = torch.eye(size, dtype=triangles.dtype)[order]  # P x = x[order]
    return lower @ upper @ permutation, log_diagonal.sum()


def results(function, given, dtype):
    triangles, log_diagonal, signs = (t.to(dtype) for t in given[:3])
    triangles.requires_grad_(), log_diagonal.requires_grad_()
    weight, logdet = function(triangles, log_diagonal, signs, *given[3:])
    torch.manual_seed(1)
    loss = (weight * torch.randn(weight.shape).to(dtype)).sum() + 3 * logdet
    return [weight, logdet, *torch.autograd.grad(loss, (triangles, log_diagonal))]


@by_kernels
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 16, 43, 130])
def test_product_and_gradients_are_as_close_to_float64_as_eager_ones(size, implementation):
    given = arguments(size)
    truth = results(eager, given, torch.float64)
    for dtype in (torch.float32, torch.float64):
        ours, theirs = (results(f, given, dtype) for f in (ops.lu_product, eager))
        for a, b, c in zip(ours, theirs, truth, strict=True):
            scale = max(1.0, float(c.abs().max().detach())) if c.numel() else 1.0
            wrong, allowed = (float((t.double() - c).abs().max().detach()) if c.numel() else 0.0 for t in (a, b))
            assert wrong <= 2 * allowed + 16 * torch.finfo(dtype).eps * scale


def before_and_after(triangles, log_diagonal, log_scale, shift, bias, signs, back, order):
    """`ops.lu_affine` by whole matrices."""
    weight, logdet = eager(triangles, log_diagonal, signs, back, order)
    scale = torch.diag(log_scale.exp())
    return weight @ scale, weight @ shift + bias, logdet + torch.slogdet(scale).logabsdet


def of_both(size):
    triangles, log_diagonal, *rest = arguments(size)
    return [triangles, log_diagonal, *(torch.randn(3, size, dtype=torch.float64) / 2).unbind(), *rest]


@by_kernels
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 16, 43, 130])
def test_a_scale_and_shift_before_the_map_are_a_part_of_it(size, implementation):
    given = of_both(size)

    def results(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in given[:5]]
        out = function(*leaves, given[5].to(dtype), *given[6:])
        torch.manual_seed(1)
        loss = sum((t * torch.randn(t.shape, dtype=torch.float64).to(dtype)).sum() for t in out)
        return [*out, *torch.autograd.grad(loss, leaves)]

    truth = results(before_and_after, torch.float64)
    for dtype in (torch.float32, torch.float64):
        for a, b, c in zip(results(ops.lu_affine, dtype), results(before_and_after, dtype), truth, strict=True):
            scale = max(1.0, float(c.abs().max().detach())) if c.numel() else 1.0
            wrong, allowed = (float((t.double() - c).abs().max().detach()) if c.numel() else 0.0 for t in (a, b))
            assert wrong <= 2 * allowed + 16 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("which", range(5))
def test_an_argument_of_both_that_does_not_fit_is_named(which):
    given = of_both(4)
    name = ("triangles", "log_diagonal", "log_scale", "shift", "bias")[which]
    given[which] = given[which][:3]
    with pytest.raises(ValueError, match=name if which else "must have shape|must be square"):
        ops.lu_affine(*given)


@by_kernels
def test_the_logarithm_is_that_of_the_determinant(implementation):
    weight, logdet = ops.lu_product(*arguments(9))
    torch.testing.assert_close(logdet, torch.linalg.slogdet(weight).logabsdet)


@by_kernels
@pytest.mark.parametrize("which", [0, 1])
def test_one_result_alone_can_be_differentiated(which, implementation):
    triangles, log_diagonal, *rest = arguments(5)
    log_diagonal.requires_grad_(), triangles.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(
            f(triangles, log_diagonal, *rest)[which].sum(), (triangles, log_diagonal), materialize_grads=True
        )
        for f in (ops.lu_product, eager)
    )
    torch.testing.assert_close(ours, theirs)


def test_second_derivatives_vmap_and_forward_mode_are_the_formulas():
    triangles, log_diagonal, *rest = arguments(4)

    def loss(f):
        return lambda t, d: f(t, d, *rest)[0].sin().sum()

    inputs = (triangles, log_diagonal)
    for transform in (
        lambda f: torch.autograd.functional.hessian(loss(f), inputs),
        lambda f: torch.func.jacfwd(loss(f), (0, 1))(*inputs),
        lambda f: torch.func.vmap(torch.func.grad(loss(f)), (None, 0))(triangles, torch.stack([log_diagonal, rest[0]])),
    ):
        torch.testing.assert_close(transform(ops.lu_product), transform(eager))


@by_kernels
def test_strided_and_16_bit_arguments_are_right(implementation):
    triangles, log_diagonal, *rest = arguments(6)
    strided = ops.lu_product(triangles.t().contiguous().t(), torch.stack([log_diagonal] * 2, 1)[:, 0], *rest)
    torch.testing.assert_close(strided, ops.lu_product(triangles, log_diagonal, *rest), rtol=0, atol=0)
    half = [t.bfloat16() for t in (triangles, log_diagonal, rest[0])]
    weight, _ = ops.lu_product(*half, *rest[1:])
    assert weight.dtype is torch.bfloat16
    torch.testing.assert_close(weight.double(), eager(*(t.double() for t in half), *rest[1:])[0], rtol=0.02, atol=0.02)


def test_arguments_that_do_not_fit_are_named():
    triangles, log_diagonal, signs, back, order = arguments(4)
    for given, message in (
        ((triangles[:3], log_diagonal, signs, back, order), "log_diagonal must have shape"),
        ((triangles[:, :3], log_diagonal, signs, back, order), "triangles must be square"),
        ((triangles, log_diagonal.float(), signs, back, order), "log_diagonal must have"),
        ((triangles, log_diagonal, signs[:2], back, order), "signs must have shape"),
        ((triangles, log_diagonal.long(), signs, back, order), "log_diagonal must have triangles's dtype"),
        ((triangles, log_diagonal, signs, back.int(), order), "back must have"),
        ((triangles, log_diagonal, signs, back, order.double()), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.lu_product(*given)
    for given in ((triangles[:1], log_diagonal, signs), (triangles, log_diagonal, signs[:1])):  # which would broadcast
        with pytest.raises(ValueError, match="must have shape"):
            ops.lu_factors(*given)
    with pytest.raises(ValueError, match="back"):
        torch.ops.genfuse.lu_product(triangles, log_diagonal, signs, back[:2], order)


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@pytest.mark.parametrize("column", [-1, 3])
def test_columns_that_are_not_there_are_refused(column, implementation):
    triangles, log_diagonal, signs, back, order = arguments(3)
    wrong = torch.tensor([0, 1, column])
    for orders in ((wrong, order), (back, wrong)):
        with pytest.raises(RuntimeError, match="from 0 to 2"):
            ops.lu_product(triangles, log_diagonal, signs, *orders)


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
def test_an_order_that_does_not_undo_the_other_is_refused(implementation):
    triangles, log_diagonal, signs, back, order = arguments(3)
    with pytest.raises(RuntimeError, match="order must undo back"):
        ops.lu_product(triangles, log_diagonal, signs, back, order.roll(1))
