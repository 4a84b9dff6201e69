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
  const void *log_scale, *shift, *bias;  // (size), of what scales and shifts x before; or null
};

struct Forward {
  void *weight, *logdet, *offset;
};

// goffset, glog_scale and gshift are only looked at where there is a scale and shift.
struct Backward {
  const void *gweight, *glogdet, *goffset;
  void *gtriangles, *glog_diagonal, *glog_scale, *gshift;
};

}  // namespace genfuse::lu_product
