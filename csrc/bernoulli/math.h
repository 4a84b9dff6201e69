#pragma once
#include "portable.h"

namespace genfuse::bernoulli {

// u <= p, not u < p: u reaches 1 in float32 and never 0, so p = 0 is never drawn and p = 1 always.
template <class T>
GENFUSE_HD T draw(T p, T u) {
  return u <= p ? T(1) : T(0);
}

}  // namespace genfuse::bernoulli
