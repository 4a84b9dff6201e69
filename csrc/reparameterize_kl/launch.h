#pragma once
#include <cstdint>

namespace genfuse::reparameterize_kl {

// Addresses, and strides in elements. mu and logvar are (rows, cols); z and what goes with it (samples, rows, cols),
// contiguous; kl is (rows). Exactly one of seed and noise is set. kl is float32 where the rest is of 16 bits.
struct Problem {
  int dtype;
  const void *mu, *logvar;
  int64_t mu_stride, logvar_stride;
  const uint64_t* seed;
  const void* noise;
  int64_t rows, cols, samples;
  void* partial;  // see rows.cuh; null on the CPU, and where no blocks share a row
};

struct Forward {
  void *z, *kl;
};

struct Backward {
  const void *gz, *gkl;
  void *gmu, *glogvar;  // (rows, cols), contiguous
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::reparameterize_kl
