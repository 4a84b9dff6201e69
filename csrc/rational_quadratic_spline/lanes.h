#pragma once
// Splines of many coordinates at once on the CPU.
#include "rational_quadratic_spline/launch.h"
#include "rational_quadratic_spline/math.h"
#include "rows.h"

namespace genfuse::rational_quadratic_spline::cpu {

// Coordinates worked on at a time, across rows. Their parameters are turned so that one parameter of all lanes lies
// together; loops over bins stand outside of those over lanes, which are vectorised.
constexpr int kLanes = 32;

// Takes n parameters of every lane, from where they lie beside each other, into n rows of kLanes; of float by four at a
// time, the last four of which may be partly those before.
template <class S, class T>
GENFUSE_HD void turn(const S* const* from, int64_t n, T* to) {
#ifdef __SSE2__
  if constexpr (std::is_same_v<S, float>) {
    for (int64_t k = 0; n >= 4 && k < n; k += 4) {
      const int64_t first = std::min(k, n - 4);
      for (int l = 0; l < kLanes; l += 4) {
        __m128 four[4];
        for (int i = 0; i < 4; ++i) four[i] = _mm_loadu_ps(from[l + i] + first);
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (first + i) * kLanes + l, four[i]);
      }
    }
    if (n >= 4) return;
  }
#endif
  for (int l = 0; l < kLanes; ++l) {
    for (int64_t k = 0; k < n; ++k) to[k * kLanes + l] = load(from[l][k]);
  }
}

// And back, to places `step` apart, of the first lanes.
template <class S, class T>
GENFUSE_HD void turn_back(const T* from, int64_t n, int lanes, S* to, int64_t step) {
  int l = 0;
#ifdef __SSE2__
  if constexpr (std::is_same_v<S, float>) {
    for (; n >= 4 && l + 4 <= lanes; l += 4) {
      for (int64_t k = 0; k < n; k += 4) {
        const int64_t first = std::min(k, n - 4);
        __m128 four[4];
        for (int i = 0; i < 4; ++i) four[i] = _mm_loadu_ps(from + (first + i) * kLanes + l);
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (l + i) * step + first, four[i]);
      }
    }
  }
#endif
  for (; l < lanes; ++l) {
    for (int64_t k = 0; k < n; ++k) store(to[l * step + k], from[k * kLanes + l]);
  }
}

// Clips raw parameters softly, and keeps the slopes for the way back.
template <class T>
GENFUSE_HD void clip(T* raw, T* slopes, int64_t n, T c) {
  GENFUSE_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Clipped<T> a(raw[i], c);
    raw[i] = a.value, slopes[i] = a.slope;
  }
}

template <class T>
GENFUSE_HD void softmax(T* e, int64_t bins, T damping) {
  T most[kLanes], sums[4][kLanes];  // of every fourth bin: fewer roundings than of one sum
  for (auto& sum : sums) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) sum[l] = 0;
  }
  for (int64_t i = 0; i < bins * kLanes; ++i) e[i] *= damping;
  for (int l = 0; l < kLanes; ++l) most[l] = e[l];
  for (int64_t k = 1; k < bins; ++k) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) most[l] = e[k * kLanes + l] > most[l] ? e[k * kLanes + l] : most[l];
  }
  for (int64_t k = 0; k < bins; ++k) {
    T* sum = sums[k % 4];
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T x = exp_(e[k * kLanes + l] - most[l]);
      e[k * kLanes + l] = x;
      sum[l] += x;
    }
  }
  T* sum = sums[0];
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) sum[l] = (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]);
  for (int64_t k = 0; k < bins; ++k) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) e[k * kLanes + l] /= sum[l];
  }
}

// a where the condition holds, else b, by their bits: of plain choices GCC makes branches around stores for AVX2.
GENFUSE_HD float choose(bool condition, float a, float b) {
  const int32_t mask = -int32_t(condition);
  return bit_cast<float>((bit_cast<int32_t>(a) & mask) | (bit_cast<int32_t>(b) & ~mask));
}
GENFUSE_HD double choose(bool condition, double a, double b) {
  const int64_t mask = -int64_t(condition);
  return bit_cast<double>((bit_cast<int64_t>(a) & mask) | (bit_cast<int64_t>(b) & ~mask));
}

// Of one axis: the share of the bin that each lane is in, and that of all before it.
template <class T>
struct Picked {
  T before[kLanes], here[kLanes];
};

// Finds the bins, and numbers them as T so that all lanes are of one width.
template <class T>
GENFUSE_HD void search(const T* share, int64_t bins, Axis<T> axis, const T* low, const T* high, const T* at, T* bin,
                       Picked<T>& to) {
  T sum[kLanes];
  for (int l = 0; l < kLanes; ++l) bin[l] = to.before[l] = 0, sum[l] = to.here[l] = share[l];
  for (int64_t k = 1; k < bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T next = share[k * kLanes + l], before = sum[l], b0 = to.before[l], h0 = to.here[l], n0 = bin[l];
      const bool past = at[l] >= axis.knot(number, before, low[l], high[l]);
      bin[l] = choose(past, number, n0);
      to.before[l] = choose(past, before, b0);
      to.here[l] = choose(past, next, h0);
      sum[l] = before + next;
    }
  }
}

template <class T>
GENFUSE_HD void pick(const T* share, int64_t bins, const T* bin, Picked<T>& to) {
  for (int l = 0; l < kLanes; ++l) to.before[l] = 0, to.here[l] = share[l];
  T sum[kLanes];
  for (int l = 0; l < kLanes; ++l) sum[l] = share[l];
  for (int64_t k = 1; k < bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T next = share[k * kLanes + l], before = sum[l], b0 = to.before[l], h0 = to.here[l];
      const bool past = bin[l] >= number;
      to.before[l] = choose(past, before, b0);
      to.here[l] = choose(past, next, h0);
      sum[l] = before + next;
    }
  }
}

template <class T>
struct Lanes {
  T* raw;  // 3 bins + 1 rows of kLanes: raw parameters, of which widths and heights become shares; with a clip slopes
           // of widths and heights follow, 2 bins rows
  int n;   // lanes in use
  int64_t row[kLanes];
  int tails[kLanes];
  T x[kLanes], at[kLanes], turns[kLanes], inside[kLanes], bin[kLanes], d0[kLanes], d1[kLanes];
  T corner_x[kLanes], corner_y[kLanes], width[kLanes], height[kLanes], slope0[kLanes], slope1[kLanes];
  T left[kLanes], right[kLanes], bottom[kLanes], top[kLanes], below[kLanes], above[kLanes];  // the boxes
  Picked<T> w, h;
};

// Where the raw derivatives stand that are parameters, and not given by the tails.
template <class T>
GENFUSE_HD T* inner_derivatives(const Lanes<T>& b, const Problem& p) {
  return b.raw + (2 * p.bins + (p.tails == kLinear ? 1 : 0)) * kLanes;
}

// Gives the ends the raw derivatives that follow from the tails.
template <class T>
GENFUSE_HD void close_ends(Lanes<T>& b, const Problem& p) {
  if (p.tails == kNone) return;
  T* d = b.raw + 2 * p.bins * kLanes;
  for (int l = 0; l < kLanes; ++l) {
    const int tails = p.tails == kMixed ? b.tails[l] : p.tails;
    if (tails == kLinear) d[l] = T(p.edge);
    if (tails != kNone) d[p.bins * kLanes + l] = d[l];
  }
}

// Gives a lane its box.
template <class T>
GENFUSE_HD void enclose(Lanes<T>& b, int l, const Box<T>& box) {
  b.left[l] = box.left, b.right[l] = box.right, b.bottom[l] = box.bottom, b.top[l] = box.top;
  b.below[l] = box.below, b.above[l] = box.above;
}

template <class T>
GENFUSE_HD void finish(const Picked<T>& picked, const T* bin, Axis<T> axis, const T* low, const T* high, T* corner,
                       T* size) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const T from = low[l], to = high[l], before = picked.before[l], here = picked.here[l];
    corner[l] = axis.knot(bin[l], before, from, to);
    size[l] = axis.size(here, from, to);
  }
}

template <bool Inverse, bool Circular, class T>
GENFUSE_HD void fold_all(Lanes<T>& b, [[maybe_unused]] bool mixed) {
  const T *x = b.x, *low = Inverse ? b.bottom : b.left, *high = Inverse ? b.top : b.right;
  T *at = b.at, *turns = b.turns, *inside = b.inside;
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const T from = low[l], to = high[l];
    const bool circular = Circular && (!mixed || b.tails[l] == kCircular);
    const Box<T> box(from, to, from, to, T(0), T(0), circular ? kCircular : kLinear);
    const Folded<T> f = fold<Inverse>(x[l], box);
    at[l] = f.at, turns[l] = f.turns, inside[l] = f.inside;
  }
}

// Turns the raw derivatives that were picked into `slopes`, and what their gradients are multiplied by.
template <bool exponential, class T>
GENFUSE_HD void derivatives(const T* raw, const Constants<T>& c, T* slopes) {
  const T least = c.min_derivative, clip = c.clip;
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) slopes[l] = derivative<exponential>(raw[l], least, clip).value;
}

template <class T>
GENFUSE_HD void find_bins(Lanes<T>& b, const Problem& p, Constants<T> c) {
  const int64_t bins = p.bins;
  T *widths = b.raw, *heights = widths + bins * kLanes, *d = heights + bins * kLanes;
  if (!p.table) {
    for (int l = 0; l < kLanes; ++l) enclose(b, l, c);
  }
  if (c.clip != T(0)) clip(widths, d + (bins + 1) * kLanes, 2 * bins * kLanes, T(2) * c.clip * c.x.damping);
  softmax(widths, bins, c.x.damping);
  softmax(heights, bins, c.y.damping);
  const bool circular = p.tails == kCircular || p.tails == kMixed;
  if (p.inverse) {
    circular ? fold_all<true, true>(b, p.tails == kMixed) : fold_all<true, false>(b, false);
    search(heights, bins, c.y, b.bottom, b.top, b.at, b.bin, b.h);
    pick(widths, bins, b.bin, b.w);
  } else {
    circular ? fold_all<false, true>(b, p.tails == kMixed) : fold_all<false, false>(b, false);
    search(widths, bins, c.x, b.left, b.right, b.at, b.bin, b.w);
    pick(heights, bins, b.bin, b.h);
  }
  for (int l = 0; l < kLanes; ++l) b.d0[l] = d[l], b.d1[l] = d[kLanes + l];
  for (int64_t k = 1; k < bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const bool past = b.bin[l] >= number;
      const T left = d[k * kLanes + l], right = d[(k + 1) * kLanes + l], d0 = b.d0[l], d1 = b.d1[l];
      b.d0[l] = choose(past, left, d0);
      b.d1[l] = choose(past, right, d1);
    }
  }
  finish(b.w, b.bin, c.x, b.left, b.right, b.corner_x, b.width);
  finish(b.h, b.bin, c.y, b.bottom, b.top, b.corner_y, b.height);
  if (c.clip != T(0)) {
    derivatives<true>(b.d0, c, b.slope0), derivatives<true>(b.d1, c, b.slope1);
  } else {
    derivatives<false>(b.d0, c, b.slope0), derivatives<false>(b.d1, c, b.slope1);
  }
}

// What the formulas take, through pointers: members of a structure within a structure stop GCC from vectorising.
template <class T>
struct Columns {
  const T *x, *at, *turns, *inside, *corner_x, *corner_y, *width, *height, *slope0, *slope1, *d0, *d1;
  const T *left, *right, *bottom, *top, *below, *above;
};
template <class T>
GENFUSE_HD Columns<T> columns_of(const Lanes<T>& b) {
  return {b.x,      b.at, b.turns, b.inside, b.corner_x, b.corner_y, b.width, b.height, b.slope0,
          b.slope1, b.d0, b.d1,    b.left,   b.right,    b.bottom,   b.top,   b.below,  b.above};
}

template <bool Inverse, class T>
GENFUSE_HD void values_of(const Lanes<T>& lanes, const Constants<T>&, T* y, T* logdet) {
  const Columns<T> b = columns_of(lanes);
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const Folded<T> folded{b.at[l], b.turns[l], b.inside[l]};
    const Bin<T> bin{b.corner_x[l], b.corner_y[l], b.width[l], b.height[l], b.slope0[l], b.slope1[l]};
    const Box<T> box(b.left[l], b.right[l], b.bottom[l], b.top[l], b.below[l], b.above[l], kLinear);
    const Value<T> v = value<Inverse>(b.x[l], folded, bin, box);
    y[l] = v.y, logdet[l] = v.logdet;
  }
}

}  // namespace genfuse::rational_quadratic_spline::cpu
