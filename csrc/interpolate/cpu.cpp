#include "bindings.h"
#include "interpolate/launch.h"
#include "interpolate/math.h"
#include "noise.h"

namespace genfuse::interpolate {
namespace {

template <class T>
using Stream = Noise<T, Uniform<T>>;
template <class T>
GENFUSE_HD T eps_of(const Problem& p, Stream<T>& stream, int64_t row) {
  return p.epsilon ? *element<T>(p.epsilon, row) : *stream.at(row, 1);
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Stream<T> stream(p.seed ? *p.seed : 0, end - begin);
  for (int64_t i = begin; i < end; ++i) {
    const T eps = eps_of(p, stream, i);
    const S *real = element<S>(out.real, i * out.real_stride), *fake = element<S>(out.fake, i * out.fake_stride);
    S* x = element<S>(out.x, i * p.cols);
    GENFUSE_INDEPENDENT
    for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(load(real[j])), T(load(fake[j])), eps));
  }
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Stream<T> stream(p.seed ? *p.seed : 0, end - begin);
  for (int64_t i = begin; i < end; ++i) {
    const T eps = eps_of(p, stream, i);
    const S* g = element<S>(out.g, i * p.cols);
    S *greal = element<S>(out.greal, i * p.cols), *gfake = element<S>(out.gfake, i * p.cols);
    GENFUSE_INDEPENDENT
    for (int64_t j = 0; j < p.cols; ++j) {
      const Grad<T> of = grad(T(load(g[j])), eps);
      store(greal[j], of.real);
      store(gfake[j], of.fake);
    }
  }
}
GENFUSE_SIMD_LOOPS(rows, Forward, rows_of<S>)
GENFUSE_SIMD_LOOPS(rows, Backward, rows_of<S>)

}  // namespace

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem = fields(&P::dtype, &P::seed, &P::epsilon, &P::rows, &P::cols);
  using F = Forward;
  define(m, "interpolate", problem, fields(&F::real, &F::real_stride, &F::fake, &F::fake_stride, &F::x));
  define(m, "interpolate_backward", problem, fields(&Backward::g, &Backward::greal, &Backward::gfake));
}

}  // namespace genfuse::interpolate
