#pragma once
#include "portable.h"

namespace genfuse::interpolate {

// The point between a real and a fake example.
template <class T>
GENFUSE_HD T between(T real, T fake, T eps) {
  return eps * real + (T(1) - eps) * fake;
}

}  // namespace genfuse::interpolate
