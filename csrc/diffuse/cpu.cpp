#include "bindings.h"
#include "diffuse/launch.h"
#include "diffuse/math.h"
#include "noise.h"

namespace genfuse::diffuse {
namespace {

// Blocks of elements, whatever rows they belong to: so no noise is made for nothing, and a few large images are work
// for all threads.
template <Target kind, class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T> stream(p.seed ? *p.seed : 0, kBlock);
  T x0_buffer[kBlock], eps_buffer[kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, last = std::min(first + kBlock, p.rows * p.cols);
    const T* eps = eps_at<S>(p.noise, stream, first, last - first, eps_buffer);
    for (int64_t i = first, row = first / p.cols; i < last; ++row) {
      const int64_t column = i - row * p.cols, n = std::min(last - i, p.cols - column);
      const T alpha = *element<T>(out.alpha, row), sigma = *element<T>(out.sigma, row);
      const T* x0 = read(element<S>(p.x0, row * p.x0_stride + column), n, x0_buffer);
      S *x_t = element<S>(out.x_t, i), *to = element<S>(out.target, i);
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        store(x_t[j], sample(x0[j], eps[j], alpha, sigma));
        if constexpr (kind != Target::x0) store(to[j], target<kind>(x0[j], eps[j], alpha, sigma));
      }
      i += n;
      eps += n;
    }
  }
}

template <bool is_v, class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T> stream(p.seed ? *p.seed : 0, p.cols < kBlock ? std::min((end - begin) * p.cols, kBlock) : 0);
  T x0_buffer[kBlock], eps_buffer[kBlock], gx_t_buffer[kBlock], gv_buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    double galpha = 0, gsigma = 0;  // of blocks
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
      const int64_t n = std::min(kBlock, p.cols - j0), first = i * p.cols + j0;
      const T* eps = eps_at<S>(p.noise, stream, first, n, eps_buffer);
      const T* x0 = read(element<S>(p.x0, i * p.x0_stride + j0), n, x0_buffer);
      const T* gx_t = read(element<S>(out.gx_t, first), n, gx_t_buffer);
      const T* gv = is_v ? read(element<S>(out.gv, first), n, gv_buffer) : nullptr;
      T of_alpha = 0, of_sigma = 0;  // a long sum would lose digits
#pragma omp simd reduction(+ : of_alpha, of_sigma)
      for (int64_t j = 0; j < n; ++j) {
        const Grad<T> g = grad<is_v>(gx_t[j], is_v ? gv[j] : T(0), x0[j], eps[j]);
        of_alpha += g.alpha;
        of_sigma += g.sigma;
      }
      galpha += of_alpha, gsigma += of_sigma;
    }
    *element<T>(out.galpha, i) = T(galpha);
    *element<T>(out.gsigma, i) = T(gsigma);
  }
}

// Each target has loops of its own: one that decided for itself would not be vectorised.
template <class S>
GENFUSE_HD void of_target(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  switch (Target(out.kind)) {
    case Target::x0: return rows_of<Target::x0, S>(p, out, begin, end);
    case Target::noise: return rows_of<Target::noise, S>(p, out, begin, end);
    case Target::v: return rows_of<Target::v, S>(p, out, begin, end);
    case Target::velocity: return rows_of<Target::velocity, S>(p, out, begin, end);
  }
}
template <class S>
GENFUSE_HD void of_target(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  out.gv ? rows_of<true, S>(p, out, begin, end) : rows_of<false, S>(p, out, begin, end);
}
GENFUSE_SIMD_LOOPS(rows, Forward, of_target<S>)
GENFUSE_SIMD_LOOPS(rows, Backward, of_target<S>)

}  // namespace

void run_cpu(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_blocks(p.rows * p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void run_cpu(const Problem& p, const Backward& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem = fields(&P::dtype, &P::x0, &P::x0_stride, &P::seed, &P::noise, &P::rows, &P::cols, &P::partial);
  define(m, "diffuse", problem,
         fields(&Forward::kind, &Forward::alpha, &Forward::sigma, &Forward::x_t, &Forward::target));
  using B = Backward;
  define(m, "diffuse_backward", problem, fields(&B::gx_t, &B::gv, &B::galpha, &B::gsigma));
}

}  // namespace genfuse::diffuse
