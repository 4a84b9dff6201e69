#pragma once
#include <cstdint>

namespace genfuse::standard_normal_log_prob {

// Addresses, and the stride between rows of z (rows, cols) in elements. All else is contiguous; logdet, which may be
// null, log_prob and its gradient g (rows) are float32 where the rest is of 16 bits.
struct Problem {
  int dtype;
  const void* z;
  int64_t z_stride, rows, cols;
  const void* logdet;
  void* partial;  // see rows.cuh; null on the CPU, and where no blocks share a row
};

struct Forward {
  void* log_prob;
};

struct Backward {
  const void* g;
  void* gz;
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::standard_normal_log_prob
