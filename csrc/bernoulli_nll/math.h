#pragma once
#include "portable.h"

namespace genfuse::bernoulli_nll {

// -log p of x in [0, 1] under a logit. What is large cancels before it is multiplied, by infinity too.
template <class T>
GENFUSE_HD T nll(T logit, T x) {
  return (logit > 0 ? T(1) - x : -x) * logit + softplus_above(logit);
}

// Of the logit, for a gradient g of the sum.
template <class T>
GENFUSE_HD T grad(T g, T logit, T x) {
  return g * (sigmoid(logit) - x);
}

}  // namespace genfuse::bernoulli_nll
