#pragma once
// The spline of one coordinate, by one thread.
#include "rational_quadratic_spline/launch.h"
#include "rational_quadratic_spline/math.h"

namespace genfuse::rational_quadratic_spline::cuda {

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Raw widths or heights, and as their softmax the shares of the bins. Of as many bins as `Bins` a thread keeps them in
// registers, with all loops unrolled: arrays that are indexed by a variable lie in memory. Of any other number it keeps
// none, and goes over the raw parameters anew for each step.
template <class S, int Bins>
struct Softmax {
  using T = compute_t<S>;
  const S* raw;
  T damping, clip, most;
  T scale, rest;  // one over the sum, rounded, and what it lacks: without, all shares of a coordinate err alike
  T kept[Bins ? Bins : 1];
  int64_t any;

  __device__ Softmax(const S* raw, int64_t bins, T damping, T clip)
      : raw(raw), damping(damping), clip(clip), any(bins) {
    if constexpr (Bins > 0) {
#pragma unroll
      for (int k = 0; k < Bins; ++k) kept[k] = clipped(k);
    }
    most = logit(0);
    T sums[4] = {};  // of every fourth bin: fewer roundings than of one sum
    each(1, [&](int64_t k) { most = logit(k) > most ? logit(k) : most; });
    each(0, [&](int64_t k) {
      const T e = exp_(logit(k) - most);
      if constexpr (Bins > 0) kept[k] = e;
      const T sum = sums[0] + e;
      sums[0] = sums[1], sums[1] = sums[2], sums[2] = sums[3], sums[3] = sum;
    });
    const T sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    scale = T(1) / sum;
    rest = multiply_add(-sum, scale, T(1)) * scale;
    if constexpr (Bins > 0) each(0, [&](int64_t k) { kept[k] = of_sum(kept[k]); });
  }

  // Calls f(k) for the bins from `first` on.
  template <class F>
  __device__ void each(int64_t first, F f) const {
    if constexpr (Bins > 0) {
#pragma unroll
      for (int k = 0; k < Bins; ++k) {
        if (k >= first) f(k);
      }
    } else {
      for (int64_t k = first; k < any; ++k) f(k);
    }
  }
  __device__ T logit(int64_t k) const {
    if constexpr (Bins > 0) return kept[k];
    return clipped(k);
  }
  __device__ T clipped(int64_t k) const {
    const T damped = damping * load(raw[k]);
    return clip == T(0) ? damped : Clipped<T>(damped, clip).value;
  }
  __device__ T share(int64_t k) const {
    if constexpr (Bins > 0) return kept[k];
    return of_sum(exp_(logit(k) - most));
  }
  __device__ T of_sum(T e) const { return multiply_add(e, scale, e * rest); }
  // What the gradient of a raw parameter is multiplied by for the clip.
  __device__ T slope(int64_t k) const { return clip == T(0) ? T(1) : Clipped<T>(damping * load(raw[k]), clip).slope; }
};

// Of one axis: the share of the bin that is meant, and that of all before it.
template <class T>
struct Picked {
  T before, here;
};

template <class Shares, class T>
__device__ int64_t search(const Shares& shares, const Axis<T>& axis, T low, T high, T at, Picked<T>& to) {
  int64_t bin = 0;
  T sum = shares.share(0);
  to = {T(0), sum};
  shares.each(1, [&](int64_t k) {
    const T next = shares.share(k);
    if (at >= axis.knot(T(k), sum, low, high)) bin = k, to = {sum, next};
    sum += next;
  });
  return bin;
}

template <class Shares, class T>
__device__ void pick(const Shares& shares, int64_t bin, Picked<T>& to) {
  to = {T(0), shares.share(0)};
  shares.each(1, [&](int64_t k) {
    if (k <= bin) to = {to.before + to.here, shares.share(k)};
  });
}

// The spline of one coordinate, by one thread: its box, its raw parameters, the bin that it is in. `d` may lie
// elsewhere than behind `raw`.
template <class S, int Bins = 0>
struct Coordinate {
  using T = compute_t<S>;
  Softmax<S, Bins> widths, heights;
  Folded<T> folded;
  Picked<T> w, h;
  int64_t k;
  Derivative<T> d0, d1;
  Bin<T> bin;

  __device__ Coordinate(const Problem& p, const Constants<T>& c, const S* raw, T x)
      : Coordinate(p, c, p.tails, raw, raw + 2 * p.bins, x) {}
  __device__ Coordinate(const Problem& p, const Constants<T>& c, int tails, const S* raw, const S* d, T x)
      : widths(raw, p.bins, c.x.damping, T(2) * c.clip),
        heights(raw + p.bins, p.bins, c.y.damping, T(2) * c.clip),
        folded(p.inverse ? fold<true>(x, c) : fold<false>(x, c)) {
    if (p.inverse) {
      k = search(heights, c.y, c.bottom, c.top, folded.at, h);
      pick(widths, k, w);
    } else {
      k = search(widths, c.x, c.left, c.right, folded.at, w);
      pick(heights, k, h);
    }
    d0 = derivative_at(p, c, tails, d, k), d1 = derivative_at(p, c, tails, d, k + 1);
    bin = {c.x.knot(T(k), w.before, c.left, c.right),
           c.y.knot(T(k), h.before, c.bottom, c.top),
           c.x.size(w.here, c.left, c.right),
           c.y.size(h.here, c.bottom, c.top),
           d0.value,
           d1.value};
  }

  static __device__ Derivative<T> derivative_at(const Problem& p, const Constants<T>& c, int tails, const S* d,
                                                int64_t knot) {
    const bool end = knot == 0 || knot == p.bins;
    T raw;
    if (tails == kLinear && end) {
      raw = T(p.edge);
    } else {
      raw = load(d[tails == kCircular && knot == p.bins ? 0 : p.tails == kLinear ? knot - 1 : knot]);
    }
    return c.clip != T(0) ? derivative<true>(raw, c.min_derivative, c.clip)
                          : derivative<false>(raw, c.min_derivative, c.clip);
  }
};

}  // namespace genfuse::rational_quadratic_spline::cuda
