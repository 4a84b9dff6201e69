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

}  // namespace genfuse::mlp
