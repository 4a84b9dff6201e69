#pragma once
#include <cstdint>

namespace genfuse::group_norm {

// x, y, gy and gx are (rows, cells, channels), scale, shift and their gradients (rows, channels).
struct Problem {
  int dtype;
  const void *x, *scale, *shift;
  int64_t rows, cells, channels, groups;
  double eps;
  bool silu;
};

struct Forward {
  void* y;
};

struct Backward {
  const void* gy;
  void *gx, *gscale, *gshift;
};

}  // namespace genfuse::group_norm
