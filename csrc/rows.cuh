#pragma once
// What kernels that walk over rows share: the shape of a launch, and the sum of a row.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace genfuse {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;  // of a grid that strides over its work

// A block of kThreads serves kThreads / Lanes rows; the grid strides over the rows, of which there may be any number.
template <int Lanes>
int blocks_for(int64_t rows) {
  constexpr int64_t per_block = kThreads / Lanes;
  return int(std::min((rows + per_block - 1) / per_block, kMostBlocks));
}

template <int Lanes>
__device__ int lane() {
  return threadIdx.x % Lanes;
}
template <int Lanes>
__device__ int64_t first_row() {
  return int64_t(blockIdx.x) * (kThreads / Lanes) + threadIdx.x / Lanes;
}
template <int Lanes>
__device__ int64_t row_step() {
  return int64_t(gridDim.x) * (kThreads / Lanes);
}

// The sum over the lanes of a row, valid in lane 0. All lanes of a row call it together.
template <int Lanes, class T>
__device__ T row_sum(T sum) {
  static_assert(Lanes == 32 || Lanes == kThreads, "a row is a warp's or a block's");
  for (int d = 16; d; d >>= 1) sum += __shfl_down_sync(~0u, sum, d);
  if constexpr (Lanes > 32) {
    __shared__ T partial[Lanes / 32];
    __syncthreads();  // the previous row's partial sums have been read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
      sum = threadIdx.x < Lanes / 32 ? partial[threadIdx.x] : T(0);
      for (int d = Lanes / 64; d; d >>= 1) sum += __shfl_down_sync(~0u, sum, d);
    }
  }
  return sum;
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string message = std::string("genfuse: CUDA: ") + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message += "; the kernels were built for " GENFUSE_CUDA_ARCHITECTURES
               ": reinstall with CUDAARCHS set to this GPU's, or set GENFUSE_IMPL=triton";
  }
  throw std::runtime_error(message);
}

// Calls launch(blocks) for a grid of a thread for each piece of work. Here and below, for no work at all there is no
// launch: one of no blocks is an error.
template <class F>
void for_threads(int64_t work, F launch) {
  if (work == 0) return;
  launch(blocks_for<1>(work));
  check(cudaGetLastError());
}

// Calls launch(lanes, blocks), where `lanes` is a constant, for a grid of as many lanes for each row: of a warp, or of
// a block where a row has more than `most` columns.
template <class F>
void for_rows(int64_t rows, int64_t cols, int64_t most, F launch) {
  if (rows == 0) return;
  const auto with = [&](auto lanes) { launch(lanes, blocks_for<lanes>(rows)); };
  if (cols <= most) {
    with(std::integral_constant<int, 32>());
  } else {
    with(std::integral_constant<int, kThreads>());
  }
  check(cudaGetLastError());
}

}  // namespace genfuse
