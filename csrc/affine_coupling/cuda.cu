#include "affine_coupling/launch.h"
#include "affine_coupling/math.h"
#include "rows.cuh"

namespace genfuse::affine_coupling {
namespace {

// Whether a moved column passes through after all.
__device__ bool kept(const Problem& p, int64_t j) { return p.mask && p.mask[j]; }

// The j-th of the columns that pass through.
__device__ int64_t passing(const Problem& p, int64_t j) { return j < p.start ? j : j + p.moved; }

template <Kind kind, class S, class T = compute_t<S>>
__device__ LogScale<T> log_scale_at(const Problem& p, S raw, int64_t j) {
  const T c = kind == Kind::factored ? static_cast<const T*>(p.factor)[j] : T(p.constant);
  return log_scale<kind>(T(load(raw)), c);
}

constexpr int kAhead = 4;  // columns of a lane that are loaded before the first is looked at

// Copies the columns that pass through.
template <int Lanes, class S>
__device__ void pass(const Problem& p, const S* from, S* to) {
  const int64_t n = p.cols - p.moved;
  for (int64_t j0 = lane<Lanes>(); j0 < n; j0 += kAhead * Lanes) {
    S at[kAhead];
    GENFUSE_UNROLL(kAhead)
    for (int k = 0; k < kAhead; ++k) {
      if (j0 + k * Lanes < n) at[k] = from[passing(p, j0 + k * Lanes)];
    }
    GENFUSE_UNROLL(kAhead)
    for (int k = 0; k < kAhead; ++k) {
      if (j0 + k * Lanes < n) to[passing(p, j0 + k * Lanes)] = at[k];
    }
  }
}

// Of the columns that move, those of a lane from j0 on.
template <int Lanes, class S>
__device__ void load_ahead(const S* from, int64_t j0, int64_t n, int64_t step, S (&to)[kAhead]) {
  GENFUSE_UNROLL(kAhead)
  for (int k = 0; k < kAhead; ++k) {
    if (const int64_t j = j0 + k * Lanes; j < n) to[k] = from[j * step];
  }
}

template <int Lanes, Kind kind, class S>
__global__ void kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const int64_t moved = row + 1 < p.rows ? p.moved : p.last;
    const S* x = static_cast<const S*>(p.x) + row * p.x_stride;
    const S* raw = static_cast<const S*>(p.params) + row * p.params_stride;
    const S* shift = static_cast<const S*>(p.shift) + row * p.shift_stride;
    S* y = static_cast<S*>(out.y) + row * p.cols;
    T* by_element = p.by_element ? static_cast<T*>(out.logdet) + row * p.cols : nullptr;
    pass<Lanes>(p, x, y);
    for (int64_t j = lane<Lanes>(); by_element && j < p.cols - p.moved; j += Lanes) by_element[passing(p, j)] = T(0);
    T sum = 0;
    for (int64_t j0 = lane<Lanes>(); j0 < moved; j0 += kAhead * Lanes) {
      S xs[kAhead], raws[kAhead], shifts[kAhead];
      load_ahead<Lanes>(x + p.start, j0, moved, 1, xs);
      load_ahead<Lanes>(raw, j0, moved, p.step, raws);
      load_ahead<Lanes>(shift, j0, moved, p.step, shifts);
      GENFUSE_UNROLL(kAhead)
      for (int k = 0; k < kAhead; ++k) {
        const int64_t j = j0 + k * Lanes;
        if (j >= moved) continue;
        const bool keep = kept(p, j);
        const T s = keep ? T(0) : log_scale_at<kind>(p, raws[k], j).value;
        const T t = keep ? T(0) : T(load(shifts[k]));
        const T f = factor(T(load(xs[k])), t, p.inverse);
        store(y[p.start + j], apply(f, scale<kind>(s, p.inverse), t, p.inverse));
        const T logdet = p.inverse ? -s : s;
        if (by_element) by_element[p.start + j] = logdet;
        sum += logdet;
      }
    }
    if (by_element) continue;
    sum = row_sum<Lanes>(sum);
    if (lane<Lanes>() == 0) static_cast<T*>(out.logdet)[row] = sum;
  }
}

template <int Lanes, Kind kind, class S>
__global__ void kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const int64_t moved = row + 1 < p.rows ? p.moved : p.last;
    const S* x = static_cast<const S*>(p.x) + row * p.x_stride;
    const S* raw = static_cast<const S*>(p.params) + row * p.params_stride;
    const S* shift = static_cast<const S*>(p.shift) + row * p.shift_stride;
    const S* gy = static_cast<const S*>(out.gy) + row * p.cols;
    S* gx = static_cast<S*>(out.gx) + row * p.cols;
    S* graw = static_cast<S*>(out.gparams) + row * p.gstride;
    S* gshift = static_cast<S*>(out.gshift) + row * p.gstride;
    const T* glogdet = static_cast<const T*>(out.glogdet) + (p.by_element ? row * p.cols + p.start : row);
    pass<Lanes>(p, gy, gx);
    for (int64_t j0 = lane<Lanes>(); j0 < moved; j0 += kAhead * Lanes) {
      S xs[kAhead], raws[kAhead], shifts[kAhead], gys[kAhead];
      load_ahead<Lanes>(x + p.start, j0, moved, 1, xs);
      load_ahead<Lanes>(raw, j0, moved, p.step, raws);
      load_ahead<Lanes>(shift, j0, moved, p.step, shifts);
      load_ahead<Lanes>(gy + p.start, j0, moved, 1, gys);
      GENFUSE_UNROLL(kAhead)
      for (int k = 0; k < kAhead; ++k) {
        const int64_t j = j0 + k * Lanes;
        if (j >= moved) continue;
        const bool keep = kept(p, j);
        const LogScale<T> s = log_scale_at<kind>(p, raws[k], j);
        const T f = factor(T(load(xs[k])), T(load(shifts[k])), p.inverse), g = load(gys[k]);
        const Grad<T> of =
            grad(g, glogdet[p.by_element ? j : 0], f, scale<kind>(s.value, p.inverse), s.derivative, p.inverse);
        store(gx[p.start + j], keep ? g : of.x);
        store(graw[j * p.gstep], keep ? T(0) : of.raw);
        store(gshift[j * p.gstep], keep ? T(0) : of.shift);
      }
    }
  }
}

template <Kind kind, class Out>
void launch(const Problem& given, const Out& given_out, void* stream) {
  const Problem p = arranged(given, 128);
  const Out out = arranged(given_out, p);
  dispatch(p.dtype, [&](auto storage) {
    for_rows<1>(p.rows, p.cols, 1024, [&](auto lanes, int blocks) {
      kernel<lanes, kind, decltype(storage)><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out);
    });
  });
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  switch (Kind(p.kind)) {
    case Kind::tanh: return launch<Kind::tanh>(p, out, stream);
    case Kind::exp: return launch<Kind::exp>(p, out, stream);
    case Kind::sigmoid: return launch<Kind::sigmoid>(p, out, stream);
    case Kind::softclip: return launch<Kind::softclip>(p, out, stream);
    case Kind::floored: return launch<Kind::floored>(p, out, stream);
    case Kind::factored: return launch<Kind::factored>(p, out, stream);
  }
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::affine_coupling
