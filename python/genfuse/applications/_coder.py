"""Arithmetic that is the same to the last bit on every machine, and a stack that symbols are coded on by it."""

import hashlib
import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genfuse.errors import DataError, SettingsError

GRID, LIMIT = 2.0**16, 2.0**10  # what is summed, or a curve is taken of, is a multiple of 1 / GRID within +-LIMIT
CURVES: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus,
    "asinh": torch.asinh,
}  # fmt: skip
COARSE = {"asinh": 2.0**12}  # the grid that a curve is taken of, if it is not GRID: fewer values to test
OFF = 1 / 8  # of a step: sigmoid(x) = 1/2 + x/4 - x^3/48 + ... comes too near to the middle of steps
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "convolution": 0}  # the first factor's place; the second one's is next
# Each cell is one operation of IEEE 754, which has one result, or is moved, compared or counted.
NAMES = (
    "add sub rsub mul div neg abs sqrt round floor ceil relu leaky_relu hardtanh threshold clamp clamp_min clamp_max "
    "sign minimum maximum min max amin amax aminmax argmax searchsorted where masked_fill isnan nan_to_num lt le gt "
    "ge eq ne logical_not logical_and bitwise_not bitwise_and bitwise_or any all fill zero zeros zeros_like ones "
    "ones_like full full_like empty empty_like new_zeros new_ones new_full new_empty new_empty_strided arange "
    "linspace scalar_tensor lift_fresh one_hot promote_types result_type _local_scalar_dense detach alias clone copy "
    "_to_copy view _unsafe_view reshape as_strided t _reshape_alias transpose permute expand repeat unsqueeze squeeze "
    "select slice split split_with_sizes unbind cat stack index index_select index_put gather scatter flip roll "
    "constant_pad_nd pixel_shuffle pixel_unshuffle"
)
SAME = frozenset(NAMES.split())


def on_grid(x: Tensor, grid: float = GRID, limit: float = LIMIT) -> Tensor:
    """The nearest multiples of 1 / ``grid`` within +-``limit``."""
    return (x.clamp(-limit, limit) * grid).round() / grid


class Exact(TorchDispatchMode):
    """Within it a network in float64 gives the same bits on every processor, number of threads and library.

    A float64 has 53 bits. The factors of products are rounded to binary grids so coarse, and held within limits so
    near, that all products, and all sums of them in any order, are multiples of one power of two below 2^53 of it:
    nothing is rounded that the order of sums, fused multiply-adds or SIMD could change. What libraries compute to a few
    units in the last place, `CURVES`, is taken of a grid and rounded to one; none of its values lies near the middle
    between two (the tests try all). Raises SettingsError for an operator of which none of this is known.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        plain, kwargs = name.removesuffix("_"), kwargs or {}
        scaled = kwargs.get("alpha", args[2] if plain in ("add", "sub", "rsub") and len(args) > 2 else 1) != 1
        factors = args[PRODUCTS[name] : PRODUCTS[name] + 2] if name in PRODUCTS else args[: plain in CURVES]
        if space != "aten" or not (factors or plain in SAME) or scaled or kwargs.get("beta", 1) != 1:
            raise SettingsError(
                f"the operator {space}::{name} of this network is not known to give the same bits on every machine, so "
                "that what it compresses might not be decoded elsewhere: leave it out of the network"
            )
        if odd := [each.dtype for each in factors if each.dtype != torch.float64]:
            raise SettingsError(
                f"{name} of {odd[0]}: a network that compresses must compute in the dtype of its weights"
            )
        if name in PRODUCTS:
            return _product(func, name, list(args), kwargs)
        if not factors:
            return func(*args, **kwargs)
        at = on_grid(args[0], COARSE.get(plain, GRID))
        result = on_grid(CURVES[plain](at, *args[1:], **kwargs) + OFF / GRID)
        return result if plain == name else args[0].copy_(result)


def _product(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """A matrix product or convolution, all of whose sums are exact."""
    bias, place = None, PRODUCTS[name]
    weight = args[place + 1]
    if name == "convolution":
        bias, args[2] = args[2], None
        bias = None if bias is None else bias.view(-1, *[1] * (weight.dim() - 2))
        terms = weight[:, 0].numel() if args[6] else weight[0].numel()  # if it is transposed
    else:
        terms = weight.shape[-2]
    size = float(weight.abs().amax()) * terms if weight.numel() else 0.0
    if not size < 2.0**26:
        raise SettingsError(f"weights of a network are too large, or not finite: the largest is {size / terms:.3g}")
    bits = math.frexp(size)[1]  # |sum| <= 2^10 * 2^bits, in steps of 2^-16 * 2^(bits - 26)
    args[place : place + 2] = on_grid(args[place]), on_grid(weight, 2.0 ** (26 - bits), math.inf)
    if name == "addmm":
        bias, func, args, kwargs = args[0], torch.ops.aten.mm.default, args[1:], {}
    product: Tensor = func(*args, **kwargs)
    return product if bias is None else product + bias


# Distributions as whole numbers

TOP = 2**30  # what the whole of a distribution is
FINE = 128.0  # points of a table in 1
DIGIT = 16  # symbols that are coded at once
STEP, COARSE_STEP = 2.0**12, 2.0**6  # what a flow moves are multiples of 1 / STEP; coarse where no bits come back
PART = 2**12  # and scales are of 1 / PART
PIECES = 16  # straight lines in each bin of a spline
WHOLE = 2**24  # symbols that are evenly distributed, at most; over 2^18 their last one is much more probable
BITS, FEW = 12, 8  # of a latent: the prior has 2^bits bins of one mass; fewer where no bits come back


@cache
def distribution(name: str, top: int = TOP) -> np.ndarray:
    """round(top F(i / 128)) of the "logistic" distribution for |i / 128| <= 24, of the "normal" one for <= 8."""
    x = [i / FINE for i in range(1, (24 if name == "logistic" else 8) * int(FINE) + 1)]
    upper = [top / (1 + math.exp(-v)) if name == "logistic" else top * math.erfc(-v * 0.5**0.5) / 2 for v in x]
    above = np.array([round(v) for v in upper], np.int64)
    return np.concatenate([top - above[::-1], [top // 2], above])


@cache
def probit(bits: int) -> np.ndarray:
    """Quantiles of N(0, 1) at i / 2^(bits + 1), i = 0, 1, ...: even ones are edges, odd ones the centres of bins."""
    half = [round(NormalDist().inv_cdf(i / 2 ** (bits + 1)) * GRID) / GRID for i in range(1, 2**bits)]
    return np.array([-math.inf, *half, 0.0, *(-v for v in reversed(half)), math.inf])


def cumulative(name: str, x: np.ndarray, top: int = TOP) -> np.ndarray:
    """top F(x), whole numbers, linear between the points of the table."""
    table = distribution(name, top)
    place = np.clip(x * FINE + (len(table) - 1) // 2, 0, len(table) - 1)
    left = np.minimum(place.astype(np.int64), len(table) - 2)
    part, below = ((place - left) * GRID).astype(np.int64), table[left]
    return below + ((table[left + 1] - below) * part >> 16)


@cache
def places(levels: int, margin: float, step: float) -> tuple[np.ndarray, np.ndarray, int]:
    """v of [0, 1) in steps so small (2^-32, for ``step`` 2^12) that next to black and white, where logit is steep, they
    are not much larger than those of the grid: where levels begin, and where logit(v), or with no margin v - 1/2, is on
    the grid, whole numbers; and how many steps of the grid the first of these is below 0."""
    whole, reach = int(step) << 20, int(24 * step if margin else step / 2)
    grid = np.arange(-reach, reach + 1) / step
    mass = cumulative("logistic", grid, whole) if margin else ((grid + 0.5) * whole).astype(np.int64)
    shares = np.arange(levels + 1) / levels * math.floor((1 - 2 * margin) * 2**18)  # the last level ends within 0..1
    begin = np.rint(shares).astype(np.int64) * (whole >> 18)
    return begin + round(margin * whole), mass, reach


def padding(words: int) -> np.ndarray:
    """Bits that an empty stack starts with where examples take some before they give any."""
    return np.frombuffer(hashlib.shake_256(b"genfuse").digest(4 * words), "<u4") | np.uint32(1)


def mixing(logits: Tensor) -> Tensor:
    """Weights (..., K) in proportion to exp(logits), as fine as the grid allows."""
    return torch.exp(logits - logits.amax(-1, keepdim=True) + 6.5)


class Coder:
    """A stack of symbols (arXiv 1311.2540, by constriction), on which a model's ``code`` puts examples, or takes them.

    Each method codes symbols k if they are given, and else decodes and returns them. What is put waits, and goes on the
    stack in reverse order by `flush`, so that a model calls them in one order, that of decoding, for both. Parameters
    are float64 tensors made within `Exact`. Where ``direct``, latents are means, and take no bits from the stack.
    """

    def __init__(self, words: Any = (), direct: bool = False) -> None:
        try:
            from constriction import stream
        except ImportError:
            raise SettingsError("compression needs the package constriction: pip install constriction") from None
        self._models, self.direct = stream.model, direct
        self.stack = stream.stack.AnsCoder(np.array(words, np.uint32))
        self._waiting: list[Any] = []
        self.least = len(words)  # words that were on the stack when it was at its shortest, before a `flush`

    @property
    def bins(self) -> int:
        return int(2 ** (FEW if self.direct else BITS))

    def flush(self) -> None:
        for symbols, *model in reversed(self._waiting):
            self.stack.encode_reverse(symbols, *model)
        self._waiting.clear()

    def _choices(self, weights: np.ndarray, k: np.ndarray | None) -> np.ndarray:
        given = self._models.Categorical(perfect=False), np.ascontiguousarray(weights, np.float64)
        if k is None:
            return self.stack.decode(*given).astype(np.int64)
        self._waiting.append((k.astype(np.int32), *given))
        return k

    def _between(self, below: Callable[[Any, Any], Any], count: int, n: int, wide: int, k: Tensor | None) -> Tensor:
        """Symbols 0..count-1 (n,), digit by digit: ``below(rows, edges)`` is 2^30 P(k < edge) of edges (n, 17)."""
        parts, whole = [], None if k is None else k.flatten().numpy().astype(np.int64)
        step = max(1, 2**21 // (wide * DIGIT))
        for rows in (slice(i, min(i + step, n)) for i in range(0, n, step) if count > 1):
            found = np.zeros(rows.stop - rows.start, np.int64)
            for place in reversed(range(math.ceil(math.log(count, DIGIT) - 1e-9) or 1)):
                edges = np.clip(found[:, None] + np.arange(DIGIT + 1) * DIGIT**place, 0, count)
                mass = below(rows, np.clip(edges, 1, count - 1))
                mass = np.where(edges == 0, 0, np.where(edges == count, TOP, mass))
                weights = np.diff(mass) + np.diff(edges)  # so that none of the symbols is impossible
                digit = self._choices(weights, None if whole is None else (whole[rows] - found) // DIGIT**place)
                found = np.minimum(found + digit * DIGIT**place, count - 1)
            parts.append(found)
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(n)).double()

    def softmax(self, logits: Tensor, k: Tensor | None = None) -> Tensor:
        """Symbols (...) of probabilities softmax(logits), (..., K)."""
        weights, whole = mixing(logits).flatten(0, -2).numpy(), None if k is None else k.flatten().numpy()
        if weights.shape[1] < 2:
            return torch.zeros(logits.shape[:-1], dtype=torch.float64)
        return torch.from_numpy(self._choices(weights, whole)).double().view(logits.shape[:-1])

    def logistics(
        self, logits: Tensor, mu: Tensor, precision: Tensor, edges: Callable[[Any], Any], count: int,
        k: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Symbols 0..count-1 (...): between which of ``edges(1)``, ..., ``edges(count - 1)`` a draw of a mixture of
        logistic distributions, of parameters (..., M), lies."""
        w, c, s = (each.flatten(0, -2).numpy() for each in (mixing(logits) * GRID, mu, precision))
        w = w.astype(np.int64)

        def below(rows: slice, e: np.ndarray) -> np.ndarray:
            at = edges(e)
            each = (w[rows, i, None] * cumulative("logistic", (at - c[rows, i, None]) * s[rows, i, None])
                    for i in range(w.shape[1]))  # fmt: skip
            return sum(each) // w[rows].sum(1, keepdims=True)

        return self._between(below, count, len(c), w.shape[1], k).view(mu.shape[:-1])

    def gaussian(self, mu: Tensor, scale: Tensor, k: Tensor | None = None) -> Tensor:
        """Bins (N, D) of the prior N(0, 1), all of one mass, that latents of N(mu, scale^2) are in."""
        c, s, at = mu.flatten().numpy(), np.maximum(scale.flatten().numpy(), 1 / GRID), probit(BITS)
        if self.direct:
            means = torch.from_numpy(np.minimum(cumulative("normal", c) >> (30 - FEW), 2**FEW - 1)).double()
            return means.view(mu.shape) if k is None else k

        def below(rows: slice, e: np.ndarray) -> np.ndarray:
            return cumulative("normal", (at[2 * e] - c[rows, None]) / s[rows, None])

        return self._between(below, self.bins, len(c), 1, k).view(mu.shape)

    # Of flows

    def _uniform(self, sizes: np.ndarray, k: np.ndarray | None = None) -> np.ndarray:
        """Symbols 0..size-1 (n,) of one probability, put on the stack at once if they are given."""
        several, model = sizes > 1, self._models.Uniform()
        if k is not None:
            self.stack.encode_reverse(k[several].astype(np.int32), model, sizes[several].astype(np.int32))
            return k
        found = np.zeros(len(sizes), np.int64)
        found[several] = self.stack.decode(model, sizes[several].astype(np.int32))
        self.least = min(self.least, self.stack.num_words())
        return found

    def _many(self, sizes: np.ndarray, k: np.ndarray | None = None) -> np.ndarray:
        """`_uniform` of sizes that are multiples of 4 ``step``, in two digits."""
        fair = int(self.step) << 2
        few = np.full(len(sizes), fair)
        if k is None:
            high = self._uniform(sizes // fair)
            return high * fair + self._uniform(few)
        self._uniform(few, k % fair)
        self._uniform(sizes // fair, k // fair)
        return k

    @property
    def step(self) -> float:
        return COARSE_STEP if self.direct else STEP

    def on_grid(self, x: Tensor) -> Tensor:
        return on_grid(x, self.step, math.inf)

    def affine(
        self, x: Tensor, scale: Tensor, shift: Any = 0.0, inverse: bool = False, where: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """x scale + shift of numbers on the grid, or with ``inverse`` the x of it, only ``where`` that is True.

        One to one (arXiv 2111.00965, algorithm 1): with scale = R / S, i R + r = j S + e, where r of 0..R-1 is taken
        from the stack, and e of 0..S-1 put on it, log2 S - log2 R bits more.
        """
        chosen = np.broadcast_to(True if where is None else where.numpy(), x.shape)
        made = np.rint(x.numpy() * self.step).astype(np.int64)
        ratio, moved = (np.broadcast_to(torch.as_tensor(each).numpy(), x.shape)[chosen] for each in (scale, shift))
        ratio = np.clip(np.rint(ratio * PART), 2, WHOLE - 1).astype(np.int64)
        moved = np.rint(moved * self.step).astype(np.int64)
        i, unit = made[chosen] - (moved if inverse else 0), np.full(len(ratio), PART)
        taken, put = (unit, ratio) if inverse else (ratio, unit)
        for part in self._parts(len(i), inverse):
            v = i[part] * taken[part] + self._uniform(taken[part])
            self._uniform(put[part], v % put[part])
            i[part] = v // put[part]
        made[chosen] = i if inverse else i + moved
        return torch.from_numpy(made).double() / self.step

    def spline(
        self, x: Tensor, bound: float, widths: Tensor, heights: Tensor, slopes: Tensor, inverse: bool = False
    ) -> Tensor:  # fmt: skip
        """The rational-quadratic spline (arXiv 1906.04032, equation 4) of x (...) on the grid, or the x of it, by
        straight lines between 16 places of each bin: bins' shares of the box (..., K), and slopes (..., K + 1)."""
        edge, made = int(bound * self.step), np.rint(x.numpy() * self.step).astype(np.int64)
        chosen = (made >= -edge) & (made < edge)
        fine = 2 ** max(0, int(math.log2(2**18 / edge)))  # a box is of 2^18 to 2^19 steps
        d, part = slopes.numpy()[chosen], np.arange(PIECES + 1) / PIECES
        ends = [np.rint(np.insert(np.add.accumulate(each.numpy()[chosen], -1), 0, 0, -1) * (2 * edge * fine))
                .astype(np.int64) for each in (widths, heights)]  # fmt: skip
        for each in ends:
            each[:, -1] = 2 * edge * fine
        i = made[chosen] + edge
        for of in self._parts(len(i), inverse):
            at = i[of] * fine + self._uniform(np.full(len(i[of]), fine))
            rows = np.arange(len(at))
            k = (ends[inverse][of, 1:-1] <= at[:, None]).sum(1)
            (x0, y0), (w, h) = zip(*((each[of][rows, k], np.diff(each[of])[rows, k]) for each in ends), strict=True)
            d0, d1, delta = d[of][rows, k, None], d[of][rows, k + 1, None], (h / w)[:, None]
            t = part * (1 - part)
            share = (delta * part**2 + d0 * t) / (delta * (1 - 2 * t) + (d0 + d1) * t)
            lines = [
                x0[:, None] + np.arange(PIECES + 1) * w[:, None] // PIECES,
                y0[:, None] + np.arange(PIECES + 1) + np.rint((h - PIECES)[:, None] * share).astype(np.int64),
            ]
            own, other = lines[::-1] if inverse else lines
            j = (own[:, 1:-1] <= at[:, None]).sum(1)
            size, wide = np.diff(own)[rows, j], np.diff(other)[rows, j]
            v = (at - own[rows, j]) * wide + self._uniform(wide)
            self._uniform(size, v % size)
            at = other[rows, j] + v // size
            self._uniform(np.full(len(at), fine), at % fine)
            i[of] = at // fine
        made[chosen] = i - edge
        return torch.from_numpy(made).double() / self.step

    @staticmethod
    def _parts(count: int, inverse: bool) -> list[slice]:
        """Few symbols at a time, so that the stack need not have bits for all before any come back."""
        step = count // 16 + 1
        found = [slice(i, i + step) for i in range(0, count, step)]
        return found[::-1] if inverse else found

    def dequantized(
        self, levels: int, margin: float, k: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """y = logit(margin + (1 - 2 margin) v) on the grid, or without margin v - 1/2, of v drawn evenly from
        [k / levels, (k + 1) / levels); or k of y, and the draw back to the stack."""
        begin, mass, reach = places(levels, margin, self.step)
        given = (k if y is None else y).numpy()  # type: ignore[union-attr]
        flat = given.ravel() if y is None else given.ravel() * self.step + reach
        flat = np.rint(flat).astype(np.int64)
        (own, other) = (begin, mass) if y is None else (mass, begin)
        if flat.min() < 0 or flat.max() > len(own) - 2:
            raise DataError("a number is on no level")
        made = np.empty_like(flat)
        for part in self._parts(len(flat), y is not None):
            if y is None:
                at = begin[flat[part]] + self._many(begin[flat[part] + 1] - begin[flat[part]])
            else:
                at = mass[flat[part]] + self._uniform(mass[flat[part] + 1] - mass[flat[part]])
            made[part] = np.searchsorted(other, at, "right") - 1
            if made[part].min() < 0 or made[part].max() > len(other) - 2:
                raise DataError("a number is on no level")
            first = other[made[part]]
            (self._uniform if y is None else self._many)(other[made[part] + 1] - first, at - first)
        values = torch.from_numpy(made).double().view(given.shape)
        return values if y is not None else (values - reach) / self.step

    def normal(self, n: int, d: int, z: Tensor | None = None) -> Tensor:
        """z (n, d) on the grid, of N(0, 1)."""
        reach = int(128 * self.step)
        if z is not None and float(z.abs().max()) >= 128:
            raise DataError("an example is so unlike those that the flow was trained on that it cannot be compressed")

        def below(rows: slice, e: np.ndarray) -> np.ndarray:
            return cumulative("normal", (e - reach) / self.step)

        k = self._between(below, 2 * reach, n * d, 1, None if z is None else z * self.step + reach)
        return ((k - reach) / self.step).view(n, d)

    def prior(self, n: int, d: int, k: Tensor | None = None) -> Tensor:
        """Bins (n, d) of latents of N(0, 1)."""
        model = self._models.Uniform(self.bins)
        if k is None:
            return torch.from_numpy(self.stack.decode(model, n * d)).double().view(n, d)
        self._waiting.append((k.flatten().numpy().astype(np.int32), model))
        return k

    def centres(self, k: Tensor) -> Tensor:
        """The latents in the middle of bins."""
        return torch.from_numpy(probit(FEW if self.direct else BITS))[2 * k.long() + 1]
