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

constexpr int kAtOnce = 4;  // rows that a lane has packs of in flight: short ones end before more of their own are

template <class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>) kernel(Problem p, Forward out) {
  constexpr int kWidth = kPack<S>;
  const int64_t step = int64_t(gridDim.y) * blockDim.x * kWidth;
  for (int64_t first = first_row(); first < p.rows; first += kAtOnce * row_step()) {
    compute_t<S> squares[kAtOnce][1] = {};
    for (int64_t j = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth; j < p.cols; j += step) {
      const Range range = {int(min(p.cols - j, int64_t(kWidth)))};
      Pack<S, kWidth> z[kAtOnce];
      GENFUSE_UNROLL(kAtOnce)
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t row = first + i * row_step();
        if (row < p.rows) z[i] = load_pack<kWidth>(static_cast<const S*>(p.z) + row * p.z_stride + j, range);
      }
      GENFUSE_UNROLL(kAtOnce)
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * row_step() >= p.rows) continue;
        GENFUSE_UNROLL(kWidth)
        for (int k = 0; k < kWidth; ++k) squares[i][0] += z[i][k] * z[i][k];
      }
    }
    GENFUSE_UNROLL(kAtOnce)
    for (int i = 0; i < kAtOnce; ++i) {
      if (const int64_t row = first + i * row_step(); row < p.rows) finish_row(p, out, row, squares[i]);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kResident<S>) kernel(Problem p, Backward out) {
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

// Rows of a few columns that do not end where 16 bytes do, a thread each: through shared memory, kTileRows of them.
constexpr int kTileRows = kThreads, kTileColumns = 32;

template <class S, class F>
__device__ void for_tiles(const Problem& p, F f) {
  S* const tile = dynamic_shared<S>();
  for (int64_t first = int64_t(blockIdx.x) * kTileRows; first < p.rows; first += int64_t(gridDim.x) * kTileRows) {
    const int64_t n = min(int64_t(kTileRows), p.rows - first), r = thread_of_block();
    load_tile(tile, static_cast<const S*>(p.z) + first * p.cols, n * p.cols);
    wait_for_tiles();
    f(tile, first, n, r < n ? tile + r * p.cols : nullptr);
    __syncthreads();
  }
}
template <class S>
__global__ void tile_kernel(Problem p, Forward out) {
  for_tiles<S>(p, [&](S*, int64_t first, int64_t, const S* row) {
    if (!row) return;
    compute_t<S> squares[1] = {};
    for (int64_t j = 0; j < p.cols; ++j) squares[0] += compute_t<S>(load(row[j])) * load(row[j]);
    finish(p, out, first + thread_of_block(), squares);
  });
}
template <class S>
__global__ void tile_kernel(Problem p, Backward out) {
  for_tiles<S>(p, [&](S* tile, int64_t first, int64_t n, S* row) {
    const auto g = row ? static_cast<const compute_t<S>*>(out.g)[first + thread_of_block()] : compute_t<S>(0);
    for (int64_t j = 0; row && j < p.cols; ++j) store(row[j], grad(g, load(row[j])));
    __syncthreads();
    store_tile(static_cast<S*>(out.gz) + first * p.cols, tile, n * p.cols);
  });
}

// Runs tiles if rows are such, and says whether it did.
template <class Out>
bool run_tiles(const Problem& p, const Out& out, const void* result, void* stream) {
  bool done = false;
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const bool aligned = (uintptr_t(p.z) | uintptr_t(result)) % 16 == 0;
    done = p.z_stride == p.cols && p.cols % kPack<S> && p.cols <= kTileColumns && aligned && p.rows >= kManyRows;
    if (!done) return;
    const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
    const size_t bytes = size_t(kTileRows * p.cols) * sizeof(S);
    tile_kernel<S><<<int(std::min(tiles, kMostBlocks)), kThreads, bytes, cudaStream_t(stream)>>>(p, out);
    check(cudaGetLastError());
  });
  return done;
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  if (run_tiles(p, out, nullptr, stream)) return;
  run_sums<1>(p, out, stream, [](auto s) -> Kernel<Problem, Forward> { return kernel<decltype(s)>; }, kAtOnce);
}
void run_cuda(const Problem& p, const Backward& out, void* stream) {
  if (run_tiles(p, out, out.gz, stream)) return;
  run_columns(p, out, stream, [](auto s) -> Kernel<Problem, Backward> { return kernel<decltype(s)>; });
}

}  // namespace genfuse::standard_normal_log_prob
