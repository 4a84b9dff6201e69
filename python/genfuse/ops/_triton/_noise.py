"""Philox uniforms and normals inside Triton kernels, number for number those of ops/_philox.py and csrc/philox.h."""

import triton
import triton.language as tl


@triton.jit
def _uniform(word, WIDE: tl.constexpr):
    """(word + 0.5) 2^-32."""
    if WIDE:
        centre = word.to(tl.float64) + 0.5
    else:  # both halves of a word are exact in float32, so their sum is rounded once
        centre = (word >> 16).to(tl.float32) * 65536.0 + ((word & 0xFFFF).to(tl.float32) + 0.5)
    return centre * 2.3283064365386963e-10


@triton.jit
def _pair(word0, word1, WIDE: tl.constexpr):
    """Box-Muller of two words: sqrt(-2 ln u0) (cos, sin)(2 pi u1), u = (word + 0.5) 2^-32."""
    if WIDE:
        ln = tl.log(_uniform(word0, WIDE))
        angle = _uniform(word1, WIDE) * 6.283185307179586
    else:
        # Next to u = 1, ln u = ln(1 - v) by its series: u itself has lost v's digits.
        v = _uniform(word0 ^ 0xFFFFFFFF, WIDE)
        series = -v * (1.0 + v * (0.5 + v * (0.3333333333 + 0.25 * v)))
        ln = tl.where(v < 0.015625, series, tl.log(_uniform(word0, WIDE)))
        # The angle within half a turn, as a signed number, keeps the digits of small angles.
        angle = (word1.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.4629180792671596e-9  # 2 pi 2^-32
    radius = tl.sqrt(-2.0 * ln)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def uniforms(seed, first, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Elements [first, first + BLOCK) of the stream of uniforms; ``first`` is a multiple of 4."""
    w0, w1, w2, w3 = _words(seed, first // 4 + tl.arange(0, BLOCK // 4))
    return _in_order(_uniform(w0, WIDE), _uniform(w1, WIDE), _uniform(w2, WIDE), _uniform(w3, WIDE))


@triton.jit
def uniform_at(seed, element, WIDE: tl.constexpr):
    """One element of the stream of uniforms, or a block of any."""
    w0, w1, w2, w3 = _words(seed, element // 4)
    lower, upper = tl.where((element & 1) != 0, w1, w0), tl.where((element & 1) != 0, w3, w2)
    return _uniform(tl.where((element & 2) != 0, upper, lower), WIDE)


@triton.jit
def _in_order(a, b, c, d):
    """The four numbers of each counter, one after the other: (..., BLOCK) from four (..., BLOCK // 4)."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def normals(seed, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Elements [first, first + BLOCK) of the stream of normals, of each of ``first`` if that is (ROWS, 1). It is a
    multiple of ALIGNED, 4, 2 or 1: all of what a counter or a pair of words gives is then used."""
    at = first // ALIGNED + tl.arange(0, BLOCK // ALIGNED)
    if ALIGNED == 4:
        w0, w1, w2, w3 = _words(seed, at)
        a, b = _pair(w0, w1, WIDE)
        c, d = _pair(w2, w3, WIDE)
        eps = _in_order(a, b, c, d)
    else:
        pair = at if ALIGNED == 2 else at // 2
        w0, w1, w2, w3 = _words(seed, pair // 2)
        upper = (pair & 1) != 0
        cosine, sine = _pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1), WIDE)
        eps = tl.interleave(cosine, sine) if ALIGNED == 2 else tl.where((at & 1) != 0, sine, cosine)
    return eps


@triton.jit
def eps_of(noise, seed, first, mask, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """The noise of elements [first, first + BLOCK), of each row if there are several: as given, or else `normals`."""
    if noise is not None:
        return tl.load(noise + first + tl.arange(0, BLOCK), mask, 0.0).to(tl.float64 if WIDE else tl.float32)
    return normals(seed, first, BLOCK, ALIGNED, WIDE)


@triton.jit
def _words(seed, counter):
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)
