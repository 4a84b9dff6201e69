"""Log-density of a standard normal plus a log-determinant: the end of a flow in one pass."""

import math

from torch import Tensor

from genfuse.ops import _op


def formula(z: Tensor, logdet: Tensor | None) -> Tensor:
    log_prob = -0.5 * (z**2).sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]  # (...)
    return log_prob if logdet is None else log_prob + logdet


def _results(z: Tensor, logdet: Tensor | None) -> Tensor:
    return _op.sums(z, *z.shape[:-1])


def _problem(z: Tensor, logdet: Tensor | None) -> tuple:
    logdet = None if logdet is None else logdet.contiguous()
    partial = _op.pieces(z) if z.is_cuda else None
    return _op.DTYPES[z.dtype], *_op.rows(z), z.shape[:-1].numel(), z.shape[-1], logdet, partial


_fused = _op.fused(
    "standard_normal_log_prob(Tensor z, Tensor? logdet) -> Tensor",
    formula=formula,
    results=_results,
    problem=_problem,
    triton="genfuse.ops._triton.standard_normal_log_prob",
    wrt=1,
    others={1: lambda g, z, logdet: g},
    saved=lambda needed, z, logdet: (z if needed[0] else None, None),
    takes=lambda z, logdet: (((*z.shape[:-1], z.shape[-1]), _op.storage(z)), (z.shape[:-1], _op.wide(z))),
)


def standard_normal_log_prob(z: Tensor, logdet: Tensor | None = None) -> Tensor:
    r"""Log-density of a standard normal at z, plus the log-determinant of the flow that led there.

    .. math::
        \log \mathcal N(z; 0, I) + \mathrm{logdet} =
        \mathrm{logdet} - \tfrac12 \sum_d z_d^2 - \tfrac D2 \log 2 \pi

    The change of variables that ends a normalizing flow (arXiv 1505.05770, section 3). Differentiable to any order.

    Args:
        z: (..., D), of any strides; float32, float64, float16 or bfloat16.
        logdet: (...), in nats, of z's dtype or the result's; None for 0.

    Returns:
        The log-density, (...), in nats, float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    wide = _op.wide(z)
    if (
        z.dtype not in _op.DTYPES
        or not z.dim()
        or not (logdet is None or (logdet.dtype is wide and logdet.shape == z.shape[:-1] and logdet.device == z.device))
    ):
        _op.check_alike(z, "z", **({} if logdet is None else {"logdet": (logdet, z.shape[:-1], wide)}))
    return _fused(z, logdet if logdet is None or logdet.dtype is wide else logdet.to(wide))
