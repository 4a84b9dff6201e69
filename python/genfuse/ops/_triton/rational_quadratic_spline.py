"""Rational-quadratic splines: one program a row, a tile of coordinates and their bins at a time."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._triton._launch import launch


@triton.jit
def _softplus(x):
    z = tl.exp(-tl.abs(x))
    u = 1.0 + z  # what rounding takes from it, the quotient gives back
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _axis(raw, mask, damping: tl.constexpr, least: tl.constexpr, bound: tl.constexpr, BINS: tl.constexpr,
          TILE: tl.constexpr, wide):  # fmt: skip
    """Shares of the bins, the sum of those before each, and the knots where bins begin."""
    k = tl.arange(0, TILE)[None, :]
    x = damping * tl.load(raw[:, None] + k, mask[:, None] & (k < BINS), 0.0).to(wide)
    x = tl.where(k < BINS, x, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    share = e / tl.sum(e, 1)[:, None]
    before = tl.cumsum(share, 1) - share
    return share, before, 2.0 * bound * (least * k.to(wide) + (1.0 - least * BINS) * before) - bound


@triton.jit
def _search(at, knot, BINS: tl.constexpr, TILE: tl.constexpr):
    k = tl.arange(0, TILE)[None, :]
    return tl.sum(((at[:, None] >= knot) & (k >= 1) & (k < BINS)).to(tl.int32), 1)


@triton.jit
def _take(t, bin, TILE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, TILE)[None, :] == bin[:, None], t, 0.0), 1)


@triton.jit
def _point(
    x, raw, mask,
    damping: tl.constexpr, bound: tl.constexpr, min_w: tl.constexpr, min_h: tl.constexpr, min_d: tl.constexpr,
    edge: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr, wide,
):  # fmt: skip
    """The bin of each coordinate, and where in it the coordinate is."""
    turns = tl.zeros_like(x)
    inside = x == x
    if TAILS == 2:
        turns = 2.0 * bound * tl.floor((x + bound) / (2.0 * bound))
        at = x - turns
    else:
        inside = (x >= -bound) & (x <= bound)
        at = tl.where(inside, x, 0.0)
    ws, w_before, w_knot = _axis(raw, mask, damping, min_w, bound, BINS, TILE, wide)
    hs, h_before, h_knot = _axis(raw + BINS, mask, damping, min_h, bound, BINS, TILE, wide)
    bin = _search(at, h_knot if INVERSE else w_knot, BINS, TILE)
    xk, yk = _take(w_knot, bin, TILE), _take(h_knot, bin, TILE)
    w = 2.0 * bound * (min_w + (1.0 - min_w * BINS) * _take(ws, bin, TILE))
    h = 2.0 * bound * (min_h + (1.0 - min_h * BINS) * _take(hs, bin, TILE))
    d = raw + 2 * BINS
    if TAILS == 0:
        r0 = tl.where(bin > 0, tl.load(d + bin - 1, mask & (bin > 0), 0.0).to(wide), edge)
        r1 = tl.where(bin < BINS - 1, tl.load(d + bin, mask & (bin < BINS - 1), 0.0).to(wide), edge)
    else:
        r0 = tl.load(d + bin, mask, 0.0).to(wide)
        r1 = tl.load(d + ((bin + 1) % BINS if TAILS == 2 else bin + 1), mask, 0.0).to(wide)
    d0, d1 = min_d + _softplus(r0), min_d + _softplus(r1)
    delta = h / w
    if INVERSE:  # as in the reference: a discriminant that is never below 0, and no cancellation
        r = (at - yk) / h
        r = tl.where(r < 0.0, 0.0, tl.where(r > 1.0, 1.0, r))
        e = (d0 * (1.0 - r) - d1 * r) / (2.0 * delta)
        e = tl.where(e < -9e18, -9e18, tl.where(e > 9e18, 9e18, e))
        rest = r * (1.0 - r)
        root = tl.sqrt(e * e + rest)
        other = tl.where(e >= 0.0, e + root, rest / (root - tl.where(e >= 0.0, -1.0, e)))
        theta = r / (r + other)
        q = other / (r + other)
    else:
        theta = (at - xk) / w
        theta = tl.where(theta < 0.0, 0.0, tl.where(theta > 1.0, 1.0, theta))
        q = 1.0 - theta
    t = theta * q
    below = 1.0 / (delta * (1.0 - 2.0 * t) + (d0 + d1) * t)
    m = d1 * theta * theta + 2.0 * delta * t + d0 * q * q
    slope = delta * below * (m * (delta * below))
    v = (delta * theta * theta + d0 * t) * below
    return (inside, turns, bin, xk, yk, w, h, r0, r1, d0, d1, delta, theta, q, t, below, m, slope, v,
            ws, w_before, hs, h_before)  # fmt: skip


@triton.jit
def forward_kernel(
    x, x_stride, params, params_stride, y, logdet, cols,
    damping: tl.constexpr, bound: tl.constexpr, min_w: tl.constexpr, min_h: tl.constexpr, min_d: tl.constexpr,
    edge: tl.constexpr,
    BINS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), wide)
    for start in range(0, cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < cols
        u = tl.load(x + row * x_stride + column, mask, 0.0).to(wide)
        raw = params + row * params_stride + column.to(tl.int64) * WIDTH
        (inside, turns, _bin, xk, yk, w, h, _r0, _r1, _d0, _d1, _delta, theta, _q, _t, _below, _m, slope, v,
         _ws, _w_before, _hs, _h_before) = _point(
            u, raw, mask, damping, bound, min_w, min_h, min_d, edge, BINS, TILE, TAILS, INVERSE, wide
        )  # fmt: skip
        along = xk + theta * w if INVERSE else yk + h * v
        along = tl.where(along < -bound, -bound, tl.where(along > bound, bound, along)) + turns
        outside = u * float("nan") if TAILS == 1 else u
        tl.store(y + row * cols + column, tl.where(inside, along, outside).to(y.dtype.element_ty), mask)
        ln = tl.log(slope)
        total += tl.where(mask & inside, -ln if INVERSE else ln, 0.0)
    tl.store(logdet + row, tl.sum(total, 0))


@triton.jit
def _raw_gradient(to, mask, share, before, bin, gknot, gsize, damping: tl.constexpr, least: tl.constexpr,
                  bound: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    k = tl.arange(0, TILE)[None, :]
    mean = gknot * _take(before, bin, TILE) + gsize * _take(share, bin, TILE)
    own = tl.where(k == bin[:, None], gsize[:, None], 0.0)
    g = tl.where(k < bin[:, None], gknot[:, None], own) - mean[:, None]
    g = damping * 2.0 * bound * (1.0 - least * BINS) * share * g
    tl.store(to[:, None] + k, g.to(to.dtype.element_ty), mask[:, None] & (k < BINS))


@triton.jit
def backward_kernel(
    x, x_stride, params, params_stride, gy, glogdet, gx, gparams, cols,
    damping: tl.constexpr, bound: tl.constexpr, min_w: tl.constexpr, min_h: tl.constexpr, min_d: tl.constexpr,
    edge: tl.constexpr,
    BINS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    g_log = tl.load(glogdet + row)
    for start in range(0, cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < cols
        u = tl.load(x + row * x_stride + column, mask, 0.0).to(wide)
        g_in = tl.load(gy + row * cols + column, mask, 0.0).to(wide)
        raw = params + row * params_stride + column.to(tl.int64) * WIDTH
        (inside, _turns, bin, _xk, _yk, w, h, r0, r1, d0, d1, delta, theta, q, t, below, m, slope, v,
         ws, w_before, hs, h_before) = _point(
            u, raw, mask, damping, bound, min_w, min_h, min_d, edge, BINS, TILE, TAILS, INVERSE, wide
        )  # fmt: skip
        log_m = 2.0 * (theta * (d1 - delta) + q * (delta - d0)) / m
        log_x = (log_m - 2.0 * (d0 + d1 - 2.0 * delta) * (q - theta) * below) / w
        if INVERSE:
            g = (g_log * log_x - g_in) / slope
            gl = -g_log
            g_out = -g
            gxk = g_in
        else:
            g = g_in
            gl = g_log
            g_out = g_in * slope + g_log * log_x
            gxk = -g_out
        gh_below = g * h * below
        gdelta = gh_below * below * t * (d1 * theta * theta - d0 * q * q) + gl * (
            2.0 / delta + 2.0 * t / m - 2.0 * (1.0 - 2.0 * t) * below
        )
        gd0 = (gh_below * t * (1.0 - v) + gl * (q * q / m - 2.0 * t * below)) * tl.sigmoid(r0)
        gd1 = (gl * (theta * theta / m - 2.0 * t * below) - gh_below * t * v) * tl.sigmoid(r1)
        gw = tl.where(inside, gxk * theta - gdelta * delta / w, 0.0)
        gh = tl.where(inside, g * v + gdelta / w, 0.0)
        gd0, gd1 = tl.where(inside, gd0, 0.0), tl.where(inside, gd1, 0.0)
        tl.store(gx + row * cols + column, tl.where(inside, g_out, g_in).to(gx.dtype.element_ty), mask)
        to = gparams + (row * cols + column) * WIDTH
        _raw_gradient(to, mask, ws, w_before, bin, tl.where(inside, gxk, 0.0), gw, damping, min_w, bound, BINS, TILE)
        _raw_gradient(
            to + BINS, mask, hs, h_before, bin, tl.where(inside, g, 0.0), gh, damping, min_h, bound, BINS, TILE
        )
        k = tl.arange(0, 2 * TILE)[None, :]
        left = bin[:, None] - (1 if TAILS == 0 else 0)
        right = (left + 1) % BINS if TAILS == 2 else left + 1
        gd = tl.where(k == left, gd0[:, None], 0.0) + tl.where(k == right, gd1[:, None], 0.0)
        keep = mask[:, None] & (k < WIDTH - 2 * BINS)
        tl.store(to[:, None] + 2 * BINS + k, gd.to(gparams.dtype.element_ty), keep)


def forward(dtype: int, *problem: Any) -> None:
    _launch(forward_kernel, *problem)


def backward(dtype: int, *problem: Any) -> None:
    _launch(backward_kernel, *problem)


def _launch(
    kernel: Any, x: Tensor, x_stride: int, params: Tensor, params_stride: int, rows: int, cols: int,
    bins: int, tails: int, inverse: bool, bound: float, min_width: float, min_height: float, min_derivative: float,
    edge: float, damping: float, *tensors: Tensor,
) -> None:  # fmt: skip
    tile = triton.next_power_of_2(bins)
    settings = {"bound": bound, "min_w": min_width, "min_h": min_height, "min_d": min_derivative, "edge": edge}
    sizes = {"BINS": bins, "WIDTH": params.shape[-1] // max(cols, 1), "TILE": tile, "TAILS": tails, "INVERSE": inverse}
    block = max(1, min(triton.next_power_of_2(max(cols, 1)), 1024 // tile))
    given = (x, x_stride, params, params_stride, *tensors, cols)
    launch(kernel, (rows,), x, *given, **settings, **sizes, damping=damping, BLOCK=block)
