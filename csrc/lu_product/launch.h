#pragma once
#include <cstdint>

namespace genfuse::lu_product {

// triangles, weight and their gradients are (size, size), what is of the diagonal (size), logdet is one number; `back`
// is the order of weight's columns, and `order` undoes it.
struct Problem {
  int dtype;
  const void *triangles, *log_diagonal, *signs;
  const int64_t *back, *order;
  int64_t size;
};

struct Forward {
  void *weight, *logdet;
};

struct Backward {
  const void *gweight, *glogdet;
  void *gtriangles, *glog_diagonal;
};

}  // namespace genfuse::lu_product
