#pragma once
#include "portable.h"

// log N(z; 0, I) + logdet, from the sum of z^2 over a row.
namespace genfuse::standard_normal_log_prob {

template <class T>
GENFUSE_HD T log_prob(T squares, T cols, T logdet) {
  return logdet - T(0.5) * (squares + cols * T(1.8378770664093454836));  // ln(2 pi)
}

template <class T>
GENFUSE_HD T grad(T g, T z) {
  return -g * z;
}

}  // namespace genfuse::standard_normal_log_prob
