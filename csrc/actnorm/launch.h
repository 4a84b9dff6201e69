#pragma once
#include <cstdint>

namespace genfuse::actnorm {

// Addresses, and the stride between examples of x in elements. An example is (channels, cells); log_scale and shift are
// (channels), and float32 where x is of 16 bits, as is logdet (rows). All but x is contiguous.
struct Problem {
  int dtype;
  bool inverse;
  const void *x, *log_scale, *shift;
  int64_t x_stride, rows, channels, cells;
};

struct Forward {
  void *y, *logdet;
};

// Gradients of the parameters are sums over the examples: first over those of each of `chunks` chunks, into partial
// (chunks, 2, channels), then over the chunks in their order, so that they come out the same on any number of threads.
struct Backward {
  const void *gy, *glogdet;
  int64_t chunks;
  double* partial;
  void *gx, *glog_scale, *gshift;
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::actnorm
