#pragma once
#include "portable.h"

namespace genfuse::group_norm {

// z where it is finite enough to be multiplied by `sigmoid_of`, which nowhere is 0; NaN stays.
template <class T>
GENFUSE_HD T above(T z) {
  return z < T(-1e3) ? T(-1e3) : z;
}

template <bool silu, class T>
GENFUSE_HD T activate(T z) {
  return silu ? above(z) * sigmoid_of(z) : z;
}

// Of z, for a gradient g of its activation.
template <bool silu, class T>
GENFUSE_HD T activation_grad(T g, T z) {
  if (!silu) return g;
  const T s = sigmoid_of(z);
  return g * (s * (1 + above(z) * (1 - s)));
}

// Of a centred x, for a gradient g of what is scaled by `factor`, which is x's scale over the standard deviation:
// `mean` and `slope` are how far the group's mean and variance take part.
template <class T>
GENFUSE_HD T grad(T g, T centred, T factor, T mean, T slope) {
  return (g * factor - mean) - centred * slope;
}

}  // namespace genfuse::group_norm
