#include "bernoulli_nll/launch.h"
#include "bernoulli_nll/math.h"
#include "bindings.h"
#include "rows.h"

namespace genfuse::bernoulli_nll {
namespace {

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  for (int64_t i = begin; i < end; ++i) {
    const S *logits = element<S>(p.logits, i * p.logits_stride), *x = element<S>(p.x, i * p.x_stride);
    double sum = 0;  // of blocks
    T terms[kBlock];
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
      const int64_t n = std::min(kBlock, p.cols - j0);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) terms[j] = nll(T(load(logits[j0 + j])), T(load(x[j0 + j])));
      sum += sum_of(terms, n);
    }
    *element<T>(out.nll, i) = T(sum);
  }
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  for (int64_t i = begin; i < end; ++i) {
    const S *logits = element<S>(p.logits, i * p.logits_stride), *x = element<S>(p.x, i * p.x_stride);
    S* glogits = element<S>(out.glogits, i * p.cols);
    const T g = *element<T>(out.g, i);
#pragma omp simd
    for (int64_t j = 0; j < p.cols; ++j) store(glogits[j], grad(g, T(load(logits[j])), T(load(x[j]))));
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
  const auto problem = fields(&P::dtype, &P::logits, &P::logits_stride, &P::x, &P::x_stride, &P::rows, &P::cols);
  define(m, "bernoulli_nll", problem, fields(&Forward::nll));
  define(m, "bernoulli_nll_backward", problem, fields(&Backward::g, &Backward::glogits));
}

}  // namespace genfuse::bernoulli_nll
