#pragma once
#include "portable.h"

// x_t = alpha x0 + sigma eps, and what a network is to predict of it.
namespace genfuse::diffuse {

enum class Target { x0, noise, v, velocity };  // as TARGETS in ops/_diffuse.py

template <class T>
GENFUSE_HD T sample(T x0, T eps, T alpha, T sigma) {
  return alpha * x0 + sigma * eps;
}

// For all but x0, which is there already.
template <Target kind, class T>
GENFUSE_HD T target(T x0, T eps, T alpha, T sigma) {
  if constexpr (kind == Target::v) return sample(eps, x0, alpha, -sigma);
  return kind == Target::velocity ? eps - x0 : eps;
}

template <class T>
struct Grad {
  T alpha, sigma;
};

// What one element adds to the gradients of alpha and sigma; gv counts only where the target was v.
template <bool is_v, class T>
GENFUSE_HD Grad<T> grad(T gx_t, T gv, T x0, T eps) {
  if constexpr (is_v) return {gx_t * x0 + gv * eps, gx_t * eps - gv * x0};
  return {gx_t * x0, gx_t * eps};
}

}  // namespace genfuse::diffuse
