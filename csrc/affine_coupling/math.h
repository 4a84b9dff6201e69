#pragma once
#include "portable.h"

// y = x exp(s) + t and its inverse (y - t) exp(-s), with a log-scale s that is bounded as `Kind` says.
namespace genfuse::affine_coupling {

enum class Kind { tanh, exp, sigmoid, softclip, floored, factored };

template <class T>
struct LogScale {
  T value, derivative;  // by the raw parameter
};

// c is the factor of `factored`, what `floored` adds to the scale, and one over the limit of `softclip`.
template <Kind kind, class T>
GENFUSE_HD LogScale<T> log_scale(T raw, [[maybe_unused]] T c = T(0)) {
  if constexpr (kind == Kind::tanh) {
    const T s = tanh_(raw);
    return {s, T(1) - s * s};
  } else if constexpr (kind == Kind::factored) {
    const T s = tanh_(raw);
    return {c * s, c * (T(1) - s * s)};
  } else if constexpr (kind == Kind::exp) {
    return {raw, T(1)};
  } else if constexpr (kind == Kind::softclip) {  // of zuko
    const T share = T(1) / (T(1) + std::fabs(raw) * c);
    return {raw * share, share * share};
  } else {  // of sigmoid(raw + 2), as in Glow; with a floor, as in nflows
    const T a = raw + T(2), rest = T(1) / (T(1) + exp_(a));
    if constexpr (kind == Kind::sigmoid) return {-softplus(-a), rest};
    const T sigma = sigmoid(a), scale = sigma + c;
    return {log_(scale), sigma * rest / scale};
  }
}

// What is multiplied by the scale: x, or on the way back what is left of it without the shift.
template <class T>
GENFUSE_HD T factor(T x, T t, bool inverse) {
  return inverse ? x - t : x;
}

template <Kind kind, class T>
GENFUSE_HD T scale(T s, bool inverse) {
  const T signed_s = inverse ? -s : s;
  return kind == Kind::tanh ? exp_of_unit(signed_s) : exp_(signed_s);
}

template <class T>
GENFUSE_HD T apply(T factor, T scale, T t, bool inverse) {
  return factor * scale + (inverse ? T(0) : t);
}

template <class T>
struct Grad {
  T x, raw, shift;
};

template <class T>
GENFUSE_HD Grad<T> grad(T gy, T glogdet, T factor, T scale, T derivative, bool inverse) {
  const T gx = gy * scale, gs = gx * factor + glogdet;
  return {gx, (inverse ? -gs : gs) * derivative, inverse ? -gx : gy};
}

}  // namespace genfuse::affine_coupling
