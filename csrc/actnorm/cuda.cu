#include "actnorm/launch.h"
#include "affine_coupling/math.h"  // of which this is the case that all examples share their parameters
#include "rows.cuh"

namespace genfuse::actnorm {
namespace {

using namespace affine_coupling;

// A row is an example where it has one cell, a channel of one where it has many: then threads are for cells.
template <bool Images, class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>) kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  const int64_t per_example = Images ? p.channels : 1, width = Images ? p.cells : p.channels;
  const T *log_scale = static_cast<const T*>(p.log_scale), *shift = static_cast<const T*>(p.shift);
  for (int64_t row = first_row(); row < p.rows * per_example; row += row_step()) {
    const int64_t example = Images ? quotient(row, per_example) : row, channel = row - example * per_example;
    const S* x_row = static_cast<const S*>(p.x) + example * p.x_stride + channel * p.cells;
    S* y = static_cast<S*>(out.y) + row * width;
    const T s_row = Images ? log_scale[channel] : T(0), t_row = Images ? shift[channel] : T(0);
    const T scale_row = scale<Kind::exp>(s_row, p.inverse);
    for (auto at = columns<S>(width, x_row, y, log_scale, shift); at; ++at) {
      const auto x = at.load(x_row);
      if constexpr (Images) {
        at.store(y, [&](int k) { return apply(factor(x[k], t_row, p.inverse), scale_row, t_row, p.inverse); });
      } else {
        const auto s = at.load(log_scale), t = at.load(shift);
        at.store(y, [&](int k) {
          return apply(factor(x[k], t[k], p.inverse), scale<Kind::exp>(s[k], p.inverse), t[k], p.inverse);
        });
      }
    }
    if (channel || blockIdx.y) continue;
    T sum = 0;
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) sum += log_scale[c];
    sum = T(p.cells) * row_sum(sum);
    if (threadIdx.x == 0) static_cast<T*>(out.logdet)[example] = p.inverse ? -sum : sum;
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

// A block sums over the examples of one chunk, for one channel of images or for as many features as its lanes take at
// once. Each thread sums for its columns, over every blockDim.y-th example.
template <bool Images, class S>  // its sums take more registers still
__global__ void __launch_bounds__(kThreads, sizeof(S) == 4 ? 3 : 2) kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  constexpr int kWidth = kPack<S>;
  const int64_t cols = p.channels * p.cells, width = Images ? p.cells : p.channels;
  const int64_t chunk = blockIdx.y, end = p.rows * (chunk + 1) / out.chunks;
  const int64_t tiles = Images ? p.channels : (width + blockDim.x * kWidth - 1) / (blockDim.x * kWidth);
  const T *shift = static_cast<const T*>(p.shift), *log_scale = static_cast<const T*>(p.log_scale);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const S *x_row = static_cast<const S*>(p.x), *gy_row = static_cast<const S*>(out.gy);
    S* gx_row = static_cast<S*>(out.gx);
    if constexpr (Images) x_row += tile * p.cells, gy_row += tile * p.cells, gx_row += tile * p.cells;
    // Of the same columns in all examples: that of the second shows whether all are aligned alike.
    const Columns<S, kWidth> first = {
        width, Images ? 0 : tile, Images ? 1 : tiles, x_row, x_row + p.x_stride, gy_row, gx_row, gx_row + cols,
        shift, log_scale};
    T t[kWidth], scaling[kWidth];
    Sum<T> of_scale[kWidth], of_shift[kWidth];
    GENFUSE_UNROLL(kWidth)
    for (int k = 0; k < kWidth; ++k) {
      const int64_t c = Images ? tile : first[k];
      t[k] = c < p.channels ? shift[c] : T(0);
      scaling[k] = scale<Kind::exp>(c < p.channels ? log_scale[c] : T(0), p.inverse);
    }
    for (int64_t i = p.rows * chunk / out.chunks + threadIdx.y; i < end; i += blockDim.y) {
      const T glogdet = static_cast<const T*>(out.glogdet)[i];
      for (auto at = first; at; ++at) {
        const auto x = at.load(x_row + i * p.x_stride), gy = at.load(gy_row + i * cols);
        T gx[kWidth];
        GENFUSE_UNROLL(kWidth)
        for (int k = 0; k < kWidth; ++k) {
          const Grad<T> g = grad(gy[k], glogdet, factor(x[k], t[k], p.inverse), scaling[k], T(1), p.inverse);
          gx[k] = g.x;
          if (!at.has(k)) continue;
          of_scale[k] += g.raw;
          of_shift[k] += g.shift;
        }
        at.store(gx_row + i * cols, [&](int k) { return gx[k]; });
      }
    }
    double* partial = out.partial + 2 * chunk * p.channels;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    if constexpr (Images) {
      double scale_sum = 0, shift_sum = 0;
      GENFUSE_UNROLL(kWidth)
      for (int k = 0; k < kWidth; ++k) scale_sum += of_scale[k], shift_sum += of_shift[k];
      scale_sum = row_sum(scale_sum, kThreads, thread);
      shift_sum = row_sum(shift_sum, kThreads, thread);
      if (thread == 0) partial[tile] = scale_sum, partial[p.channels + tile] = shift_sum;
    } else {
      __shared__ double sums[2 * kWidth][kThreads];
      __syncthreads();  // the previous tile's sums have been read
      for (int k = 0; k < kWidth; ++k) sums[k][thread] = of_scale[k], sums[kWidth + k][thread] = of_shift[k];
      for (int lines = blockDim.y / 2; lines; lines /= 2) {  // a half is added to the other until one line is left
        __syncthreads();
        if (threadIdx.y >= lines) continue;
        for (int i = 0; i < 2 * kWidth; ++i) sums[i][thread] += sums[i][thread + lines * blockDim.x];
      }
      if (threadIdx.y) continue;
      for (int k = 0; k < kWidth; ++k) {
        if (!first.has(k)) continue;
        partial[first[k]] = sums[k][thread];
        partial[p.channels + first[k]] = sums[kWidth + k][thread];
      }
    }
  }
}

// The lanes of a channel share out the chunks.
template <class T>
__global__ void sum_kernel(Problem p, Backward out) {
  for (int64_t c = first_row(); c < p.channels; c += row_step()) {
    double of_scale = 0, of_shift = 0;
    for (int64_t chunk = threadIdx.x; chunk < out.chunks; chunk += blockDim.x) {
      const double* partial = out.partial + 2 * chunk * p.channels;
      of_scale += partial[c];
      of_shift += partial[p.channels + c];
    }
    of_scale = row_sum(of_scale);
    of_shift = row_sum(of_shift);
    if (threadIdx.x == 0) {
      static_cast<T*>(out.glog_scale)[c] = T(of_scale);
      static_cast<T*>(out.gshift)[c] = T(of_shift);
    }
  }
}

template <bool Images, class S>
void launch(const Problem& p, const Forward& out, cudaStream_t stream) {
  for_columns<S>(Images ? p.rows * p.channels : p.rows, Images ? p.cells : p.channels, 0,
                 [&](dim3 grid, dim3 threads) { kernel<Images, S><<<grid, threads, 0, stream>>>(p, out); });
}

template <bool Images, class S>
void launch(const Problem& p, const Backward& out, cudaStream_t stream) {
  if (p.channels == 0) return;
  if (out.chunks) {
    const int64_t packs = ((Images ? p.cells : p.channels) + kPack<S> - 1) / kPack<S>;
    const int lanes = std::min(lanes_for(1, packs), Images ? kThreads : 32);
    const int64_t tiles = Images ? p.channels : (packs + lanes - 1) / lanes;
    const dim3 grid(unsigned(std::min(tiles, kMostBlocks)), unsigned(out.chunks));
    kernel<Images, S><<<grid, threads_for(lanes), 0, stream>>>(p, out);
  }
  sum_kernel<compute_t<S>><<<blocks_for(32, p.channels), threads_for(32), 0, stream>>>(p, out);
  check(cudaGetLastError());
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (p.cells == 1 || p.channels == 0) {
      launch<false, S>(p, out, cudaStream_t(stream));
    } else {
      launch<true, S>(p, out, cudaStream_t(stream));
    }
  });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::actnorm
