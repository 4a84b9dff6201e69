"""How networks see the columns of a table, numbers, integers and categories with cells missing, and a head for them."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from genfuse import ops
from genfuse.errors import NoLevelsError
from genfuse.nn.likelihoods import at_least_float32

WIDTH = 1e-3  # of the interval, in scores, over which the density of a number is averaged, so that it is bounded
BOUND = 4.0  # of the scores that `activate` makes: one row in 16,000 of a Gaussian is beyond
FAR = 20.0  # standard deviations, beyond which encoders see no difference: the variances that they make stay finite
APART = 1e-5  # how far apart, as a share of them, two scores must be for the probability between them in float32
EDGE = 1e-6  # probabilities nearer to 0 or 1 have no score in float32


class Near(nn.Flatten):
    """Examples x as vectors (N, D) of values no further than `FAR` from 0, as an encoder sees them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-FAR, FAR)


class Columns(nn.Module):
    """The D columns of a table for networks, and a likelihood of all columns at once.

    Examples x are (N, D), one float per column, NaN where a cell is missing: standardized numbers and integers, and the
    standardized codes 0, 1, ... of categories. Networks see v (N, `width`): for each column of numbers or integers its
    *score*, what a monotonic, piecewise linear function makes of it that leads the quantiles of the training split to
    those of N(0, 1), so that heavy tails and several modes are no matter; then for each *block* as many cells as it has
    choices, 1 for the one that is there and -1 for the others. A column of categories is a block, in which "missing" is
    one more category; a column of numbers of which some are missing has one of two, there or missing.

    As a likelihood it reads raw (..., N, `outputs`) as `genfuse.nn.likelihoods.AnyLikelihood` says: for each score the
    logits, locations and log-scales of a mixture of logistic densities (arXiv 1701.05517, section 2.1), for integers
    integrated over their bins; and the logits of all blocks. All columns are one computation, by index and scatter.

    Args:
        columns: of each column ``kind`` (number, integer or category), ``mean`` and ``std``, by which it was
            standardized, and ``missing``, whether cells are; of numbers and integers ``knots``, standardized and
            rising, their ``scores``, and ``low`` and ``high``, between which samples are held; and ``shares``, how
            often each category is among the training rows, of numbers how often there and missing, if some are; the
            missing ones last. `genfuse.data.Schema` makes them.
        mixtures: logistic densities in each mixture.
    """

    numeric: Tensor  # the columns of numbers and integers
    knots: Tensor  # between the pieces of the function that makes scores
    heights: Tensor  # the scores there
    to_scores: Tensor  # the line of each piece, as `_lines` has it
    to_values: Tensor
    centre: Tensor  # by which columns were standardized
    spread: Tensor
    low: Tensor
    high: Tensor
    step: Tensor  # from one integer to the next, standardized; 0 for numbers
    block_of: Tensor  # the column of each block
    code_scale: Tensor  # makes a block's choice of its column: 0 where that is of numbers
    code_shift: Tensor
    most: Tensor  # the last choice that is not "missing"; 0 where the column is of numbers
    missing: Tensor  # the choice that is "missing"; one beyond the last if no cell is
    gone: Tensor  # the choice of a cell that is missing, also where none is
    last: Tensor  # the last choice of each block
    start: Tensor  # the first one's place among all
    block: Tensor  # of each choice
    place: Tensor  # of each choice in its block
    share: Tensor  # of each choice
    end: Tensor  # of the part of [0, 1] that is a choice's
    halfway: Tensor  # of N(0, 1), in the middle of that part
    indicated: Tensor  # the numbers that may be missing, and the blocks that say so
    indicator: Tensor

    def __init__(self, columns: Sequence[Mapping[str, Any]], mixtures: int = 5) -> None:
        super().__init__()
        numeric = [i for i, column in enumerate(columns) if column["kind"] != "category"]
        blocks = [(i, column["shares"]) for i, column in enumerate(columns) if column["shares"]]
        sizes = [len(shares) for _, shares in blocks]
        self.columns, self.mixtures = len(columns), mixtures
        self.scores, self.blocks, self.choices = len(numeric), len(blocks), sum(sizes)
        self.width = self.scores + self.choices  # of v
        self.outputs = 3 * mixtures * self.scores + self.choices  # a network's, as a likelihood
        self.latents = self.scores + self.blocks  # cells of what `dequantize` makes
        self.uniforms = (mixtures + 1) * self.scores + self.choices  # that `sample` makes a draw of

        def keep(name: str, values: Any, dtype: torch.dtype = torch.float32) -> None:
            made = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
            self.register_buffer(name, made, persistent=False)

        most = max((len(columns[i]["knots"]) for i in numeric), default=2)
        curves = [_curve(columns[i]["knots"], columns[i]["scores"], most) for i in numeric]
        keep("numeric", numeric, torch.long)
        x, y = (torch.tensor([c[i] for c in curves], dtype=torch.float64).view(self.scores, most) for i in (0, 1))
        keep("knots", x[:, 1:-1].contiguous())
        keep("heights", y[:, 1:-1].contiguous())
        keep("to_scores", _lines(x, y))
        keep("to_values", _lines(y, x))
        keep("centre", [column["mean"] for column in columns], torch.float64)
        keep("spread", [column["std"] for column in columns], torch.float64)
        keep("low", [columns[i]["low"] for i in numeric])
        keep("high", [columns[i]["high"] for i in numeric])
        keep("step", [1 / columns[i]["std"] if columns[i]["kind"] == "integer" else 0.0 for i in numeric])
        category = torch.tensor([columns[i]["kind"] == "category" for i, _ in blocks], dtype=torch.bool)
        keep("block_of", [i for i, _ in blocks], torch.long)
        codes = [size - 1 if columns[i]["missing"] else size for (i, _), size in zip(blocks, sizes, strict=True)]
        keep("missing", codes, torch.long)
        keep("last", [size - 1 for size in sizes], torch.long)
        keep("start", list(accumulate(sizes, initial=0))[:-1], torch.long)
        keep("block", [i for i, size in enumerate(sizes) for _ in range(size)], torch.long)
        keep("place", [k for size in sizes for k in range(size)], torch.long)
        keep("share", [share / total for _, of in blocks for total in [sum(of)] for share in of])
        keep("end", [end / total for _, of in blocks for total in [sum(of)] for end in accumulate(of)])
        keep("halfway", _probit(self.end - self.share / 2))
        for name, of in (("code_scale", self.spread), ("code_shift", self.centre)):
            keep(name, torch.where(category, of[self.block_of], 0.0))
        keep("most", torch.where(category, self.missing - 1, 0))
        keep("gone", self.missing.minimum(self.last))
        owners = {column: b for b, (column, _) in enumerate(blocks)}
        keep("indicated", [i for i, c in enumerate(numeric) if c in owners], torch.long)
        keep("indicator", [owners[c] for c in numeric if c in owners], torch.long)

    @property
    def owners(self) -> Tensor:
        """The column of each cell of v, (width,)."""
        return torch.cat([self.numeric, self.block_of[self.block]])

    # What networks see.

    def forward(self, x: Tensor) -> Tensor:
        """`encode` of the first D columns of x (N, D + C), and the rest as it is, as an encoder sees it: none further
        than `FAR` from 0."""
        return torch.cat([self.encode(x[..., : self.columns]), x[..., self.columns :]], -1).clamp(-FAR, FAR)

    def encode(self, x: Tensor, noise: bool = False) -> Tensor:
        """v (N, width) of x (N, D). With ``noise`` integers are spread over their bins, so that v has a density."""
        there = self._numbers(x)
        if noise:
            there = there + self.step * (torch.rand_like(there) - 0.5)
        scores = torch.where(x[..., self.numeric].isnan(), 0.0, self._score(there)[0])
        codes = self._codes(x)
        chosen = codes[..., self.block] == self.place
        return torch.cat([scores, 2 * chosen.to(scores) - 1], -1).to(x.dtype)

    def decode(self, v: Tensor) -> Tensor:
        """x (N, D) of v (N, width): integers are whole, and of each block the largest choice is taken."""
        return self._cells(v[..., : self.scores], self._largest(v[..., self.scores :]))

    def activate(
        self,
        raw: Tensor,
        temperature: float = 0.2,
        *,
        drawn: bool = True,
        generator: torch.Generator | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        """v (N, width) of what a generator puts out (N, width), with gradients: scores by tanh, and of each block a
        draw, relaxed (Gumbel-softmax, arXiv 1611.01144), as CTGAN does (1907.00503, section 4.4); without ``drawn`` its
        probabilities at that temperature. ``u`` are uniform draws in (0, 1) to make it of, (N, choices)."""
        scores, logits = raw[..., : self.scores], raw[..., self.scores :]
        if drawn:
            logits = logits + _gumbel(_uniform(logits, generator) if u is None else u)
        choices = ops.block_log_softmax(logits / temperature, self.block, self.blocks).exp()
        return torch.cat([BOUND * torch.tanh(scores / BOUND), 2 * choices - 1], -1)

    # A likelihood.

    def log_prob(self, raw: Tensor, x: Tensor) -> Tensor:
        """log p(x), (..., N) nats, of raw (..., N, outputs): a density of the numbers that are there and a probability
        of all else. That of a number is of its standardized value."""
        x = at_least_float32(x)
        low, high, slope, share = self._edges(x)
        density = torch.where(low.isnan() | (self.step > 0), 0.0, slope.log() - math.log(WIDTH)) + share.log()
        density = density.sum(-1)
        chosen = self.start + self._codes(x)
        return ops.mixed_log_prob(raw, low.to(raw.dtype), high.to(raw.dtype), chosen, self.block) + density

    def mean(self, raw: Tensor) -> Tensor:
        """The middle of p(x), (N, D): of numbers that of their scores, of categories the likeliest."""
        logits, mu, _, choices = self._parts(raw)
        return self._cells((logits.softmax(-1) * mu).sum(-1), self._largest(choices))

    def sample(self, raw: Tensor, generator: torch.Generator | None = None, *, u: Tensor | None = None) -> Tensor:
        """A draw x ~ p(x), (N, D), of which numbers are held within those of the training split. ``u`` are uniform
        draws in (0, 1) to make it of, (N, `uniforms`)."""
        logits, mu, log_scale, choices = self._parts(raw)
        if u is None:
            of_parts, of_scores, of_choices = (_uniform(like, generator) for like in (logits, mu[..., 0], choices))
        else:
            of_parts, of_scores, of_choices = u.split([self.mixtures * self.scores, self.scores, self.choices], -1)
            of_parts = of_parts.unflatten(-1, (self.scores, self.mixtures))
        chosen = (logits + _gumbel(of_parts)).argmax(-1, keepdim=True)
        logistic = torch.log(of_scores) - torch.log1p(-of_scores)
        scores = mu.gather(-1, chosen)[..., 0] + log_scale.gather(-1, chosen)[..., 0].exp() * logistic
        return self._cells(scores, self._largest(choices + _gumbel(of_choices)))

    # As levels 0, 1, ..., if there is no real number among the columns.

    @property
    def sizes(self) -> list[int]:
        """How many levels each column has, (D,): integers from the least to the largest of the training split, or
        categories. Raises SettingsError for columns of real numbers, or of integers of which some are missing."""
        if odd := {*self.numeric[self.step == 0].tolist(), *self.numeric[self.indicated].tolist()}:
            raise NoLevelsError(sorted(odd))
        found = torch.zeros(self.columns, dtype=torch.long, device=self.low.device)
        found[self.numeric] = (self._whole(self.high) - self._whole(self.low)).long() + 1
        found[self.block_of] = self.last + 1
        return found.tolist()

    def levels(self, x: Tensor) -> Tensor:
        """The levels of examples, (N, D) in float64; outside of 0..size - 1 for integers beyond those of training."""
        k = x.new_zeros(x.shape, dtype=torch.float64)
        k[..., self.block_of] = self._codes(x).double()
        k[..., self.numeric] = self._whole(self._numbers(x)) - self._whole(self.low)
        return k

    def of_levels(self, k: Tensor) -> Tensor:
        """Examples of levels, (N, D) in float64."""
        values = k.to(torch.float64, copy=True)
        values[..., self.numeric] = values[..., self.numeric] + self._whole(self.low)
        x = (values - self.centre) / self.spread
        gone = k[..., self.block_of] == self.missing
        x[..., self.block_of] = x[..., self.block_of].masked_fill(gone, math.nan)
        return x

    def _whole(self, numbers: Tensor) -> Tensor:
        """Standardized numbers (..., P) as integers."""
        return (numbers.double() * self.spread[self.numeric] + self.centre[self.numeric]).round()

    def code(self, coder: Any, raw: Tensor, x: Tensor | None = None) -> Tensor:
        """Put examples x on a coder's stack, or take them if x is None; of raw as `log_prob`."""
        logits, mu, log_scale, choices = self._parts(raw)
        precision, sizes, given = torch.exp(-log_scale), self.sizes, None if x is None else self.levels(x)
        k = raw.new_zeros(raw.shape[0], self.columns)
        counts = torch.arange(max(sizes), device=raw.device)[:, None]
        ends = (counts - 0.5 + self._whole(self.low) - self.centre[self.numeric]) / self.spread[self.numeric]
        between = self._score(ends)[0].numpy()  # the scores at the lower edge of each level, (levels, P)
        for i, column in enumerate(self.numeric.tolist()):
            parts = (each[:, i] for each in (logits, mu, precision))
            k[:, column] = coder.logistics(
                *parts, lambda edge, i=i: between[edge, i], sizes[column], None if given is None else given[:, column]
            )
        for start, column in zip(self.start.tolist(), self.block_of.tolist(), strict=True):
            own = choices[:, start : start + sizes[column]]
            k[:, column] = coder.softmax(own, None if given is None else given[:, column])
        return self.of_levels(k)

    # As real numbers with a density, for flows.

    def dequantize(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Real numbers v (N, latents), and log w (N,), with E[log p(v) + log w] <= log p(x) (arXiv 1511.01844).

        A category becomes a draw from its part of N(0, 1), which is divided into parts as large as the categories are
        often; an integer a point of its bin; and in place of a number that is missing there is a draw from N(0, 1).
        """
        x, missing = at_least_float32(x), x[..., self.numeric].isnan()
        noise = _uniform(x.new_zeros(*x.shape[:-1], self.latents), generator)
        spread, within = noise[..., : self.scores], noise[..., self.scores :]
        scores, slope = self._score(self._numbers(x) + self.step * (spread - 0.5))
        log_w = slope.log() + torch.where(self.step > 0, self.step, 1.0).log()
        free = _probit(spread)
        scores, log_w = torch.where(missing, free, scores), torch.where(missing, -_log_normal(free), log_w)
        place = self.start + self._codes(x)
        share = self.share[place]
        drawn = _probit(self.end[place] - share * (1 - within))
        of_blocks = share.log() - _log_normal(drawn)
        return torch.cat([scores, drawn], -1).to(x.dtype), (log_w.sum(-1) + of_blocks.sum(-1)).to(x.dtype)

    def middle(self, x: Tensor) -> Tensor:
        """Real numbers (N, latents): the middle of what `dequantize` makes of x (N, D), a function of x alone."""
        missing, place = x[..., self.numeric].isnan(), self.start + self._codes(x)
        scores = torch.where(missing, 0.0, self._score(self._numbers(x))[0])
        return torch.cat([scores, self.halfway[place]], -1).to(x.dtype)

    def quantize(self, v: Tensor) -> Tensor:
        """x (N, D) of real numbers v (N, latents), the opposite of `dequantize`."""
        p = torch.special.ndtr(v[..., self.scores :])[..., self.block]
        beyond = (p >= self.end).long()
        codes = torch.zeros(*v.shape[:-1], self.blocks, dtype=torch.long, device=v.device)
        codes = codes.index_add(-1, self.block, beyond)
        return self._cells(v[..., : self.scores], codes.minimum(self.last))

    # Between the two.

    def _numbers(self, x: Tensor) -> Tensor:
        """Numbers and integers (N, P); of those that are missing any."""
        return x[..., self.numeric].nan_to_num(0.0)

    def _codes(self, x: Tensor) -> Tensor:
        """The choice (N, B) of each block."""
        codes = x[..., self.block_of] * self.code_scale + self.code_shift
        return torch.where(codes.isnan(), self.gone, codes.round().clamp(min=0).minimum(self.most)).long()

    def _cells(self, scores: Tensor, codes: Tensor) -> Tensor:
        """x (N, D) of scores (N, P) and choices (N, B)."""
        x, _ = _piecewise(scores, self.heights, self.to_values)
        x = torch.where(
            self.step > 0, ((self._whole(x) - self.centre[self.numeric]) / self.spread[self.numeric]).to(x.dtype), x
        )
        x = torch.maximum(torch.minimum(x, self.high), self.low)
        gone = codes == self.missing
        out = x.new_zeros(*x.shape[:-1], self.columns)
        labels = ((codes - self.centre[self.block_of]) / self.spread[self.block_of]).masked_fill(gone, math.nan)
        of_numbers = torch.where(gone[..., self.indicator], math.nan, x[..., self.indicated])
        out[..., self.block_of] = labels.to(x.dtype)
        out[..., self.numeric] = x
        out[..., self.numeric[self.indicated]] = of_numbers
        return out

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, P) of numbers, and the slope."""
        return _piecewise(x, self.knots, self.to_scores)

    def _edges(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scores (N, P) between which a number or integer is, NaN where it is missing, the slope there, and the
        share that it has of them: below 1 so far out that floating point could not tell its own edges apart."""
        cells, half = x[..., self.numeric], self.step / 2
        (low, high), (slope, _) = self._score(torch.stack([cells - half, cells + half]))
        spread = torch.where(self.step == 0, WIDTH / 2, 0.0)
        low, high, gap = low - spread, high + spread, 2 * spread + slope * self.step
        more = (low.abs() * APART - gap).clamp(min=0) / 2
        return low - more, high + more, slope, torch.where(more > 0, gap / (gap + 2 * more), 1.0)

    def _parts(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, locations and log-scales (..., P, K) of all mixtures, and the logits (..., S) of all choices."""
        numbers, choices = at_least_float32(raw).split([self.outputs - self.choices, self.choices], -1)
        return *ops.logistic_mixture(numbers, self.scores), choices

    def _largest(self, values: Tensor) -> Tensor:
        """The choice (..., B) of the largest of values (..., S) in each block."""
        each = self.block.expand_as(values)
        top = values.new_full((*values.shape[:-1], self.blocks), -math.inf).scatter_reduce(-1, each, values, "amax")
        hit = torch.where(values == top[..., self.block], self.place, 0)
        codes = torch.zeros(*values.shape[:-1], self.blocks, dtype=torch.long, device=values.device)
        return codes.scatter_reduce(-1, each, hit, "amax")


def _curve(knots: Sequence[float], scores: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """Knots and scores, ``most`` of them: more follow on the line through the last two, which changes nothing."""
    dx, ds = knots[-1] - knots[-2], scores[-1] - scores[-2]
    more = range(1, most - len(knots) + 1)
    return [*knots, *(knots[-1] + i * dx for i in more)], [*scores, *(scores[-1] + i * ds for i in more)]


def _lines(x: Tensor, y: Tensor) -> Tensor:
    """Where the lines through neighbouring points (P, Q) meet x = 0, and their slopes, (2, P, Q - 1)."""
    slope = y.diff() / x.diff()
    return torch.stack([y[:, :-1] - x[:, :-1] * slope, slope])


def _piecewise(x: Tensor, inner: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    """Piecewise linear functions (P,) of x (..., P), of Q lines between inner knots (P, Q - 1), and their slopes."""
    flat = x.detach().flatten(0, -2).double().T.contiguous()
    place = torch.searchsorted(inner, flat)  # (P, M)
    start, slope = lines.gather(2, place.expand(2, -1, -1))
    return (start + flat * slope).T.reshape(x.shape).to(x.dtype), slope.T.reshape(x.shape).to(x.dtype)


def _uniform(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    where = like.device if generator is None else generator.device
    u = torch.rand(like.shape, dtype=like.dtype, device=where, generator=generator)
    return u.to(like.device).clamp(EDGE, 1 - EDGE)


def _gumbel(u: Tensor) -> Tensor:
    return -torch.log(-torch.log(u))


def _probit(p: Tensor) -> Tensor:
    return torch.special.ndtri(p.clamp(EDGE, 1 - EDGE))


def _log_normal(v: Tensor) -> Tensor:
    return -0.5 * (v.square() + math.log(2 * math.pi))
