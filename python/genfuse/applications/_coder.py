"""Arithmetic that is the same to the last bit on every machine, and a stack that symbols are coded on by it."""

import math
from collections.abc import Callable, Mapping, Sequence
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
CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus,
    "asinh": torch.asinh,
}  # fmt: skip
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "convolution": 0}  # the first factor's place; the second one's is next
# Each cell is one operation of IEEE 754, which has one result, or is moved, compared or counted.
SAME = set(
    "add sub rsub mul div neg abs sqrt round floor ceil relu threshold clamp clamp_min clamp_max minimum maximum min "
    "max amin amax aminmax where masked_fill sign lt le gt ge eq ne isnan nan_to_num logical_not logical_and "
    "bitwise_and bitwise_or any all argmax searchsorted leaky_relu hardtanh fill zero zeros_like ones_like zeros ones "
    "full full_like new_zeros new_ones new_full empty empty_like new_empty new_empty_strided arange linspace one_hot "
    "promote_types result_type scalar_tensor lift_fresh detach alias clone copy _to_copy view _unsafe_view reshape _reshape_alias as_strided t "
    "transpose permute expand repeat unsqueeze squeeze select slice split split_with_sizes unbind chunk narrow cat "
    "stack index index_select index_put gather scatter flip roll constant_pad_nd pixel_shuffle pixel_unshuffle "
    "_local_scalar_dense upsample_nearest2d".split()
)


def on_grid(x: Tensor, grid: float = GRID, limit: float = LIMIT) -> Tensor:
    """The nearest multiples of 1 / ``grid`` within +-``limit``."""
    return (x.clamp(-limit, limit) * grid).round() / grid


class Exact(TorchDispatchMode):
    """Within it a network in float64 gives the same bits on every processor, on any number of threads, with every
    library.

    A float64 has 53 bits. The factors of matrix products and convolutions are rounded to binary grids so coarse, and
    held within limits so near, that each product, and each sum of them in any order, is a multiple of one power of two
    below 2^53 of it: no rounding is left that the order of summation, fused multiply-adds or SIMD could change. What
    libraries compute to a few units in the last place, `CURVES`, is taken of a grid and rounded to one; no value on it
    lies near the middle between two (tests try all). Single sums, products and quotients have one result by IEEE 754.

    Raises SettingsError, which names it, for an operator of which none of this is known.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        plain, kwargs = name.removesuffix("_") if name[-1:] == "_" else name, dict(kwargs or {})
        if space == "aten" and plain in CURVES:
            result = on_grid(CURVES[plain](on_grid(_double(args[0], name)), *args[1:], **kwargs))
            return result if plain == name else args[0].copy_(result)
        if space == "aten" and name in PRODUCTS:
            return _product(func, name, list(args), kwargs)
        alpha = kwargs.get("alpha", args[2] if plain in ("add", "sub", "rsub") and len(args) > 2 else 1)
        if space != "aten" or plain not in SAME or alpha != 1 or kwargs.get("beta", 1) != 1:
            raise SettingsError(
                f"the operator {space}::{name} of this network is not known to give the same bits on every machine, so "
                "that what it compresses might not be decoded elsewhere: leave it out of the network"
            )
        return func(*args, **kwargs)


def _double(x: Tensor, name: str) -> Tensor:
    if x.dtype != torch.float64:
        raise SettingsError(f"{name} of {x.dtype}: a network that compresses must compute in the dtype of its weights")
    return x


def _product(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """A matrix product or convolution, all of whose sums are exact."""
    first = PRODUCTS[name]
    x, weight = (_double(each, name) for each in args[first : first + 2])
    transposed = name == "convolution" and args[6]
    terms = weight[:, 0].numel() if transposed else weight[0].numel() if name == "convolution" else weight.shape[-2]
    size = float(weight.abs().amax()) * terms if weight.numel() else 0.0
    if not size < 2.0**26:
        raise SettingsError(f"the weights of a network are too large, or not finite: {terms} terms up to {size / terms:.3g}")
    bits = math.frexp(size)[1]  # |sum| <= 2^10 * 2^bits, in steps of 2^-16 * 2^(bits - 26)
    args[first], args[first + 1] = on_grid(x), on_grid(weight, 2.0 ** (26 - bits), math.inf)
    bias = None
    if name == "convolution":
        bias, args[2] = args[2], None
        bias = None if bias is None else bias.view(-1, *[1] * (x.dim() - 2))
    elif name == "addmm":
        bias, func, args, kwargs = args[0], torch.ops.aten.mm.default, args[1:], {}
    product: Tensor = func(*args, **kwargs)
    return product if bias is None else product + bias


# Distributions as whole numbers

TOP = 2**30  # what the whole of a distribution is
FINE = 128.0  # points of a table in 1
DIGIT = 16  # symbols of one code
BITS, FEW = 12, 8  # of a latent: the prior has 2^bits bins of one mass; fewer where no bits come back


@cache
def distribution(name: str) -> np.ndarray:
    """round(2^30 F(i / 128)) of the "logistic" distribution for |i / 128| <= 24, of the "normal" one for <= 8."""
    x = np.arange(1, (24 if name == "logistic" else 8) * int(FINE) + 1) / FINE
    upper = [TOP / (1 + math.exp(-v)) if name == "logistic" else TOP * math.erfc(-v * 0.5**0.5) / 2 for v in x.tolist()]
    above = np.array([round(v) for v in upper], np.int64)
    return np.concatenate([TOP - above[::-1], [TOP // 2], above])


@cache
def probit(bits: int = BITS) -> np.ndarray:
    """The quantiles of N(0, 1) at i / 2^(bits + 1) on the grid, whose even ones are edges and odd ones centres of
    2^``bits`` bins; -inf and inf at the ends."""
    half = [round(NormalDist().inv_cdf(i / 2 ** (bits + 1)) * GRID) / GRID for i in range(1, 2**bits)]
    return np.array([-math.inf, *half, 0.0, *(-v for v in reversed(half)), math.inf])


def cumulative(name: str, x: np.ndarray) -> np.ndarray:
    """2^30 F(x), whole numbers, linear between the points of the table."""
    table = distribution(name)
    place = np.clip(x * FINE + (len(table) - 1) // 2, 0, len(table) - 1)
    left = np.minimum(place.astype(np.int64), len(table) - 2)
    part = ((place - left) * GRID).astype(np.int64)
    below = table[left]
    return below + ((table[left + 1] - below) * part >> 16)


class Coder:
    """A stack of symbols, on which a model's ``code`` puts examples, or takes them from.

    Every method here codes symbols k if they are given, else decodes and returns them. What is put waits, and goes on
    the stack in reverse order by `flush`, so that a model calls the methods in one order, that of decoding, for both.
    Parameters are float64 tensors of `Exact`. The stack is constriction's, asymmetric numeral systems (arXiv
    1311.2540) of 24 bits.
    """

    def __init__(self, words: np.ndarray | None = None) -> None:
        from constriction import stream

        self._models, self._waiting = stream.model, []  # type: ignore[var-annotated]
        try:
            self._stack = stream.stack.AnsCoder(*([] if words is None else [words.astype(np.uint32)]))
        except ValueError as error:
            raise DataError(f"this is no message: {error}") from None
        self.direct = False  # whether latents are means, and take no bits from the stack

    @property
    def bits(self) -> int:
        """That are on the stack."""
        return int(self._stack.num_valid_bits())

    @property
    def words(self) -> np.ndarray:
        """The stack, (N,) uint32."""
        return np.asarray(self._stack.get_compressed())

    def flush(self) -> None:
        """Put on the stack what waits."""
        for symbols, model, parameters in reversed(self._waiting):
            self._stack.encode_reverse(symbols, model, *parameters)
        self._waiting.clear()

    def _code(self, model: Any, parameters: Sequence[Any], k: np.ndarray | None) -> np.ndarray:
        if k is None:
            return np.asarray(self._stack.decode(model, *parameters), np.int64)
        given = () if isinstance(parameters[0], int) else parameters
        self._waiting.append((np.ascontiguousarray(k, np.int32), model, given))
        return k

    def _choices(self, weights: np.ndarray, k: np.ndarray | None) -> np.ndarray:
        if not len(weights):
            return np.zeros(0, np.int64)
        family = self._models.Categorical(perfect=False)
        return self._code(family, [np.ascontiguousarray(weights, np.float64)], k)

    def _between(
        self, below: Callable[[np.ndarray], np.ndarray], count: int, n: int, k: np.ndarray | None
    ) -> np.ndarray:
        """Symbols 0..count-1 (n,) of which ``below``, of edges (n, M), says 2^30 P(k < edge): digit by digit."""
        found, steps = np.zeros(n, np.int64), np.arange(DIGIT + 1)
        for place in reversed(range(max(1, math.ceil(math.log(count, DIGIT) - 1e-9)))):
            edges = np.clip(found[:, None] + steps * DIGIT**place, 0, count)
            mass = below(np.clip(edges, 1, count - 1))
            mass = np.where(edges <= 0, 0, np.where(edges >= count, TOP, mass))
            weights = np.diff(mass) + np.diff(edges)  # so that none of the symbols is impossible
            digit = self._choices(weights, None if k is None else (k - found) // DIGIT**place)
            found = np.minimum(found + digit * DIGIT**place, count - 1)
        return found

    def softmax(self, logits: Tensor, k: Tensor | None = None) -> Tensor:
        """Symbols (...) of probabilities softmax(logits), (..., K)."""
        if logits.shape[-1] < 2:
            return torch.zeros(logits.shape[:-1], dtype=torch.float64)
        weights = mixing(logits).flatten(0, -2).numpy()
        parts = [
            self._choices(weights[rows], None if k is None else _whole(k)[rows]) for rows in _parts(*weights.shape)
        ]
        return torch.from_numpy(np.concatenate(parts)).double().view(logits.shape[:-1])

    def logistics(
        self,
        logits: Tensor,
        mu: Tensor,
        precision: Tensor,
        edges: Callable[[np.ndarray], np.ndarray],
        count: int,
        k: Tensor | None = None,
    ) -> Tensor:
        """Symbols 0..count-1 (...): where a draw of a mixture of logistic distributions, of parameters (..., M), lies
        among ``edges(1)``, ..., ``edges(count - 1)``."""
        shape, parts = mu.shape[:-1], []
        weights = (mixing(logits).flatten(0, -2) * GRID).numpy().astype(np.int64)
        centres, scales = mu.flatten(0, -2).numpy(), precision.flatten(0, -2).numpy()
        for rows in _parts(len(centres), (DIGIT + 1) * centres.shape[1]) if count > 1 else ():
            w, c, s = (each[rows] for each in (weights, centres, scales))
            total = w.sum(1, keepdims=True)

            def below(e: np.ndarray, w: Any = w, c: Any = c, s: Any = s, total: Any = total) -> np.ndarray:
                at, mass = edges(e), np.zeros(e.shape, np.int64)
                for i in range(w.shape[1]):
                    mass += w[:, i : i + 1] * cumulative("logistic", (at - c[:, i : i + 1]) * s[:, i : i + 1])
                return mass // total

            parts.append(self._between(below, count, len(c), None if k is None else _whole(k)[rows]))
        found = np.concatenate(parts) if parts else np.zeros(len(centres))
        return torch.from_numpy(found).double().view(shape)

    def gaussian(self, mu: Tensor, scale: Tensor, k: Tensor | None = None) -> Tensor:
        """Which bins (N, D) of the prior N(0, 1), all of one mass, latents of N(mu, scale^2) are in."""
        centre, spread = mu.flatten().numpy(), np.maximum(scale.flatten().numpy(), 1 / GRID)
        bits = FEW if self.direct else BITS
        if self.direct:  # the bin of the mean, which is coded by the prior alone
            if k is not None:
                return k
            found = np.minimum(cumulative("normal", centre) >> (30 - bits), 2**bits - 1)
        else:
            at = probit(bits)
            found = self._between(
                lambda e: cumulative("normal", (at[2 * e] - centre[:, None]) / spread[:, None]),
                2**bits, len(centre), None if k is None else _whole(k),
            )  # fmt: skip
        return torch.from_numpy(found).double().view(mu.shape)

    def prior(self, shape: tuple[int, ...], k: Tensor | None = None) -> Tensor:
        """Which of those bins latents of N(0, 1) are in."""
        model = self._models.Uniform(2 ** (FEW if self.direct else BITS))
        found = self._code(model, [math.prod(shape)], None if k is None else _whole(k))
        return torch.from_numpy(np.asarray(found)).double().view(shape)

    def centres(self, k: Tensor) -> Tensor:
        """The latents in the middle of these bins."""
        at = torch.from_numpy(probit(FEW if self.direct else BITS))
        return at[2 * k.long() + 1]


def mixing(logits: Tensor) -> Tensor:
    """Weights (..., K) in proportion to exp(logits), as fine as the grid allows."""
    return torch.exp(logits - logits.amax(-1, keepdim=True) + 6.5)


def _whole(k: Tensor) -> np.ndarray:
    found: np.ndarray = k.flatten().numpy().astype(np.int64)
    return found


def _parts(n: int, wide: int) -> list[slice]:
    """Rows of a table so wide, some at a time."""
    rows = max(1, 2**21 // wide)
    return [slice(i, i + rows) for i in range(0, n, rows)]
