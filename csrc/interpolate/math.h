#pragma once
#include "philox.h"

namespace genfuse::interpolate {

// The uniform of an example: element `row` of the stream.
template <class T>
GENFUSE_HD T epsilon(int64_t row, uint64_t key) {
  return uniform<T>(philox(uint64_t(row) / 4, key).w[row % 4]);
}

// Exactly one of the two at either end.
template <class T>
GENFUSE_HD T between(T real, T fake, T epsilon) {
  return epsilon * real + (T(1) - epsilon) * fake;
}

}  // namespace genfuse::interpolate
