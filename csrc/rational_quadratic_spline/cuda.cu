#include "rational_quadratic_spline/coordinate.cuh"
#include "rows.cuh"

namespace genfuse::rational_quadratic_spline {
namespace {

using namespace cuda;

template <int Lanes, class S>
__global__ void kernel(Problem p, Constants<compute_t<S>> c, Forward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* params = static_cast<const S*>(p.params) + row * p.params_stride;
    T sum = 0;
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) {
      const T x = load(static_cast<const S*>(p.x)[row * p.x_stride + j]);
      const Coordinate<S> at(p, c, params + j * p.width(), x);
      const Value<T> v = p.inverse ? value<true>(x, at.folded, at.bin, c) : value<false>(x, at.folded, at.bin, c);
      store(static_cast<S*>(out.y)[row * p.cols + j], v.y);
      sum += v.logdet;
    }
    sum = row_sum<Lanes>(sum);
    if (lane<Lanes>() == 0) static_cast<T*>(out.logdet)[row] = sum;
  }
}

// From the gradients for a bin's corner and size on one axis, those for the raw parameters of the axis.
template <class S, class T>
__device__ void raw_gradients(const Softmax<S>& shares, const Axis<T>& axis, int64_t bin, const Picked<T>& picked,
                              T gknot, T gsize, S* to) {
  const T mean = gknot * picked.before + gsize * picked.here;
  for (int64_t k = 0; k < shares.bins; ++k) {
    const T g = k < bin ? gknot : (k == bin ? gsize : T(0));
    store(to[k], axis.raw(shares.share(k), g - mean));
  }
}

template <int Lanes, class S>
__global__ void kernel(Problem p, Constants<compute_t<S>> c, Backward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* params = static_cast<const S*>(p.params) + row * p.params_stride;
    const T glogdet = static_cast<const T*>(out.glogdet)[row];
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) {
      const int64_t i = row * p.cols + j, bins = p.bins;
      const T x = load(static_cast<const S*>(p.x)[row * p.x_stride + j]);
      const T gy = load(static_cast<const S*>(out.gy)[i]);
      const Coordinate<S> at(p, c, params + j * p.width(), x);
      const Grad<T> g =
          p.inverse ? grad<true>(gy, glogdet, at.folded, at.bin) : grad<false>(gy, glogdet, at.folded, at.bin);
      store(static_cast<S*>(out.gx)[i], g.gx);
      S* to = static_cast<S*>(out.gparams) + i * p.width();
      raw_gradients(at.widths, c.x, at.k, at.w, g.x, g.w, to);
      raw_gradients(at.heights, c.y, at.k, at.h, g.y, g.h, to + bins);
      const T gd0 = g.d0 * sigmoid(at.d0), gd1 = g.d1 * sigmoid(at.d1);
      const int64_t first = p.tails == kLinear ? 1 : 0, count = p.width() - 2 * bins;
      for (int64_t k = 0; k < count; ++k) {
        T gd = at.k == k + first ? gd0 : T(0);
        if (at.k + 1 == k + first || (p.tails == kCircular && k == 0 && at.k + 1 == bins)) gd += gd1;
        store(to[2 * bins + k], gd);
      }
    }
  }
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for_rows(p.rows, p.cols, 32 * 8, [&](auto lanes, int blocks) {
      kernel<lanes, S><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, Constants<compute_t<S>>(p), out);
    });
  });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::rational_quadratic_spline
