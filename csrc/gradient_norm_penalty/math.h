#pragma once
#include "portable.h"

namespace genfuse::gradient_norm_penalty {

// (norm - target)^2 of one example's gradient g, or its positive part squared. Derivatives divide by the norm, but by
// no less than eps.
template <class T>
struct Penalty {
  T target, eps;
  bool one_sided;

  GENFUSE_HD T value(T norm) const {
    const T excess = one_sided && norm < target ? T(0) : norm - target;
    return excess * excess;
  }

  // The derivative of the value is slope g.
  GENFUSE_HD T slope(T norm) const { return one_sided && norm < target ? T(0) : T(2) - T(2) * target / floor(norm); }

  // The derivative of slope g along v is slope v + bend g, with dot = <g, v>. Divided one by one: the cube underflows.
  GENFUSE_HD T bend(T norm, T dot) const {
    return norm < eps || (one_sided && norm < target) ? T(0) : T(2) * target / norm * (dot / norm) / norm;
  }

 private:
  GENFUSE_HD T floor(T norm) const { return norm < eps ? eps : norm; }
};

}  // namespace genfuse::gradient_norm_penalty
