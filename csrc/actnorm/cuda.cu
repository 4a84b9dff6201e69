#include "actnorm/launch.h"
#include "affine_coupling/math.h"  // of which this is the case that all examples share their parameters
#include "rows.cuh"

namespace genfuse::actnorm {
namespace {

using namespace affine_coupling;

template <class T>
struct Parameters {
  T scale, shift;
};
template <class T>
__device__ Parameters<T> parameters(const Problem& p, int64_t channel) {
  return {scale<Kind::exp>(static_cast<const T*>(p.log_scale)[channel], p.inverse),
          static_cast<const T*>(p.shift)[channel]};
}

// The log-determinant is one for all examples. A block sums for those that it writes.
template <class T>
__device__ void write_logdet(const Problem& p, const Forward& out) {
  const int thread = thread_of_block();
  const int64_t block = blockIdx.x + int64_t(blockIdx.y) * gridDim.x, blocks = int64_t(gridDim.x) * gridDim.y;
  if (block * kThreads >= p.rows) return;
  double terms = 0;
  for (int64_t c = thread; c < p.channels; c += kThreads) terms += static_cast<const T*>(p.log_scale)[c];
  const T sum = T(p.cells) * row_sum(T(terms), kThreads, thread);
  for (int64_t i = block * kThreads + thread; i < p.rows; i += blocks * kThreads) {
    static_cast<T*>(out.logdet)[i] = p.inverse ? -sum : sum;
  }
}

// Features: some examples side by side, so many that they end where 16 bytes do, are one line of `fold` times as many
// columns. A thread keeps to its columns, whose parameters it has at hand, and takes some lines at once.
struct Lines {
  int64_t fold, width, count;

  Lines(const Problem& p, int pack, int64_t widest) : fold(1) {
    while (p.channels * fold % pack && 2 * fold * p.channels <= widest && p.x_stride == p.channels) fold *= 2;
    width = fold * p.channels;
    count = (p.rows + fold - 1) / fold;
  }
  template <int N>  // of the columns from one on, those that there are
  __device__ Range range(const Problem& p, int64_t line, int64_t column) const {
    const int64_t left = min(width, p.rows * p.channels - line * width) - column;
    return {line < count ? int(max(int64_t(0), min(left, int64_t(N)))) : 0};
  }
  template <int N, class T>
  __device__ void parameters(const Problem& p, int64_t column, Parameters<T> (&of)[N]) const {
    int64_t channel = fold == 1 && column < width ? column : column - quotient(column, p.channels) * p.channels;
    GENFUSE_UNROLL(N)
    for (int k = 0; k < N; ++k) {
      of[k] = actnorm::parameters<T>(p, channel);
      if (++channel == p.channels) channel = 0;
    }
  }
  template <class S>
  __device__ const S* x(const Problem& p, int64_t line) const {
    return static_cast<const S*>(p.x) + line * fold * p.x_stride;
  }
};

constexpr int kLinesAtOnce = 4;
template <class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>) features_kernel(Problem p, Lines lines, Forward out) {
  using T = compute_t<S>;
  constexpr int kWidth = kPack<S>, kAtOnce = kLinesAtOnce;
  write_logdet<T>(p, out);
  const int64_t step = int64_t(gridDim.y) * blockDim.x * kWidth;
  for (int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth; column < lines.width;
       column += step) {
    Parameters<T> of[kWidth];
    lines.parameters(p, column, of);
    for (int64_t first = first_row(); first < lines.count; first += kAtOnce * row_step()) {
      Pack<S, kWidth> x[kAtOnce];
      GENFUSE_UNROLL(kAtOnce)
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t line = first + i * row_step();
        if (line < lines.count)
          x[i] = load_pack<kWidth>(lines.x<S>(p, line) + column, lines.range<kWidth>(p, line, column));
      }
      GENFUSE_UNROLL(kAtOnce)
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t line = first + i * row_step();
        if (line >= lines.count) continue;
        store_pack<kWidth>(
            static_cast<S*>(out.y) + line * lines.width + column, lines.range<kWidth>(p, line, column),
            [&](int k) { return apply(factor(x[i][k], of[k].shift, p.inverse), of[k].scale, of[k].shift, p.inverse); });
      }
    }
  }
}

// Images: a row is a channel of one example.
template <class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>) images_kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  write_logdet<T>(p, out);
  for (int64_t row = first_row(); row < p.rows * p.channels; row += row_step()) {
    const int64_t example = quotient(row, p.channels), channel = row - example * p.channels;
    const S* x_row = static_cast<const S*>(p.x) + example * p.x_stride + channel * p.cells;
    S* y = static_cast<S*>(out.y) + row * p.cells;
    const Parameters<T> of = parameters<T>(p, channel);
    for (auto at = columns<S>(p.cells, x_row, y); at; ++at) {
      const auto x = at.load(x_row);
      at.store(y, [&](int k) { return apply(factor(x[k], of.shift, p.inverse), of.scale, of.shift, p.inverse); });
    }
  }
}

// A sum of many terms and of what rounding took from it (Knuth's), which its double is right to: where gradients of
// examples cancel, as they do near an optimum, little else is left of it.
template <class T>
struct Sum {
  T value = 0, lost = 0;

  __device__ void operator+=(T x) {
    const T sum = value + x, part = sum - value;
    lost += (value - (sum - part)) + (x - part);
    value = sum;
  }
  __device__ operator double() const { return double(value) + double(lost); }
};

// The first of a chunk's blocks sums glogdet over its examples, [begin, end).
template <class T>
__device__ void sum_logdets(const Problem& p, const Backward& out, int64_t chunk, int64_t begin, int64_t end) {
  if (blockIdx.x) return;
  const int thread = thread_of_block();
  double sum = 0;
  for (int64_t i = begin + thread; i < end; i += kThreads) sum += static_cast<const T*>(out.glogdet)[i];
  sum = row_sum(sum, kThreads, thread);
  if (thread == 0) out.partial[chunk * sums_of(p) + 2 * p.channels] = sum;
}

// A block sums over the examples of one chunk of lines, for as many columns as its lanes take at once. Each thread sums
// for its columns, over every blockDim.y-th line.
template <class S>  // whose sums take more registers still
__global__ void __launch_bounds__(kThreads, sizeof(S) == 4 ? 3 : 2)
    features_kernel(Problem p, Lines lines, Backward out) {
  using T = compute_t<S>;
  constexpr int kWidth = kPack<S>, kAtOnce = 2;
  __shared__ double sums[2 * kWidth][kThreads];
  const int64_t chunk = blockIdx.y, start = lines.count * chunk / out.chunks;
  const int64_t end = lines.count * (chunk + 1) / out.chunks, tile = blockDim.x * kWidth;
  const int thread = thread_of_block();
  sum_logdets<T>(p, out, chunk, start * lines.fold, min(end * lines.fold, p.rows));
  for (int64_t begin = blockIdx.x * tile; begin < lines.width; begin += gridDim.x * tile) {
    const int64_t column = begin + threadIdx.x * kWidth;
    Parameters<T> of[kWidth];
    Sum<T> of_scale[kWidth], of_shift[kWidth];
    lines.parameters(p, column, of);
    for (int64_t first = start + threadIdx.y; first < end; first += kAtOnce * blockDim.y) {
      Pack<S, kWidth> x[kAtOnce], gy[kAtOnce];
      GENFUSE_UNROLL(kAtOnce)
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t line = first + i * blockDim.y;
        if (line >= end) continue;
        const Range range = lines.range<kWidth>(p, line, column);
        x[i] = load_pack<kWidth>(lines.x<S>(p, line) + column, range);
        gy[i] = load_pack<kWidth>(static_cast<const S*>(out.gy) + line * lines.width + column, range);
      }
      GENFUSE_UNROLL(kAtOnce)
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t line = first + i * blockDim.y;
        if (line >= end) continue;
        const Range range = lines.range<kWidth>(p, line, column);
        T gx[kWidth];
        GENFUSE_UNROLL(kWidth)
        for (int k = 0; k < kWidth; ++k) {
          if (!range.has(k)) continue;
          const Grad<T> g =
              grad(T(gy[i][k]), T(0), factor(x[i][k], of[k].shift, p.inverse), of[k].scale, T(1), p.inverse);
          gx[k] = g.x;
          of_scale[k] += g.raw;
          of_shift[k] += g.shift;
        }
        store_pack<kWidth>(static_cast<S*>(out.gx) + line * lines.width + column, range, [&](int k) { return gx[k]; });
      }
    }
    __syncthreads();  // the previous tile's sums have been read
    for (int k = 0; k < kWidth; ++k) sums[k][thread] = of_scale[k], sums[kWidth + k][thread] = of_shift[k];
    for (int half = blockDim.y / 2; half; half /= 2) {  // a half is added to the other until one line is left
      __syncthreads();
      if (threadIdx.y >= half) continue;
      for (int i = 0; i < 2 * kWidth; ++i) sums[i][thread] += sums[i][thread + half * blockDim.x];
    }
    __syncthreads();
    double* partial = out.partial + chunk * sums_of(p);
    const int64_t here = min(tile, lines.width - begin), channels = min(here, p.channels);
    for (int64_t c = thread; c < channels; c += kThreads) {
      double scale_sum = 0, shift_sum = 0;
      for (int64_t j = c; j < here; j += p.channels) {
        scale_sum += sums[j % kWidth][j / kWidth];
        shift_sum += sums[kWidth + j % kWidth][j / kWidth];
      }
      partial[begin + c] = scale_sum, partial[p.channels + begin + c] = shift_sum;
    }
  }
}

// The same for the cells of one channel, by a whole block.
template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 4 ? 3 : 2) images_kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  constexpr int kWidth = kPack<S>;
  const int64_t cols = p.channels * p.cells, chunk = blockIdx.y;
  const int64_t begin = p.rows * chunk / out.chunks, end = p.rows * (chunk + 1) / out.chunks;
  sum_logdets<T>(p, out, chunk, begin, end);
  for (int64_t channel = blockIdx.x; channel < p.channels; channel += gridDim.x) {
    const Parameters<T> of = parameters<T>(p, channel);
    Sum<T> of_scale[kWidth], of_shift[kWidth];
    for (int64_t i = begin + threadIdx.y; i < end; i += blockDim.y) {
      const S* x_row = static_cast<const S*>(p.x) + i * p.x_stride + channel * p.cells;
      const S* gy_row = static_cast<const S*>(out.gy) + i * cols + channel * p.cells;
      S* gx_row = static_cast<S*>(out.gx) + i * cols + channel * p.cells;
      for (Columns<S, kWidth> at = {p.cells, 0, 1, x_row, gy_row, gx_row}; at; ++at) {
        const auto x = at.load(x_row), gy = at.load(gy_row);
        T gx[kWidth];
        GENFUSE_UNROLL(kWidth)
        for (int k = 0; k < kWidth; ++k) {
          const Grad<T> g = grad(T(gy[k]), T(0), factor(x[k], of.shift, p.inverse), of.scale, T(1), p.inverse);
          gx[k] = g.x;
          if (!at.has(k)) continue;
          of_scale[k] += g.raw;
          of_shift[k] += g.shift;
        }
        at.store(gx_row, [&](int k) { return gx[k]; });
      }
    }
    double scale_sum = 0, shift_sum = 0;
    GENFUSE_UNROLL(kWidth)
    for (int k = 0; k < kWidth; ++k) scale_sum += of_scale[k], shift_sum += of_shift[k];
    const int thread = thread_of_block();
    scale_sum = row_sum(scale_sum, kThreads, thread);
    shift_sum = row_sum(shift_sum, kThreads, thread);
    double* partial = out.partial + chunk * sums_of(p);
    if (thread == 0) partial[channel] = scale_sum, partial[p.channels + channel] = shift_sum;
  }
}

// Sums over the chunks: neighbouring lanes have neighbouring sums, and a line of them every kSumLines-th chunk.
constexpr int kSumLines = 32;
template <class T>
__global__ void sum_kernel(Problem p, Backward out) {
  __shared__ double sums[kSumLines][32];
  const int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const int thread = thread_of_block();
  double sum = 0, logdets = 0;
  GENFUSE_UNROLL(4)
  for (int64_t chunk = threadIdx.y; chunk < out.chunks; chunk += kSumLines) {
    if (i < 2 * p.channels) sum += out.partial[chunk * sums_of(p) + i];
  }
  for (int64_t chunk = thread; chunk < out.chunks; chunk += 32 * kSumLines) {
    logdets += out.partial[chunk * sums_of(p) + 2 * p.channels];
  }
  logdets = row_sum(logdets, 32 * kSumLines, thread);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || i >= 2 * p.channels) return;
  for (int line = 1; line < kSumLines; ++line) sum += sums[line][threadIdx.x];
  if (i < p.channels) {
    static_cast<T*>(out.glog_scale)[i] = T(sum + of_logdet(p, logdets));
  } else {
    static_cast<T*>(out.gshift)[i - p.channels] = T(sum);
  }
}

template <class S>
void launch(const Problem& p, const Forward& out, cudaStream_t stream) {
  if (p.cells != 1 && p.channels != 0) {
    return for_columns<S>(p.rows * p.channels, p.cells, 0,
                          [&](dim3 grid, dim3 threads) { images_kernel<S><<<grid, threads, 0, stream>>>(p, out); });
  }
  if (p.rows == 0) return;
  const Lines lines(p, kPack<S>, 32 * kPack<S>);
  const int64_t packs = std::max(int64_t(1), (lines.width + kPack<S> - 1) / kPack<S>);
  const int lanes = lanes_for(lines.count, packs);
  const dim3 grid(blocks_for(lanes, rows_at_once(lines.count, kLinesAtOnce)),
                  unsigned(std::min((packs + lanes - 1) / lanes, int64_t(kEvenBlocks))));
  features_kernel<S><<<grid, threads_for(lanes), 0, stream>>>(p, lines, out);
  check(cudaGetLastError());
}

template <class S>
void launch(const Problem& p, const Backward& out, cudaStream_t stream) {
  if (p.channels == 0) return;
  if (out.chunks && p.cells != 1) {
    const int lanes = lanes_for(1, (p.cells + kPack<S> - 1) / kPack<S>);
    const dim3 grid(unsigned(std::min(p.channels, kMostBlocks)), unsigned(out.chunks));
    images_kernel<S><<<grid, threads_for(lanes), 0, stream>>>(p, out);
  } else if (out.chunks) {
    const Lines lines(p, kPack<S>, 32 * kPack<S>);
    const int64_t packs = (lines.width + kPack<S> - 1) / kPack<S>;
    const int lanes = std::min(lanes_for(1, packs), 32);
    const dim3 grid(unsigned(std::min((packs + lanes - 1) / lanes, kMostBlocks)), unsigned(out.chunks));
    features_kernel<S><<<grid, threads_for(lanes), 0, stream>>>(p, lines, out);
  }
  const int blocks = int((2 * p.channels + 31) / 32);
  sum_kernel<compute_t<S>><<<blocks, dim3(32, kSumLines), 0, stream>>>(p, out);
  check(cudaGetLastError());
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) { launch<decltype(storage)>(p, out, cudaStream_t(stream)); });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::actnorm
