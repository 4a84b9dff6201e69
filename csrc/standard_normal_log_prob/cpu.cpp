#include "bindings.h"
#include "rows.h"
#include "standard_normal_log_prob/launch.h"
#include "standard_normal_log_prob/math.h"

namespace genfuse::standard_normal_log_prob::cpu {
namespace {

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  for (int64_t i = begin; i < end; ++i) {
    const S* z = element<S>(p.z, i * p.z_stride);
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < p.cols; ++j) squares += load(z[j]) * load(z[j]);
    const T logdet = out.logdet ? *element<T>(out.logdet, i) : T(0);
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

#define GENFUSE_ROWS(S)                                                                          \
  GENFUSE_SIMD void rows(S, const Problem& p, const Forward& out, int64_t begin, int64_t end) {  \
    rows_of<S>(p, out, begin, end);                                                              \
  }                                                                                              \
  GENFUSE_SIMD void rows(S, const Problem& p, const Backward& out, int64_t begin, int64_t end) { \
    rows_of<S>(p, out, begin, end);                                                              \
  }
GENFUSE_ROWS(float)
GENFUSE_ROWS(double)
GENFUSE_ROWS(Half)
GENFUSE_ROWS(BFloat16)
#undef GENFUSE_ROWS

template <class Out>
void run_rows(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

}  // namespace

void run(const Problem& p, const Forward& out) { run_rows(p, out); }
void run(const Problem& p, const Backward& out) { run_rows(p, out); }

}  // namespace genfuse::standard_normal_log_prob::cpu

namespace genfuse {

void bind_standard_normal_log_prob(pybind11::module_& m) {
  using namespace standard_normal_log_prob;
  m.def("standard_normal_log_prob", [](int dtype, Address z, int64_t z_stride, int64_t rows, int64_t cols,
                                       Address logdet, Address log_prob, int device, Address stream) {
    const Problem p{dtype, at<void>(z), z_stride, rows, cols};
    GENFUSE_RUN(p, (Forward{at<void>(logdet), at<void>(log_prob)}), device, stream);
  });
  m.def("standard_normal_log_prob_backward", [](int dtype, Address z, int64_t z_stride, int64_t rows, int64_t cols,
                                                Address g, Address gz, int device, Address stream) {
    const Problem p{dtype, at<void>(z), z_stride, rows, cols};
    GENFUSE_RUN(p, (Backward{at<void>(g), at<void>(gz)}), device, stream);
  });
}

}  // namespace genfuse
