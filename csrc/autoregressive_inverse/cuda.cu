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

// What a block keeps: x and all hidden units as [unit][row], and of one column the parameters as [row][parameter].
int64_t kept(const Problem& p) { return (p.cols + p.units + p.width()) * kRows * (p.dtype == 0 ? 4 : 8); }

int64_t blocks(const Problem& p) {
  const int64_t tiles = (p.rows + kRows - 1) / kRows;
  return std::min(tiles, kept(p) > kSharedMemory ? kMostBlocksInMemory : kMostBlocks);
}

template <class T>
struct Value {
  T x, logdet;
};

template <Kind kind, class T>
__device__ Value<T> undo_affine(T y, const T* params) {
  const T s = affine_coupling::log_scale<kind>(params[0]).value, t = params[1];
  return {affine_coupling::apply(affine_coupling::factor(y, t, true), affine_coupling::scale<kind>(s, true), t, true),
          -s};
}

template <class T>
__device__ Value<T> undo(const Problem& p, const spline::Constants<T>& c, T y, const T* params) {
  if (p.spline.bins) {
    const spline::cuda::Coordinate<T> at(p.spline, c, params, y);
    const spline::Value<T> v = spline::value<true>(y, at.folded, at.bin, c);
    return {v.y, v.logdet};
  }
  switch (Kind(p.scale)) {
    case Kind::tanh: return undo_affine<Kind::tanh>(y, params);
    case Kind::exp: return undo_affine<Kind::exp>(y, params);
    default: return undo_affine<Kind::sigmoid>(y, params);
  }
}

template <class T>
__global__ void kernel(Problem p, spline::Constants<T> c, Forward out) {
  extern __shared__ double shared[];
  const int64_t own = (p.cols + p.units + p.width()) * kRows;
  T* x = out.workspace ? static_cast<T*>(out.workspace) + blockIdx.x * own : reinterpret_cast<T*>(shared);
  T* params = x + (p.cols + p.units) * kRows;
  const int warp = threadIdx.x / 32, r = threadIdx.x % kRows, share = threadIdx.x % 32 / kRows;
  for (int64_t tile = blockIdx.x; tile * kRows < p.rows; tile += gridDim.x) {
    const int64_t row = tile * kRows + r;
    const bool in_use = row < p.rows;
    T sum = 0;  // of the first kRows threads, each of which finishes a row
    for (int64_t k = 0; k < p.cols; ++k) {
      const T* in = x;
      T* units = x + p.cols * kRows;
      int64_t known = k, inputs = p.cols;
      for (int64_t i = 0; i <= p.hidden; ++i) {
        const bool last = i == p.hidden;
        const Layer layer = p.layers[i];
        const int64_t first = p.start(i, k), end = p.start(i, k + 1);
        for (int64_t u = first + warp; u < end; u += kWarps) {  // the same for all lanes of a warp
          const T* weight = static_cast<const T*>(layer.weight) + u * inputs;
          T a = 0;
          for (int64_t j = share; j < known; j += kShares) a += in[j * kRows + r] * weight[j];
          for (int d = kRows; d < 32; d *= 2) a += __shfl_xor_sync(~0u, a, d);
          if (share) continue;
          a += static_cast<const T*>(layer.bias)[u];
          if (i == 0 && p.context && in_use) a += static_cast<const T*>(p.context)[row * p.context_stride + u];
          if (last) {
            params[r * p.width() + u - first] = a;
          } else {
            units[u * kRows + r] = a < T(0) ? T(0) : a;  // NaN stays NaN
          }
        }
        __syncthreads();
        in = units, known = end, inputs = layer.units, units += layer.units * kRows;
      }
      if (threadIdx.x < kRows) {
        const T y = in_use ? static_cast<const T*>(p.y)[row * p.y_stride + k] : T(0);
        const Value<T> v = undo(p, c, y, params + r * p.width());
        x[k * kRows + r] = v.x;
        sum += v.logdet;
        if (in_use) static_cast<T*>(out.x)[row * p.cols + k] = v.x;
      }
      __syncthreads();
    }
    if (threadIdx.x < kRows && in_use) static_cast<T*>(out.logdet)[row] = sum;
  }
}

template <class T>
void launch(const Problem& p, const Forward& out, cudaStream_t stream) {
  const int64_t bytes = out.workspace ? 0 : kept(p);
  kernel<T><<<int(blocks(p)), kThreads, size_t(bytes), stream>>>(p, spline::Constants<T>(p.spline), out);
}

}  // namespace

int64_t workspace(const Problem& p) { return kept(p) > kSharedMemory ? blocks(p) * kept(p) : 0; }

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  if (p.rows == 0) return;  // a launch of no blocks is an error
  if (p.dtype == 0) {
    launch<float>(p, out, static_cast<cudaStream_t>(stream));
  } else {
    launch<double>(p, out, static_cast<cudaStream_t>(stream));
  }
  check(cudaGetLastError());
}

}  // namespace genfuse::autoregressive_inverse
