#pragma once
#include "portable.h"

namespace genfuse::bernoulli_nll {

// -log p of x in [0, 1] under a logit. What is large cancels before what is small is added.
template <class T>
GENFUSE_HD T nll(T logit, T x) {
  return ((logit > 0 ? logit : T(0)) - x * logit) + softplus_above(logit);
}

// Of the logit, for a gradient g of the sum.
template <class T>
GENFUSE_HD T grad(T g, T logit, T x) {
  return g * (sigmoid(logit) - x);
}

}  // namespace genfuse::bernoulli_nll
