"""Monotonic rational-quadratic splines and their log-determinant, from a conditioner's raw output, in one pass."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genfuse.ops import _op

TAILS = {"linear": 0, "none": 1, "circular": 2, "mixed": 3}  # as launch.h numbers them
EXTRA = {"linear": -1, "none": 1, "circular": 0, "mixed": 1}  # raw derivatives, beyond one a bin

PUBLIC = ("linear", "none", "circular")

Side = float | Sequence[float] | Tensor  # of all coordinates, or one of each


class Settings(NamedTuple):
    """What all kernels take after their tensors."""

    bins: int
    bound: float | Sequence[float]  # or the four sides
    tails: str
    inverse: bool
    min_width: float
    min_height: float
    min_derivative: float
    damping: float = 1.0
    slope: float = 0.0  # above 0: raw parameters are as in zuko

    @property
    def box(self) -> Sequence[float]:
        """Left, right, bottom and top."""
        return _sides(self.bound)

    @property
    def arguments(self) -> tuple:
        """What the operator takes after its tensors."""
        return _arguments(self)

    @property
    def params(self) -> int:
        return _count(self.bins, self.tails)

    @property
    def clip(self) -> float:
        """Of raw derivatives; half of it is that of raw widths and heights."""
        return -math.log(self.slope) if self.slope else 0.0

    @property
    def unit_derivative(self) -> float:
        """The raw derivative that means 1."""
        if not self.slope:
            return math.log(math.expm1(1 - self.min_derivative))
        clipped = math.log(1 - self.min_derivative)
        return clipped / (1 - abs(clipped) / self.clip)

    @property
    def edge(self) -> float:
        """The raw derivative of both ends under linear tails."""
        return self.unit_derivative if self.tails in ("linear", "mixed") else 0.0


# Functions, since torch.compile of PyTorch 2.6 knows no properties and slices of a named tuple.
def _sides(bound: float | Sequence[float]) -> Sequence[float]:
    return (-bound, bound, -bound, bound) if isinstance(bound, (int, float)) else bound


def _arguments(s: Settings) -> tuple:
    least = s.min_width, s.min_height, s.min_derivative
    return (s.bins, _sides(s.bound), s.tails, s.inverse, *least, s.damping, s.slope)


def _count(bins: int, tails: str) -> int:
    return 3 * bins + EXTRA[tails]


class _Box(NamedTuple):
    """The sides and the number of the tails, for all coordinates, or for each."""

    left: Any
    right: Any
    bottom: Any
    top: Any
    tails: Any


def _box(x: Tensor, table: Tensor | None, s: Settings) -> _Box:
    if table is None:
        return _Box._make((*s.box, TAILS[s.tails]))
    if x.shape[-1] != len(table):  # each coordinate is a row
        table = table[:, None]
    columns = table.to(x.dtype).unbind(-1)
    return _Box._make((*columns[:4], columns[4] if s.tails == "mixed" else TAILS[s.tails]))


class _Bin(NamedTuple):
    """The bin that a point is in: its index, lower corner, width, height, and the derivatives at its ends."""

    k: Tensor
    x: Tensor
    y: Tensor
    w: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor


class _Shares(NamedTuple):
    """The bins' shares of width and height beyond the minimum, and the derivatives at all knots, each with what its
    gradient is multiplied by on the way to raw parameters."""

    widths: Tensor
    heights: Tensor
    d: Tensor
    by_width: Tensor | float
    by_height: Tensor | float
    by_d: Tensor


def _clipped(t: Tensor, limit: float) -> tuple[Tensor, Tensor | float]:
    """t, clipped softly if there is a limit, and the slope."""
    if not limit:
        return t, 1.0
    share = 1 / (1 + (t / limit).abs())
    return t * share, share**2


def _shares(params: Tensor, box: _Box, s: Settings) -> _Shares:
    widths, heights, d = params.split([s.bins, s.bins, s.params - 2 * s.bins], -1)
    if s.tails == "linear":
        d = F.pad(d, (1, 1), value=s.edge)
    elif s.tails == "circular":
        d = torch.cat([d, d[..., :1]], -1)
    elif s.tails == "mixed":
        linear, circular = ((box.tails == TAILS[t])[..., None] for t in ("linear", "circular"))
        first, last = (torch.where(linear, s.edge, end) for end in (d[..., :1], d[..., -1:]))
        d = torch.cat([first, d[..., 1:-1], torch.where(circular, first, last)], -1)
    (w, by_w), (h, by_h) = (_clipped(s.damping * t, s.clip / 2) for t in (widths, heights))
    if s.slope:
        d, by_d = _clipped(d, s.clip)
        d = d.exp()
        by_d = d * by_d
    else:
        d, by_d = _op.softplus(d), d.sigmoid()
    return _Shares(w.softmax(-1), h.softmax(-1), s.min_derivative + d, by_w, by_h, by_d)


def _least(minimum: float, like: Tensor) -> float:
    """A bin of no size would divide by it."""
    return max(minimum, torch.finfo(like.dtype).eps)


def _find(at: Tensor, shares: _Shares, box: _Box, s: Settings) -> _Bin:
    def knots(share: Tensor, minimum: float, low: Any, high: Any) -> tuple[Tensor, Tensor]:
        low, high = (t[..., None] if isinstance(t, Tensor) else t for t in (low, high))
        minimum = _least(minimum, share)
        size = (high - low) * (minimum + (1 - minimum * s.bins) * share)
        return F.pad(size.cumsum(-1)[..., :-1], (1, 0)) + low, size

    x, w = knots(shares.widths, s.min_width, box.left, box.right)
    y, h = knots(shares.heights, s.min_height, box.bottom, box.top)
    d = shares.d
    k = (at.detach()[..., None] >= (y if s.inverse else x)[..., 1:]).sum(-1, keepdim=True)
    return _Bin(k, *(t.gather(-1, k)[..., 0] for t in (x, y, w, h, d[..., :-1], d[..., 1:])))


def _unit(t: Tensor) -> Tensor:
    """t, which only rounding takes out of [0, 1], moved back; the derivative stays 1."""
    return t + (t.clamp(0, 1) - t).detach()


def _folded(x: Tensor, box: _Box, *, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x inside the box, how many times its size was taken from it, and where it was inside."""
    low, high = box[2:4] if inverse else box[:2]
    inside, turns = (x >= low) & (x <= high), torch.zeros_like(x)
    if isinstance(box.tails, Tensor) or box.tails == TAILS["circular"]:
        circular = _are("circular", box, x)
        turns = torch.where(circular, torch.floor((x.detach() - low) / (high - low)), turns)
        inside = inside | circular
    return torch.where(inside, x - turns * (high - low), low), turns, inside


def _beyond(x: Tensor, box: _Box, *, inverse: bool) -> Tensor:
    """What lies outside: linear tails go on from the corners with slope 1."""
    if inverse:
        y = torch.where(x < box.bottom, x - (box.bottom - box.left), x - (box.top - box.right))
    else:
        y = torch.where(x < box.left, x + (box.bottom - box.left), x + (box.top - box.right))
    return torch.where(_are("none", box, x), math.nan, y)


def _are(tails: str, box: _Box, x: Tensor) -> Tensor:
    """Whether the tails are these: of each coordinate, or one for all. By an operator, since tracers keep no others."""
    found = box.tails == TAILS[tails]
    return found if isinstance(found, Tensor) else x.new_full((), int(found), dtype=torch.bool)


def formula(x: Tensor, params: Tensor, table: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    s = Settings(*settings)
    box = _box(x, table, s)
    at, turns, inside = _folded(x, box, inverse=s.inverse)
    b = _find(at, _shares(params, box, s), box, s)
    delta = b.h / b.w
    if s.inverse:
        # Equation 29 in r = (y - y_k) / h has the discriminant (d0 (1 - r) - d1 r)^2 + 4 delta^2 r (1 - r): never
        # below 0. Of its two forms of one root, each is free of cancellation on one side of e = 0.
        r = _unit((at - b.y) / b.h)
        most = torch.finfo(x.dtype).max ** 0.5 / 2
        e = ((b.d0 * (1 - r) - b.d1 * r) / (2 * delta)).clamp(-most, most)
        rest = r * (1 - r)
        root = (e * e + rest).sqrt()
        other = torch.where(e >= 0, e + root, rest / (root - e.clamp(max=0)))
        theta, q = r / (r + other), other / (r + other)
        y = b.x + theta * b.w
        y = torch.where(y < box.left, box.left, torch.where(y > box.right, box.right, y))
    else:
        theta = _unit((at - b.x) / b.w)
        q = 1 - theta
    t = theta * q
    below = delta * (1 - 2 * t) + (b.d0 + b.d1) * t
    if not s.inverse:
        y = b.y + b.h * ((delta * theta**2 + b.d0 * t) / below)
    ratio = delta / below
    logdet = ((b.d1 * theta**2 + 2 * delta * t + b.d0 * q**2) * ratio * ratio).log()
    logdet = torch.where(inside, -logdet if s.inverse else logdet, 0.0).sum(-1)
    size = box.right - box.left if s.inverse else box.top - box.bottom
    return torch.where(inside, y + turns * size, _beyond(x, box, inverse=s.inverse)), logdet


def gradient(
    gy: Tensor, glogdet: Tensor, x: Tensor, params: Tensor, table: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of x and params. Those of the inverse by the implicit function theorem, at its result."""
    s = Settings(*settings)
    box = _box(x, table, s)
    at, turns, inside = _folded(x, box, inverse=s.inverse)
    shares = _shares(params, box, s)
    b = _find(at, shares, box, s)
    if s.inverse:
        result, _ = _fused(x, params, table, *settings)
        at = torch.where(inside, result - turns * (box.right - box.left), box.left)
    delta = b.h / b.w
    theta = _unit((at - b.x) / b.w)
    q = 1 - theta
    t = theta * q
    below = 1 / (delta * (1 - 2 * t) + (b.d0 + b.d1) * t)
    m = b.d1 * theta**2 + 2 * delta * t + b.d0 * q**2
    v = (delta * theta**2 + b.d0 * t) * below  # y = y_k + h v
    slope = delta * below * (m * (delta * below))
    g_log = glogdet.unsqueeze(-1)
    log_m = 2 * (theta * (b.d1 - delta) + q * (delta - b.d0)) / m
    log_x = (log_m - 2 * (b.d0 + b.d1 - 2 * delta) * (q - theta) * below) / b.w
    if s.inverse:
        g = -(gy - g_log * log_x) / slope
        g_log = -g_log
        gx, gxk = -g, gy
    else:
        g = gy
        gx = gy * slope + g_log * log_x
        gxk = -gx
    gh_below = g * b.h * below
    gdelta = gh_below * below * t * (b.d1 * theta**2 - b.d0 * q**2) + g_log * (
        2 / delta + 2 * t / m - 2 * (1 - 2 * t) * below
    )
    gd0 = gh_below * t * (1 - v) + g_log * (q**2 / m - 2 * t * below)
    gd1 = -gh_below * t * v + g_log * (theta**2 / m - 2 * t * below)
    gw, gh = gxk * theta - gdelta * delta / b.w, g * v + gdelta / b.w

    index = torch.arange(s.bins + 1, device=x.device)
    here, past = index == b.k, index == b.k + 1

    def raw(share: Tensor, by: Tensor | float, minimum: float, size: Any, gknot: Tensor, gsize: Tensor) -> Tensor:
        g = torch.where(index[:-1] < b.k, gknot[..., None], torch.where(here[..., :-1], gsize[..., None], 0.0))
        size = size[..., None] if isinstance(size, Tensor) else size
        scale = s.damping * size * (1 - _least(minimum, share) * s.bins)
        return scale * share * (g - (g * share).sum(-1, keepdim=True)) * by

    ends = gd0[..., None] * shares.by_d, gd1[..., None] * shares.by_d
    gd = torch.where(here, ends[0], torch.where(past, ends[1], 0.0))
    if s.tails == "linear":
        gd = gd[..., 1:-1]
    elif s.tails == "circular":
        gd = torch.cat([gd[..., :1] + gd[..., -1:], gd[..., 1:-1]], -1)
    elif s.tails == "mixed":
        tails = box.tails[..., None]
        first = torch.where(tails == TAILS["circular"], gd[..., :1] + gd[..., -1:], gd[..., :1])
        first = torch.where(tails == TAILS["linear"], 0.0, first)
        last = torch.where(tails == TAILS["none"], gd[..., -1:], 0.0)
        gd = torch.cat([first, gd[..., 1:-1], last], -1)
    gwidths = raw(shares.widths, shares.by_width, s.min_width, box.right - box.left, gxk, gw)
    gheights = raw(shares.heights, shares.by_height, s.min_height, box.top - box.bottom, g, gh)
    gparams = torch.cat([gwidths, gheights, gd], -1)
    return torch.where(inside, gx, gy), torch.where(inside[..., None], gparams, 0.0)


def _results(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _op.like(x), _op.sums(x, *x.shape[:-1])


@lru_cache(maxsize=None, typed=True)  # 8 and 8.0 are not one number of bins
def _constants(*settings: Any) -> tuple:
    s = Settings(*settings)
    return (
        s.bins, TAILS[s.tails], s.inverse, s.min_width, s.min_height, s.min_derivative, s.edge, s.damping, s.clip,
        *s.box,
    )  # fmt: skip


def _problem(x: Tensor, params: Tensor, table: Tensor | None, bins: int, box: Sequence[float], *settings: Any) -> tuple:
    return (
        _op.DTYPES[x.dtype], *_op.rows(x), *_op.rows(params.flatten(-2)), x.shape[:-1].numel(), x.shape[-1],
        *_constants(bins, tuple(box), *settings), *((None, 1) if table is None else (table.contiguous(), len(table))),
    )  # fmt: skip


def _takes(x: Tensor, params: Tensor, table: Tensor | None, *settings: Any) -> tuple:
    s = Settings(*settings)
    check_settings(s)
    if not x.dim() or (s.tails == "mixed" and table is None) or (table is not None and not len(table) and x.shape[-1]):
        raise ValueError("x must have an axis of coordinates, and mixed tails a table")
    boxes = 0 if table is None else len(table)
    return (x.shape, _op.storage(x)), ((*x.shape, s.params), x.dtype), ((boxes, 5), _op.wide(x))


_fused = _op.fused(
    "rational_quadratic_spline(Tensor x, Tensor params, Tensor? table, int bins, float[] box, str tails, bool inverse, "
    "float min_width, float min_height, float min_derivative, float damping, float slope) -> (Tensor, Tensor)",
    formula=formula,
    gradient=gradient,
    results=_results,
    problem=_problem,
    triton="genfuse.ops._triton.rational_quadratic_spline",
    wrt=2,
    takes=_takes,
)


def check_settings(s: Settings) -> None:
    """Raise a ValueError that names the setting which makes no spline."""
    if not isinstance(s.bins, int):
        raise ValueError(f"bins must be a whole number, got {s.bins}")
    if s.bins < 1:
        raise ValueError(f"bins must be at least 1, got {s.bins}")
    if isinstance(s.bound, (int, float)) and not 0 < s.bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {s.bound}")
    left, right, bottom, top = _sides(s.bound)
    if not (-math.inf < left < right < math.inf and -math.inf < bottom < top < math.inf):
        raise ValueError(f"box must be finite, left of right and bottom below top, got {(left, right, bottom, top)}")
    if s.tails not in TAILS:
        raise ValueError(f"tails must be one of {', '.join(PUBLIC)}, got {s.tails!r}")
    for name, least in (("min_width", s.min_width), ("min_height", s.min_height)):
        if not 0 <= least <= 1 / s.bins:
            raise ValueError(f"{name} must be from 0 to 1 / bins = {1 / s.bins:g}, got {least}")
    if not (s.min_derivative > 0 or (s.slope and s.min_derivative == 0)) or not s.min_derivative < 1:
        raise ValueError(f"min_derivative must be between 0 and 1, got {s.min_derivative}")
    if s.slope and not s.slope < 1 - s.min_derivative:
        raise ValueError(f"min_derivative must be below 1 - slope, got {s.min_derivative} with {s.slope}")
    if not 0 < s.damping < math.inf:
        raise ValueError(f"damping must be positive and finite, got {s.damping}")


def check_inside(x: Tensor, name: str, s: Settings, table: Tensor | None = None) -> None:
    """Raise a ValueError where there is no outside, and x is there."""
    if s.tails not in ("none", "mixed") or not _op.has_values(x, *(() if table is None else (table,))):
        return
    box = _box(x, table, s)
    low, high = box[2:4] if s.inverse else box[:2]
    outside = (x < low) | (x > high)
    if isinstance(box.tails, Tensor):
        outside = outside & (box.tails == TAILS["none"])
    if bool(outside.any()):
        sides = "its box" if isinstance(low, Tensor) else f"[{low:g}, {high:g}]"
        raise ValueError(f'{name} must lie in {sides} with tails="none", got {float(x[outside][0]):g}')


def rational_quadratic_spline(
    x: Tensor,
    params: Tensor,
    *,
    bins: int,
    bound: Side | None = None,
    box: tuple[Side, Side, Side, Side] | None = None,
    tails: str | Sequence[str] = "linear",
    inverse: bool = False,
    min_width: float | None = None,
    min_height: float | None = None,
    min_derivative: float | None = None,
    damping: float = 1.0,
    slope: float | None = None,
    by_element: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Transform each coordinate by a monotonic rational-quadratic spline of its own, with the log-determinant.

    Durkan et al., "Neural Spline Flows" (arXiv 1906.04032), section 3.1 and appendix A.1. From raw parameters, as a
    conditioner returns them: with raw widths a, raw heights b and raw derivatives c of a coordinate,

    .. math::
        w = 2 B (\mathrm{min\_width} + (1 - K \mathrm{min\_width}) \operatorname{softmax}(a)), \qquad
        d = \mathrm{min\_derivative} + \operatorname{softplus}(c),

    heights as widths, and knots from -B to B on both axes. These are nflows' meanings; zuko's are those with a
    ``slope``. The inverse solves its quadratic equation in a form whose discriminant cannot fall below 0.
    Differentiable to any order.

    Args:
        x: (..., D), of any strides; float32, float64, float16 or bfloat16.
        params: (..., D, P), of x's dtype, or of 16 bits beside a float32 x: for each coordinate ``bins`` raw widths,
            ``bins`` raw heights, and raw derivatives: at the bins - 1 inner knots for linear tails, at all bins + 1
            for none and for tails of each coordinate, where those that follow from its tails have no effect; at the
            first ``bins`` for circular, whose last is the first.
        bins: K, the number of bins.
        bound: B; the spline maps [-B, B] to itself, in the units of x. A number, or one for each coordinate, as a
            sequence or a tensor (D,).
        box: in place of bound left, right, bottom and top, each as bound; the spline maps [left, right] to
            [bottom, top]. Tensors on a GPU are not looked at.
        tails: outside the box "linear" has slope 1, as it has at both ends, so that with a bound it is the identity;
            "circular" goes on periodically, f(x + 2B) = f(x) + 2B; "none" has no outside: see Raises. Or a sequence of
            these, one for each coordinate.
        inverse: whether to map y back to x.
        min_width, min_height: least size of a bin, as a share of the box, from 0, which counts as the smallest that
            makes a difference to 1. 1e-3, or with a slope 0, by default.
        min_derivative: least derivative at a knot, likewise.
        damping: a factor of raw widths and heights, above 0. The paper's code has one over the square root of the
            number of the conditioner's last hidden units.
        slope: raw parameters as in zuko, which calls the same so: with L = -log slope, raw widths and heights are
            a / (1 + |2 a / L|), and d = min_derivative + exp(c / (1 + |c / L|)).
        by_element: whether to return log-determinants of x's shape.

    Returns:
        y, of x's shape and dtype, contiguous; and the log-determinant of what was done, forward or inverse, (...), in
        nats, float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes, devices or sizes do not go together; and, with tails "none", for
            an x outside the box. That check waits for the device, once a call; under torch.compile, torch.func, tracers
            and modes it is left out, and such an x gives NaN.
    """
    if (bound is None) == (box is None):
        raise ValueError("one of bound and box must be given, not both")
    if box is not None and not (isinstance(box, (tuple, list)) and len(box) == 4):
        raise ValueError(f"box must be four sides: left, right, bottom and top; got {box!r}")
    if not isinstance(tails, (str, tuple, list)):
        raise ValueError(f"tails must be one of {', '.join(PUBLIC)}, or a sequence of these; got {tails!r}")
    if slope is not None and not 0 < slope < 1:
        raise ValueError(f"slope must be between 0 and 1, got {slope}")
    default = 1e-3 if slope is None else 0.0
    least = [default if m is None else m for m in (min_width, min_height, min_derivative)]
    table = None
    if isinstance(tails, str) and isinstance(bound, (int, float)):
        sides: Any = float(bound)
    elif isinstance(tails, str) and box is not None and all(isinstance(side, (int, float)) for side in box):
        sides = tuple(float(side) for side in box)  # type: ignore[arg-type]
    else:
        _op.check_alike(x, "x")
        table = _table(x, bound, box, tails)
        sides, tails = (-1.0, 1.0, -1.0, 1.0), tails if isinstance(tails, str) else "mixed"
    if tails == "mixed" and table is None:
        raise ValueError(f"tails must be one of {', '.join(PUBLIC)}, got 'mixed'")
    settings = Settings(bins, sides, tails, inverse, least[0], least[1], least[2], damping, slope or 0.0)
    check_settings(settings)
    if x.dtype is torch.float32 and params.dtype in (torch.float16, torch.bfloat16):
        params = params.float()
    shape = (*x.shape, _count(bins, tails))
    if (
        params.shape != shape
        or params.dtype is not x.dtype
        or params.device != x.device
        or x.dtype not in _op.DTYPES
        or not x.dim()
    ):
        _op.check_alike(x, "x", params=(params, shape))
    check_inside(x, "x", settings, table)
    if by_element:
        y, logdet = _fused(x.unsqueeze(-1), params.unsqueeze(-2), table, *_arguments(settings))
        return y.squeeze(-1), logdet
    return _fused(x, params, table, *_arguments(settings))


def _table(x: Tensor, bound: Side | None, box: Sequence[Side] | None, tails: str | Sequence[str]) -> Tensor:
    """The sides and the tails of each coordinate, (D, 5)."""
    features = x.shape[-1]

    def column(value: Any, name: str) -> Tensor:
        t = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
        if t.dim() > 1 or (t.dim() and t.shape[0] != 1 and t.shape[0] != features):
            raise ValueError(f"{name} must be one or one for each of {features} coordinates, got {tuple(t.shape)}")
        return t.to(x.device, _op.wide(x), non_blocking=True).expand(features)

    unknown = next((t for t in ([tails] if isinstance(tails, str) else tails) if t not in PUBLIC), None)
    if unknown is not None:
        raise ValueError(f"tails must be one of {', '.join(PUBLIC)}, got {unknown!r}")
    if box is None:
        b = column(bound, "bound")
        sides = [-b, b, -b, b]
    else:
        sides = [column(side, name) for side, name in zip(box, ("left", "right", "bottom", "top"), strict=True)]
    if x.is_cpu and _op.has_values(*sides):
        left, right, bottom, top = (side.detach() for side in sides)
        if not bool(((left < right) & (bottom < top) & (right - left + top - bottom).isfinite()).all()):
            what = "bound must be positive and finite" if box is None else "box must be finite, left of right"
            raise ValueError(f"{what}, in every coordinate")
    return torch.stack(
        [*sides, column([TAILS[t] for t in tails] if not isinstance(tails, str) else TAILS[tails], "tails")], -1
    )
