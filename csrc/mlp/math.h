#pragma once
#include "portable.h"

namespace genfuse::mlp {

// ReLU, or with a slope LeakyReLU, of a number or of a vector of them; NaN stays NaN, and of ReLU -inf is 0.
template <class X, class T>
GENFUSE_HD X rectify(X x, T slope) {
  const X below = slope != T(0) ? x * slope : X{};
  return x <= X{} ? below : x;
}

// A gradient through it: a value has the sign of what was rectified, if it has one.
template <class X, class T>
GENFUSE_HD X through(X g, X value, T slope) {
  const X below = slope != T(0) ? g * slope : X{};
  return value <= X{} ? below : g;
}

// What a layer's network sees of a feature: asinh of it where the limit is 0, else what is within the limit.
template <class T>
GENFUSE_HD T squash(T x, T limit) {
  return limit == T(0) ? asinh_(x) : x < -limit ? -limit : x > limit ? limit : x;
}

// A gradient through it.
template <class T>
GENFUSE_HD T through_squash(T g, T x, T limit) {
  return limit == T(0) ? g / std::sqrt(T(1) + x * x) : x < -limit || x > limit ? T(0) : g;
}

}  // namespace genfuse::mlp
