#include "rows.cuh"
#include "standard_normal_log_prob/launch.h"
#include "standard_normal_log_prob/math.h"

namespace genfuse::standard_normal_log_prob {

template <class T>
__device__ void finish(const Problem& p, const Forward& out, int64_t row, const T (&squares)[1]) {
  const T logdet = p.logdet ? static_cast<const T*>(p.logdet)[row] : T(0);
  static_cast<T*>(out.log_prob)[row] = log_prob(squares[0], T(p.cols), logdet);
}

namespace {

template <class S>
__global__ void __launch_bounds__(kThreads, kResident) kernel(Problem p, Forward out) {
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* z_row = static_cast<const S*>(p.z) + row * p.z_stride;
    compute_t<S> squares[1] = {};
    for (auto at = columns<S>(p.cols, z_row); at; ++at) {
      const auto z = at.load(z_row);
      GENFUSE_UNROLL(at.kWidth)
      for (int k = 0; k < at.kWidth; ++k) squares[0] += z[k] * z[k];
    }
    finish_row(p, out, row, squares);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResident) kernel(Problem p, Backward out) {
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* z_row = static_cast<const S*>(p.z) + row * p.z_stride;
    S* gz_row = static_cast<S*>(out.gz) + row * p.cols;
    const auto g = static_cast<const compute_t<S>*>(out.g)[row];
    for (auto at = columns<S>(p.cols, z_row, gz_row); at; ++at) {
      const auto z = at.load(z_row);
      at.store(gz_row, [&](int k) { return grad(g, z[k]); });
    }
  }
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  run_sums<1>(p, out, stream, [](auto s) -> Kernel<Problem, Forward> { return kernel<decltype(s)>; });
}
void run_cuda(const Problem& p, const Backward& out, void* stream) {
  run_columns(p, out, stream, [](auto s) -> Kernel<Problem, Backward> { return kernel<decltype(s)>; });
}

}  // namespace genfuse::standard_normal_log_prob
