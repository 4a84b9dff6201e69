#include "affine_coupling/math.h"
#include "autoregressive_inverse/launch.h"
#include "rational_quadratic_spline/coordinate.cuh"
#include "rows.cuh"

namespace genfuse::autoregressive_inverse {
namespace {

namespace spline = rational_quadratic_spline;
using affine_coupling::Kind;

// A block sweeps over a few rows, so that few rows keep many blocks busy. A warp takes a unit of all of them; the lanes
// of one row share out its inputs.
constexpr int kRows = 8, kShares = 32 / kRows, kWarps = kThreads / 32;
constexpr int64_t kMostBlocksInMemory = 2048;
constexpr int64_t kSharedMemory = 48 * 1024;  // what every GPU has for a block without being asked

// What a block keeps: x, all hidden units and the residual sum as [unit][row], of one column the parameters as
// [row][parameter].
int64_t bytes(int dtype, int64_t kept) { return kept * kRows * (dtype == 0 ? 4 : 8); }

int64_t blocks(int64_t rows, int64_t bytes) {
  return std::min((rows + kRows - 1) / kRows, bytes > kSharedMemory ? kMostBlocksInMemory : kMostBlocks);
}

template <class T>
struct Value {
  T x, logdet;
};

template <Kind kind, class T>
__device__ Value<T> undo_affine(T y, const T* params, T constant) {
  const T s = affine_coupling::log_scale<kind>(params[0], constant).value, t = params[1];
  return {affine_coupling::apply(affine_coupling::factor(y, t, true), affine_coupling::scale<kind>(s, true), t, true),
          -s};
}

template <class T>
__device__ Value<T> undo(const Problem& p, const spline::Constants<T>& c, int64_t k, T y, const T* params) {
  if (p.bins) {
    const spline::cuda::Coordinate<T> at(p, c, params, y);
    const spline::Value<T> v = spline::value<true>(y, at.folded, at.bin, c);
    return {v.y, v.logdet};
  }
  const T constant = p.factor ? static_cast<const T*>(p.factor)[k] : T(p.constant);
  switch (Kind(p.scale)) {
    case Kind::tanh: return undo_affine<Kind::tanh>(y, params, constant);
    case Kind::exp: return undo_affine<Kind::exp>(y, params, constant);
    case Kind::sigmoid: return undo_affine<Kind::sigmoid>(y, params, constant);
    case Kind::softclip: return undo_affine<Kind::softclip>(y, params, constant);
    case Kind::floored: return undo_affine<Kind::floored>(y, params, constant);
    default: return undo_affine<Kind::factored>(y, params, constant);
  }
}

// What n inputs give to a unit for a row: the share of each lane, then the sum of all of them, in every lane. All lanes
// of a warp call it together. Inputs lie `step` apart, their weights `along`.
template <class T>
__device__ T weighted(const T* weight, int64_t along, const T* in, int64_t step, int64_t n, int share) {
  T a = 0;
  for (int64_t j = share; j < n; j += kShares) a += in[j * step] * weight[j * along];
  for (int d = kRows; d < 32; d *= 2) a += __shfl_xor_sync(~0u, a, d);
  return a;
}

template <class T>
__global__ void kernel(Problem p, spline::Constants<T> c, Forward out) {
  T* x = p.workspace ? static_cast<T*>(p.workspace) + blockIdx.x * p.kept * kRows : dynamic_shared<T>();
  T* params = x + (p.kept - p.width()) * kRows;
  T* sums = params - (p.residual ? p.size(0) * kRows : 0);
  const int warp = threadIdx.x / 32, r = threadIdx.x % kRows, share = threadIdx.x % 32 / kRows;
  for (int64_t tile = blockIdx.x; tile * kRows < p.rows; tile += gridDim.x) {
    const int64_t row = tile * kRows + r;
    const bool in_use = row < p.rows;
    T sum = 0;  // of the first kRows threads, each of which finishes a row
    for (int64_t k = 0; k < p.cols; ++k) {
      const T* in = x;
      T* units = x + p.cols * kRows;
      int64_t known = k, inputs = p.cols;
      for (int64_t i = 0; i <= p.hidden(); ++i) {
        const int64_t first = p.start(i, k), end = p.start(i, k + 1);
        for (int64_t u = first + warp; u < end; u += kWarps) {  // the same for all lanes of a warp
          T a = weighted(static_cast<const T*>(p.weights[i]) + u * inputs, 1, in + r, kRows, known, share);
          if (share) continue;
          a += static_cast<const T*>(p.biases[i])[u];
          if (i == 0 && p.context && in_use) a += static_cast<const T*>(p.context)[row * p.context_stride + u];
          if (i == p.hidden()) {
            params[r * p.width() + u - first] = a;
            continue;
          }
          if (p.adds(i)) a = sums[u * kRows + r] = i ? sums[u * kRows + r] + a : a;
          units[u * kRows + r] = p.rectified(i) && a < T(0) ? T(0) : a;  // NaN stays NaN
        }
        __syncthreads();
        in = units, known = end, inputs = p.size(i), units += inputs * kRows;
      }
      if (threadIdx.x < kRows) {
        const T y = in_use ? static_cast<const T*>(p.x)[row * p.x_stride + k] : T(0);
        const Value<T> v = undo(p, c, k, y, params + r * p.width());
        x[k * kRows + r] = v.x;
        sum += v.logdet;
        if (in_use) static_cast<T*>(out.x)[row * p.cols + k] = v.x;
      }
      __syncthreads();
    }
    if (threadIdx.x < kRows && in_use) static_cast<T*>(out.logdet)[row] = sum;
  }
}

// Works on its results, in which each row is its block's own, as degrees are the first row's. Lanes without a row do as
// the last one does, and store nothing.
template <class T>
__global__ void kernel(Sweep p, Backward out) {
  const int warp = threadIdx.x / 32, share = threadIdx.x % 32 / kRows;
  const int64_t step = p.rows, outputs = p.hidden();
  for (int64_t tile = blockIdx.x; tile * kRows < p.rows; tile += gridDim.x) {
    const int64_t own = tile * kRows + threadIdx.x % kRows, row = own < p.rows ? own : p.rows - 1;
    const bool stores = own < p.rows && share == 0;
    const auto at = [&](const void* base, int64_t unit) { return static_cast<const T*>(base)[unit * step + row]; };
    T* x = static_cast<T*>(out.gradients) + row;
    T* last = x + p.cols() * step;
    for (int64_t i = 0; i < outputs; ++i) last += p.size(i) * step;
    // Puts a value of the row in its place; its unit is counted from x on.
    const auto put = [&](T* to, T value, int64_t degree) {
      *to = value;
      if (row == 0) out.degrees[(to - x) / step] = degree;
    };
    if (stores) {
      for (int64_t k = warp; k < p.cols(); k += kWarps) put(x + k * step, at(p.gx, k), k + 1);
    }
    __syncthreads();
    for (int64_t k = p.cols() - 1; k >= 0; --k) {
      T* g = last;
      int64_t from = p.start(outputs, k);
      if (stores) {
        for (int64_t j = from + warp; j < p.start(outputs, k + 1); j += kWarps) {
          put(g + j * step, at(p.slope, j) * x[k * step] + at(p.offset, j), k);
        }
      }
      __syncthreads();
      for (int64_t i = outputs - 1; i >= 0; --i) {
        const int64_t size = p.size(i), above = p.size(i + 1), first = p.start(i, k), end = p.start(i, k + 1);
        const T* in = g;
        g -= size * step;
        for (int64_t u = first + warp; u < end; u += kWarps) {
          const T* weight = static_cast<const T*>(p.weights[i + 1]) + from * size + u;
          T a = weighted(weight, size, in + from * step, step, above - from, share);
          if (p.rectified(i) && at(p.activations[i], u) <= T(0)) a = 0;
          if (p.adds(i) && i + 2 < outputs) a += in[(above + u) * step];
          if (stores) put(g + u * step, a, k);
        }
        __syncthreads();
        from = first;
      }
      if (k && warp == 0) {
        const T* weight = static_cast<const T*>(p.weights[0]) + from * p.cols() + k - 1;
        const T a = weighted(weight, p.cols(), g + from * step, step, p.size(0) - from, share);
        if (stores) x[(k - 1) * step] += a;
      }
      __syncthreads();
    }
  }
}

template <class T>
void launch(const Problem& p, const Forward& out, cudaStream_t stream) {
  const int64_t size = bytes(p.dtype, p.kept);
  kernel<T><<<int(blocks(p.rows, size)), kThreads, size_t(p.workspace ? 0 : size), stream>>>(p, spline::Constants<T>(p),
                                                                                             out);
}
template <class T>
void launch(const Sweep& p, const Backward& out, cudaStream_t stream) {
  kernel<T><<<int(blocks(p.rows, 0)), kThreads, 0, stream>>>(p, out);
}

template <class P, class Out>
void run_rows(const P& p, const Out& out, void* stream) {
  if (p.rows == 0) return;  // a launch of no blocks is an error
  p.dtype == 0 ? launch<float>(p, out, cudaStream_t(stream)) : launch<double>(p, out, cudaStream_t(stream));
  check(cudaGetLastError());
}

}  // namespace

int64_t workspace(int dtype, int64_t rows, int64_t kept) {
  const int64_t size = bytes(dtype, kept);
  return size > kSharedMemory ? blocks(rows, size) * size : 0;
}

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Sweep& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::autoregressive_inverse
