"""The log-probability of columns of several kinds: mixtures of logistics and softmax over blocks, in one pass."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from genfuse.ops import _op

LIMIT, START = 7.0, 1.0  # of log-scales, as math.h has them: how far they reach, and what is 0
FAR = 1e30  # where an infinite edge is taken to be: its gradient is 0, and not NaN


def log_logistic(upper: Tensor, lower: Tensor, gap: Tensor) -> Tensor:
    """log(sigmoid(upper) - sigmoid(lower)), gap = upper - lower, as sigmoid(upper) sigmoid(-lower) (1 - exp(-gap))."""
    return F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-gap))


def logistic_mixture(raw: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, locations and log-scales, (..., P, K) each, of raw (..., 3 K P) for P columns.

    Log-scales are 7 tanh((r - 1) / 7), held smoothly within +-7.
    """
    if not raw.dim() or raw.shape[-1] % (3 * columns or 1):
        raise ValueError(f"raw must be (..., 3 K P) for columns P = {columns}, got {tuple(raw.shape)}")
    logits, mu, log_scale = raw.unflatten(-1, (columns, raw.shape[-1] // max(columns, 1))).chunk(3, -1)
    return logits, mu, LIMIT * torch.tanh((log_scale - START) / LIMIT)


def block_log_softmax(logits: Tensor, block: Tensor, blocks: int) -> Tensor:
    """Log-probabilities (..., S) of choices, normalised over each block: ``block`` (S,) is the block of each choice."""
    _op.check_alike(logits, "logits", block=(block, logits.shape[-1:], torch.int64))
    top = logits.new_full((*logits.shape[:-1], blocks), -math.inf)
    top = top.scatter_reduce(-1, block.expand_as(logits), logits.detach(), "amax")
    each = block.expand_as(logits)
    shifted = logits - top.gather(-1, each)
    total = shifted.new_zeros(*shifted.shape[:-1], blocks).index_add(-1, block, shifted.exp())
    return shifted - total.where(total != 0, 1.0).log().gather(-1, each)  # 0 of blocks that there are not


def formula(raw: Tensor, low: Tensor, high: Tensor, chosen: Tensor, block: Tensor) -> Tensor:
    columns, blocks = low.shape[1], len(block)  # at least as many as there are
    numbers, choices = raw.split([raw.shape[2] - len(block), len(block)], -1)
    logits, mu, log_scale = logistic_mixture(numbers, columns)  # (L, N, P, K)
    there = ~low.isnan()
    low, high = torch.where(there, low, -0.5)[..., None], torch.where(there, high, 0.5)[..., None]
    far = min(FAR, torch.finfo(low.dtype).max)
    low, high = low.clamp(-far, far), high.clamp(-far, far)
    precision = torch.exp(-log_scale)
    each = log_logistic((high - mu) * precision, (low - mu) * precision, (high - low) * precision)
    of_numbers = torch.where(there, (each + logits.log_softmax(-1)).logsumexp(-1), 0.0)
    of_choices = block_log_softmax(choices, block, blocks)
    return of_numbers.sum(-1) + of_choices.gather(-1, chosen.expand(raw.shape[0], -1, -1)).sum(-1)  # (L, N)


def _problem(raw: Tensor, low: Tensor, high: Tensor, chosen: Tensor, block: Tensor) -> tuple:
    columns, choices = low.shape[1], len(block)
    return (
        _op.DTYPES[raw.dtype], *_op.rows(raw), low.contiguous(), high.contiguous(), chosen.contiguous(),
        block.contiguous(), raw.shape[:2].numel(), low.shape[0], columns,
        (raw.shape[2] - choices) // max(3 * columns, 1), choices, chosen.shape[1],
    )  # fmt: skip


def _takes(raw: Tensor, low: Tensor, high: Tensor, chosen: Tensor, block: Tensor) -> list:
    each, examples, choices = 3 * low.shape[1], low.shape[0], block.shape[0]
    components = max((raw.shape[2] - choices) // max(each, 1), 1)
    edges = (examples, low.shape[1]), _op.wide(raw)
    return [
        ((raw.shape[0], examples, components * each + choices), _op.storage(raw)),
        edges,
        edges,
        ((examples, chosen.shape[1]), torch.int64),
        ((choices,), torch.int64),
    ]


_fused = _op.fused(
    "mixed_log_prob(Tensor raw, Tensor low, Tensor high, Tensor chosen, Tensor block) -> Tensor",
    formula=formula,
    results=lambda raw, *_: raw.new_empty(raw.shape[:2], dtype=_op.wide(raw)),
    problem=_problem,
    native=_op.cpu_only("mixed_log_prob", "mixed_log_prob_backward"),
    wrt=1,
    takes=_takes,
)


def mixed_log_prob(raw: Tensor, low: Tensor, high: Tensor, chosen: Tensor, block: Tensor) -> Tensor:
    r"""Sum an example's log-probabilities over columns of numbers, and over blocks of choices.

    .. math::
        \sum_p \log \sum_k \pi_{pk} \left( \sigma\Big(\frac{h_p - \mu_{pk}}{s_{pk}}\Big)
        - \sigma\Big(\frac{l_p - \mu_{pk}}{s_{pk}}\Big) \right) + \sum_b \log \mathrm{softmax}(a_b)_{c_b}

    A mixture of K logistic densities of each number, integrated between two edges (arXiv 1701.05517, section 2.1), and
    a categorical distribution of each block: a network's whole output for a table of columns of several kinds.
    Differentiable to any order, in all but integers. A CPU has a kernel for it; elsewhere it is PyTorch's formula.

    Args:
        raw: (..., N, 3 K P + S): of each of P numbers the K logits, locations and log-scales r, where
            log s = 7 tanh((r - 1) / 7); then the logits of all S choices, block by block. Any strides; float32,
            float64, float16 or bfloat16.
        low: the lower edge of each number, (N, P), of raw's dtype or float32 beside 16 bits; -inf for a number of which
            only the upper edge is known, and NaN for one that is missing, which has probability 1.
        high: the upper edge, as low; inf for a number of which only the lower edge is known.
        chosen: of each of B blocks the choice that was made, (N, B), counted from 0 over all S choices; int64.
        block: the block 0, 1, ... B - 1 of each choice, rising, (S,); int64.

    Returns:
        (..., N), in nats, float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
        RuntimeError: from the kernel, for blocks that do not rise from 0 to B - 1, and for choices that are not there.
    """
    wide = _op.wide(raw)
    if raw.dim() < 2 or low.dim() != 2 or chosen.dim() != 2 or block.dim() != 1:
        got = ", ".join(str(tuple(t.shape)) for t in (raw, low, chosen, block))
        raise ValueError(f"raw, low, chosen and block must be (..., N, 3 K P + S), (N, P), (N, B) and (S,); got {got}")
    n, columns, choices = *low.shape, len(block)
    for name, t in (("chosen", chosen), ("block", block)):
        if t.dtype is not torch.int64 or t.device != raw.device or (name == "chosen" and t.shape[0] != n):
            raise ValueError(
                f"{name} must be int64 on raw's device {raw.device}, of {n} examples if it is chosen; got {t.dtype} on "
                f"{t.device}, of shape {tuple(t.shape)}"
            )
    numbers = raw.shape[-1] - choices
    fits = raw.shape[-2] == n and (numbers % (3 * columns) == 0 < numbers if columns else numbers == 0)
    if not fits:
        raise ValueError(
            f"raw must be (..., {n}, 3 K {columns} + {choices}) for {columns} numbers and {choices} choices of {n} "
            f"examples; got {tuple(raw.shape)}"
        )
    _op.check_alike(raw, "raw", low=(low, (n, columns), wide), high=(high, (n, columns), wide))
    flat = raw if raw.dim() == 3 else raw.reshape(raw.shape[:-2].numel(), *raw.shape[-2:])
    return _fused(flat, low.to(wide), high.to(wide), chosen, block).view(raw.shape[:-1])
