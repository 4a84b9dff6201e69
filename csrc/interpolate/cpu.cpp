#include "bindings.h"
#include "interpolate/launch.h"
#include "interpolate/math.h"
#include "noise.h"

namespace genfuse::interpolate {
namespace {

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T, Uniform<T>> stream(p.seed ? *p.seed : 0, end - begin);
  for (int64_t i = begin; i < end; ++i) {
    const T eps = p.epsilon ? *element<T>(p.epsilon, i) : *stream.at(i, 1);
    const S *real = element<S>(p.real, i * p.real_stride), *fake = element<S>(p.fake, i * p.fake_stride);
    S* x = element<S>(out.x, i * p.cols);
    if (p.real && p.fake) {
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(load(real[j])), T(load(fake[j])), eps));
    } else if (p.real) {
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(load(real[j])), T(0), eps));
    } else {
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(0), T(load(fake[j])), eps));
    }
  }
}
GENFUSE_SIMD_LOOPS(rows, Forward, rows_of<S>)

}  // namespace

void run_cpu(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  define(m, "interpolate",
         fields(&P::dtype, &P::real, &P::real_stride, &P::fake, &P::fake_stride, &P::seed, &P::epsilon, &P::rows,
                &P::cols),
         fields(&Forward::x));
}

}  // namespace genfuse::interpolate
