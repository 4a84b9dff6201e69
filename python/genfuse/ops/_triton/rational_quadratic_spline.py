"""Rational-quadratic splines: one program a row, a tile of coordinates and their bins at a time."""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfuse.ops._op import wide
from genfuse.ops._triton._launch import launch, power_of_2


@triton.jit
def _softplus(x):
    z = tl.exp(-tl.abs(x))
    u = 1.0 + z  # what rounding takes from it, the quotient gives back
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _box(table, at, boxes, left, right, bottom, top, TAILS: tl.constexpr, wide: tl.constexpr):
    """The sides and the tails of the coordinates, counted over all rows."""
    tails = tl.full(at.shape, TAILS, wide)
    if table is None:
        lo, r = tl.full(at.shape, left, wide), tl.full(at.shape, right, wide)
        b, t = tl.full(at.shape, bottom, wide), tl.full(at.shape, top, wide)
    else:
        row = table + at % boxes * 5
        lo, r, b, t = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        if TAILS == 3:
            tails = tl.load(row + 4)
    return lo, r, b, t, tails


@triton.jit
def _axis(raw, mask, damping: tl.constexpr, least: tl.constexpr, clip: tl.constexpr, low, high, BINS: tl.constexpr,
          TILE: tl.constexpr, wide):  # fmt: skip
    """Shares of the bins, the sum of those before each, the knots where bins begin, and slopes of the soft clip."""
    k = tl.arange(0, TILE)[None, :]
    x = tl.full((1, 1), damping, wide) * tl.load(raw[:, None] + k, mask[:, None] & (k < BINS), 0.0).to(wide)
    share = 1.0 / (1.0 + tl.abs(x) / tl.full((1, 1), 0.5 * clip, wide)) if clip > 0 else tl.full(x.shape, 1.0, wide)
    x = tl.where(k < BINS, x * share, float("-inf"))
    slope = share * share
    e = tl.exp(x - tl.max(x, 1)[:, None])
    share = e / tl.sum(e, 1)[:, None]
    before = tl.cumsum(share, 1) - share
    knot = (high - low)[:, None] * (least * k.to(wide) + (1.0 - least * BINS) * before) + low[:, None]
    return share, before, knot, slope


@triton.jit
def _derivative(raw, min_d: tl.constexpr, clip: tl.constexpr):
    """At a knot, and its own by the raw parameter."""
    if clip > 0:
        share = 1.0 / (1.0 + tl.abs(raw) / tl.full(raw.shape, clip, raw.dtype))
        e = tl.exp(raw * share)
        return min_d + e, e * share * share
    return min_d + _softplus(raw), tl.sigmoid(raw)


@triton.jit
def _search(at, knot, BINS: tl.constexpr, TILE: tl.constexpr):
    k = tl.arange(0, TILE)[None, :]
    return tl.sum(((at[:, None] >= knot) & (k >= 1) & (k < BINS)).to(tl.int32), 1)


@triton.jit
def _take(t, bin, TILE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, TILE)[None, :] == bin[:, None], t, 0.0), 1)


@triton.jit
def _point(
    x, raw, mask, left, right, bottom, top, tails,
    damping: tl.constexpr, min_w: tl.constexpr, min_h: tl.constexpr, min_d: tl.constexpr, edge: tl.constexpr,
    clip: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr, wide,
):  # fmt: skip
    """The bin of each coordinate, and where in it the coordinate is."""
    low = bottom if INVERSE else left
    high = top if INVERSE else right
    circular = tails == 2
    turns = tl.where(circular, tl.floor((x - low) / (high - low)), 0.0)
    inside = circular | ((x >= low) & (x <= high))
    at = tl.where(inside, x - turns * (high - low), low)
    ws, w_before, w_knot, w_slope = _axis(raw, mask, damping, min_w, clip, left, right, BINS, TILE, wide)
    hs, h_before, h_knot, h_slope = _axis(raw + BINS, mask, damping, min_h, clip, bottom, top, BINS, TILE, wide)
    bin = _search(at, h_knot if INVERSE else w_knot, BINS, TILE)
    xk, yk = _take(w_knot, bin, TILE), _take(h_knot, bin, TILE)
    w = (right - left) * (min_w + (1.0 - min_w * BINS) * _take(ws, bin, TILE))
    h = (top - bottom) * (min_h + (1.0 - min_h * BINS) * _take(hs, bin, TILE))
    d = raw + 2 * BINS
    linear = tails == 0
    skipped: tl.constexpr = 1 if TAILS == 0 else 0
    first = linear & (bin == 0)
    last = linear & (bin == BINS - 1)
    after = tl.where(circular & (bin == BINS - 1), 0, bin + 1)
    # Not `~first`, which the interpreter of Triton 3.2 does not know.
    r0 = tl.where(first, edge, tl.load(d + bin - skipped, mask & (first == 0), 0.0).to(wide))
    r1 = tl.where(last, edge, tl.load(d + after - skipped, mask & (last == 0), 0.0).to(wide))
    d0, by_d0 = _derivative(r0, min_d, clip)
    d1, by_d1 = _derivative(r1, min_d, clip)
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
    return (inside, turns, bin, xk, yk, w, h, by_d0, by_d1, d0, d1, delta, theta, q, t, below, m, slope, v,
            ws, w_before, w_slope, hs, h_before, h_slope)  # fmt: skip


@triton.jit
def forward_kernel(
    x, x_stride, free, free_stride, y, logdet, cols,
    table, boxes, left: tl.constexpr, right: tl.constexpr, bottom: tl.constexpr, top: tl.constexpr,
    damping: tl.constexpr, min_w: tl.constexpr, min_h: tl.constexpr, min_d: tl.constexpr, edge: tl.constexpr,
    clip: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), wide)
    for start in range(0, cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < cols
        u = tl.load(x + row * x_stride + column, mask, 0.0).to(wide)
        raw = free + row * free_stride + column.to(tl.int64) * WIDTH
        lo, r, b, t, tails = _box(table, row * cols + column, boxes, left, right, bottom, top, TAILS, wide)
        (inside, turns, _bin, xk, yk, w, h, _r0, _r1, _d0, _d1, _delta, theta, _q, _t, _below, _m, slope, v,
         _ws, _w_before, _w_slope, _hs, _h_before, _h_slope) = _point(
            u, raw, mask, lo, r, b, t, tails, damping, min_w, min_h, min_d, edge, clip, BINS, TILE, TAILS, INVERSE, wide
        )  # fmt: skip
        along = xk + theta * w if INVERSE else yk + h * v
        low = lo if INVERSE else b
        high = r if INVERSE else t
        along = tl.where(along < low, low, tl.where(along > high, high, along)) + turns * (high - low)
        outside = u - tl.where(u < b, b - lo, t - r) if INVERSE else u + tl.where(u < lo, b - lo, t - r)
        outside = tl.where(tails == 1, float("nan"), outside)
        tl.store(y + row * cols + column, tl.where(inside, along, outside).to(y.dtype.element_ty), mask)
        ln = tl.log(slope)
        total += tl.where(mask & inside, -ln if INVERSE else ln, 0.0)
    tl.store(logdet + row, tl.sum(total, 0))


@triton.jit
def _raw_gradient(to, mask, share, before, slope, bin, gknot, gsize, damping: tl.constexpr, least: tl.constexpr,
                  size, BINS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    k = tl.arange(0, TILE)[None, :]
    mean = gknot * _take(before, bin, TILE) + gsize * _take(share, bin, TILE)
    own = tl.where(k == bin[:, None], gsize[:, None], 0.0)
    g = tl.where(k < bin[:, None], gknot[:, None], own) - mean[:, None]
    g = tl.full((1, 1), damping, share.dtype) * (1.0 - least * BINS) * size[:, None] * share * g * slope
    tl.store(to[:, None] + k, g.to(to.dtype.element_ty), mask[:, None] & (k < BINS))


@triton.jit
def backward_kernel(
    x, x_stride, free, free_stride, gy, glogdet, gx, gparams, cols,
    table, boxes, left: tl.constexpr, right: tl.constexpr, bottom: tl.constexpr, top: tl.constexpr,
    damping: tl.constexpr, min_w: tl.constexpr, min_h: tl.constexpr, min_d: tl.constexpr, edge: tl.constexpr,
    clip: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    g_log = tl.load(glogdet + row)
    for start in range(0, cols, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < cols
        u = tl.load(x + row * x_stride + column, mask, 0.0).to(wide)
        g_in = tl.load(gy + row * cols + column, mask, 0.0).to(wide)
        raw = free + row * free_stride + column.to(tl.int64) * WIDTH
        lo, r, b, u_top, tails = _box(table, row * cols + column, boxes, left, right, bottom, top, TAILS, wide)
        (inside, _turns, bin, _xk, _yk, w, h, by_d0, by_d1, d0, d1, delta, theta, q, t, below, m, slope, v,
         ws, w_before, w_slope, hs, h_before, h_slope) = _point(
            u, raw, mask, lo, r, b, u_top, tails,
            damping, min_w, min_h, min_d, edge, clip, BINS, TILE, TAILS, INVERSE, wide,
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
        gd0 = (gh_below * t * (1.0 - v) + gl * (q * q / m - 2.0 * t * below)) * by_d0
        gd1 = (gl * (theta * theta / m - 2.0 * t * below) - gh_below * t * v) * by_d1
        gw = tl.where(inside, gxk * theta - gdelta * delta / w, 0.0)
        gh = tl.where(inside, g * v + gdelta / w, 0.0)
        gd0, gd1 = tl.where(inside, gd0, 0.0), tl.where(inside, gd1, 0.0)
        tl.store(gx + row * cols + column, tl.where(inside, g_out, g_in).to(gx.dtype.element_ty), mask)
        to = gparams + (row * cols + column) * WIDTH
        gxk, gyk = tl.where(inside, gxk, 0.0), tl.where(inside, g, 0.0)
        _raw_gradient(to, mask, ws, w_before, w_slope, bin, gxk, gw, damping, min_w, r - lo, BINS, TILE)
        _raw_gradient(to + BINS, mask, hs, h_before, h_slope, bin, gyk, gh, damping, min_h, u_top - b, BINS, TILE)
        k = tl.arange(0, 2 * TILE)[None, :]
        skipped: tl.constexpr = 1 if TAILS == 0 else 0
        after = tl.where((tails == 2) & (bin == BINS - 1), 0, bin + 1)
        gd0 = tl.where((tails == 0) & (bin == 0), 0.0, gd0)
        gd1 = tl.where((tails == 0) & (bin == BINS - 1), 0.0, gd1)
        gd = tl.where(k == bin[:, None] - skipped, gd0[:, None], 0.0)
        gd += tl.where(k == after[:, None] - skipped, gd1[:, None], 0.0)
        keep = mask[:, None] & (k < WIDTH - 2 * BINS)
        tl.store(to[:, None] + 2 * BINS + k, gd.to(gparams.dtype.element_ty), keep)


def _launch(
    kernel: Any, dtype: int, x: Tensor, x_stride: int, free: Tensor, free_stride: int, rows: int, cols: int,
    bins: int, tails: int, inverse: bool, min_width: float, min_height: float, min_derivative: float,
    edge: float, damping: float, clip: float, left: float, right: float, bottom: float, top: float,
    table: Tensor | None, boxes: int, *tensors: Tensor,
) -> None:  # fmt: skip
    tile = power_of_2(bins)
    least = torch.finfo(wide(x)).eps
    settings = {"min_w": max(min_width, least), "min_h": max(min_height, least), "min_d": min_derivative, "edge": edge}
    sizes = {"BINS": bins, "WIDTH": free.shape[-1] // max(cols, 1), "TILE": tile, "TAILS": tails, "INVERSE": inverse}
    block = max(1, min(power_of_2(max(cols, 8)), 1024 // tile))  # Triton 3.6 fails on blocks of 4
    sides = {"left": left, "right": right, "bottom": bottom, "top": top}
    given = (x, x_stride, free, free_stride, *tensors, cols, table, boxes)
    launch(kernel, (rows,), x, *given, **sides, **settings, **sizes, damping=damping, clip=clip, BLOCK=block)


forward, backward = partial(_launch, forward_kernel), partial(_launch, backward_kernel)
