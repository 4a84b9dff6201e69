#include "bindings.h"
#include "noise.h"
#include "reparameterize_kl/launch.h"
#include "reparameterize_kl/math.h"

namespace genfuse::reparameterize_kl {
namespace {

template <class T>
Noise<T> noise_of(const Problem& p, int64_t rows) {
  // With several samples the next elements that a row needs lie elsewhere: make no more than it asks for.
  return Noise<T>(p.seed ? *p.seed : 0, p.samples == 1 ? std::min(rows * p.cols, kBlock) : 0);
}

template <class S>
GENFUSE_HD void forward_rows(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T> stream = noise_of<T>(p, end - begin);
  T sigmas[kBlock], terms[kBlock], mu_buffer[kBlock], logvar_buffer[kBlock], eps_buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;  // of blocks
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
      const int64_t n = std::min(kBlock, p.cols - j0);
      const T* mu = read(element<S>(p.mu, i * p.mu_stride + j0), n, mu_buffer);
      const T* logvar = read(element<S>(p.logvar, i * p.logvar_stride + j0), n, logvar_buffer);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        sigmas[j] = sigma(logvar[j]);
        terms[j] = kl(mu[j], logvar[j], sigmas[j]);
      }
      sum += sum_of(terms, n);
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + i) * p.cols + j0;
        const T* eps = eps_at<S>(p.noise, stream, first, n, eps_buffer);
        S* z = element<S>(out.z, first);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) store(z[j], sample(mu[j], sigmas[j], eps[j]));
      }
    }
    *element<T>(out.kl, i) = T(sum);
  }
}

template <class S>
GENFUSE_HD void backward_rows(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T> stream = noise_of<T>(p, end - begin);
  double gz_total[kBlock], gz_eps_total[kBlock];  // of so many samples: long sums would lose digits
  constexpr int64_t kSamplesOfSum = 32;
  T gz_sum[kBlock], gz_eps_sum[kBlock], mu_buffer[kBlock], logvar_buffer[kBlock], eps_buffer[kBlock], gz_buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const T gkl = *element<T>(out.gkl, i);
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
      const int64_t n = std::min(kBlock, p.cols - j0);
      for (int64_t j = 0; j < n; ++j) gz_sum[j] = gz_eps_sum[j] = 0;
      if (p.samples > kSamplesOfSum) std::fill_n(gz_total, n, 0), std::fill_n(gz_eps_total, n, 0);
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + i) * p.cols + j0;
        const T* eps = eps_at<S>(p.noise, stream, first, n, eps_buffer);
        const T* gz = read(element<S>(out.gz, first), n, gz_buffer);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          gz_sum[j] += gz[j];
          gz_eps_sum[j] += gz[j] * eps[j];
        }
        if (p.samples <= kSamplesOfSum || ((s + 1) % kSamplesOfSum && s + 1 < p.samples)) continue;
        for (int64_t j = 0; j < n; ++j) {
          gz_total[j] += gz_sum[j], gz_eps_total[j] += gz_eps_sum[j];
          gz_sum[j] = gz_eps_sum[j] = 0;
        }
      }
      for (int64_t j = 0; p.samples > kSamplesOfSum && j < n; ++j) {
        gz_sum[j] = T(gz_total[j]), gz_eps_sum[j] = T(gz_eps_total[j]);
      }
      const T* mu = read(element<S>(p.mu, i * p.mu_stride + j0), n, mu_buffer);
      const T* logvar = read(element<S>(p.logvar, i * p.logvar_stride + j0), n, logvar_buffer);
      S* gmu = element<S>(out.gmu, i * p.cols + j0);
      S* glogvar = element<S>(out.glogvar, i * p.cols + j0);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const Grad<T> g = grad(gz_sum[j], gz_eps_sum[j], gkl, mu[j], sigma(logvar[j]));
        store(gmu[j], g.mu);
        store(glogvar[j], g.logvar);
      }
    }
  }
}
GENFUSE_SIMD_LOOPS(rows, Forward, forward_rows<S>)
GENFUSE_SIMD_LOOPS(rows, Backward, backward_rows<S>)

}  // namespace

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols * p.samples, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem = fields(&P::dtype, &P::mu, &P::mu_stride, &P::logvar, &P::logvar_stride, &P::seed, &P::noise,
                              &P::rows, &P::cols, &P::samples, &P::partial);
  define(m, "reparameterize_kl", problem, fields(&Forward::z, &Forward::kl));
  using B = Backward;
  define(m, "reparameterize_kl_backward", problem, fields(&B::gz, &B::gkl, &B::gmu, &B::glogvar));
}

}  // namespace genfuse::reparameterize_kl
