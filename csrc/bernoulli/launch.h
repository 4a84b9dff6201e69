#pragma once
#include <cstdint>

namespace genfuse::bernoulli {

// Addresses of `n` contiguous elements each.
struct Problem {
  int dtype;
  const void* p;
  const uint64_t* seed;
  int64_t n;
};

struct Forward {
  void* x;
};

void run_cuda(const Problem&, const Forward&, void* stream);

}  // namespace genfuse::bernoulli
