#include "diffuse/launch.h"
#include "diffuse/math.h"
#include "rows.cuh"

namespace genfuse::diffuse {

template <class T>
__device__ void finish(const Problem&, const Backward& out, int64_t row, const T (&sums)[2]) {
  static_cast<T*>(out.galpha)[row] = sums[0];
  static_cast<T*>(out.gsigma)[row] = sums[1];
}

namespace {

// A thread takes neighbours, whatever rows they belong to.
template <Target kind, class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>) forward_kernel(Problem p, Forward out) {
  constexpr int kWidth = kPack<S>;
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  const int64_t end = p.rows * p.cols;
  for (int64_t first = first_row<1>() * kWidth; first < end; first += row_step<1>() * kWidth) {
    const Range range = {int(min(end - first, int64_t(kWidth)))};
    int64_t row = quotient(first, p.cols), column = first - row * p.cols;
    Pack<S, kWidth> x0;
    T alpha[kWidth], sigma[kWidth], eps[kWidth];
    if (column + kWidth <= p.cols) {
      x0 = load_pack<kWidth>(static_cast<const S*>(p.x0) + row * p.x0_stride + column, range);
      alpha[0] = static_cast<const T*>(out.alpha)[row], sigma[0] = static_cast<const T*>(out.sigma)[row];
      GENFUSE_UNROLL(kWidth)
      for (int k = 1; k < kWidth; ++k) alpha[k] = alpha[0], sigma[k] = sigma[0];
    } else {
      GENFUSE_UNROLL(kWidth)
      for (int k = 0; k < kWidth; ++k) {
        if (!range.has(k)) continue;
        x0.at[k] = static_cast<const S*>(p.x0)[row * p.x0_stride + column];
        alpha[k] = static_cast<const T*>(out.alpha)[row], sigma[k] = static_cast<const T*>(out.sigma)[row];
        if (++column == p.cols) column = 0, ++row;
      }
    }
    eps_at<S, true>(p.noise, key, first, range, eps);
    store_pack<kWidth>(static_cast<S*>(out.x_t) + first, range,
                       [&](int k) { return sample(x0[k], eps[k], alpha[k], sigma[k]); });
    if constexpr (kind != Target::x0) {
      store_pack<kWidth>(static_cast<S*>(out.target) + first, range,
                         [&](int k) { return target<kind>(x0[k], eps[k], alpha[k], sigma[k]); });
    }
  }
}

// The same where a row is a number of whole packs, and the noise is to be made: as in the training of an image model.
template <Target kind, class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>)
    packs_kernel(Problem p, Forward out, uint32_t packs, Divisor per_row) {
  constexpr int kWidth = kPack<S>;
  using T = compute_t<S>;
  const uint64_t key = *p.seed;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < packs; i += gridDim.x * kThreads) {
    const int64_t first = int64_t(i) * kWidth;
    const auto x0 = load_pack<kWidth>(static_cast<const S*>(p.x0) + first, {kWidth}, true);
    const uint32_t row = per_row(i);
    const T alpha = static_cast<const T*>(out.alpha)[row], sigma = static_cast<const T*>(out.sigma)[row];
    T eps[kWidth];
    eps_at<S, true>(nullptr, key, first, {kWidth}, eps);
    store_pack<kWidth>(static_cast<S*>(out.x_t) + first, {kWidth}, true,
                       [&](int k) { return sample(x0[k], eps[k], alpha, sigma); });
    if constexpr (kind != Target::x0) {
      store_pack<kWidth>(static_cast<S*>(out.target) + first, {kWidth}, true,
                         [&](int k) { return target<kind>(x0[k], eps[k], alpha, sigma); });
    }
  }
}

template <bool is_v, class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>) backward_kernel(Problem p, Backward out) {
  constexpr int kWidth = kPack<S>;
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  const int64_t piece = int64_t(blockIdx.y) * blockDim.x + threadIdx.x, step = int64_t(gridDim.y) * blockDim.x;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* x0_row = static_cast<const S*>(p.x0) + row * p.x0_stride;
    const int64_t begin = row * p.cols, end = begin + p.cols;
    T sums[2] = {};
    for (int64_t first = (begin / kWidth + piece) * kWidth; first < end; first += step * kWidth) {
      const Range range = {int(min(end - first, int64_t(kWidth))), 1, int(max(begin - first, int64_t(0)))};
      const auto x0 = load_pack<kWidth>(x0_row + (first - begin), range);
      const auto gx_t = load_pack<kWidth>(static_cast<const S*>(out.gx_t) + first, range);
      Pack<S, kWidth> gv = {};
      if constexpr (is_v) gv = load_pack<kWidth>(static_cast<const S*>(out.gv) + first, range);
      T eps[kWidth];
      eps_at<S, true>(p.noise, key, first, range, eps);
      GENFUSE_UNROLL(kWidth)
      for (int k = 0; k < kWidth; ++k) {
        if (!range.has(k)) continue;
        const Grad<T> g = grad<is_v>(gx_t[k], gv[k], x0[k], eps[k]);
        sums[0] += g.alpha;
        sums[1] += g.sigma;
      }
    }
    finish_row(p, out, row, sums);
  }
}

template <Target kind>
void launch(const Problem& p, const Forward& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t packs = (p.rows * p.cols + kPack<S> - 1) / kPack<S>;
    const bool aligned = (uintptr_t(p.x0) | uintptr_t(out.x_t) | uintptr_t(out.target)) % 16 == 0;
    if (!p.noise && aligned && p.x0_stride == p.cols && p.cols % kPack<S> == 0 && packs >> 31 == 0) {
      const Divisor per_row(uint32_t(std::max(p.cols / kPack<S>, int64_t(1))));
      return for_threads(std::min(packs, kEvenBlocks * kThreads), [&](int blocks) {
        packs_kernel<kind, S><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out, uint32_t(packs), per_row);
      });
    }
    for_threads(packs,
                [&](int blocks) { forward_kernel<kind, S><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out); });
  });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  switch (Target(out.kind)) {
    case Target::x0: return launch<Target::x0>(p, out, stream);
    case Target::noise: return launch<Target::noise>(p, out, stream);
    case Target::v: return launch<Target::v>(p, out, stream);
    case Target::velocity: return launch<Target::velocity>(p, out, stream);
  }
}
void run_cuda(const Problem& p, const Backward& out, void* stream) {
  run_sums<2>(p, out, stream, [&](auto s) -> Kernel<Problem, Backward> {
    using S = decltype(s);
    return out.gv ? backward_kernel<true, S> : backward_kernel<false, S>;
  });
}

}  // namespace genfuse::diffuse
