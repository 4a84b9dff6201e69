#pragma once
#include "portable.h"
#include "rational_quadratic_spline/launch.h"

// Monotonic rational-quadratic splines on one coordinate (Durkan et al., arXiv 1906.04032, section 3.1).
namespace genfuse::rational_quadratic_spline {

// How shares of one axis, which sum to 1, become knots and sizes of bins.
template <class T>
struct Axis {
  T bound, least, share;

  Axis(const Problem& p, double minimum)
      : bound(T(p.bound)), least(T(minimum)), share(T(1. - minimum * double(p.bins))) {}

  GENFUSE_HD T knot(T k, T before) const { return T(2) * bound * (least * k + share * before) - bound; }
  GENFUSE_HD T size(T here) const { return T(2) * bound * (least + share * here); }
  // The gradient for a raw parameter, from that for its share less the mean of all.
  GENFUSE_HD T raw(T here, T g) const { return T(2) * bound * share * here * g; }
};

template <class T>
struct Constants {
  Axis<T> x, y;
  T bound, min_derivative;
  bool none, circular, inverse;

  explicit Constants(const Problem& p)
      : x(p, p.min_width),
        y(p, p.min_height),
        bound(T(p.bound)),
        min_derivative(T(p.min_derivative)),
        none(p.tails == kNone),
        circular(p.tails == kCircular),
        inverse(p.inverse) {}
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
  const bool inside = x >= -c.bound && x <= c.bound;
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

// In r = (y - y_k) / h, the discriminant of (29) is (d0 (1 - r) - d1 r)^2 + 4 delta^2 r (1 - r): never below 0. Of its two
// forms of one root, each is free of cancellation on one side of e = 0.
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

template <class T>
GENFUSE_HD Value<T> value(T x, const Folded<T>& f, const Bin<T>& b, const Constants<T>& c) {
  T y, logdet;
  if (c.inverse) {
    const Point<T> p = at_y(f.at, b);
    y = b.x + p.theta * b.w;
    y = y < -c.bound ? -c.bound : (y > c.bound ? c.bound : y);
    logdet = -log_(p.slope());
  } else {
    const Point<T> p = at_x(f.at, b);
    y = b.y + b.h * p.value(b);
    logdet = log_(p.slope());
  }
  const T outside = c.none ? T(NAN) : x;
  return {f.inside ? y + f.turns : outside, f.inside ? logdet : T(0)};
}

// Gradients for x, the corner, size and end derivatives of the bin.
template <class T>
struct Grad {
  T gx, x, y, w, h, d0, d1;
};

template <class T>
GENFUSE_HD Grad<T> grad(T gy, T glog, const Folded<T>& f, const Bin<T>& b, const Constants<T>& c) {
  const Point<T> p = c.inverse ? at_y(f.at, b) : at_x(f.at, b);
  const T log_m = T(2) * (p.theta * (b.d1 - p.delta) + p.q * (p.delta - b.d0)) / p.m;
  const T log_x = (log_m - T(2) * (b.d0 + b.d1 - T(2) * p.delta) * (p.q - p.theta) * p.below) / b.w;
  T g = gy, gl = glog;
  Grad<T> out;
  if (c.inverse) {  // by the implicit function theorem
    g = -(gy - glog * log_x) / p.slope();
    gl = -glog;
    out.gx = -g;
    out.x = gy;
  } else {
    out.gx = gy * p.slope() + glog * log_x;
    out.x = -out.gx;
  }
  const T v = p.value(b), gh_below = g * b.h * p.below, t_below = T(2) * p.t * p.below, inv_m = T(1) / p.m;
  const T gdelta = gh_below * p.below * p.t * (b.d1 * p.theta * p.theta - b.d0 * p.q * p.q) +
                   gl * (T(2) / p.delta + T(2) * p.t * inv_m - T(2) * (T(1) - T(2) * p.t) * p.below);
  out.d0 = gh_below * p.t * (T(1) - v) + gl * (p.q * p.q * inv_m - t_below);
  out.d1 = gl * (p.theta * p.theta * inv_m - t_below) - gh_below * p.t * v;
  out.y = g;
  out.w = out.x * p.theta - gdelta * p.delta / b.w;
  out.h = g * v + gdelta / b.w;
  if (!f.inside) out = {gy, T(0), T(0), T(0), T(0), T(0), T(0)};
  return out;
}

}  // namespace genfuse::rational_quadratic_spline
