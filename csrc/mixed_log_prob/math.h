#pragma once
#include "portable.h"

namespace genfuse::mixed_log_prob {

// A log-scale is limit tanh((raw - start) / limit), as in _mixed_log_prob.py.
constexpr int kLimit = 7, kStart = 1;
constexpr float kFar = 1e30f;  // where an infinite edge is taken to be

// 1 - e^-x for x >= 0, relatively accurate; `z` is e^-x.
GENFUSE_HD float complement(float x, float z) {
  float p = -2.7557319e-7f;  // Taylor's, which up to 1 is within an ulp
  p = p * x + 2.7557319e-6f;
  p = p * x - 2.4801587e-5f;
  p = p * x + 1.9841270e-4f;
  p = p * x - 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x - 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  p = p * x - 0.5f;
  return x < 1.f ? x + x * (x * p) : 1.f - z;
}
GENFUSE_HD double complement(double x, double) { return -expm1(-x); }

// A logistic density between two edges: what its mass depends on.
template <class T>
struct Logistic {
  T t, precision, upper, lower, gap, of_upper, of_lower, of_gap, rest;

  // `scale` is the raw log-scale.
  GENFUSE_HD Logistic(T low, T high, T mu, T scale) {
    low = low < -kFar ? -kFar : low > kFar ? kFar : low;
    high = high < -kFar ? -kFar : high > kFar ? kFar : high;
    t = tanh_((scale - kStart) * (T(1) / kLimit));
    precision = exp_(-kLimit * t);
    upper = (high - mu) * precision;
    lower = (low - mu) * precision;
    gap = (high - low) * precision;
    of_upper = exp_(upper > 0 ? -upper : upper);
    of_lower = exp_(lower > 0 ? -lower : lower);
    of_gap = exp_(-gap);
    rest = complement(gap, of_gap);
  }

  // log(sigmoid(upper) - sigmoid(lower)) = log(sigmoid(upper) sigmoid(-lower) (1 - e^-gap)).
  GENFUSE_HD T log_mass() const {
    const T far = (upper < 0 ? upper : T(0)) - (lower > 0 ? lower : T(0));
    return far + log_(rest / ((1 + of_upper) * (1 + of_lower)));
  }

  // Derivatives of that, by the location and by the raw log-scale.
  GENFUSE_HD void derivatives(T& by_mu, T& by_scale) const {
    const T above = (upper > 0 ? of_upper : T(1)) / (1 + of_upper),
            below = (lower > 0 ? T(1) : of_lower) / (1 + of_lower);
    by_mu = (below - above) * precision;
    by_scale = ((lower * below - upper * above) - gap * of_gap / rest) * (1 - t * t);
  }
};

}  // namespace genfuse::mixed_log_prob
