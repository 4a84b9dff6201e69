#pragma once
#include "rational_quadratic_spline/launch.h"

namespace genfuse::autoregressive_inverse {

// A linear layer: weight (units, units of the layer before it) and bias (units), contiguous.
struct Layer {
  const void *weight, *bias;
  int64_t units;
};

// Addresses, and strides between rows in elements. y is (rows, cols); context, which may be null, has what is added to
// the first layer. The last of hidden + 1 layers has the parameters of each column in turn. starts (hidden, cols + 1)
// has where the units of each degree start, and the number of units. `layers` and `starts` lie where the rest lies.
struct Problem {
  int dtype;  // float or double
  const void* y;
  int64_t y_stride;
  const void* context;
  int64_t context_stride;
  int64_t rows, cols;
  const Layer* layers;
  int64_t hidden, units;  // how many hidden layers, and how many units in all of them
  const int64_t* starts;
  int scale;                                  // of the affine transform
  rational_quadratic_spline::Problem spline;  // its settings; with no bins the transform is affine

  GENFUSE_HD int64_t width() const { return spline.bins ? spline.width() : 2; }  // parameters of a column
  GENFUSE_HD int64_t start(int64_t layer, int64_t degree) const {
    return layer < hidden ? starts[layer * (cols + 1) + degree] : degree * width();
  }
};

struct Forward {
  void *x, *logdet;  // contiguous
  void* workspace;   // of the size that workspace(problem) says; null on the CPU
};

void run_cuda(const Problem&, const Forward&, void* stream);
int64_t workspace(const Problem&);  // on a GPU, in bytes; 0 where shared memory holds all

}  // namespace genfuse::autoregressive_inverse
