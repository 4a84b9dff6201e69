"""The Bernoulli log-likelihood of an example: cross-entropy and sum in one pass."""

from torch import Tensor
from torch.nn import functional as F

from genfuse.ops import _op


def formula(logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)  # (N,)


def _problem(logits: Tensor, x: Tensor) -> tuple:
    return _op.DTYPES[logits.dtype], *_op.rows(logits), *_op.rows(x), *logits.shape


_fused = _op.fused(
    "bernoulli_nll(Tensor logits, Tensor x) -> Tensor",
    formula=formula,
    results=lambda logits, x: _op.sums(logits, logits.shape[0]),
    problem=_problem,
    native=_op.cpu_only("bernoulli_nll", "bernoulli_nll_backward"),
    wrt=1,
    takes=lambda logits, x: [_op.matrix(logits)] * 2,
)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    r"""Sum an example's minus log-probabilities under logits.

    .. math::
        -\sum_j \left( x_j \log \sigma(l_j) + (1 - x_j) \log(1 - \sigma(l_j)) \right)

    As `torch.nn.functional.binary_cross_entropy_with_logits`, without a pass over the cells for each of its parts.
    Differentiable to any order. A CPU has a kernel for it; elsewhere it is PyTorch's formula.

    Args:
        logits: l, (N, ...), of any strides; float32, float64, float16 or bfloat16.
        x: in [0, 1], of logits' shape and dtype.

    Returns:
        (N,), in nats, float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    alike = x.shape == logits.shape and x.dtype is logits.dtype and x.device == logits.device
    if not alike or logits.dtype not in _op.DTYPES or not logits.dim():
        _op.check_alike(logits, "logits", x=(x, tuple(logits.shape)))
    if logits.dim() != 2:
        logits, x = (t.reshape(logits.shape[0], logits.shape[1:].numel()) for t in (logits, x))
    return _fused(logits, x)
