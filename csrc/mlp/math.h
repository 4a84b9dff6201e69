#pragma once
#include "portable.h"

namespace genfuse::mlp {

// ReLU, or with a slope LeakyReLU; NaN stays NaN.
template <class T>
GENFUSE_HD T rectify(T x, T slope) {
  return x <= T(0) ? x * slope : x;
}

// A gradient through it: a value has the sign of what was rectified, if it has one.
template <class T>
GENFUSE_HD T through(T g, T value, T slope) {
  return value <= T(0) ? g * slope : g;
}

}  // namespace genfuse::mlp
