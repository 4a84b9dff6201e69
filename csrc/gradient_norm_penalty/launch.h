#pragma once
#include <cstdint>

namespace genfuse::gradient_norm_penalty {

// Addresses, and the stride between examples of gradient (rows, cols) in elements. All else is contiguous. norm,
// penalty and its gradient (rows) are float32 where the rest is of 16 bits.
struct Problem {
  int dtype;
  const void* gradient;
  int64_t stride, rows, cols;
  double target, eps;
  bool one_sided;
};

struct Forward {
  void *penalty, *norm;
};

// The gradient of every example's penalty is weight gpenalty; with gpenalty_stride 0 they share one gpenalty.
struct Backward {
  const void* gpenalty;
  int64_t gpenalty_stride;
  double weight;
  const void* norm;
  void* ggradient;
};

// The gradients of gpenalty, one for each example, and of gradient, for the gradient v of ggradient.
struct DoubleBackward {
  const void* gpenalty;
  int64_t gpenalty_stride;
  double weight;
  const void *norm, *v;
  int64_t v_stride;
  void *of_gpenalty, *of_gradient;
};

namespace cpu {
void run(const Problem&, const Forward&);
void run(const Problem&, const Backward&);
void run(const Problem&, const DoubleBackward&);
}  // namespace cpu

namespace cuda {
void run(const Problem&, const Forward&, void* stream);
void run(const Problem&, const Backward&, void* stream);
void run(const Problem&, const DoubleBackward&, void* stream);
}  // namespace cuda

}  // namespace genfuse::gradient_norm_penalty
