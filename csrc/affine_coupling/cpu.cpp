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
      for (int64_t j = 0; j < n; ++j) buffer_[j] = mask_ && mask_[j0 + j] ? Bits(0) : ~Bits(0);
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

template <class S>
GENFUSE_HD void copy(const S* from, S* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = from[j];
}

// What is not beside each other goes through a buffer.
template <class S, class T>
GENFUSE_HD const T* gather(const S* from, int64_t step, int64_t n, T* buffer) {
  if (step == 1) return read(from, n, buffer);
  if (step == 2) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) buffer[j] = load(from[2 * j]);
    return buffer;
  }
  for (int64_t j = 0; j < n; ++j) buffer[j] = load(from[j * step]);
  return buffer;
}
template <bool has_mask, class T>
GENFUSE_HD T masked(T x, const bits_of<T>* moves, int64_t j) {
  if constexpr (has_mask) return bit_cast<T>(bit_cast<bits_of<T>>(x) & moves[j]);
  return x;
}

// Of n columns from j0 on, what depends on the kind: log-scales, their derivatives, and the scales. 0 and 1 where the
// mask keeps a column.
template <class T>
struct Scales {
  T s[kBlock], derivative[kBlock], scale[kBlock];
};

template <Kind kind, class T>
GENFUSE_HD void scales_of(const Problem& p, const T* raw, const bits_of<T>* moves, int64_t j0, int64_t n,
                          Scales<T>& out) {
  const T constant = T(p.constant), sign = p.inverse ? T(-1) : T(1);
  const T* factors = kind == Kind::factored ? element<T>(p.factor, j0) : raw;
  T *values = out.s, *derivatives = out.derivative, *scales = out.scale;
  GENFUSE_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const LogScale<T> bounded = log_scale<kind>(raw[j], kind == Kind::factored ? factors[j] : constant);
    const T s = masked<true>(bounded.value, moves, j);
    values[j] = s;
    derivatives[j] = masked<true>(bounded.derivative, moves, j);
    scales[j] = scale<kind>(sign * s, false);
  }
}

#define GENFUSE_SCALES(T)                                                                                  \
  GENFUSE_SIMD void scales(const Problem& p, const T* raw, const bits_of<T>* moves, int64_t j0, int64_t n, \
                           Scales<T>& out) {                                                               \
    switch (Kind(p.kind)) {                                                                                \
      case Kind::tanh: return scales_of<Kind::tanh>(p, raw, moves, j0, n, out);                            \
      case Kind::exp: return scales_of<Kind::exp>(p, raw, moves, j0, n, out);                              \
      case Kind::sigmoid: return scales_of<Kind::sigmoid>(p, raw, moves, j0, n, out);                      \
      case Kind::softclip: return scales_of<Kind::softclip>(p, raw, moves, j0, n, out);                    \
      case Kind::floored: return scales_of<Kind::floored>(p, raw, moves, j0, n, out);                      \
      case Kind::factored: return scales_of<Kind::factored>(p, raw, moves, j0, n, out);                    \
    }                                                                                                      \
  }
GENFUSE_SCALES(float)
GENFUSE_SCALES(double)
#undef GENFUSE_SCALES

// Every kind, with a mask, parameters wherever they lie, and log-determinants for each row or by element. Loops for one
// kind alone do without: they are for a log-determinant for each row, and parameters that lie together.
constexpr Kind kAny = Kind(-1);

template <Kind kind, bool inverse, class S, bool has_mask = kind == kAny>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  constexpr bool any = kind == kAny;
  const int64_t after = p.start + p.moved, step = any ? p.step : 1;
  const bool by_element = any && p.by_element;
  T x_buffer[kBlock], raw_buffer[kBlock], shift_buffer[kBlock];
  Scales<T> of;
  Moving<bits_of<T>> moving(p);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t moved = any && i + 1 == p.rows ? p.last : p.moved;
    const S* x_row = element<S>(p.x, i * p.x_stride);
    const S* raw_row = element<S>(p.params, i * p.params_stride);
    const S* shift_row = element<S>(p.shift, i * p.shift_stride);
    S* y_row = element<S>(out.y, i * p.cols);
    T* logdet = element<T>(out.logdet, by_element ? i * p.cols : i);
    if constexpr (!any) {
      prefetch(x_row + kRowsAhead * p.x_stride, p.cols);
      prefetch(raw_row + kRowsAhead * p.params_stride, 2 * moved);
      prefetch(y_row + kRowsAhead * p.cols, p.cols);
    }
    copy(x_row, y_row, p.start);
    copy(x_row + after, y_row + after, p.cols - after);
    if (by_element) {
      std::fill_n(logdet, p.start, T(0));
      std::fill_n(logdet + after, p.cols - after, T(0));
    }
    constexpr int64_t block = any ? kBlock : kBlock / 4;  // `part` may be one chain of sums
    double sum = 0;                                       // of blocks
    for (int64_t j0 = 0; j0 < moved; j0 += block) {
      const int64_t n = std::min(block, moved - j0);
      const T* x = read(x_row + p.start + j0, n, x_buffer);
      const T* raw = gather(raw_row + j0 * step, step, n, raw_buffer);
      const T* shift = gather(shift_row + j0 * step, step, n, shift_buffer);
      S* y = y_row + p.start + j0;
      const auto* moves = has_mask ? moving.at(j0, n) : nullptr;
      if constexpr (any) scales(p, raw, moves, j0, n, of);
      T part = 0;  // a long sum would lose digits
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < n; ++j) {
        const T s = any ? of.s[j] : masked<has_mask>(log_scale<kind>(raw[j]).value, moves, j);
        const T t = masked<has_mask>(shift[j], moves, j);
        store(y[j], apply(factor(x[j], t, inverse), any ? of.scale[j] : scale<kind>(s, inverse), t, inverse));
        if constexpr (!any) part += s;
      }
      sum += any ? sum_of(of.s, n) : part;
      for (int64_t j = 0; by_element && j < n; ++j) logdet[p.start + j0 + j] = inverse ? -of.s[j] : of.s[j];
    }
    if (!by_element) *logdet = T(inverse ? -sum : sum);
  }
}

template <Kind kind, bool inverse, class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  constexpr bool any = kind == kAny;
  const int64_t after = p.start + p.moved, step = any ? p.step : 1, gstep = any ? p.gstep : 1;
  T x_buffer[kBlock], raw_buffer[kBlock], shift_buffer[kBlock], gy_buffer[kBlock], glogdet_buffer[kBlock];
  S graw_buffer[kBlock], gshift_buffer[kBlock];
  Scales<T> of;
  Moving<bits_of<T>> moving(p);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t moved = any && i + 1 == p.rows ? p.last : p.moved;
    const S* x_row = element<S>(p.x, i * p.x_stride);
    const S* raw_row = element<S>(p.params, i * p.params_stride);
    const S* shift_row = element<S>(p.shift, i * p.shift_stride);
    const S* gy_row = element<S>(out.gy, i * p.cols);
    S* gx_row = element<S>(out.gx, i * p.cols);
    const bool by_element = any && p.by_element;
    const T glogdet_row = by_element ? T(0) : *element<T>(out.glogdet, i);
    if constexpr (any) {
      std::fill_n(glogdet_buffer, std::min(moved, kBlock), glogdet_row);
    } else {
      prefetch(x_row + kRowsAhead * p.x_stride + p.start, moved);
      prefetch(raw_row + kRowsAhead * p.params_stride, 2 * moved);
      prefetch(gy_row + kRowsAhead * p.cols, p.cols);
      prefetch(gx_row + kRowsAhead * p.cols, p.cols);
    }
    copy(gy_row, gx_row, p.start);
    copy(gy_row + after, gx_row + after, p.cols - after);
    for (int64_t j0 = 0; j0 < moved; j0 += kBlock) {
      const int64_t n = std::min(kBlock, moved - j0);
      const T* x = read(x_row + p.start + j0, n, x_buffer);
      const T* raw = gather(raw_row + j0 * step, step, n, raw_buffer);
      const T* shift = gather(shift_row + j0 * step, step, n, shift_buffer);
      const T* gy = read(gy_row + p.start + j0, n, gy_buffer);
      const T* glogdet = by_element ? element<T>(out.glogdet, i * p.cols + p.start + j0) : glogdet_buffer;
      S* gx = gx_row + p.start + j0;
      // Gradients of the parameters: into their places, or if those are apart, by way of buffers.
      S* raw_to = element<S>(out.gparams, i * p.gstride + j0 * gstep);
      S* shift_to = element<S>(out.gshift, i * p.gstride + j0 * gstep);
      S *graw = gstep == 1 ? raw_to : graw_buffer, *gshift = gstep == 1 ? shift_to : gshift_buffer;
      const auto* moves = any ? moving.at(j0, n) : nullptr;
      if constexpr (any) scales(p, raw, moves, j0, n, of);
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        const LogScale<T> s = any ? LogScale<T>{T(0), of.derivative[j]} : log_scale<kind>(raw[j]);
        const T f = factor(x[j], masked<any>(shift[j], moves, j), inverse);
        const T scaled = any ? of.scale[j] : scale<kind>(s.value, inverse);
        const Grad<T> g = grad(gy[j], any ? glogdet[j] : glogdet_row, f, scaled, s.derivative, inverse);
        store(gx[j], g.x);
        store(graw[j], masked<any>(g.raw, moves, j));
        store(gshift[j], masked<any>(g.shift, moves, j));
      }
      for (int64_t j = 0; gstep != 1 && j < n; ++j) raw_to[j * gstep] = graw[j], shift_to[j * gstep] = gshift[j];
    }
  }
}

// Each way, and forward without a mask and with one, has loops of its own: one that decided for itself would not be
// vectorised.
template <Kind kind, class S, class Out>
GENFUSE_HD void either_way(const Problem& p, const Out& out, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<Out, Forward> && kind != kAny) {
    if (p.mask && p.inverse) return rows_of<kind, true, S, true>(p, out, begin, end);
    if (p.mask) return rows_of<kind, false, S, true>(p, out, begin, end);
  }
  p.inverse ? rows_of<kind, true, S>(p, out, begin, end) : rows_of<kind, false, S>(p, out, begin, end);
}
GENFUSE_SIMD_LOOPS(tanh_rows, Forward, either_way<Kind::tanh, S>)
GENFUSE_SIMD_LOOPS(tanh_rows, Backward, either_way<Kind::tanh, S>)
GENFUSE_SIMD_LOOPS(exp_rows, Forward, either_way<Kind::exp, S>)
GENFUSE_SIMD_LOOPS(exp_rows, Backward, either_way<Kind::exp, S>)
GENFUSE_SIMD_LOOPS(sigmoid_rows, Forward, either_way<Kind::sigmoid, S>)
GENFUSE_SIMD_LOOPS(sigmoid_rows, Backward, either_way<Kind::sigmoid, S>)
GENFUSE_SIMD_LOOPS(all_rows, Forward, either_way<kAny, S>)
GENFUSE_SIMD_LOOPS(all_rows, Backward, either_way<kAny, S>)

}  // namespace

template <class Out>
void run_cpu(const Problem& given, const Out& given_out) {
  const Problem p = arranged(given, kBlock);
  const Out out = arranged(given_out, p);
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) {
      const bool plain = (!p.mask || std::is_same_v<Out, Forward>) && !p.by_element && p.step == 1 && p.gstep == 1;
      switch (plain ? Kind(p.kind) : kAny) {
        case Kind::tanh: return tanh_rows(storage, p, out, begin, end);
        case Kind::exp: return exp_rows(storage, p, out, begin, end);
        case Kind::sigmoid: return sigmoid_rows(storage, p, out, begin, end);
        default: return all_rows(storage, p, out, begin, end);
      }
    });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem = fields(&P::dtype, &P::kind, &P::constant, &P::by_element, &P::inverse, &P::x, &P::x_stride,
                              &P::params, &P::params_stride, &P::step, &P::shift, &P::shift_stride, &P::factor,
                              &P::mask, &P::rows, &P::cols, &P::start, &P::moved);
  using F = Forward;
  using B = Backward;
  define(m, "affine_coupling", problem, fields(&F::y, &F::logdet));
  define(m, "affine_coupling_backward", problem, fields(&B::gy, &B::glogdet, &B::gx, &B::gparams));
  define(m, "affine_pair", problem, fields(&F::y, &F::logdet));
  define(m, "affine_pair_backward", problem, fields(&B::gy, &B::glogdet, &B::gx, &B::gparams, &B::gshift));
}

}  // namespace genfuse::affine_coupling
