#include "gradient_norm_penalty/launch.h"
#include "gradient_norm_penalty/math.h"
#include "rows.cuh"

namespace genfuse::gradient_norm_penalty {

template <class T>
__device__ Penalty<T> penalty_of(const Problem& p) {
  return {T(p.target), T(p.eps), p.one_sided};
}

template <class T>
__device__ void finish(const Problem& p, const Forward& out, int64_t row, const T (&squares)[1]) {
  const T norm = sqrt(squares[0]);
  static_cast<T*>(out.norm)[row] = norm;
  if (!p.summed) static_cast<T*>(out.penalty)[row] = penalty_of<T>(p).value(norm);
}

// Keeps <g, v> where the first piece's was: what blocks need who share a row.
template <class T>
__device__ void finish(const Problem& p, const DoubleBackward&, int64_t row, const T (&dot)[1]) {
  static_cast<T*>(p.partial)[row] = dot[0];
}

namespace {

// Of the penalty of one example.
template <class T>
__device__ T gpenalty_of(const Problem& p, const void* gpenalty, int64_t row) {
  return T(p.weight) * static_cast<const T*>(gpenalty)[p.summed ? 0 : row];
}

// What a lane adds to <a, b>.
template <class S>
__device__ compute_t<S> dot_of(const Problem& p, const S* a, const S* b) {
  compute_t<S> dot = 0;
  for (auto at = columns<S>(p.cols, a, b); at; ++at) {
    const auto of_a = at.load(a), of_b = at.load(b);
    GENFUSE_UNROLL(at.kWidth)
    for (int k = 0; k < at.kWidth; ++k) dot += of_a[k] * of_b[k];
  }
  return dot;
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResident<S>) kernel(Problem p, Forward out) {
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* g = static_cast<const S*>(p.gradient) + row * p.stride;
    compute_t<S> squares[1] = {dot_of(p, g, g)};
    finish_row(p, out, row, squares);
  }
}

// One block, so that the sum is the same in every run, as large as there are, and with some rows a thread at a time. It
// ends the rows that blocks share, too.
constexpr int kSumThreads = 1024, kSumRows = 4;
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(Problem p, Forward out) {
  T* norms = static_cast<T*>(out.norm);
  double sum = 0;
  for (int64_t first = threadIdx.x; first < p.rows; first += kSumRows * kSumThreads) {
    T norm[kSumRows];
    GENFUSE_UNROLL(kSumRows)
    for (int k = 0; k < kSumRows; ++k) {
      const int64_t row = first + k * kSumThreads;
      if (row >= p.rows) continue;
      norm[k] = p.partial ? sqrt(sum_of_pieces<1, T>(p.partial, p.rows, row)) : norms[row];
    }
    GENFUSE_UNROLL(kSumRows)
    for (int k = 0; k < kSumRows; ++k) {
      const int64_t row = first + k * kSumThreads;
      if (row >= p.rows) continue;
      if (p.partial) norms[row] = norm[k];
      sum += penalty_of<T>(p).value(norm[k]);
    }
  }
  sum = row_sum(sum, kSumThreads, threadIdx.x);
  if (threadIdx.x == 0) *static_cast<T*>(out.penalty) = T(p.weight * sum);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResident<S>) kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* g_row = static_cast<const S*>(p.gradient) + row * p.stride;
    S* ggradient = static_cast<S*>(out.ggradient) + row * p.cols;
    const T norm = static_cast<const T*>(out.norm)[row];
    const T slope = gpenalty_of<T>(p, out.gpenalty, row) * penalty_of<T>(p).slope(norm);
    for (auto at = columns<S>(p.cols, g_row, ggradient); at; ++at) {
      const auto g = at.load(g_row);
      at.store(ggradient, [&](int k) { return slope * g[k]; });
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResident<S>) dot_kernel(Problem p, DoubleBackward out) {
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* g = static_cast<const S*>(p.gradient) + row * p.stride;
    compute_t<S> dot[1] = {dot_of(p, g, static_cast<const S*>(out.v) + row * out.v_stride)};
    finish_row(p, out, row, dot);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResident<S>) kernel(Problem p, DoubleBackward out) {
  using T = compute_t<S>;
  const Penalty<T> penalty = penalty_of<T>(p);
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* g_row = static_cast<const S*>(p.gradient) + row * p.stride;
    const S* v_row = static_cast<const S*>(out.v) + row * out.v_stride;
    S* of_gradient = static_cast<S*>(out.of_gradient) + row * p.cols;
    const T dot = p.partial ? static_cast<const T*>(p.partial)[row] : row_sum(dot_of(p, g_row, v_row));
    const T norm = static_cast<const T*>(out.norm)[row], gpenalty = gpenalty_of<T>(p, out.gpenalty, row);
    if (threadIdx.x + blockIdx.y == 0) {
      static_cast<T*>(out.of_gpenalty)[row] = T(p.weight) * penalty.slope(norm) * dot;
    }
    const T slope = gpenalty * penalty.slope(norm), bend = gpenalty * penalty.bend(norm, dot);
    for (auto at = columns<S>(p.cols, g_row, v_row, of_gradient); at; ++at) {
      const auto g = at.load(g_row), v = at.load(v_row);
      at.store(of_gradient, [&](int k) { return slope * v[k] + bend * g[k]; });
    }
  }
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  const auto of = [](auto s) -> Kernel<Problem, Forward> { return kernel<decltype(s)>; };
  if (!p.summed) return run_sums<1>(p, out, stream, of);
  run_columns(p, out, stream, of, p.partial ? pieces_for(p.rows) : 1);
  dispatch(p.dtype, [&](auto storage) {
    sum_kernel<compute_t<decltype(storage)>><<<1, kSumThreads, 0, cudaStream_t(stream)>>>(p, out);
  });
  check(cudaGetLastError());
}
void run_cuda(const Problem& p, const Backward& out, void* stream) {
  run_columns(p, out, stream, [](auto s) -> Kernel<Problem, Backward> { return kernel<decltype(s)>; });
}
void run_cuda(const Problem& p, const DoubleBackward& out, void* stream) {
  using Of = Kernel<Problem, DoubleBackward>;
  if (p.partial) run_sums<1>(p, out, stream, [](auto s) -> Of { return dot_kernel<decltype(s)>; });
  run_columns(p, out, stream, [](auto s) -> Of { return kernel<decltype(s)>; }, p.partial ? 0 : 1);
}

}  // namespace genfuse::gradient_norm_penalty
