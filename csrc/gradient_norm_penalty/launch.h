#pragma once
#include <cstdint>

namespace genfuse::gradient_norm_penalty {

// Addresses, and the stride between examples of gradient (rows, cols) in elements. All else is contiguous. norm (rows),
// penalty and its gradient, (rows) or, where the penalties are summed with one weight, a single number, are float32
// where the rest is of 16 bits.
struct Problem {
  int dtype;
  const void* gradient;
  int64_t stride, rows, cols;
  double target, eps, weight;
  bool one_sided, summed;
  void* partial;  // see rows.cuh; null on the CPU, and where no blocks share a row
};

struct Forward {
  void *penalty, *norm;
};

struct Backward {
  const void *gpenalty, *norm;
  void* ggradient;
};

// The gradients of gpenalty, a term (rows) of each example, and of gradient, for the gradient v of ggradient.
struct DoubleBackward {
  const void *gpenalty, *norm, *v;
  int64_t v_stride;
  void *of_gpenalty, *of_gradient;
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);
void run_cuda(const Problem&, const DoubleBackward&, void* stream);

}  // namespace genfuse::gradient_norm_penalty
