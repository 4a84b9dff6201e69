#include "rows.cuh"
#include "standard_normal_log_prob/launch.h"
#include "standard_normal_log_prob/math.h"

namespace genfuse::standard_normal_log_prob {
namespace {

template <int Lanes, class S>
__global__ void kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* z = static_cast<const S*>(p.z) + row * p.z_stride;
    T squares = 0;
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) {
      const T value = load(z[j]);
      squares += value * value;
    }
    squares = row_sum<Lanes>(squares);
    if (lane<Lanes>() == 0) {
      const T logdet = p.logdet ? static_cast<const T*>(p.logdet)[row] : T(0);
      static_cast<T*>(out.log_prob)[row] = log_prob(squares, T(p.cols), logdet);
    }
  }
}

template <int Lanes, class S>
__global__ void kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* z = static_cast<const S*>(p.z) + row * p.z_stride;
    S* gz = static_cast<S*>(out.gz) + row * p.cols;
    const T g = static_cast<const T*>(out.g)[row];
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) store(gz[j], grad(g, T(load(z[j]))));
  }
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, 1024, [&](auto lanes, int blocks) {
      kernel<lanes, decltype(storage)><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out);
    });
  });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::standard_normal_log_prob
