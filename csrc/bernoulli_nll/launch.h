#pragma once
#include <cstdint>

namespace genfuse::bernoulli_nll {

// logits and x are (rows, cols), with strides between rows in elements; nll and g (rows), glogits (rows, cols).
struct Problem {
  int dtype;
  const void* logits;
  int64_t logits_stride;
  const void* x;
  int64_t x_stride, rows, cols;
};

struct Forward {
  void* nll;
};

struct Backward {
  const void* g;
  void* glogits;
};

}  // namespace genfuse::bernoulli_nll
