#include "reparameterize_kl/launch.h"
#include "reparameterize_kl/math.h"
#include "rows.cuh"

namespace genfuse::reparameterize_kl {

template <class T>
__device__ void finish(const Problem&, const Forward& out, int64_t row, const T (&kl)[1]) {
  static_cast<T*>(out.kl)[row] = kl[0];
}

namespace {

// Calls f(j, range) for the columns of this lane, kPack<S> neighbours at a time: `Aligned`, from where a counter of the
// noise begins, which in the first of them may be before the row does.
template <bool Aligned, class S, class F>
__device__ void for_packs(int64_t row, int64_t cols, F f) {
  const int64_t step = int64_t(gridDim.y) * blockDim.x * kPack<S>, ahead = Aligned ? row * cols % kPack<S> : 0;
  const int64_t first = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kPack<S> - ahead;
  for (int64_t j = first; j < cols; j += step) {
    f(j, Range{int(min(cols - j, int64_t(kPack<S>))), 1, int(max(-j, int64_t(0)))});
  }
}

template <bool Aligned, class S>
__global__ void __launch_bounds__(kThreads, Aligned ? kFewerResident<S> : 2) kernel(Problem p, Forward out) {
  constexpr int kWidth = kPack<S>;
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* mu_row = static_cast<const S*>(p.mu) + row * p.mu_stride;
    const S* logvar_row = static_cast<const S*>(p.logvar) + row * p.logvar_stride;
    T sum[1] = {};
    for_packs<Aligned, S>(row, p.cols, [&](int64_t j, Range range) {
      const auto mu = load_pack<kWidth>(mu_row + j, range), logvar = load_pack<kWidth>(logvar_row + j, range);
      T sigmas[kWidth], eps[kWidth];
      GENFUSE_UNROLL(kWidth)
      for (int k = 0; k < kWidth; ++k) {
        sigmas[k] = sigma(logvar[k]);
        if (range.has(k)) sum[0] += kl(mu[k], logvar[k], sigmas[k]);
      }
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + row) * p.cols + j;
        eps_at<S, Aligned>(p.noise, key, first, range, eps);
        store_pack<kWidth>(static_cast<S*>(out.z) + first, range,
                           [&](int k) { return sample(mu[k], sigmas[k], eps[k]); });
      }
    });
    finish_row(p, out, row, sum);
  }
}

template <bool Aligned, class S>
__global__ void __launch_bounds__(kThreads, Aligned ? kFewerResident<S> : 2) kernel(Problem p, Backward out) {
  constexpr int kWidth = kPack<S>;
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const S* mu_row = static_cast<const S*>(p.mu) + row * p.mu_stride;
    const S* logvar_row = static_cast<const S*>(p.logvar) + row * p.logvar_stride;
    const T gkl = static_cast<const T*>(out.gkl)[row];
    for_packs<Aligned, S>(row, p.cols, [&](int64_t j, Range range) {
      const auto mu = load_pack<kWidth>(mu_row + j, range), logvar = load_pack<kWidth>(logvar_row + j, range);
      T gz_sum[kWidth] = {}, gz_eps_sum[kWidth] = {}, eps[kWidth];
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + row) * p.cols + j;
        const auto gz = load_pack<kWidth>(static_cast<const S*>(out.gz) + first, range);
        eps_at<S, Aligned>(p.noise, key, first, range, eps);
        GENFUSE_UNROLL(kWidth)
        for (int k = 0; k < kWidth; ++k) {
          gz_sum[k] += gz[k];
          gz_eps_sum[k] += gz[k] * eps[k];
        }
      }
      const int64_t to = row * p.cols + j;
      const auto of = [&](int k) { return grad(gz_sum[k], gz_eps_sum[k], gkl, mu[k], sigma(logvar[k])); };
      store_pack<kWidth>(static_cast<S*>(out.gmu) + to, range, [&](int k) { return of(k).mu; });
      store_pack<kWidth>(static_cast<S*>(out.glogvar) + to, range, [&](int k) { return of(k).logvar; });
    });
  }
}

// Whether all samples of a row begin at the same place of a counter.
template <class S>
bool aligned(const Problem& p) {
  return p.samples == 1 || p.cols % kPack<S> == 0;
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  using Of = Kernel<Problem, Forward>;
  run_sums<1>(p, out, stream, [&](auto s) -> Of {
    return aligned<decltype(s)>(p) ? Of(kernel<true, decltype(s)>) : Of(kernel<false, decltype(s)>);
  });
}
void run_cuda(const Problem& p, const Backward& out, void* stream) {
  using Of = Kernel<Problem, Backward>;
  run_columns(p, out, stream, [&](auto s) -> Of {
    return aligned<decltype(s)>(p) ? Of(kernel<true, decltype(s)>) : Of(kernel<false, decltype(s)>);
  });
}

}  // namespace genfuse::reparameterize_kl
