#include "actnorm/launch.h"
#include "affine_coupling/math.h"  // of which this is the case that all examples share their parameters
#include "bindings.h"
#include "rows.h"

namespace genfuse::actnorm {
namespace {

using namespace affine_coupling;

// Calls f(channel, first, last) for the stretches of the columns [j0, j0 + n) that have one channel each, counted from
// j0.
template <class F>
GENFUSE_HD void for_channels(const Problem& p, int64_t j0, int64_t n, F f) {
  for (int64_t j = 0, c = j0 / p.cells; j < n; ++c) {
    const int64_t last = std::min(n, (c + 1) * p.cells - j0);
    f(c, j, last);
    j = last;
  }
}

// Scale and shift of every column of a block.
template <bool inverse, class T>
struct Parameters {
  T scales[kBlock], shifts[kBlock];

  GENFUSE_HD void fill(const Problem& p, int64_t j0, int64_t n) {
    const T *log_scale = element<T>(p.log_scale, 0), *shift = element<T>(p.shift, 0);
    for_channels(p, j0, n, [&](int64_t c, int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        scales[j] = log_scale[c];
        shifts[j] = shift[c];
      }
    });
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scales[j] = scale<Kind::exp>(scales[j], inverse);
  }
};

template <bool inverse, class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const int64_t cols = p.channels * p.cells;
  T x_buffer[kBlock];
  Parameters<inverse, T> of;
  for (int64_t j0 = 0; j0 < cols; j0 += kBlock) {
    const int64_t n = std::min(kBlock, cols - j0);
    of.fill(p, j0, n);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = read(element<S>(p.x, i * p.x_stride + j0), n, x_buffer);
      S* y = element<S>(out.y, i * cols + j0);
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        store(y[j], apply(factor(x[j], of.shifts[j], inverse), of.scales[j], of.shifts[j], inverse));
      }
    }
  }
}

// The examples of one chunk.
template <bool inverse, class S>
GENFUSE_HD void chunk_of(const Problem& p, const Backward& out, int64_t chunk) {
  using T = compute_t<S>;
  const int64_t cols = p.channels * p.cells, begin = p.rows * chunk / out.chunks,
                end = p.rows * (chunk + 1) / out.chunks;
  double *partial_scale = out.partial + chunk * sums_of(p), *partial_shift = partial_scale + p.channels;
  std::fill_n(partial_scale, sums_of(p), 0.);
  const T* glogdet = element<T>(out.glogdet, 0);
  double& logdets = partial_scale[2 * p.channels];
  for (int64_t i = begin; i < end; ++i) logdets += glogdet[i];
  T x_buffer[kBlock], gy_buffer[kBlock];
  double scale_sums[kBlock], shift_sums[kBlock];
  Parameters<inverse, T> of;
  for (int64_t j0 = 0; j0 < cols; j0 += kBlock) {
    const int64_t n = std::min(kBlock, cols - j0);
    of.fill(p, j0, n);
    std::fill_n(scale_sums, n, 0.);
    std::fill_n(shift_sums, n, 0.);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = read(element<S>(p.x, i * p.x_stride + j0), n, x_buffer);
      const T* gy = read(element<S>(out.gy, i * cols + j0), n, gy_buffer);
      S* gx = element<S>(out.gx, i * cols + j0);
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        const Grad<T> g = grad(gy[j], T(0), factor(x[j], of.shifts[j], inverse), of.scales[j], T(1), inverse);
        store(gx[j], g.x);
        scale_sums[j] += g.raw;
        shift_sums[j] += g.shift;
      }
    }
    for_channels(p, j0, n, [&](int64_t c, int64_t first, int64_t last) {
      double of_scale = 0, of_shift = 0;
#pragma omp simd reduction(+ : of_scale, of_shift)
      for (int64_t j = first; j < last; ++j) {
        of_scale += scale_sums[j];
        of_shift += shift_sums[j];
      }
      partial_scale[c] += of_scale;
      partial_shift[c] += of_shift;
    });
  }
}

template <class S>
GENFUSE_HD void either_way(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  p.inverse ? rows_of<true, S>(p, out, begin, end) : rows_of<false, S>(p, out, begin, end);
}
template <class S>
GENFUSE_HD void either_way(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    p.inverse ? chunk_of<true, S>(p, out, chunk) : chunk_of<false, S>(p, out, chunk);
  }
}
GENFUSE_SIMD_LOOPS(rows, Forward, either_way<S>)
GENFUSE_SIMD_LOOPS(rows, Backward, either_way<S>)

}  // namespace

void run_cpu(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    using T = compute_t<decltype(storage)>;
    double sum = 0;
    for (int64_t c = 0; c < p.channels; ++c) sum += *element<T>(p.log_scale, c);
    std::fill_n(element<T>(out.logdet, 0), p.rows, T(double(p.cells) * (p.inverse ? -sum : sum)));
    for_rows(p.rows, p.channels * p.cells, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void run_cpu(const Problem& p, const Backward& out) {
  dispatch(p.dtype, [&](auto storage) {
    using T = compute_t<decltype(storage)>;
    const int64_t work = out.chunks ? p.rows / out.chunks * p.channels * p.cells : 0;
    for_rows(out.chunks, work, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
    const int64_t sums = sums_of(p);
    for (int64_t chunk = 1; chunk < out.chunks; ++chunk) {
      for (int64_t c = 0; c < sums; ++c) out.partial[c] += out.partial[chunk * sums + c];
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      *element<T>(out.glog_scale, c) = out.chunks ? T(out.partial[c] + of_logdet(p, out.partial[sums - 1])) : T(0);
      *element<T>(out.gshift, c) = out.chunks ? T(out.partial[p.channels + c]) : T(0);
    }
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem =
      fields(&P::dtype, &P::inverse, &P::x, &P::x_stride, &P::log_scale, &P::shift, &P::rows, &P::channels, &P::cells);
  define(m, "actnorm", problem, fields(&Forward::y, &Forward::logdet));
  using B = Backward;
  define(m, "actnorm_backward", problem,
         fields(&B::gy, &B::glogdet, &B::chunks, &B::partial, &B::gx, &B::glog_scale, &B::gshift));
}

}  // namespace genfuse::actnorm
