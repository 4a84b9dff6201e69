#pragma once
#include <cstdint>

#include "portable.h"

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
// (chunks, 2 channels + 1), then over the chunks in their order, so that they come out the same on any number of
// threads. Last in a chunk is its sum of glogdet, which may cancel, and be large beside all others.
struct Backward {
  const void *gy, *glogdet;
  int64_t chunks;
  double* partial;
  void *gx, *glog_scale, *gshift;
};

// How many sums a chunk has.
GENFUSE_HD int64_t sums_of(const Problem& p) { return 2 * p.channels + 1; }

// What the sum of glogdet adds to the gradient of log_scale.
GENFUSE_HD double of_logdet(const Problem& p, double sum) { return double(p.cells) * (p.inverse ? -sum : sum); }

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::actnorm
