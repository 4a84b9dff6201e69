"""Monotonic rational-quadratic splines and their log-determinant, from a conditioner's raw output, in one pass."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genfuse.ops import _op

TAILS = {"linear": 0, "none": 1, "circular": 2}  # as launch.h numbers them
EXTRA = {"linear": -1, "none": 1, "circular": 0}  # raw derivatives, beyond one a bin


class Settings(NamedTuple):
    """What all kernels take after their tensors."""

    bins: int
    bound: float
    tails: str
    inverse: bool
    min_width: float
    min_height: float
    min_derivative: float
    damping: float = 1.0

    @property
    def params(self) -> int:
        return 3 * self.bins + EXTRA[self.tails]

    @property
    def unit_derivative(self) -> float:
        """The raw derivative that means 1."""
        return math.log(math.expm1(1 - self.min_derivative))

    @property
    def edge(self) -> float:
        """The raw derivative of both ends under linear tails."""
        return self.unit_derivative if self.tails == "linear" else 0.0


class _Bin(NamedTuple):
    """The bin that a point is in: its index, lower corner, width, height, and the derivatives at its ends."""

    k: Tensor
    x: Tensor
    y: Tensor
    w: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor


def _shares(params: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The bins' shares of width and height beyond the minimum, and the raw derivatives at all knots."""
    widths, heights, d = params.split([s.bins, s.bins, s.params - 2 * s.bins], -1)
    if s.tails == "linear":
        d = F.pad(d, (1, 1), value=s.edge)
    elif s.tails == "circular":
        d = torch.cat([d, d[..., :1]], -1)
    return (s.damping * widths).softmax(-1), (s.damping * heights).softmax(-1), d


def _find(at: Tensor, shares: tuple[Tensor, Tensor, Tensor], s: Settings, *, along_y: bool) -> _Bin:
    def knots(share: Tensor, minimum: float) -> tuple[Tensor, Tensor]:
        size = 2 * s.bound * (minimum + (1 - minimum * s.bins) * share)
        return F.pad(size.cumsum(-1)[..., :-1], (1, 0)) - s.bound, size

    (x, w), (y, h) = knots(shares[0], s.min_width), knots(shares[1], s.min_height)
    d = s.min_derivative + F.softplus(shares[2])
    k = (at.detach()[..., None] >= (y if along_y else x)[..., 1:]).sum(-1, keepdim=True)
    return _Bin(k, *(t.gather(-1, k)[..., 0] for t in (x, y, w, h, d[..., :-1], d[..., 1:])))


def _unit(t: Tensor) -> Tensor:
    """t, which only rounding takes out of [0, 1], moved back; the derivative stays 1."""
    return t + (t.clamp(0, 1) - t).detach()


def _folded(x: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """x inside the box, what was taken from it, and where it was inside."""
    if s.tails == "circular":
        turns = 2 * s.bound * torch.floor((x.detach() + s.bound) / (2 * s.bound))
        return x - turns, turns, torch.ones_like(x, dtype=torch.bool)
    inside = x.abs() <= s.bound
    return torch.where(inside, x, 0.0), torch.zeros_like(x), inside


def formula(x: Tensor, params: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    s = Settings(*settings)
    at, turns, inside = _folded(x, s)
    b = _find(at, _shares(params, s), s, along_y=s.inverse)
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
        y = (b.x + theta * b.w).clamp(-s.bound, s.bound)
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
    return torch.where(inside, y + turns, math.nan if s.tails == "none" else x), logdet


def gradient(gy: Tensor, glogdet: Tensor, x: Tensor, params: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """Gradients of x and params. Those of the inverse by the implicit function theorem, at its result."""
    s = Settings(*settings)
    if s.inverse:
        x, _ = _fused(x, params, *settings)
    at, _, inside = _folded(x, s)
    shares = _shares(params, s)
    b = _find(at, shares, s, along_y=False)
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

    def raw(share: Tensor, minimum: float, gknot: Tensor, gsize: Tensor) -> Tensor:
        g = torch.where(index[:-1] < b.k, gknot[..., None], torch.where(here[..., :-1], gsize[..., None], 0.0))
        return s.damping * 2 * s.bound * (1 - minimum * s.bins) * share * (g - (g * share).sum(-1, keepdim=True))

    gd = torch.where(here, gd0[..., None], torch.where(past, gd1[..., None], 0.0)) * shares[2].sigmoid()
    if s.tails == "linear":
        gd = gd[..., 1:-1]
    elif s.tails == "circular":
        gd = torch.cat([gd[..., :1] + gd[..., -1:], gd[..., 1:-1]], -1)
    gparams = torch.cat([raw(shares[0], s.min_width, gxk, gw), raw(shares[1], s.min_height, g, gh), gd], -1)
    return torch.where(inside, gx, gy), torch.where(inside[..., None], gparams, 0.0)


def _results(x: Tensor, params: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return _op.like(x), x.new_empty(x.shape[:-1], dtype=_op.wide(x))


def _problem(x: Tensor, params: Tensor, *settings: Any) -> tuple:
    s = Settings(*settings)
    return (
        _op.DTYPES[x.dtype], *_op.rows(x), *_op.rows(params.flatten(-2)), x.shape[:-1].numel(), x.shape[-1],
        s.bins, TAILS[s.tails], s.inverse, s.bound, s.min_width, s.min_height, s.min_derivative, s.edge, s.damping,
    )  # fmt: skip


_fused = _op.fused(
    "rational_quadratic_spline(Tensor x, Tensor params, int bins, float bound, str tails, bool inverse, "
    "float min_width, float min_height, float min_derivative, float damping) -> (Tensor, Tensor)",
    formula=formula,
    gradient=gradient,
    results=_results,
    problem=_problem,
    triton="genfuse.ops._triton.rational_quadratic_spline",
    wrt=2,
)


def complain_unless_valid(s: Settings) -> None:
    """Raise a ValueError that names the setting which makes no spline."""
    if s.bins < 1:
        raise ValueError(f"bins must be at least 1, got {s.bins}")
    if not 0 < s.bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {s.bound}")
    if s.tails not in TAILS:
        raise ValueError(f"tails must be one of {', '.join(TAILS)}, got {s.tails!r}")
    for name, least in (("min_width", s.min_width), ("min_height", s.min_height)):
        if not 0 < least <= 1 / s.bins:
            raise ValueError(f"{name} must be above 0 and at most 1 / bins = {1 / s.bins:g}, got {least}")
    if not 0 < s.min_derivative < 1:
        raise ValueError(f"min_derivative must be between 0 and 1, got {s.min_derivative}")
    if not 0 < s.damping < math.inf:
        raise ValueError(f"damping must be positive and finite, got {s.damping}")


def complain_unless_inside(x: Tensor, name: str, s: Settings) -> None:
    """Raise a ValueError where there is no outside, and x is there."""
    if s.tails == "none" and not torch.compiler.is_compiling() and bool((x.detach().abs() > s.bound).any()):
        box = f"[-{s.bound:g}, {s.bound:g}]"
        raise ValueError(f'{name} must lie in {box} with tails="none", got {float(x.abs().max()):g}')


def rational_quadratic_spline(
    x: Tensor,
    params: Tensor,
    *,
    bins: int,
    bound: float,
    tails: str = "linear",
    inverse: bool = False,
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    damping: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Transform each coordinate by a monotonic rational-quadratic spline of its own, with the log-determinant.

    Durkan et al., "Neural Spline Flows" (arXiv 1906.04032), section 3.1 and appendix A.1. From raw parameters, as a
    conditioner returns them: with raw widths a, raw heights b and raw derivatives c of a coordinate,

    .. math::
        w = 2 B (\mathrm{min\_width} + (1 - K \mathrm{min\_width}) \operatorname{softmax}(a)), \qquad
        d = \mathrm{min\_derivative} + \operatorname{softplus}(c),

    heights as widths, and knots from -B to B on both axes. These are nflows' meanings. The inverse solves its quadratic
    equation in a form whose discriminant cannot fall below 0. Differentiable to any order.

    Args:
        x: (..., D), of any strides; float32, float64, float16 or bfloat16.
        params: (..., D, P), of x's dtype, or of 16 bits beside a float32 x: for each coordinate ``bins`` raw widths,
            ``bins`` raw heights, and raw derivatives: at the bins - 1 inner knots for linear tails, at all bins + 1
            for none, at the first ``bins`` for circular, whose last is the first.
        bins: K, the number of bins.
        bound: B; the spline maps [-B, B] to itself, in the units of x.
        tails: outside the box "linear" is the identity, whose derivative 1 holds at both ends; "circular" goes on
            periodically, f(x + 2B) = f(x) + 2B; "none" has no outside: see Raises.
        inverse: whether to map y back to x.
        min_width, min_height: least size of a bin, as a share of the box.
        min_derivative: least derivative at a knot.
        damping: a factor of raw widths and heights, above 0. The paper's code has one over the square root of the
            number of the conditioner's last hidden units.

    Returns:
        y, of x's shape and dtype, contiguous; and the log-determinant of what was done, forward or inverse, (...), in
        nats, float64 for float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes, devices or sizes do not go together; and, with tails="none", for
            an x outside the box. That check waits for the device, once a call; under torch.compile it is left out, and
            such an x gives NaN.
    """
    settings = Settings(bins, float(bound), tails, inverse, min_width, min_height, min_derivative, damping)
    complain_unless_valid(settings)
    if x.dtype is torch.float32 and params.dtype in (torch.float16, torch.bfloat16):
        params = params.float()
    shape = (*x.shape, settings.params)
    if (
        params.shape != shape
        or params.dtype is not x.dtype
        or params.device != x.device
        or x.dtype not in _op.DTYPES
        or not x.dim()
    ):
        _op.complain_unless_like(x, "x", params=(params, shape))
    complain_unless_inside(x, "x", settings)
    return _fused(x, params, *settings)
