#include "bindings.h"
#include "rows.h"
#include "standard_normal_log_prob/launch.h"
#include "standard_normal_log_prob/math.h"

namespace genfuse::standard_normal_log_prob {
namespace {

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  for (int64_t i = begin; i < end; ++i) {
    const S* z = element<S>(p.z, i * p.z_stride);
    const T squares = dot(z, z, p.cols);
    const T logdet = p.logdet ? *element<T>(p.logdet, i) : T(0);
    *element<T>(out.log_prob, i) = log_prob(squares, T(p.cols), logdet);
  }
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  for (int64_t i = begin; i < end; ++i) {
    const S* z = element<S>(p.z, i * p.z_stride);
    S* gz = element<S>(out.gz, i * p.cols);
    const T g = *element<T>(out.g, i);
#pragma omp simd
    for (int64_t j = 0; j < p.cols; ++j) store(gz[j], grad(g, T(load(z[j]))));
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
  const auto problem = fields(&P::dtype, &P::z, &P::z_stride, &P::rows, &P::cols, &P::logdet, &P::partial);
  define(m, "standard_normal_log_prob", problem, fields(&Forward::log_prob));
  using B = Backward;
  define(m, "standard_normal_log_prob_backward", problem, fields(&B::g, &B::gz));
}

}  // namespace genfuse::standard_normal_log_prob
