#include "philox.h"
#include "reparameterize_kl/launch.h"
#include "reparameterize_kl/math.h"
#include "rows.cuh"

namespace genfuse::reparameterize_kl {
namespace {

// A lane takes four neighbouring columns, so that the four normals of one counter serve it. Loops over them are
// unrolled and guarded, never cut short: arrays that are indexed by a variable lie in memory.
constexpr int kColumns = 4;

// The noise of elements [first, first + kColumns) of z; from memory only as far as `n` of them exist.
template <class S, class T>
__device__ void eps_at(const Problem& p, uint64_t key, int64_t first, int n, T eps[kColumns]) {
  if (p.noise) {
    GENFUSE_UNROLL(kColumns)
    for (int k = 0; k < kColumns; ++k) {
      if (k < n) eps[k] = load(static_cast<const S*>(p.noise)[first + k]);
    }
    return;
  }
  const int shift = int(first & 3);
  T ahead[8];
  normals(key, uint64_t(first) / 4, ahead);
  if (shift) normals(key, uint64_t(first) / 4 + 1, ahead + 4);
  GENFUSE_UNROLL(kColumns)
  for (int k = 0; k < kColumns; ++k) {
    eps[k] = shift == 0 ? ahead[k] : shift == 1 ? ahead[k + 1] : shift == 2 ? ahead[k + 2] : ahead[k + 3];
  }
}

template <int Lanes, class S>
__global__ void kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* mu_row = static_cast<const S*>(p.mu) + row * p.mu_stride;
    const S* logvar_row = static_cast<const S*>(p.logvar) + row * p.logvar_stride;
    T sum = 0;
    for (int64_t j = lane<Lanes>() * kColumns; j < p.cols; j += Lanes * kColumns) {
      const int n = int(min(int64_t(kColumns), p.cols - j));
      T mu[kColumns], sigmas[kColumns], eps[kColumns];
      GENFUSE_UNROLL(kColumns)
      for (int k = 0; k < kColumns; ++k) {
        if (k >= n) continue;
        const T logvar = load(logvar_row[j + k]);
        mu[k] = load(mu_row[j + k]);
        sigmas[k] = sigma(logvar);
        sum += kl(mu[k], logvar, sigmas[k]);
      }
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + row) * p.cols + j;
        eps_at<S>(p, key, first, n, eps);
        GENFUSE_UNROLL(kColumns)
        for (int k = 0; k < kColumns; ++k) {
          if (k < n) store(static_cast<S*>(out.z)[first + k], sample(mu[k], sigmas[k], eps[k]));
        }
      }
    }
    sum = row_sum<Lanes>(sum);
    if (lane<Lanes>() == 0) static_cast<T*>(out.kl)[row] = sum;
  }
}

template <int Lanes, class S>
__global__ void kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* mu_row = static_cast<const S*>(p.mu) + row * p.mu_stride;
    const S* logvar_row = static_cast<const S*>(p.logvar) + row * p.logvar_stride;
    const T gkl = static_cast<const T*>(out.gkl)[row];
    for (int64_t j = lane<Lanes>() * kColumns; j < p.cols; j += Lanes * kColumns) {
      const int n = int(min(int64_t(kColumns), p.cols - j));
      T gz_sum[kColumns] = {}, gz_eps_sum[kColumns] = {}, eps[kColumns];
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + row) * p.cols + j;
        eps_at<S>(p, key, first, n, eps);
        GENFUSE_UNROLL(kColumns)
        for (int k = 0; k < kColumns; ++k) {
          if (k >= n) continue;
          const T gz = load(static_cast<const S*>(out.gz)[first + k]);
          gz_sum[k] += gz;
          gz_eps_sum[k] += gz * eps[k];
        }
      }
      GENFUSE_UNROLL(kColumns)
      for (int k = 0; k < kColumns; ++k) {
        if (k >= n) continue;
        const T sigma_k = sigma(T(load(logvar_row[j + k])));
        const Grad<T> g = grad(gz_sum[k], gz_eps_sum[k], gkl, T(load(mu_row[j + k])), sigma_k);
        store(static_cast<S*>(out.gmu)[row * p.cols + j + k], g.mu);
        store(static_cast<S*>(out.glogvar)[row * p.cols + j + k], g.logvar);
      }
    }
  }
}

template <class Out>
void run_rows(const Problem& p, const Out& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, 32 * kColumns * 8, [&](auto lanes, int blocks) {
      kernel<lanes, decltype(storage)><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out);
    });
  });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run_rows(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run_rows(p, out, stream); }

}  // namespace genfuse::reparameterize_kl
