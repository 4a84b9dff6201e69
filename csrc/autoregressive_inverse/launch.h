#pragma once
#include "rational_quadratic_spline/launch.h"

namespace genfuse::autoregressive_inverse {

// The layers of a masked network, the last of which makes the parameters of each column in turn. weights has of each
// layer (units, units of the layer before it), contiguous. starts is (layers, degrees), and lies where the rest lies:
// where the units of each degree from 0 to cols - 1 start, and the number of units.
struct Network {
  List<const void*> weights;
  const int64_t* starts;
  int64_t degrees;  // cols + 1
  bool residual;

  GENFUSE_HD int64_t hidden() const { return weights.count - 1; }
  GENFUSE_HD int64_t start(int64_t layer, int64_t degree) const { return starts[layer * degrees + degree]; }
  GENFUSE_HD int64_t size(int64_t layer) const { return start(layer, degrees - 1); }
  // Whether the layer makes what is added up along the blocks of a residual network: all before ReLU, with no ReLU in
  // front of the last layer.
  GENFUSE_HD bool adds(int64_t layer) const { return residual && layer % 2 == 0; }
  GENFUSE_HD bool rectified(int64_t layer) const { return !residual || layer < hidden() - 1; }
};

// The spline's x is what is undone; with no bins the transform is affine. context, which may be null, is added to the
// first layer. float or double.
struct Problem : rational_quadratic_spline::Problem, Network {
  const void* context;
  int64_t context_stride;
  List<const void*> biases;
  int scale;  // of affine_coupling's kinds, with their factor (cols), which may be null, or constant
  double constant;
  const void* factor;
  int64_t kept;     // values of a row: x, all hidden units, the residual sum, the parameters of a column
  void* workspace;  // of the size that workspace(problem) says; null on the CPU

  GENFUSE_HD int64_t width() const { return bins ? rational_quadratic_spline::Problem::width() : 2; }  // of a column
};

struct Forward {
  void *x, *logdet;  // contiguous
};

// The sweep backwards. The gradients for the parameters of a column are slope times that for x, plus offset.
// Everything but `starts` and weights is (units, rows), contiguous.
struct Sweep : Network {
  int dtype;
  int64_t rows;
  List<const void*> activations;  // of hidden layers
  const void *gx, *slope, *offset;

  GENFUSE_HD int64_t cols() const { return degrees - 1; }
};

struct Backward {
  void* gradients;   // for x, and for what each layer adds to its biases
  int64_t* degrees;  // of the same units: how many inputs they see; of x, from which degree on it is seen
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Sweep&, const Backward&, void* stream);
int64_t workspace(int dtype, int64_t rows, int64_t kept);  // on a GPU, in bytes; 0 where shared memory holds all

}  // namespace genfuse::autoregressive_inverse
