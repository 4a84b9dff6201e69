#include "affine_coupling/launch.h"
#include "affine_coupling/math.h"
#include "bindings.h"
#include "rows.h"

namespace genfuse::affine_coupling {
namespace {

// Bits that are all set for columns that move, and 0 for those that the mask keeps after all. What is to be 0 there is
// put through a bitwise and: a selection would become a branch, and no loop with one in it is vectorised.
template <class Bits>
class Moving {
 public:
  explicit Moving(const Problem& p) : mask_(p.mask) {}

  // Of n columns from j0 on. Most rows are no longer than a block, which then serves all of them.
  GENFUSE_HD const Bits* at(int64_t j0, int64_t n) {
    if (j0 != filled_) {
      for (int64_t j = 0; j < n; ++j) buffer_[j] = mask_[j0 + j] ? Bits(0) : ~Bits(0);
      filled_ = j0;
    }
    return buffer_;
  }

 private:
  const uint8_t* mask_;
  int64_t filled_ = -1;
  Bits buffer_[kBlock];
};

template <class T>
using bits_of = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <bool has_mask, class T>
GENFUSE_HD T masked(T x, const bits_of<T>* moves, int64_t j) {
  if constexpr (has_mask) return bit_cast<T>(bit_cast<bits_of<T>>(x) & moves[j]);
  return x;
}

template <class S>
GENFUSE_HD void copy(const S* from, S* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = from[j];
}

template <Kind kind, bool inverse, bool has_mask, class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const int64_t moved = p.moved, after = p.start + moved;
  T x_buffer[kBlock], raw_buffer[kBlock], shift_buffer[kBlock];
  Moving<bits_of<T>> moving(p);
  for (int64_t i = begin; i < end; ++i) {
    const S* x_row = element<S>(p.x, i * p.x_stride);
    const S* raw_row = element<S>(p.params, i * p.params_stride);
    S* y_row = element<S>(out.y, i * p.cols);
    prefetch(x_row + kRowsAhead * p.x_stride, p.cols);
    prefetch(raw_row + kRowsAhead * p.params_stride, 2 * moved);
    prefetch(y_row + kRowsAhead * p.cols, p.cols);
    copy(x_row, y_row, p.start);
    copy(x_row + after, y_row + after, p.cols - after);
    T sum = 0;
    for (int64_t j0 = 0; j0 < moved; j0 += kBlock) {
      const int64_t n = std::min(kBlock, moved - j0);
      const auto* moves = has_mask ? moving.at(j0, n) : nullptr;
      const T* x = read(x_row + p.start + j0, n, x_buffer);
      const T* raw = read(raw_row + j0, n, raw_buffer);
      const T* shift = read(raw_row + moved + j0, n, shift_buffer);
      S* y = y_row + p.start + j0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) {
        const T s = masked<has_mask>(log_scale<kind>(raw[j]).value, moves, j), t = masked<has_mask>(shift[j], moves, j);
        store(y[j], apply(factor(x[j], t, inverse), scale<kind>(s, inverse), t, inverse));
        sum += s;
      }
    }
    *element<T>(out.logdet, i) = inverse ? -sum : sum;
  }
}

template <Kind kind, bool inverse, bool has_mask, class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const int64_t moved = p.moved, after = p.start + moved;
  T x_buffer[kBlock], raw_buffer[kBlock], shift_buffer[kBlock], gy_buffer[kBlock];
  Moving<bits_of<T>> moving(p);
  for (int64_t i = begin; i < end; ++i) {
    const S* x_row = element<S>(p.x, i * p.x_stride);
    const S* raw_row = element<S>(p.params, i * p.params_stride);
    const S* gy_row = element<S>(out.gy, i * p.cols);
    S* gx_row = element<S>(out.gx, i * p.cols);
    const T glogdet = *element<T>(out.glogdet, i);
    prefetch(x_row + kRowsAhead * p.x_stride + p.start, moved);
    prefetch(raw_row + kRowsAhead * p.params_stride, 2 * moved);
    prefetch(gy_row + kRowsAhead * p.cols, p.cols);
    prefetch(gx_row + kRowsAhead * p.cols, p.cols);
    copy(gy_row, gx_row, p.start);
    copy(gy_row + after, gx_row + after, p.cols - after);
    for (int64_t j0 = 0; j0 < moved; j0 += kBlock) {
      const int64_t n = std::min(kBlock, moved - j0);
      const auto* moves = has_mask ? moving.at(j0, n) : nullptr;
      const T* x = read(x_row + p.start + j0, n, x_buffer);
      const T* raw = read(raw_row + j0, n, raw_buffer);
      const T* shift = read(raw_row + moved + j0, n, shift_buffer);
      const T* gy = read(gy_row + p.start + j0, n, gy_buffer);
      S* gx = gx_row + p.start + j0;
      S* graw = element<S>(out.gparams, i * 2 * moved + j0);
      S* gshift = graw + moved;
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        const LogScale<T> bounded = log_scale<kind>(raw[j]);
        const T s = masked<has_mask>(bounded.value, moves, j), t = masked<has_mask>(shift[j], moves, j);
        const Grad<T> g =
            grad(gy[j], glogdet, factor(x[j], t, inverse), scale<kind>(s, inverse), bounded.derivative, inverse);
        store(gx[j], g.x);
        store(graw[j], masked<has_mask>(g.raw, moves, j));
        store(gshift[j], masked<has_mask>(g.shift, moves, j));
      }
    }
  }
}

// Each way, and each without a mask and with one, has loops of its own: one that decided for itself would not be
// vectorised.
template <Kind kind, class S, class Out>
GENFUSE_HD void either_way(const Problem& p, const Out& out, int64_t begin, int64_t end) {
  if (p.mask) {
    p.inverse ? rows_of<kind, true, true, S>(p, out, begin, end) : rows_of<kind, false, true, S>(p, out, begin, end);
  } else {
    p.inverse ? rows_of<kind, true, false, S>(p, out, begin, end) : rows_of<kind, false, false, S>(p, out, begin, end);
  }
}
GENFUSE_SIMD_LOOPS(tanh_rows, Forward, either_way<Kind::tanh, S>)
GENFUSE_SIMD_LOOPS(tanh_rows, Backward, either_way<Kind::tanh, S>)
GENFUSE_SIMD_LOOPS(exp_rows, Forward, either_way<Kind::exp, S>)
GENFUSE_SIMD_LOOPS(exp_rows, Backward, either_way<Kind::exp, S>)
GENFUSE_SIMD_LOOPS(sigmoid_rows, Forward, either_way<Kind::sigmoid, S>)
GENFUSE_SIMD_LOOPS(sigmoid_rows, Backward, either_way<Kind::sigmoid, S>)

}  // namespace

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) {
      switch (Kind(p.kind)) {
        case Kind::tanh: return tanh_rows(storage, p, out, begin, end);
        case Kind::exp: return exp_rows(storage, p, out, begin, end);
        case Kind::sigmoid: return sigmoid_rows(storage, p, out, begin, end);
      }
    });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem = fields(&P::dtype, &P::kind, &P::inverse, &P::x, &P::x_stride, &P::params, &P::params_stride,
                              &P::mask, &P::rows, &P::cols, &P::start, &P::moved);
  define(m, "affine_coupling", problem, fields(&Forward::y, &Forward::logdet));
  using B = Backward;
  define(m, "affine_coupling_backward", problem, fields(&B::gy, &B::glogdet, &B::gx, &B::gparams));
}

}  // namespace genfuse::affine_coupling
