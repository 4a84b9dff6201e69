#pragma once
#include <cstdint>

namespace genfuse::interpolate {

// Addresses, and strides between rows in elements. All that has columns is (rows, cols), and contiguous but for real
// and fake. Exactly one of seed and epsilon (rows) is set; epsilon is float32 where the rest is of 16 bits.
struct Problem {
  int dtype;
  const uint64_t* seed;
  const void* epsilon;
  int64_t rows, cols;
};

struct Forward {
  const void* real;
  int64_t real_stride;
  const void* fake;
  int64_t fake_stride;
  void* x;
};

struct Backward {
  const void* g;
  void *greal, *gfake;
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::interpolate
