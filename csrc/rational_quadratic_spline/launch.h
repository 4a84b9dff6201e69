#pragma once
#include <cstdint>

#include "portable.h"

namespace genfuse::rational_quadratic_spline {

enum Tails { kLinear, kNone, kCircular, kMixed };

// Addresses, and strides between rows in elements. x is (rows, cols), params (rows, cols, P) with neighbouring
// coordinates P apart; logdet is (rows), float32 where the rest is of 16 bits. table, which may be null, is (boxes, 5)
// of logdet's type: left, right, bottom, top and, of mixed tails, the tails of each coordinate, counted modulo `boxes`.
struct Problem {
  int dtype;
  const void *x, *params;
  int64_t x_stride, params_stride, rows, cols;
  int64_t bins;
  int tails;
  bool inverse;
  double min_width, min_height, min_derivative;
  double edge;     // the raw derivative of both ends under linear tails
  double damping;  // a factor of raw widths and heights
  double clip;     // of raw derivatives, those of widths and heights are half of it; then derivatives are exponentials
  double left, right, bottom, top;  // the box
  const void* table = nullptr;
  int64_t boxes = 1;

  GENFUSE_HD int64_t width() const { return 3 * bins + (tails == kLinear ? -1 : tails == kCircular ? 0 : 1); }  // P
};

struct Forward {
  void *y, *logdet;
};

struct Backward {
  const void *gy, *glogdet;
  void *gx, *gparams;  // all contiguous
};

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::rational_quadratic_spline
