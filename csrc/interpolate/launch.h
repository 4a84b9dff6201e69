#pragma once
#include <cstdint>

namespace genfuse::interpolate {

// Addresses, and the strides between examples of real and fake (rows, cols) in elements; all else is contiguous.
struct Problem {
  int dtype;
  const void* real;
  int64_t real_stride;
  const void* fake;
  int64_t fake_stride;
  const uint64_t* seed;
  int64_t rows, cols;
};

struct Forward {
  void *x, *epsilon;  // epsilon (rows) is float32 where the rest is of 16 bits
};

namespace cpu {
void run(const Problem&, const Forward&);
}

namespace cuda {
void run(const Problem&, const Forward&, void* stream);
}

}  // namespace genfuse::interpolate
