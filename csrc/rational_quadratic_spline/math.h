#pragma once
#include "portable.h"
#include "rational_quadratic_spline/launch.h"

// Monotonic rational-quadratic splines on one coordinate (Durkan et al., arXiv 1906.04032, section 3.1).
namespace genfuse::rational_quadratic_spline {

// How shares of one axis, the softmax of damped raw parameters, become knots and sizes of bins.
template <class T>
struct Axis {
  T bound, least, share, damping;

  Axis(const Problem& p, double minimum)
      : bound(T(p.bound)), least(T(minimum)), share(T(1. - minimum * double(p.bins))), damping(T(p.damping)) {}

  GENFUSE_HD T knot(T k, T before) const { return T(2) * bound * (least * k + share * before) - bound; }
  GENFUSE_HD T size(T here) const { return T(2) * bound * (least + share * here); }
  // The gradient for a raw parameter, from that for its share less the mean of all.
  GENFUSE_HD T raw(T here, T g) const { return damping * (T(2) * bound * share * here * g); }
};

template <class T>
struct Constants {
  Axis<T> x, y;
  T bound, min_derivative;
  T outside;  // what is added there to the identity: NaN where there is no outside
  bool circular;

  explicit Constants(const Problem& p)
      : x(p, p.min_width),
        y(p, p.min_height),
        bound(T(p.bound)),
        min_derivative(T(p.min_derivative)),
        outside(p.tails == kNone ? T(NAN) : T(0)),
        circular(p.tails == kCircular) {}
};

// A coordinate moved into the box.
template <class T>
struct Folded {
  T at, turns;
  bool inside;
};

template <class T>
GENFUSE_HD Folded<T> fold(T x, const Constants<T>& c) {
  if (c.circular) {
    const T turns = T(2) * c.bound * std::floor((x + c.bound) / (T(2) * c.bound));
    return {x - turns, turns, true};
  }
  const bool inside = (x >= -c.bound) & (x <= c.bound);
  return {inside ? x : T(0), T(0), inside};
}

// A bin: lower corner, size, derivatives at its ends.
template <class T>
struct Bin {
  T x, y, w, h, d0, d1;
};

// Where a point is in its bin, as a share of the width from either side; and all that follows from it.
template <class T>
struct Point {
  T theta, q, delta, t, below, m;  // below is one over the denominator of (4), m the bracket of (5)

  GENFUSE_HD Point(T theta, T q, T delta, const Bin<T>& b) : theta(theta), q(q), delta(delta), t(theta * q) {
    below = T(1) / (delta * (T(1) - T(2) * t) + (b.d0 + b.d1) * t);
    m = b.d1 * theta * theta + T(2) * delta * t + b.d0 * q * q;
  }
  GENFUSE_HD T value(const Bin<T>& b) const { return (delta * theta * theta + b.d0 * t) * below; }  // share of h
  GENFUSE_HD T slope() const { return delta * below * (m * (delta * below)); }
};

template <class T>
GENFUSE_HD T unit(T x) {
  return x < T(0) ? T(0) : (x > T(1) ? T(1) : x);
}

template <class T>
GENFUSE_HD Point<T> at_x(T x, const Bin<T>& b) {
  const T theta = unit((x - b.x) / b.w);
  return Point<T>(theta, T(1) - theta, b.h / b.w, b);
}

// In r = (y - y_k) / h, the discriminant of (29) is (d0 (1 - r) - d1 r)^2 + 4 delta^2 r (1 - r): never below 0. Of its
// two forms of one root, each is free of cancellation on one side of e = 0.
template <class T>
GENFUSE_HD Point<T> at_y(T y, const Bin<T>& b) {
  const T delta = b.h / b.w, r = unit((y - b.y) / b.h), p = T(1) - r;
  const T most = T(9e18);  // whose square is finite
  T e = (b.d0 * p - b.d1 * r) / (T(2) * delta);
  e = e < -most ? -most : (e > most ? most : e);
  const T root = std::sqrt(e * e + r * p);
  const T other = e >= T(0) ? e + root : r * p / (root - e);
  const T scale = T(1) / (r + other);
  return Point<T>(r * scale, other * scale, delta, b);
}

template <class T>
struct Value {
  T y, logdet;
};

template <bool Inverse, class T>
GENFUSE_HD Point<T> point(T at, const Bin<T>& b) {
  if constexpr (Inverse) {
    return at_y(at, b);
  } else {
    return at_x(at, b);
  }
}

template <bool Inverse, class T>
GENFUSE_HD Value<T> value(T x, const Folded<T>& f, const Bin<T>& b, const Constants<T>& c) {
  const Point<T> p = point<Inverse>(f.at, b);
  const T along = Inverse ? b.x + p.theta * b.w : b.y + b.h * p.value(b);
  const T y = along < -c.bound ? -c.bound : (along > c.bound ? c.bound : along);
  const T logdet = log_(p.slope());
  return {f.inside ? y + f.turns : x + c.outside, f.inside ? (Inverse ? -logdet : logdet) : T(0)};
}

// Gradients for x, the corner, size and end derivatives of the bin.
template <class T>
struct Grad {
  T gx, x, y, w, h, d0, d1;
};

template <bool Inverse, class T>
GENFUSE_HD Grad<T> grad(T gy, T glog, const Folded<T>& f, const Bin<T>& b) {
  const Point<T> p = point<Inverse>(f.at, b);
  const T inv_m = T(1) / p.m, inv_w = T(1) / b.w, slope = p.slope();
  const T log_m = T(2) * (p.theta * (b.d1 - p.delta) + p.q * (p.delta - b.d0)) * inv_m;
  const T log_x = (log_m - T(2) * (b.d0 + b.d1 - T(2) * p.delta) * (p.q - p.theta) * p.below) * inv_w;
  // The inverse by the implicit function theorem: as forward, at its result, with these in place of gy and glog.
  const T g = Inverse ? (glog * log_x - gy) / slope : gy;
  const T gl = Inverse ? -glog : glog;
  const T gx = Inverse ? -g : gy * slope + glog * log_x;
  const T gxk = Inverse ? gy : -gx;
  const T v = p.value(b), gh_below = g * b.h * p.below, t_below = T(2) * p.t * p.below;
  const T gdelta = gh_below * p.below * p.t * (b.d1 * p.theta * p.theta - b.d0 * p.q * p.q) +
                   gl * (T(2) / p.delta + T(2) * p.t * inv_m - T(2) * (T(1) - T(2) * p.t) * p.below);
  const T gd0 = gh_below * p.t * (T(1) - v) + gl * (p.q * p.q * inv_m - t_below);
  const T gd1 = gl * (p.theta * p.theta * inv_m - t_below) - gh_below * p.t * v;
  const T gw = gxk * p.theta - gdelta * p.delta * inv_w, gh = g * v + gdelta * inv_w;
  const bool in = f.inside;
  return {in ? gx : gy,   in ? gxk : T(0), in ? g : T(0),  in ? gw : T(0),
          in ? gh : T(0), in ? gd0 : T(0), in ? gd1 : T(0)};
}

}  // namespace genfuse::rational_quadratic_spline
