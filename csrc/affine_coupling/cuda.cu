#include "affine_coupling/launch.h"
#include "affine_coupling/math.h"
#include "rows.cuh"

namespace genfuse::affine_coupling {
namespace {

// Whether a moved column passes through after all.
__device__ bool kept(const Problem& p, int64_t j) { return p.mask && p.mask[j]; }

// The j-th of the columns that pass through.
__device__ int64_t passing(const Problem& p, int64_t j) { return j < p.start ? j : j + p.moved; }

template <Kind kind, class S, class T = compute_t<S>>
__device__ LogScale<T> log_scale_at(const Problem& p, S raw, int64_t j) {
  const T c = kind == Kind::factored ? static_cast<const T*>(p.factor)[j] : T(p.constant);
  return log_scale<kind>(T(load(raw)), c);
}

constexpr int kAhead = 4;  // columns of a lane that are loaded before the first is looked at

// Copies the columns that pass through.
template <class S>
__device__ void pass(const Problem& p, const S* from, S* to) {
  const int64_t n = p.cols - p.moved, lanes = blockDim.x;
  for (int64_t j0 = threadIdx.x; j0 < n; j0 += kAhead * lanes) {
    S at[kAhead];
    GENFUSE_UNROLL(kAhead)
    for (int k = 0; k < kAhead; ++k) {
      if (j0 + k * lanes < n) at[k] = from[passing(p, j0 + k * lanes)];
    }
    GENFUSE_UNROLL(kAhead)
    for (int k = 0; k < kAhead; ++k) {
      if (j0 + k * lanes < n) to[passing(p, j0 + k * lanes)] = at[k];
    }
  }
}

// Of the columns that move, those of a lane from j0 on.
template <class S>
__device__ void load_ahead(const S* from, int64_t j0, int64_t n, int64_t step, S (&to)[kAhead]) {
  const int64_t lanes = blockDim.x;
  GENFUSE_UNROLL(kAhead)
  for (int k = 0; k < kAhead; ++k) {
    if (const int64_t j = j0 + k * lanes; j < n) to[k] = from[j * step];
  }
}

// The rows of one example, wherever they lie: in memory, or in place in shared memory.
template <class S>
struct ForwardRows {
  const S *x, *raw, *shift;
  S* y;
};
template <class S>
struct BackwardRows {
  const S *x, *raw, *shift, *gy;
  S *gx, *graw, *gshift;
};

template <Kind kind, class S>
__device__ void transform(const Problem& p, const Forward& out, int64_t row, const ForwardRows<S>& at) {
  using T = compute_t<S>;
  const int64_t moved = row + 1 < p.rows ? p.moved : p.last, lanes = blockDim.x;
  T* by_element = p.by_element ? static_cast<T*>(out.logdet) + row * p.cols : nullptr;
  for (int64_t j = threadIdx.x; by_element && j < p.cols - p.moved; j += blockDim.x) by_element[passing(p, j)] = T(0);
  double sum = 0;  // across steps, of which a long row has thousands for each lane
  for (int64_t j0 = threadIdx.x; j0 < moved; j0 += kAhead * lanes) {
    S xs[kAhead], raws[kAhead], shifts[kAhead];
    T ahead = 0;
    load_ahead(at.x + p.start, j0, moved, 1, xs);
    load_ahead(at.raw, j0, moved, p.step, raws);
    load_ahead(at.shift, j0, moved, p.step, shifts);
    GENFUSE_UNROLL(kAhead)
    for (int k = 0; k < kAhead; ++k) {
      const int64_t j = j0 + k * lanes;
      if (j >= moved) continue;
      const bool keep = kept(p, j);
      const T s = keep ? T(0) : log_scale_at<kind>(p, raws[k], j).value;
      const T t = keep ? T(0) : T(load(shifts[k]));
      const T f = factor(T(load(xs[k])), t, p.inverse);
      store(at.y[p.start + j], apply(f, scale<kind>(s, p.inverse), t, p.inverse));
      const T logdet = p.inverse ? -s : s;
      if (by_element) by_element[p.start + j] = logdet;
      ahead += logdet;
    }
    sum += ahead;
  }
  if (p.by_element) return;
  const T logdet = row_sum(T(sum));
  if (threadIdx.x == 0) static_cast<T*>(out.logdet)[row] = logdet;
}

template <Kind kind, class S>
__device__ void transform(const Problem& p, const Backward& out, int64_t row, const BackwardRows<S>& at) {
  using T = compute_t<S>;
  const int64_t moved = row + 1 < p.rows ? p.moved : p.last, lanes = blockDim.x;
  const T* glogdet = static_cast<const T*>(out.glogdet) + (p.by_element ? row * p.cols + p.start : row);
  for (int64_t j0 = threadIdx.x; j0 < moved; j0 += kAhead * lanes) {
    S xs[kAhead], raws[kAhead], shifts[kAhead], gys[kAhead];
    load_ahead(at.x + p.start, j0, moved, 1, xs);
    load_ahead(at.raw, j0, moved, p.step, raws);
    load_ahead(at.shift, j0, moved, p.step, shifts);
    load_ahead(at.gy + p.start, j0, moved, 1, gys);
    GENFUSE_UNROLL(kAhead)
    for (int k = 0; k < kAhead; ++k) {
      const int64_t j = j0 + k * lanes;
      if (j >= moved) continue;
      const bool keep = kept(p, j);
      const LogScale<T> s = log_scale_at<kind>(p, raws[k], j);
      const T f = factor(T(load(xs[k])), T(load(shifts[k])), p.inverse), g = load(gys[k]);
      const Grad<T> of =
          grad(g, glogdet[p.by_element ? j : 0], f, scale<kind>(s.value, p.inverse), s.derivative, p.inverse);
      store(at.gx[p.start + j], keep ? g : of.x);
      store(at.graw[j * p.gstep], keep ? T(0) : of.raw);
      store(at.gshift[j * p.gstep], keep ? T(0) : of.shift);
    }
  }
}

template <Kind kind, class S>
__global__ void kernel(Problem p, Forward out) {
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const ForwardRows<S> at = {
        static_cast<const S*>(p.x) + row * p.x_stride, static_cast<const S*>(p.params) + row * p.params_stride,
        static_cast<const S*>(p.shift) + row * p.shift_stride, static_cast<S*>(out.y) + row * p.cols};
    pass(p, at.x, at.y);
    transform<kind>(p, out, row, at);
  }
}

template <Kind kind, class S>
__global__ void kernel(Problem p, Backward out) {
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const BackwardRows<S> at = {static_cast<const S*>(p.x) + row * p.x_stride,
                                static_cast<const S*>(p.params) + row * p.params_stride,
                                static_cast<const S*>(p.shift) + row * p.shift_stride,
                                static_cast<const S*>(out.gy) + row * p.cols,
                                static_cast<S*>(out.gx) + row * p.cols,
                                static_cast<S*>(out.gparams) + row * p.gstride,
                                static_cast<S*>(out.gshift) + row * p.gstride};
    pass(p, at.gy, at.gx);
    transform<kind>(p, out, row, at);
  }
}

// The same through shared memory: a block copies `size` rows of each array there, and changes them in place.
template <Kind kind, class S>
__global__ void tile_kernel(Problem p, Forward out, int size) {
  S *const xs = dynamic_shared<S>(), *const params = xs + size * p.cols;
  for (int64_t first = int64_t(blockIdx.x) * size; first < p.rows; first += int64_t(gridDim.x) * size) {
    const int64_t n = min(int64_t(size), p.rows - first);
    load_tile(xs, static_cast<const S*>(p.x) + first * p.cols, n * p.cols);
    load_tile(params, static_cast<const S*>(p.params) + first * p.params_stride, n * p.params_stride);
    wait_for_tiles();
    for (int64_t r = threadIdx.y; r < n; r += blockDim.y) {
      S *const x = xs + r * p.cols, *const raw = params + r * p.params_stride;
      transform<kind>(p, out, first + r, ForwardRows<S>{x, raw, raw + (p.step == 1 ? p.moved : 1), x});
    }
    __syncthreads();
    store_tile(static_cast<S*>(out.y) + first * p.cols, xs, n * p.cols);
    __syncthreads();
  }
}

template <Kind kind, class S>
__global__ void tile_kernel(Problem p, Backward out, int size) {
  S *const xs = dynamic_shared<S>(), *const gys = xs + size * p.cols, *const params = gys + size * p.cols;
  for (int64_t first = int64_t(blockIdx.x) * size; first < p.rows; first += int64_t(gridDim.x) * size) {
    const int64_t n = min(int64_t(size), p.rows - first);
    load_tile(xs, static_cast<const S*>(p.x) + first * p.cols, n * p.cols);
    load_tile(gys, static_cast<const S*>(out.gy) + first * p.cols, n * p.cols);
    load_tile(params, static_cast<const S*>(p.params) + first * p.params_stride, n * p.params_stride);
    wait_for_tiles();
    for (int64_t r = threadIdx.y; r < n; r += blockDim.y) {
      S *const gy = gys + r * p.cols, *const raw = params + r * p.params_stride;
      S* const shift = raw + (p.step == 1 ? p.moved : 1);
      const BackwardRows<S> at = {xs + r * p.cols, raw, shift, gy, gy, raw, shift};
      transform<kind>(p, out, first + r, at);
    }
    __syncthreads();
    store_tile(static_cast<S*>(out.gx) + first * p.cols, gys, n * p.cols);
    store_tile(static_cast<S*>(out.gparams) + first * p.gstride, params, n * p.gstride);
    __syncthreads();
  }
}

constexpr int64_t kTile = 24 * 1024;  // bytes of a block: what several of a multiprocessor have side by side

bool aligned(const Problem& p) { return (uintptr_t(p.x) | uintptr_t(p.params)) % 16 == 0; }
bool aligned(const Forward& out) { return uintptr_t(out.y) % 16 == 0; }
bool aligned(const Backward& out) { return (uintptr_t(out.gy) | uintptr_t(out.gx) | uintptr_t(out.gparams)) % 16 == 0; }
int64_t width(const Problem& p, const Forward&) { return p.cols + 2 * p.moved; }
int64_t width(const Problem& p, const Backward&) { return 2 * p.cols + 2 * p.moved; }

// Rows of a tile, whose number is a multiple of 8, so that all begin at 16 bytes; 0 where rows have to stay in memory,
// as one has gaps after it, or eight are too long.
template <class S, class Out>
int64_t tile_rows(const Problem& given, const Problem& p, const Out& out) {
  const bool packed = p.cols > 1 && p.x_stride == p.cols && !given.shift && p.params_stride == 2 * p.moved;
  if (!packed || p.last != p.moved || !aligned(p) || !aligned(out)) return 0;
  const int64_t fit = kTile / int64_t(width(p, out) * sizeof(S)), enough = (p.rows + kManyBlocks - 1) / kManyBlocks;
  return std::min(fit, (enough + 7) / 8 * 8) / 8 * 8;
}

// Lanes of a row there: for few columns each, and such that neighbouring rows rarely meet in one bank.
inline int tile_lanes(const Problem& p) {
  int lanes = 1;
  while (lanes < 16 && (8 * lanes < p.moved || p.cols % (4 * lanes) == 0)) lanes *= 2;
  return lanes;
}

template <Kind kind, class Out>
void launch(const Problem& given, const Out& given_out, void* stream) {
  const Problem p = arranged(given, 128);
  const Out out = arranged(given_out, p);
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t size = tile_rows<S>(given, p, out);
    if (size == 0) {
      return for_rows<1>(p.rows, p.cols, 1024, [&](int lanes, int blocks) {
        kernel<kind, S><<<blocks, threads_for(lanes), 0, cudaStream_t(stream)>>>(p, out);
      });
    }
    const int blocks = int(std::min((p.rows + size - 1) / size, kMostBlocks));
    const size_t bytes = size_t(size * width(p, out)) * sizeof(S);
    tile_kernel<kind, S><<<blocks, threads_for(tile_lanes(p)), bytes, cudaStream_t(stream)>>>(p, out, int(size));
    check(cudaGetLastError());
  });
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  switch (Kind(p.kind)) {
    case Kind::tanh: return launch<Kind::tanh>(p, out, stream);
    case Kind::exp: return launch<Kind::exp>(p, out, stream);
    case Kind::sigmoid: return launch<Kind::sigmoid>(p, out, stream);
    case Kind::softclip: return launch<Kind::softclip>(p, out, stream);
    case Kind::floored: return launch<Kind::floored>(p, out, stream);
    case Kind::factored: return launch<Kind::factored>(p, out, stream);
  }
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::affine_coupling
