#pragma once
// The spline of one coordinate, by one thread.
#include "rational_quadratic_spline/launch.h"
#include "rational_quadratic_spline/math.h"

namespace genfuse::rational_quadratic_spline::cuda {

// A thread takes one coordinate at a time. It goes over its raw parameters anew for each step, which the first-level
// cache holds, and keeps none of them: arrays that are indexed by a variable lie in memory.
template <class S>
struct Softmax {
  using T = compute_t<S>;
  const S* raw;
  int64_t bins;
  T damping, most, scale;

  __device__ Softmax(const S* raw, int64_t bins, T damping) : raw(raw), bins(bins), damping(damping), most(damped(0)) {
    for (int64_t k = 1; k < bins; ++k) most = damped(k) > most ? damped(k) : most;
    T sum = 0;
    for (int64_t k = 0; k < bins; ++k) sum += exp_(damped(k) - most);
    scale = T(1) / sum;
  }
  __device__ T damped(int64_t k) const { return damping * load(raw[k]); }
  __device__ T share(int64_t k) const { return exp_(damped(k) - most) * scale; }
};

// Of one axis: the share of the bin that is meant, and that of all before it.
template <class T>
struct Picked {
  T before, here;
};

template <class S, class T>
__device__ int64_t search(const Softmax<S>& shares, const Axis<T>& axis, T at, Picked<T>& to) {
  int64_t bin = 0;
  T sum = shares.share(0);
  to = {T(0), sum};
  for (int64_t k = 1; k < shares.bins; ++k) {
    const T next = shares.share(k);
    if (at >= axis.knot(T(k), sum)) bin = k, to = {sum, next};
    sum += next;
  }
  return bin;
}

template <class S, class T>
__device__ void pick(const Softmax<S>& shares, int64_t bin, Picked<T>& to) {
  to = {T(0), shares.share(0)};
  for (int64_t k = 1; k <= bin; ++k) to = {to.before + to.here, shares.share(k)};
}

template <class S>
struct Coordinate {
  using T = compute_t<S>;
  Softmax<S> widths, heights;
  Folded<T> folded;
  Picked<T> w, h;
  int64_t k;
  T d0, d1;  // raw
  Bin<T> bin;

  __device__ Coordinate(const Problem& p, const Constants<T>& c, const S* raw, T x)
      : widths(raw, p.bins, c.x.damping), heights(raw + p.bins, p.bins, c.y.damping), folded(fold(x, c)) {
    if (p.inverse) {
      k = search(heights, c.y, folded.at, h);
      pick(widths, k, w);
    } else {
      k = search(widths, c.x, folded.at, w);
      pick(heights, k, h);
    }
    d0 = derivative(p, raw + 2 * p.bins, k), d1 = derivative(p, raw + 2 * p.bins, k + 1);
    bin = {c.x.knot(T(k), w.before), c.y.knot(T(k), h.before),        c.x.size(w.here),
           c.y.size(h.here),         c.min_derivative + softplus(d0), c.min_derivative + softplus(d1)};
  }

  // The raw derivative at a knot.
  static __device__ T derivative(const Problem& p, const S* raw, int64_t knot) {
    if (p.tails == kNone) return load(raw[knot]);
    if (p.tails == kCircular) return load(raw[knot == p.bins ? 0 : knot]);
    return knot == 0 || knot == p.bins ? T(p.edge) : T(load(raw[knot - 1]));
  }
};

}  // namespace genfuse::rational_quadratic_spline::cuda
