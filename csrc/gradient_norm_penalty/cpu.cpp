#include "bindings.h"
#include "gradient_norm_penalty/launch.h"
#include "gradient_norm_penalty/math.h"
#include "rows.h"

namespace genfuse::gradient_norm_penalty {
namespace {

template <class T>
GENFUSE_HD Penalty<T> penalty_of(const Problem& p) {
  return {T(p.target), T(p.eps), p.one_sided};
}

template <class S>
GENFUSE_HD bool past_caches(const Problem& p) {
  return p.rows * p.cols * int64_t(sizeof(S)) > kCached;
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const Penalty<T> penalty = penalty_of<T>(p);
  for (int64_t i = begin; i < end; ++i) {
    const S* g = element<S>(p.gradient, i * p.stride);
    const T norm = std::sqrt(dot(g, g, p.cols));
    *element<T>(out.norm, i) = norm;
    if (!p.summed) *element<T>(out.penalty, i) = penalty.value(norm);
  }
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const Penalty<T> penalty = penalty_of<T>(p);
  for (int64_t i = begin; i < end; ++i) {
    const S* g = element<S>(p.gradient, i * p.stride);
    S* ggradient = element<S>(out.ggradient, i * p.cols);
    const T gpenalty = T(p.weight) * *element<T>(out.gpenalty, p.summed ? 0 : i);
    const T slope = gpenalty * penalty.slope(*element<T>(out.norm, i));
    write(ggradient, p.cols, past_caches<S>(p), [=](int64_t j) { return slope * load(g[j]); });
  }
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const DoubleBackward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const Penalty<T> penalty = penalty_of<T>(p);
  for (int64_t i = begin; i < end; ++i) {
    const S *g = element<S>(p.gradient, i * p.stride), *v = element<S>(out.v, i * out.v_stride);
    S* of_gradient = element<S>(out.of_gradient, i * p.cols);
    const T gpenalty = T(p.weight) * *element<T>(out.gpenalty, p.summed ? 0 : i);
    const T norm = *element<T>(out.norm, i), along = dot(g, v, p.cols);
    *element<T>(out.of_gpenalty, i) = T(p.weight) * penalty.slope(norm) * along;
    const T slope = gpenalty * penalty.slope(norm), bend = gpenalty * penalty.bend(norm, along);
    write(of_gradient, p.cols, past_caches<S>(p), [=](int64_t j) { return slope * load(v[j]) + bend * load(g[j]); });
  }
}
GENFUSE_SIMD_LOOPS(rows, Forward, rows_of<S>)
GENFUSE_SIMD_LOOPS(rows, Backward, rows_of<S>)
GENFUSE_SIMD_LOOPS(rows, DoubleBackward, rows_of<S>)

}  // namespace

void run_cpu(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    using T = compute_t<decltype(storage)>;
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
    if (!p.summed) return;
    double sum = 0;
    for (int64_t i = 0; i < p.rows; ++i) sum += penalty_of<T>(p).value(*element<T>(out.norm, i));
    *element<T>(out.penalty, 0) = T(p.weight * sum);
  });
}

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows_again(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem = fields(&P::dtype, &P::gradient, &P::stride, &P::rows, &P::cols, &P::target, &P::eps, &P::weight,
                              &P::one_sided, &P::summed, &P::partial);
  define(m, "gradient_norm_penalty", problem, fields(&Forward::penalty, &Forward::norm));
  using B = Backward;
  define(m, "gradient_norm_penalty_backward", problem, fields(&B::gpenalty, &B::norm, &B::ggradient));
  using D = DoubleBackward;
  define(m, "gradient_norm_penalty_double_backward", problem,
         fields(&D::gpenalty, &D::norm, &D::v, &D::v_stride, &D::of_gpenalty, &D::of_gradient));
}

}  // namespace genfuse::gradient_norm_penalty
