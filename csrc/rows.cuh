#pragma once
// What kernels that walk over rows share: the shape of a launch, what a lane loads and stores at once, sums of rows.
#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "philox.h"

namespace genfuse {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;      // of a grid that strides over its work
constexpr int64_t kManyBlocks = 1024;         // keep the largest GPU busy
constexpr int64_t kEvenBlocks = 8192;         // and as many that its last, partly filled round costs little
constexpr int64_t kManyRows = 1 << 16;        // keep it busy with a lane each
constexpr int kPieces = 16;                   // at most, of a row whose sums are of two steps: PIECES in ops/_op.py
template <class S>                            // What a lane takes at once: four values, or 16 bytes of smaller ones,
constexpr int kPack = sizeof(S) < 4 ? 8 : 4;  // and where registers suffice two times that, 32 bytes of each array:
template <class S>                            // loads in flight hide memory's latency.
constexpr int kWide = sizeof(S) < 8 ? 2 * kPack<S> : kPack<S>;

// Blocks of a multiprocessor at once, which leave a thread 48 registers, and of 16 bits 64 but on sm_90, where 48 do;
// and those that compute more, 64 for float32, 80 for 16 bits and 128 for float64: with fewer they would spill.
template <class S>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kResident = sizeof(S) == 2 ? 4 : 5;
#else
constexpr int kResident = 5;
#endif
template <class S>
constexpr int kFewerResident = sizeof(S) == 4   ? 4
                               : sizeof(S) == 2 ? 3
                                                : 2;

// A row is taken by the threads of blockDim.x, its lanes: of a warp or less, a power of 2, or of a whole block. A block
// has blockDim.y rows at a time; the grid strides over them all, of which there may be any number.
inline dim3 threads_for(int lanes) { return dim3(lanes, kThreads / lanes); }
inline int blocks_for(int lanes, int64_t rows) {
  const int64_t per_block = kThreads / lanes;
  return int(std::min((rows + per_block - 1) / per_block, kMostBlocks));
}
__device__ inline int64_t first_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ inline int64_t row_step() { return int64_t(gridDim.x) * blockDim.y; }

__device__ inline int thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

// The sum over the lanes of a row, for each of them. All lanes of a row call it together.
template <class T>
__device__ T row_sum(T sum, int lanes, int thread) {
  const int within = lanes < 32 ? lanes : 32;
  const unsigned row = (~0u >> (32 - within)) << (thread % 32 & ~(within - 1));
  for (int d = within / 2; d; d /= 2) sum += __shfl_xor_sync(row, sum, d);
  if (lanes > 32) {
    __shared__ T partial[32];
    __syncthreads();  // the previous row's partial sums have been read
    if (thread % 32 == 0) partial[thread / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < lanes / 32; ++warp) sum += partial[warp];
  }
  return sum;
}
template <class T>
__device__ T row_sum(T sum) {
  return row_sum(sum, blockDim.x, thread_of_block());
}

// The same in blocks of one dimension, for a number of lanes that is known beforehand.
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
template <int Lanes, class T>
__device__ T row_sum(T sum) {
  return row_sum(sum, Lanes, threadIdx.x);
}

// n / d for n >= 0, in 32 bits where they do, which is several times as fast.
__device__ inline int64_t quotient(int64_t n, int64_t d) {
  return (n | d) >> 32 ? n / d : int64_t(uint32_t(n) / uint32_t(d));
}

// n / by for 0 <= n < 2^31, as a product (Granlund and Montgomery, "Division by invariant integers using
// multiplication", 1994).
struct Divisor {
  uint32_t by, multiplier;
  int shift = 0;

  explicit Divisor(uint32_t by) : by(by) {
    while (uint64_t(1) << shift < by) ++shift;
    multiplier = uint32_t((((uint64_t(1) << shift) - by) << 32) / by + 1);
  }
  __device__ uint32_t operator()(uint32_t n) const {
    return (uint32_t(wide_product(n, multiplier) >> 32) + n) >> shift;
  }
};

// N values in registers, as they lie in memory: all are loaded before the first is looked at.
template <class S, int N>
struct alignas(16) Pack {
  S at[N];
  __device__ compute_t<S> operator[](int k) const { return load(at[k]); }
};

// Which of N values, `stride` apart, exist: those of [begin, end).
struct Range {
  int end, stride = 1, begin = 0;

  __device__ bool has(int k) const { return k * stride >= begin && k * stride < end; }
  // Whether they all lie as 16 bytes can be taken at a time.
  template <int N>
  __device__ bool whole(const void* at) const {
    return stride == 1 && begin <= 0 && end >= N && uintptr_t(at) % 16 == 0;
  }
};

// 16 bytes at a time if `whole`; else one by one, and 0 for what does not exist.
template <int N, class S>
__device__ Pack<S, N> load_pack(const S* from, Range range, bool whole) {
  Pack<S, N> pack;
  if (whole) {
    GENFUSE_UNROLL(N)
    for (int i = 0; i < int(sizeof(pack) / 16); ++i) {
      reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    GENFUSE_UNROLL(N)
    for (int k = 0; k < N; ++k) pack.at[k] = range.has(k) ? from[k * range.stride] : S{};
  }
  return pack;
}
template <int N, class S>
__device__ Pack<S, N> load_pack(const S* from, Range range) {
  return load_pack<N>(from, range, range.whole<N>(from));
}

// value(k) for each k that exists. (An assignment of 16 bytes may become four of 4.)
template <int N, class S, class F>
__device__ void store_pack(S* to, Range range, bool whole, F value) {
  Pack<S, N> pack;
  GENFUSE_UNROLL(N)
  for (int k = 0; k < N; ++k) store(pack.at[k], value(k));
  if (whole) {
    GENFUSE_UNROLL(N)
    for (int i = 0; i < int(sizeof(pack) / 16); ++i) {
      __stwb(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<uint4*>(&pack)[i]);
    }
  } else {
    GENFUSE_UNROLL(N)
    for (int k = 0; k < N; ++k) {
      if (range.has(k)) to[k * range.stride] = pack.at[k];
    }
  }
}
template <int N, class S, class F>
__device__ void store_pack(S* to, Range range, F value) {
  store_pack<N>(to, range, range.whole<N>(to), value);
}

// Normal noise of the first of `range` and its neighbours: as it was given, or made. A lane takes whole counters, or
// unless it is `Aligned` parts of one more. Loops over columns are unrolled and guarded, never cut short: arrays that
// are indexed by a variable lie in memory.
template <class S, bool Aligned, class T>
__device__ void eps_at(const void* given, uint64_t key, int64_t first, Range range, T eps[kPack<S>]) {
  constexpr int kWidth = kPack<S>;
  if (given) {
    const auto noise = load_pack<kWidth>(static_cast<const S*>(given) + first, range);
    GENFUSE_UNROLL(kWidth)
    for (int k = 0; k < kWidth; ++k) eps[k] = noise[k];
    return;
  }
  const int shift = Aligned ? 0 : int(first & 3);
  T ahead[kWidth + 4];
  GENFUSE_UNROLL(kWidth / 4)
  for (int c = 0; c < kWidth; c += 4) normals(key, uint64_t(first + c) / 4, ahead + c);
  if (shift) normals(key, uint64_t(first) / 4 + kWidth / 4, ahead + kWidth);
  GENFUSE_UNROLL(kWidth)
  for (int k = 0; k < kWidth; ++k) {
    eps[k] = shift == 0 ? ahead[k] : shift == 1 ? ahead[k + 1] : shift == 2 ? ahead[k + 2] : ahead[k + 3];
  }
}

// The columns of a lane in one of `pieces` pieces of a row, so many at a time: neighbours where whole packs of all
// `rows` can be taken, and else such that neighbouring lanes touch neighbouring memory.
template <class S, int Width = kWide<S>>
class Columns {
 public:
  static constexpr int kWidth = Width;

  template <class... Row>
  __device__ Columns(int64_t cols, int64_t piece, int64_t pieces, const Row*... rows) : end_(cols) {
    whole_ = cols % kWidth == 0 && (uintptr_t(rows) | ...) % 16 == 0;
    stride_ = whole_ ? 1 : blockDim.x;
    first_ = piece * blockDim.x * kWidth + threadIdx.x * (whole_ ? kWidth : 1);
    step_ = pieces * blockDim.x * kWidth;
  }

  __device__ explicit operator bool() const { return first_ < end_; }
  __device__ void operator++() { first_ += step_; }
  __device__ int64_t operator[](int k) const { return first_ + k * stride_; }
  __device__ bool has(int k) const { return range().has(k); }

  template <class R>  // zeros from null
  __device__ Pack<R, kWidth> load(const R* row) const {
    return row ? load_pack<kWidth>(row + first_, range(), whole_) : Pack<R, kWidth>{};
  }
  template <class R, class F>
  __device__ void store(R* row, F value) const {
    store_pack<kWidth>(row + first_, range(), whole_, value);
  }

 private:
  __device__ Range range() const { return {int(min(end_ - first_, int64_t(kWidth) * kThreads)), stride_}; }

  int64_t first_, end_, step_;
  int stride_;  // 1 also for a lane that has a row to itself
  bool whole_;
};

// Those of a block that shares its rows with all blocks of its blockIdx.x.
template <class S, class... Row>
__device__ Columns<S> columns(int64_t cols, const Row*... rows) {
  return {cols, blockIdx.y, gridDim.y, rows...};
}

// The shared memory that a launch asked for.
template <class S>
__device__ S* dynamic_shared() {
  extern __shared__ __align__(16) double shared[];
  return reinterpret_cast<S*>(shared);
}

// All threads of a block copy rows that lie side by side, `count` values in all, into shared memory and back: 16 bytes
// at a time however short a row is. Both ends are aligned to 16 bytes.
template <class S>
__device__ void load_tile(S* shared, const S* rows, int64_t count) {
  constexpr int kUnit = 16 / sizeof(S);
  const int whole = int(count / kUnit);
  for (int i = thread_of_block(); i < whole; i += kThreads) {
    __pipeline_memcpy_async(shared + i * kUnit, rows + i * kUnit, 16);
  }
  for (int i = whole * kUnit + thread_of_block(); i < count; i += kThreads) shared[i] = rows[i];
}
__device__ inline void wait_for_tiles() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
}
template <class S>
__device__ void store_tile(S* rows, const S* shared, int64_t count) {
  constexpr int kUnit = 16 / sizeof(S);
  const int whole = int(count / kUnit);
  for (int i = thread_of_block(); i < whole; i += kThreads) {
    __stwb(reinterpret_cast<uint4*>(rows) + i, reinterpret_cast<const uint4*>(shared)[i]);
  }
  for (int i = whole * kUnit + thread_of_block(); i < count; i += kThreads) rows[i] = shared[i];
}

// How many blocks share a row where any do: enough to keep the largest GPU busy, and no more, as short pieces end
// before their loads do.
GENFUSE_HD int pieces_for(int64_t rows) {
  return rows > 4 * kManyBlocks / kPieces ? int(4 * kManyBlocks / rows) : kPieces;
}

// The sum over the pieces of a row of the i-th of N sums.
template <int N, class T>
__device__ T sum_of_pieces(const void* partial, int64_t rows, int64_t row, int i = 0) {
  T sum = 0;
  const int pieces = pieces_for(rows);
  GENFUSE_UNROLL(4)
  for (int piece = 0; piece < pieces; ++piece) sum += static_cast<const T*>(partial)[(piece * rows + row) * N + i];
  return sum;
}

// Ends a row with finish(p, out, row, sums), of the sums over its lanes. Where blocks share the row, each keeps its own
// in p.partial, (pieces, rows, N), and `finish_kernel` adds them in their order.
template <int N, class T, class Problem, class Out>
__device__ void finish_row(const Problem& p, const Out& out, int64_t row, T (&sums)[N]) {
  for (T& sum : sums) sum = row_sum(sum);
  if (threadIdx.x) return;
  if (gridDim.y == 1) return finish(p, out, row, sums);
  for (int i = 0; i < N; ++i) static_cast<T*>(p.partial)[(blockIdx.y * p.rows + row) * N + i] = sums[i];
}
template <int N, class T, class Problem, class Out>
__global__ void finish_kernel(Problem p, Out out) {
  for (int64_t row = first_row<1>(); row < p.rows; row += row_step<1>()) {
    T sums[N];
    for (int i = 0; i < N; ++i) sums[i] = sum_of_pieces<N, T>(p.partial, p.rows, row, i);
    finish(p, out, row, sums);
  }
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
  launch(blocks_for(1, work));
  check(cudaGetLastError());
}

// Lanes for a row of so many packs: enough of a warp's for one each, or a block's if the row is long, or if rows are
// few.
inline int lanes_for(int64_t rows, int64_t packs) {
  if (packs > (rows > kManyBlocks * 8 ? 256 : 64)) return kThreads;
  int lanes = rows >= kManyRows ? 1 : 4;
  while (lanes < 32 && lanes < packs) lanes *= 2;
  return lanes;
}

// How many lanes of one row each there are for rows of which a lane takes so many at once: of few it takes one.
inline int64_t rows_at_once(int64_t rows, int64_t at_once) {
  return rows < kManyRows ? rows : (rows + at_once - 1) / at_once;
}

// Calls launch(grid, threads) for kernels that take `columns` of rows. Blocks share a row where there are few long
// ones: as many as `pieces`, if it is not 0. A lane takes `at_once` rows where there are many.
template <class S, class F>
void for_columns(int64_t rows, int64_t cols, int64_t pieces, F launch, int64_t at_once = 1) {
  if (rows == 0) return;
  const int64_t packs = (cols + kWide<S> - 1) / kWide<S>;
  const int lanes = lanes_for(rows, packs);
  if (pieces == 0) pieces = std::max(int64_t(1), std::min(packs / lanes, kEvenBlocks / rows));
  launch(dim3(blocks_for(lanes, rows_at_once(rows, at_once)), unsigned(pieces)), threads_for(lanes));
  check(cudaGetLastError());
}

// Launches such a kernel, of(storage) for the storage type.
template <class Problem, class Out>
using Kernel = void (*)(Problem, Out);
template <class Problem, class Out, class Of>
void run_columns(const Problem& p, const Out& out, void* stream, Of of, int64_t pieces = 0, int64_t at_once = 1) {
  dispatch(p.dtype, [&](auto storage) {
    const Kernel<Problem, Out> kernel = of(storage);
    for_columns<decltype(storage)>(
        p.rows, p.cols, pieces,
        [&](dim3 grid, dim3 threads) { kernel<<<grid, threads, 0, cudaStream_t(stream)>>>(p, out); }, at_once);
  });
}

// The same for kernels that end with `finish_row`, of N sums.
template <int N, class Problem, class Out, class Of>
void run_sums(const Problem& p, const Out& out, void* stream, Of of, int64_t at_once = 1) {
  run_columns(p, out, stream, of, p.partial ? pieces_for(p.rows) : 1, at_once);
  if (!p.partial) return;
  dispatch(p.dtype, [&](auto storage) {
    const Kernel<Problem, Out> kernel = finish_kernel<N, compute_t<decltype(storage)>>;
    for_threads(p.rows, [&](int blocks) { kernel<<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out); });
  });
}

// Calls launch(lanes, blocks), where `lanes` is a constant, for a grid of as many lanes for each row: of a warp or
// less, or of a block where a row has more than `most` columns. A lane for each column; or, from `Least` lanes on, for
// eight of them where rows are many.
template <int Least, class F>
void for_rows(int64_t rows, int64_t cols, int64_t most, F launch) {
  if (rows == 0) return;
  const auto with = [&](auto lanes) { launch(lanes, blocks_for(lanes, rows)); };
  const int64_t wanted = Least == 1 && rows >= kManyRows ? (cols + 7) / 8 : cols;
  if (cols > most) {
    with(std::integral_constant<int, kThreads>());
  } else if (wanted > 16) {
    with(std::integral_constant<int, 32>());
  } else if (wanted > 8) {
    with(std::integral_constant<int, 16>());
  } else if (wanted > 4) {
    with(std::integral_constant<int, 8>());
  } else if (wanted > Least || Least == 4) {
    with(std::integral_constant<int, 4>());
  } else {
    with(std::integral_constant<int, Least>());
  }
  check(cudaGetLastError());
}

}  // namespace genfuse
