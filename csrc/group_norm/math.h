#pragma once
#include "portable.h"

namespace genfuse::group_norm {

// z, or -1000 if it is less: `sigmoid_of` is at least 1e-38, which times -1e30 would not be small. NaN stays.
template <class T>
GENFUSE_HD T bounded_below(T z) {
  return z < T(-1e3) ? T(-1e3) : z;
}

template <bool silu, class T>
GENFUSE_HD T activate(T z) {
  return silu ? bounded_below(z) * sigmoid_of(z) : z;
}

// Of z, for a gradient g of its activation.
template <bool silu, class T>
GENFUSE_HD T activation_grad(T g, T z) {
  if (!silu) return g;
  const T s = sigmoid_of(z);
  return g * (s * (1 + bounded_below(z) * (1 - s)));
}

// Of a centred x, for a gradient g of what is scaled by `factor`, which is x's scale over the standard deviation:
// `mean` and `slope` are how far the group's mean and variance take part.
template <class T>
GENFUSE_HD T grad(T g, T centred, T factor, T mean, T slope) {
  return (g * factor - mean) - centred * slope;
}

}  // namespace genfuse::group_norm
