#pragma once
#include "portable.h"

namespace genfuse::interpolate {

// The point between a real and a fake example.
template <class T>
GENFUSE_HD T between(T real, T fake, T eps) {
  return eps * real + (T(1) - eps) * fake;
}

// What of the point's gradient is each one's.
template <class T>
struct Grad {
  T real, fake;
};
template <class T>
GENFUSE_HD Grad<T> grad(T g, T eps) {
  return {eps * g, (T(1) - eps) * g};
}

}  // namespace genfuse::interpolate
