#pragma once
#include <cstdint>

namespace genfuse::affine_coupling {

// Addresses, and strides in elements. x is (rows, cols), of which `moved` columns from `start` on are moved; the others
// pass through, and so do those where mask (moved), which may be null, is not 0. params is (rows, 2 moved), first all
// raw log-scales, then all shifts. Results are contiguous; logdet (rows) is float32 where the rest is of 16 bits.
struct Problem {
  int dtype;
  int kind;
  bool inverse;
  const void *x, *params;
  int64_t x_stride, params_stride;
  const uint8_t* mask;
  int64_t rows, cols, start, moved;
};

struct Forward {
  void *y, *logdet;
};

struct Backward {
  const void *gy, *glogdet;
  void *gx, *gparams;
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::affine_coupling
