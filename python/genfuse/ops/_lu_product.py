"""The matrix of an invertible linear layer by its LU factors, and the logarithm of its determinant."""

import torch
from torch import Tensor

from genfuse.ops import _op


def lu_factors(triangles: Tensor, log_diagonal: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """L, without its diagonal of ones, and U, (D, D) each, of the arguments of `lu_product`."""
    rows, columns = triangles.shape[:1], triangles.shape[1:]  # one size, if it is square
    _op.check_alike(triangles, "triangles", log_diagonal=(log_diagonal, rows), signs=(signs, columns))
    return triangles.tril(-1), triangles.triu(1) + torch.diag(signs * log_diagonal.exp())


def formula(
    triangles: Tensor, log_diagonal: Tensor, signs: Tensor, back: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    lower, upper = lu_factors(triangles, log_diagonal, signs)
    return torch.addmm(upper, lower, upper).index_select(1, back), log_diagonal.sum()  # (D, D), ()


def _takes(triangles: Tensor, log_diagonal: Tensor, signs: Tensor, back: Tensor, order: Tensor) -> tuple:
    size, dtype = len(triangles), _op.wide(triangles)
    of_each, index = ((size,), dtype), ((size,), torch.int64)
    return ((size, size), dtype), of_each, of_each, index, index


def _problem(triangles: Tensor, *rest: Tensor) -> tuple:
    return _op.DTYPES[triangles.dtype], triangles.contiguous(), *(t.contiguous() for t in rest), len(triangles)


def affine_formula(
    triangles: Tensor, log_diagonal: Tensor, log_scale: Tensor, shift: Tensor, bias: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight, logdet = formula(triangles, log_diagonal, *rest)
    return weight * log_scale.exp(), torch.addmv(bias, weight, shift), logdet + log_scale.sum()  # (D, D), (D,), ()


def _affine_takes(triangles: Tensor, log_diagonal: Tensor, *rest: Tensor) -> tuple:
    whole, of_each, *others = _takes(triangles, log_diagonal, *rest[3:])
    return whole, *[of_each] * 4, *others


# Of triangles and log_diagonal, log_scale, shift, bias, signs, back and order.
_affine = _op.fused(
    "lu_affine(Tensor triangles, Tensor log_diagonal, Tensor log_scale, Tensor shift, Tensor bias, Tensor signs, "
    "Tensor back, Tensor order) -> (Tensor, Tensor, Tensor)",
    formula=affine_formula,
    results=lambda triangles, log_diagonal, *_: (
        _op.like(triangles), _op.like(log_diagonal), log_diagonal.new_empty(())
    ),
    problem=_problem,
    native=_op.cpu_only("lu_affine", "lu_affine_backward"),
    wrt=4,
    others={4: lambda gweight, goffset, *_: goffset},
    takes=_affine_takes,
)  # fmt: skip


_fused = _op.fused(
    "lu_product(Tensor triangles, Tensor log_diagonal, Tensor signs, Tensor back, Tensor order) -> (Tensor, Tensor)",
    formula=formula,
    results=lambda triangles, log_diagonal, *_: (_op.like(triangles), log_diagonal.new_empty(())),
    problem=_problem,
    native=_op.cpu_only("lu_product", "lu_product_backward"),
    wrt=2,
    takes=_takes,
)


def lu_product(
    triangles: Tensor, log_diagonal: Tensor, signs: Tensor, back: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Multiply the LU factors of a matrix with a permutation.

    .. math::
        W = L U P, \qquad \log|\det W| = \sum_i d_i

    with L's diagonal of ones and U's of :math:`\pm e^{d_i}`: the linear map of Glow (arXiv 1807.03039, section 3.2),
    whose determinant and inverse are cheap. Differentiable to any order, in the first two. A CPU has a kernel for it.

    Args:
        triangles: L below the diagonal, and U above it, (D, D); float32, float64, float16 or bfloat16.
        log_diagonal: d, (D,), of its dtype.
        signs: of U's diagonal, (D,): 1 or -1, of its dtype.
        back: column j of W is column back[j] of L U, (D,), int64.
        order: the permutation that undoes back, (D,), int64.

    Returns:
        W, (D, D), and the logarithm of its determinant's absolute value, (), in nats.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
        RuntimeError: from the kernel, for a column that is not there, or an order that does not undo back.
    """
    given = _checked(triangles, {"log_diagonal": log_diagonal, "signs": signs}, back, order)
    return (_fused if triangles.dtype is _op.wide(triangles) else formula)(*given)


def lu_affine(
    triangles: Tensor, log_diagonal: Tensor, log_scale: Tensor, shift: Tensor, bias: Tensor, signs: Tensor,
    back: Tensor, order: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Put a scale and shift before a linear map that is given by its LU factors, as Glow's flows have them.

    .. math::
        W (x \odot e^s + t) + b = V x + c, \qquad V = W\, \mathrm{diag}(e^s), \quad c = W t + b

    Of both layers together one product of x is left. W is that of `lu_product`. Differentiable to any order, in the
    first five. A CPU has a kernel for it.

    Args:
        triangles, log_diagonal, signs, back, order: as in `lu_product`.
        log_scale: s, (D,), of triangles' dtype.
        shift: t, (D,).
        bias: b, (D,).

    Returns:
        V, (D, D), c, (D,), and the logarithm of the absolute value of V's determinant, (), in nats.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
        RuntimeError: from the kernel, for a column that is not there, or an order that does not undo back.
    """
    numbers = {"log_diagonal": log_diagonal, "log_scale": log_scale, "shift": shift, "bias": bias, "signs": signs}
    given = _checked(triangles, numbers, back, order)
    return (_affine if triangles.dtype is _op.wide(triangles) else affine_formula)(*given)


def _checked(triangles: Tensor, numbers: dict[str, Tensor], back: Tensor, order: Tensor) -> tuple[Tensor, ...]:
    """All of them, of which ``numbers`` and the orders are to be (D,)."""
    size, dtype = len(triangles) if triangles.dim() else 0, triangles.dtype
    fits = triangles.shape == (size, size) and dtype in _op.DTYPES
    for t in (*numbers.values(), back, order):
        fits = fits and t.shape == (size,) and t.device == triangles.device
        fits = fits and t.dtype is (torch.int64 if t is back or t is order else dtype)
    if not fits:
        indices = {name: (t, (size,), torch.int64) for name, t in (("back", back), ("order", order))}
        _op.check_alike(triangles, "triangles", **{name: (t, (size,)) for name, t in numbers.items()}, **indices)
        raise ValueError(
            "triangles must be square, and back and order int64; got "
            f"{tuple(triangles.shape)}, {back.dtype} and {order.dtype}"
        )
    return triangles, *numbers.values(), back, order
