#include "rational_quadratic_spline/coordinate.cuh"
#include "rows.cuh"

namespace genfuse::rational_quadratic_spline {
namespace {

using namespace cuda;

// Neighbouring threads take neighbouring coordinates, whose parameters are P apart: a warp moves those of all of its
// coordinates together, by way of shared memory. A row there has an odd number of places, so that no two threads meet
// in one bank; without a fixed number of bins there is none, and threads reach for the parameters themselves.
template <int Lanes, int Bins, class S>
struct Tile {
  static constexpr int kPlaces = (2 * Bins) | 1, kWarp = Lanes < 32 ? Lanes : 32;
  static constexpr bool kStaged = Bins > 0 && sizeof(S) * kPlaces* kThreads <= 40960;

  // Calls f(place, parameter) for widths and heights of this warp's columns from j - lane on.
  template <class F>
  static __device__ void each(const Problem& p, int64_t j, int64_t cols, F f) {
    const int own = threadIdx.x % kWarp, rows = (threadIdx.x - own) * kPlaces;
    const int64_t first = j - own, count = (cols - first < kWarp ? cols - first : kWarp) * 2 * Bins;
    __syncwarp();
    for (int64_t i = own; i < count; i += kWarp) {
      f(rows + i / (2 * Bins) * kPlaces + i % (2 * Bins), (first + i / (2 * Bins)) * p.width() + i % (2 * Bins));
    }
    __syncwarp();
  }
  // Takes them from their row; returns those of the thread.
  static __device__ const S* load(const Problem& p, const S* row, int64_t j, int64_t cols, S* shared) {
    if constexpr (!kStaged) return row + j * p.width();
    each(p, j, cols, [&](int64_t place, int64_t parameter) { shared[place] = row[parameter]; });
    return shared + threadIdx.x * kPlaces;
  }
  // Takes them back, changed.
  static __device__ void store(const Problem& p, S* row, int64_t j, int64_t cols, const S* shared) {
    if constexpr (!kStaged) return;
    each(p, j, cols, [&](int64_t place, int64_t parameter) { row[parameter] = shared[place]; });
  }
};

// Columns in steps of which all lanes of a warp take part, in or out of the row.
template <int Lanes, int Bins, class S>
__global__ void kernel(Problem p, Constants<compute_t<S>> all, Forward out) {
  using T = compute_t<S>;
  using Tiles = Tile<Lanes, Bins, S>;
  __shared__ S shared[Tiles::kStaged ? Tiles::kPlaces * kThreads : 1];
  const int64_t rows = (p.rows + kThreads / Lanes - 1) / (kThreads / Lanes) * (kThreads / Lanes);
  for (int64_t row = first_row<Lanes>(); row < rows; row += row_step<Lanes>()) {
    const int64_t cols = row < p.rows ? p.cols : 0;
    const S* params = static_cast<const S*>(p.params) + row * p.params_stride;
    double sum = 0;  // of a long row a lane has thousands of terms
    for (int64_t j = lane<Lanes>(); j - lane<Lanes>() < p.cols; j += Lanes) {
      const S* raw = Tiles::load(p, params, j, cols, shared);
      if (j >= cols) continue;
      const Constants<T> c = all.of(p, row * p.cols + j);
      const T x = load(static_cast<const S*>(p.x)[row * p.x_stride + j]);
      const Coordinate<S, Bins> at(p, c, c.tails, raw, params + j * p.width() + 2 * p.bins, x);
      const Value<T> v = p.inverse ? value<true>(x, at.folded, at.bin, c) : value<false>(x, at.folded, at.bin, c);
      store(static_cast<S*>(out.y)[row * p.cols + j], v.y);
      sum += v.logdet;
    }
    const T logdet = row_sum<Lanes>(T(sum));
    if (lane<Lanes>() == 0 && row < p.rows) static_cast<T*>(out.logdet)[row] = logdet;
  }
}

// From the gradients for a bin's corner and size on one axis, those for the raw parameters of the axis.
template <class Shares, class S, class T>
__device__ void raw_gradients(const Shares& shares, const Axis<T>& axis, T low, T high, int64_t bin,
                              const Picked<T>& picked, T gknot, T gsize, S* to) {
  const T mean = gknot * picked.before + gsize * picked.here;
  shares.each(0, [&](int64_t k) {
    const T g = k < bin ? gknot : (k == bin ? gsize : T(0));
    const T slope = shares.slope(k);
    store(to[k], axis.raw(shares.share(k), g - mean, low, high) * slope);
  });
}

template <int Lanes, int Bins, class S>
__global__ void kernel(Problem p, Constants<compute_t<S>> all, Backward out) {
  using T = compute_t<S>;
  using Tiles = Tile<Lanes, Bins, S>;
  __shared__ S shared[Tiles::kStaged ? Tiles::kPlaces * kThreads : 1];
  const int64_t rows = (p.rows + kThreads / Lanes - 1) / (kThreads / Lanes) * (kThreads / Lanes);
  for (int64_t row = first_row<Lanes>(); row < rows; row += row_step<Lanes>()) {
    const int64_t cols = row < p.rows ? p.cols : 0;
    const S* params = static_cast<const S*>(p.params) + row * p.params_stride;
    S* gparams = static_cast<S*>(out.gparams) + row * p.cols * p.width();
    for (int64_t j = lane<Lanes>(); j - lane<Lanes>() < p.cols; j += Lanes) {
      const S* raw = Tiles::load(p, params, j, cols, shared);
      if (j < cols) {
        const int64_t i = row * p.cols + j, bins = p.bins;
        const Constants<T> c = all.of(p, i);
        const T x = load(static_cast<const S*>(p.x)[row * p.x_stride + j]);
        const T gy = load(static_cast<const S*>(out.gy)[i]), glogdet = static_cast<const T*>(out.glogdet)[row];
        const Coordinate<S, Bins> at(p, c, c.tails, raw, params + j * p.width() + 2 * bins, x);
        const Grad<T> g =
            p.inverse ? grad<true>(gy, glogdet, at.folded, at.bin) : grad<false>(gy, glogdet, at.folded, at.bin);
        store(static_cast<S*>(out.gx)[i], g.gx);
        S* d = gparams + j * p.width() + 2 * bins;
        S* to = Tiles::kStaged ? shared + threadIdx.x * Tiles::kPlaces : gparams + j * p.width();
        raw_gradients(at.widths, c.x, c.left, c.right, at.k, at.w, g.x, g.w, to);
        raw_gradients(at.heights, c.y, c.bottom, c.top, at.k, at.h, g.y, g.h, to + bins);
        const T gd0 = g.d0 * at.d0.slope, gd1 = g.d1 * at.d1.slope;
        const int64_t first = p.tails == kLinear ? 1 : 0, count = p.width() - 2 * bins;
        for (int64_t k = 0; k < count; ++k) {
          const int64_t knot = k + first;
          const bool given = c.tails == kLinear && (knot == 0 || knot == bins);
          T gd = at.k == knot ? gd0 : T(0);
          if (at.k + 1 == knot) gd += gd1;
          if (c.tails == kCircular && knot == 0 && at.k + 1 == bins) gd += gd1;
          store(d[k], given || (c.tails == kCircular && knot == bins) ? T(0) : gd);
        }
      }
      Tiles::store(p, gparams, j, cols, shared);
    }
  }
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for_rows<4>(p.rows, p.cols, 32 * 8, [&](auto lanes, int blocks) {
      const auto launch = [&](auto bins) {
        kernel<lanes, bins, S><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, Constants<compute_t<S>>(p), out);
      };
      if (p.bins == 8) return launch(std::integral_constant<int, 8>());
      if constexpr (sizeof(S) < 8) {  // 16 of 8 bytes do not fit a thread's registers
        if (p.bins == 16) return launch(std::integral_constant<int, 16>());
      }
      launch(std::integral_constant<int, 0>());
    });
  });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::rational_quadratic_spline
