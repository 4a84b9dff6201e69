#pragma once
#include <cstdint>

namespace genfuse::affine_coupling {

// Addresses, and strides in elements. x is (rows, cols), of which `moved` columns from `start` on are moved; the others
// pass through, and so do those where mask (moved), which may be null, is not 0. Raw log-scales and shifts have steps
// between neighbours in a row: params (rows, 2 moved) holds first all of the ones, then all of the others, or if step
// is not 1 both of each column beside each other; or it holds log-scales alone, and shift the shifts. Results are
// contiguous; logdet, (rows) or by element (rows, cols), is float32 where the rest is of 16 bits, and so is factor
// (moved), which the kind `factored` takes. Other kinds take `constant`.
struct Problem {
  int dtype;
  int kind;
  double constant;
  bool by_element, inverse;
  const void *x, *params, *shift, *factor;
  int64_t x_stride, params_stride, shift_stride, step;
  const uint8_t* mask;
  int64_t rows, cols, start, moved;
  int64_t last, gstride, gstep;  // moved columns of the last row; strides of the gradients. `arranged` fills these in
};

struct Forward {
  void *y, *logdet;
};

struct Backward {
  const void *gy, *glogdet;
  void *gx, *gparams, *gshift;  // gshift is null where gparams has both
};

// The element at `offset` of an array of a dtype.
template <class Void>
Void* offset(Void* base, int64_t elements, int dtype) {
  constexpr int64_t sizes[] = {4, 8, 2, 2};
  return const_cast<char*>(static_cast<const char*>(base)) + elements * sizes[dtype];
}

// With the place of the shifts and the strides of gradients; and where nothing depends on the row that an element is
// in, with rows of `size` elements, of which the last may be shorter: rows of one element are no slower than long ones.
inline Problem arranged(Problem p, int64_t size) {
  const bool pair = p.shift;
  p.last = p.moved;
  p.gstep = pair ? 1 : p.step;
  p.gstride = pair ? p.moved : 2 * p.moved;
  if (!pair) {
    p.shift = offset(p.params, p.step == 1 ? p.moved : 1, p.dtype);
    p.shift_stride = p.params_stride;
  }
  if (p.cols == 1) {
    p.by_element = true;
    if (p.moved && p.params_stride == p.shift_stride) p.step = p.params_stride, p.gstep = p.gstride;
  }
  const int64_t apart = p.cols * p.step, elements = p.rows * p.cols;
  if (p.by_element && !p.mask && !p.factor && p.moved == p.cols && p.x_stride == p.cols && p.params_stride == apart &&
      p.shift_stride == apart && p.gstride == p.cols * p.gstep && elements) {
    p.rows = (elements + size - 1) / size;
    p.cols = p.moved = p.x_stride = size;
    p.last = elements - (p.rows - 1) * size;
    p.params_stride = p.shift_stride = size * p.step;
    p.gstride = size * p.gstep;
  }
  return p;
}

// Of gradients: where those of the shifts are.
inline Backward arranged(Backward out, const Problem& p) {
  if (!out.gshift) out.gshift = offset(out.gparams, p.gstep == 1 ? p.moved : 1, p.dtype);
  return out;
}
inline Forward arranged(Forward out, const Problem&) { return out; }

void run_cuda(const Problem&, const Forward&, void* stream);
void run_cuda(const Problem&, const Backward&, void* stream);

}  // namespace genfuse::affine_coupling
