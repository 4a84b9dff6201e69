#include "gradient_norm_penalty/launch.h"
#include "gradient_norm_penalty/math.h"
#include "rows.cuh"

namespace genfuse::gradient_norm_penalty {
namespace {

template <class T>
__device__ Penalty<T> penalty_of(const Problem& p) {
  return {T(p.target), T(p.eps), p.one_sided};
}

// Of the penalty of one example.
template <class T>
__device__ T gpenalty_of(const Problem& p, const void* gpenalty, int64_t row) {
  return T(p.weight) * static_cast<const T*>(gpenalty)[p.summed ? 0 : row];
}

// row_sum for all lanes of a row.
template <int Lanes, class T>
__device__ T row_total(T sum) {
  sum = row_sum<Lanes>(sum);
  if constexpr (Lanes == 32) {
    return __shfl_sync(~0u, sum, 0);
  } else {
    __shared__ T total;
    if (threadIdx.x == 0) total = sum;
    __syncthreads();  // and row_sum waits before the next row's total is written
    return total;
  }
}

template <int Lanes, class S>
__global__ void kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* g = static_cast<const S*>(p.gradient) + row * p.stride;
    T squares = 0;
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) {
      const T value = load(g[j]);
      squares += value * value;
    }
    squares = row_sum<Lanes>(squares);
    if (lane<Lanes>() == 0) {
      const T norm = sqrt(squares);
      static_cast<T*>(out.norm)[row] = norm;
      if (!p.summed) static_cast<T*>(out.penalty)[row] = penalty_of<T>(p).value(norm);
    }
  }
}

// One block, so that the sum is the same in every run.
template <class T>
__global__ void sum_kernel(Problem p, Forward out) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kThreads) {
    sum += penalty_of<T>(p).value(static_cast<const T*>(out.norm)[row]);
  }
  sum = row_sum<kThreads>(sum);
  if (threadIdx.x == 0) *static_cast<T*>(out.penalty) = T(p.weight * sum);
}

template <int Lanes, class S>
__global__ void kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* g = static_cast<const S*>(p.gradient) + row * p.stride;
    S* ggradient = static_cast<S*>(out.ggradient) + row * p.cols;
    const T norm = static_cast<const T*>(out.norm)[row];
    const T slope = gpenalty_of<T>(p, out.gpenalty, row) * penalty_of<T>(p).slope(norm);
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) store(ggradient[j], slope * load(g[j]));
  }
}

template <int Lanes, class S>
__global__ void kernel(Problem p, DoubleBackward out) {
  using T = compute_t<S>;
  const Penalty<T> penalty = penalty_of<T>(p);
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* g = static_cast<const S*>(p.gradient) + row * p.stride;
    const S* v = static_cast<const S*>(out.v) + row * out.v_stride;
    S* of_gradient = static_cast<S*>(out.of_gradient) + row * p.cols;
    T dot = 0;
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) dot += T(load(g[j])) * T(load(v[j]));
    dot = row_total<Lanes>(dot);
    const T norm = static_cast<const T*>(out.norm)[row], gpenalty = gpenalty_of<T>(p, out.gpenalty, row);
    if (lane<Lanes>() == 0) static_cast<T*>(out.of_gpenalty)[row] = T(p.weight) * penalty.slope(norm) * dot;
    const T slope = gpenalty * penalty.slope(norm), bend = gpenalty * penalty.bend(norm, dot);
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) {
      store(of_gradient[j], slope * T(load(v[j])) + bend * T(load(g[j])));
    }
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

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  run_rows(p, out, stream);
  if (!p.summed) return;
  dispatch(p.dtype, [&](auto storage) {
    sum_kernel<compute_t<decltype(storage)>><<<1, kThreads, 0, cudaStream_t(stream)>>>(p, out);
  });
  check(cudaGetLastError());
}
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const DoubleBackward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::gradient_norm_penalty
