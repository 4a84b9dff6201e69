#pragma once
#include <cstdint>

namespace genfuse::interpolate {

// Addresses, and strides between rows in elements. real and fake are (rows, cols), or null for 0; x is contiguous.
// Exactly one of seed and epsilon (rows) is set; epsilon is float32 where the rest is of 16 bits.
struct Problem {
  int dtype;
  const void *real, *fake;
  int64_t real_stride, fake_stride;
  const uint64_t* seed;
  const void* epsilon;
  int64_t rows, cols;
};

struct Forward {
  void* x;
};

void run_cuda(const Problem&, const Forward&, void* stream);

}  // namespace genfuse::interpolate
