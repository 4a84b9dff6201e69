#pragma once
#include <cstdint>

namespace genfuse::diffuse {

// Addresses, and the stride between examples of x0 in elements. x0 and what goes with it are (rows, cols), alpha, sigma
// and their gradients (rows), and float32 where the rest is of 16 bits. All but x0 is contiguous. Exactly one of seed
// and noise is set.
struct Problem {
  int dtype;
  const void* x0;
  int64_t x0_stride;
  const uint64_t* seed;
  const void* noise;
  int64_t rows, cols;
  void* partial;  // see rows.cuh; null on the CPU, and where no blocks share a row
};

struct Forward {
  int kind;  // of the target, as math.h numbers them
  const void *alpha, *sigma;
  void *x_t, *target;
};

// Of alpha and sigma alone: the gradient of x0 is no more than a Forward.
struct Backward {
  const void *gx_t, *gv;  // gv is null unless the target was v
  void *galpha, *gsigma;
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::diffuse
