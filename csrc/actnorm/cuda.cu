#include "actnorm/launch.h"
#include "affine_coupling/math.h"  // of which this is the case that all examples share their parameters
#include "rows.cuh"

namespace genfuse::actnorm {
namespace {

using namespace affine_coupling;

// A row is an example where it has one cell, a channel of one where it has many: then threads are for cells.
template <bool Images, int Lanes, class S>
__global__ void kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  const int64_t per_example = Images ? p.channels : 1, width = Images ? p.cells : p.channels;
  const T *log_scale = static_cast<const T*>(p.log_scale), *shift = static_cast<const T*>(p.shift);
  for (int64_t row = first_row<Lanes>(); row < p.rows * per_example; row += row_step<Lanes>()) {
    const int64_t example = row / per_example, channel = row % per_example;
    const S* x = static_cast<const S*>(p.x) + example * p.x_stride + channel * p.cells;
    S* y = static_cast<S*>(out.y) + row * width;
    for (int64_t j = lane<Lanes>(); j < width; j += Lanes) {
      const int64_t c = Images ? channel : j;
      const T t = shift[c];
      store(y[j], apply(factor(T(load(x[j])), t, p.inverse), scale<Kind::exp>(log_scale[c], p.inverse), t, p.inverse));
    }
    if (channel) continue;
    T sum = 0;
    for (int64_t c = lane<Lanes>(); c < p.channels; c += Lanes) sum += log_scale[c];
    sum = T(p.cells) * row_sum<Lanes>(sum);
    if (lane<Lanes>() == 0) static_cast<T*>(out.logdet)[example] = p.inverse ? -sum : sum;
  }
}

// A block sums over the examples of one chunk, for one channel of images or for as many features as it has columns.
template <bool Images, class S>
__global__ void kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  constexpr int kColumns = Images ? kThreads : 32, kStep = kThreads / kColumns;
  const int column = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const int64_t cols = p.channels * p.cells, width = Images ? p.cells : p.channels;
  const int64_t chunk = blockIdx.y, end = p.rows * (chunk + 1) / out.chunks;
  for (int64_t tile = blockIdx.x; tile < (Images ? p.channels : (width + kColumns - 1) / kColumns); tile += gridDim.x) {
    const int64_t first = Images ? column : tile * kColumns + column, c = Images ? tile : first;
    const bool there = c < p.channels;
    const T t = there ? static_cast<const T*>(p.shift)[c] : T(0);
    const T scaling = there ? scale<Kind::exp>(static_cast<const T*>(p.log_scale)[c], p.inverse) : T(0);
    T of_scale = 0, of_shift = 0;
    for (int64_t i = p.rows * chunk / out.chunks + line; i < end; i += kStep) {
      const T glogdet = static_cast<const T*>(out.glogdet)[i];
      for (int64_t j = first; j < width; j += Images ? kColumns : width) {
        const int64_t at = Images ? c * p.cells + j : j;
        const T f = factor(T(load(static_cast<const S*>(p.x)[i * p.x_stride + at])), t, p.inverse);
        const T gy = load(static_cast<const S*>(out.gy)[i * cols + at]);
        const Grad<T> g = grad(gy, glogdet, f, scaling, T(1), p.inverse);
        store(static_cast<S*>(out.gx)[i * cols + at], g.x);
        of_scale += g.raw;
        of_shift += g.shift;
      }
    }
    double* partial = out.partial + 2 * chunk * p.channels;
    if constexpr (Images) {
      of_scale = row_sum<kThreads>(of_scale);
      of_shift = row_sum<kThreads>(of_shift);
    } else {
      __shared__ T scales[kStep][kColumns], shifts[kStep][kColumns];
      __syncthreads();  // the previous tile's sums have been read
      scales[line][column] = of_scale;
      shifts[line][column] = of_shift;
      __syncthreads();
      of_scale = of_shift = 0;
      for (int k = 0; k < kStep; ++k) {
        of_scale += scales[k][column];
        of_shift += shifts[k][column];
      }
    }
    if (there && threadIdx.x < (Images ? 1 : kColumns)) {
      partial[c] = of_scale;
      partial[p.channels + c] = of_shift;
    }
  }
}

template <class T>
__global__ void sum_kernel(Problem p, Backward out) {
  for (int64_t c = first_row<1>(); c < p.channels; c += row_step<1>()) {
    double of_scale = 0, of_shift = 0;
    for (int64_t chunk = 0; chunk < out.chunks; ++chunk) {
      const double* partial = out.partial + 2 * chunk * p.channels;
      of_scale += partial[c];
      of_shift += partial[p.channels + c];
    }
    static_cast<T*>(out.glog_scale)[c] = T(of_scale);
    static_cast<T*>(out.gshift)[c] = T(of_shift);
  }
}

template <bool Images, class S>
void launch(const Problem& p, const Forward& out, cudaStream_t stream) {
  for_rows(Images ? p.rows * p.channels : p.rows, Images ? p.cells : p.channels, 1024,
           [&](auto lanes, int blocks) { kernel<Images, lanes, S><<<blocks, kThreads, 0, stream>>>(p, out); });
}

template <bool Images, class S>
void launch(const Problem& p, const Backward& out, cudaStream_t stream) {
  if (p.channels && out.chunks) {
    const int tiles = int(std::min(Images ? p.channels : (p.channels + 31) / 32, kMostBlocks));
    kernel<Images, S><<<dim3(tiles, unsigned(out.chunks)), kThreads, 0, stream>>>(p, out);
  }
  for_threads(p.channels, [&](int blocks) { sum_kernel<compute_t<S>><<<blocks, kThreads, 0, stream>>>(p, out); });
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
