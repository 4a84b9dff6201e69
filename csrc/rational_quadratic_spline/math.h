#pragma once
#include "portable.h"
#include "rational_quadratic_spline/launch.h"

// Monotonic rational-quadratic splines on one coordinate (Durkan et al., arXiv 1906.04032, section 3.1).
namespace genfuse::rational_quadratic_spline {

// How shares of one axis, the softmax of damped raw parameters, become knots and sizes of bins between two sides.
template <class T>
struct Axis {
  T least, share, damping;

  Axis(const Problem& p, double minimum) : damping(T(p.damping)) {
    const double epsilon = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;  // a bin of no size would divide by it
    minimum = minimum > epsilon ? minimum : epsilon;
    least = T(minimum), share = T(1. - minimum * double(p.bins));
  }

  GENFUSE_HD T knot(T k, T before, T low, T high) const { return (high - low) * (least * k + share * before) + low; }
  GENFUSE_HD T size(T here, T low, T high) const { return (high - low) * (least + share * here); }
  // The gradient for a raw parameter, from that for its share less the mean of all.
  GENFUSE_HD T raw(T here, T g, T low, T high) const { return damping * ((high - low) * share * here * g); }
};

// The sides of the box, and what is beyond it: the same with slope 1, shifted by so much below and above; or nothing,
// where that is NaN; or the same again and again.
template <class T>
struct Box {
  T left, right, bottom, top, below, above;
  int tails;

  GENFUSE_HD Box(T left, T right, T bottom, T top, T below, T above, int tails)
      : left(left), right(right), bottom(bottom), top(top), below(below), above(above), tails(tails) {}
  GENFUSE_HD Box(T left, T right, T bottom, T top, int tails)
      : left(left),
        right(right),
        bottom(bottom),
        top(top),
        below(tails == kNone ? T(NAN) : bottom - left),
        above(tails == kNone ? T(NAN) : top - right),
        tails(tails) {}
};

template <class T>
struct Constants : Box<T> {
  Axis<T> x, y;
  T min_derivative;
  T clip;  // one over that of derivatives, or 0

  explicit Constants(const Problem& p)
      : Box<T>(T(p.left), T(p.right), T(p.bottom), T(p.top), p.tails),
        x(p, p.min_width),
        y(p, p.min_height),
        min_derivative(T(p.min_derivative)),
        clip(p.clip > 0 ? T(1. / p.clip) : T(0)) {}

  // Those of one coordinate, counted over all rows.
  GENFUSE_HD Constants of(const Problem& p, int64_t coordinate) const {
    Constants own = *this;
    if (p.table) {
      const T* box = static_cast<const T*>(p.table) + coordinate % p.boxes * 5;
      static_cast<Box<T>&>(own) = Box<T>(box[0], box[1], box[2], box[3], p.tails == kMixed ? int(box[4]) : p.tails);
    }
    return own;
  }
};

// A soft clip at 1 / c, as in zuko, and its slope.
template <class T>
struct Clipped {
  T value, slope;

  GENFUSE_HD Clipped(T raw, T c) {
    const T share = T(1) / (T(1) + std::fabs(raw) * c);
    value = raw * share, slope = share * share;
  }
};

// The derivative at a knot, and its own by the raw parameter.
template <class T>
struct Derivative {
  T value, slope;
};

template <bool exponential, class T>
GENFUSE_HD Derivative<T> derivative(T raw, T least, T clip) {
  if constexpr (exponential) {
    const Clipped<T> a(raw, clip);
    const T e = exp_(a.value);
    return {least + e, e * a.slope};
  } else {
    return {least + softplus(raw), sigmoid(raw)};
  }
}

// A coordinate moved into the box, by so many times its size.
template <class T>
struct Folded {
  T at, turns, inside;
};

template <bool Inverse, class T>
GENFUSE_HD Folded<T> fold(T x, const Box<T>& box) {
  const T low = Inverse ? box.bottom : box.left, high = Inverse ? box.top : box.right;
  if (box.tails == kCircular) {
    const T turns = std::floor((x - low) / (high - low));
    return {x - turns * (high - low), turns, T(1)};
  }
  const bool inside = (x >= low) & (x <= high);
  return {inside ? x : low, T(0), inside ? T(1) : T(0)};
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
GENFUSE_HD Value<T> value(T x, const Folded<T>& f, const Bin<T>& b, const Box<T>& box) {
  const Point<T> p = point<Inverse>(f.at, b);
  const T along = Inverse ? b.x + p.theta * b.w : b.y + b.h * p.value(b);
  const T low = Inverse ? box.left : box.bottom, high = Inverse ? box.right : box.top;
  const T y = along < low ? low : (along > high ? high : along);
  const T shift = x < (Inverse ? box.bottom : box.left) ? box.below : box.above;
  const T logdet = log_(p.slope());
  return {f.inside != T(0) ? y + f.turns * (high - low) : (Inverse ? x - shift : x + shift),
          f.inside != T(0) ? (Inverse ? -logdet : logdet) : T(0)};
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
  const bool in = f.inside != T(0);
  return {in ? gx : gy,   in ? gxk : T(0), in ? g : T(0),  in ? gw : T(0),
          in ? gh : T(0), in ? gd0 : T(0), in ? gd1 : T(0)};
}

}  // namespace genfuse::rational_quadratic_spline
