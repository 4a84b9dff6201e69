#include "bindings.h"
#include "gradient_norm_penalty/launch.h"
#include "gradient_norm_penalty/math.h"
#include "rows.h"

namespace genfuse::gradient_norm_penalty::cpu {
namespace {

template <class T>
GENFUSE_HD Penalty<T> penalty_of(const Problem& p) {
  return {T(p.target), T(p.eps), p.one_sided};
}

// In blocks, whose sums are added up: a long sum would lose digits.
template <class S, class T = compute_t<S>>
GENFUSE_HD T dot(const S* a, const S* b, int64_t n) {
  T sum = 0;
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    T part = 0;
    const int64_t end = std::min(j0 + kBlock, n);
#pragma omp simd reduction(+ : part)
    for (int64_t j = j0; j < end; ++j) part += load(a[j]) * load(b[j]);
    sum += part;
  }
  return sum;
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

#define GENFUSE_ROWS(S)                                                                                \
  GENFUSE_SIMD void rows(S, const Problem& p, const Forward& out, int64_t begin, int64_t end) {        \
    rows_of<S>(p, out, begin, end);                                                                    \
  }                                                                                                    \
  GENFUSE_SIMD void rows(S, const Problem& p, const Backward& out, int64_t begin, int64_t end) {       \
    rows_of<S>(p, out, begin, end);                                                                    \
  }                                                                                                    \
  GENFUSE_SIMD void rows(S, const Problem& p, const DoubleBackward& out, int64_t begin, int64_t end) { \
    rows_of<S>(p, out, begin, end);                                                                    \
  }
GENFUSE_ROWS(float)
GENFUSE_ROWS(double)
GENFUSE_ROWS(Half)
GENFUSE_ROWS(BFloat16)
#undef GENFUSE_ROWS

template <class Out>
void run_again(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows_again(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

}  // namespace

void run(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    using T = compute_t<decltype(storage)>;
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
    if (!p.summed) return;
    double sum = 0;
    for (int64_t i = 0; i < p.rows; ++i) sum += penalty_of<T>(p).value(*element<T>(out.norm, i));
    *element<T>(out.penalty, 0) = T(p.weight * sum);
  });
}
void run(const Problem& p, const Backward& out) { run_again(p, out); }
void run(const Problem& p, const DoubleBackward& out) { run_again(p, out); }

}  // namespace genfuse::gradient_norm_penalty::cpu

namespace genfuse {

void bind_gradient_norm_penalty(pybind11::module_& m) {
  using namespace gradient_norm_penalty;
  m.def("gradient_norm_penalty",
        [](int dtype, Address gradient, int64_t stride, int64_t rows, int64_t cols, double target, double eps,
           double weight, bool one_sided, bool summed, Address penalty, Address norm, int device, Address stream) {
          const Problem p{dtype, at<void>(gradient), stride, rows, cols, target, eps, weight, one_sided, summed};
          GENFUSE_RUN(p, (Forward{at<void>(penalty), at<void>(norm)}), device, stream);
        });
  m.def("gradient_norm_penalty_backward",
        [](int dtype, Address gradient, int64_t stride, int64_t rows, int64_t cols, double target, double eps,
           double weight, bool one_sided, bool summed, Address gpenalty, Address norm, Address ggradient, int device,
           Address stream) {
          const Problem p{dtype, at<void>(gradient), stride, rows, cols, target, eps, weight, one_sided, summed};
          GENFUSE_RUN(p, (Backward{at<void>(gpenalty), at<void>(norm), at<void>(ggradient)}), device, stream);
        });
  m.def("gradient_norm_penalty_double_backward",
        [](int dtype, Address gradient, int64_t stride, int64_t rows, int64_t cols, double target, double eps,
           double weight, bool one_sided, bool summed, Address gpenalty, Address norm, Address v, int64_t v_stride,
           Address of_gpenalty, Address of_gradient, int device, Address stream) {
          const Problem p{dtype, at<void>(gradient), stride, rows, cols, target, eps, weight, one_sided, summed};
          const DoubleBackward out{at<void>(gpenalty), at<void>(norm),        at<void>(v),
                                   v_stride,           at<void>(of_gpenalty), at<void>(of_gradient)};
          GENFUSE_RUN(p, out, device, stream);
        });
}

}  // namespace genfuse
