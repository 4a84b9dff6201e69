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
    for (int64_t j = lane<Lanes>(); j < p.cols - p.moved; j += Lanes) {
      y[passing(p, j)] = x[passing(p, j)];
      if (by_element) by_element[passing(p, j)] = T(0);
    }
    T sum = 0;
    for (int64_t j = lane<Lanes>(); j < moved; j += Lanes) {
      const bool keep = kept(p, j);
      const T s = keep ? T(0) : log_scale_at<kind>(p, raw[j * p.step], j).value;
      const T t = keep ? T(0) : T(load(shift[j * p.step]));
      const T f = factor(T(load(x[p.start + j])), t, p.inverse);
      store(y[p.start + j], apply(f, scale<kind>(s, p.inverse), t, p.inverse));
      const T logdet = p.inverse ? -s : s;
      if (by_element) by_element[p.start + j] = logdet;
      sum += logdet;
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
    for (int64_t j = lane<Lanes>(); j < p.cols - p.moved; j += Lanes) gx[passing(p, j)] = gy[passing(p, j)];
    for (int64_t j = lane<Lanes>(); j < moved; j += Lanes) {
      const bool keep = kept(p, j);
      const LogScale<T> s = log_scale_at<kind>(p, raw[j * p.step], j);
      const T f = factor(T(load(x[p.start + j])), T(load(shift[j * p.step])), p.inverse), g = load(gy[p.start + j]);
      const Grad<T> out_grad =
          grad(g, glogdet[p.by_element ? j : 0], f, scale<kind>(s.value, p.inverse), s.derivative, p.inverse);
      store(gx[p.start + j], keep ? g : out_grad.x);
      store(graw[j * p.gstep], keep ? T(0) : out_grad.raw);
      store(gshift[j * p.gstep], keep ? T(0) : out_grad.shift);
    }
  }
}

template <Kind kind, class Out>
void launch(const Problem& given, const Out& given_out, void* stream) {
  const Problem p = arranged(given, 128);
  const Out out = arranged(given_out, p);
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, 1024, [&](auto lanes, int blocks) {
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
