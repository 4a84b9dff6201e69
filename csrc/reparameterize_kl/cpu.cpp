#include "bindings.h"
#include "noise.h"
#include "reparameterize_kl/launch.h"
#include "reparameterize_kl/math.h"

namespace genfuse::reparameterize_kl::cpu {
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
  T sigmas[kBlock], mu_buffer[kBlock], logvar_buffer[kBlock], eps_buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    T sum = 0;
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
      const int64_t n = std::min(kBlock, p.cols - j0);
      const T* mu = read(element<S>(p.mu, i * p.mu_stride + j0), n, mu_buffer);
      const T* logvar = read(element<S>(p.logvar, i * p.logvar_stride + j0), n, logvar_buffer);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) {
        sigmas[j] = sigma(logvar[j]);
        sum += kl(mu[j], logvar[j], sigmas[j]);
      }
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + i) * p.cols + j0;
        const T* eps = eps_at<S>(p.noise, stream, first, n, eps_buffer);
        S* z = element<S>(out.z, first);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) store(z[j], sample(mu[j], sigmas[j], eps[j]));
      }
    }
    *element<T>(out.kl, i) = sum;
  }
}

template <class S>
GENFUSE_HD void backward_rows(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T> stream = noise_of<T>(p, end - begin);
  T gz_sum[kBlock], gz_eps_sum[kBlock], mu_buffer[kBlock], logvar_buffer[kBlock], eps_buffer[kBlock], gz_buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const T gkl = *element<T>(out.gkl, i);
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
      const int64_t n = std::min(kBlock, p.cols - j0);
      for (int64_t j = 0; j < n; ++j) gz_sum[j] = gz_eps_sum[j] = 0;
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t first = (s * p.rows + i) * p.cols + j0;
        const T* eps = eps_at<S>(p.noise, stream, first, n, eps_buffer);
        const T* gz = read(element<S>(out.gz, first), n, gz_buffer);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          gz_sum[j] += gz[j];
          gz_eps_sum[j] += gz[j] * eps[j];
        }
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

#define GENFUSE_ROWS(S)                                                                          \
  GENFUSE_SIMD void rows(S, const Problem& p, const Forward& out, int64_t begin, int64_t end) {  \
    forward_rows<S>(p, out, begin, end);                                                         \
  }                                                                                              \
  GENFUSE_SIMD void rows(S, const Problem& p, const Backward& out, int64_t begin, int64_t end) { \
    backward_rows<S>(p, out, begin, end);                                                        \
  }
GENFUSE_ROWS(float)
GENFUSE_ROWS(double)
GENFUSE_ROWS(Half)
GENFUSE_ROWS(BFloat16)
#undef GENFUSE_ROWS

template <class Out>
void run_rows(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols * p.samples, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

}  // namespace

void run(const Problem& p, const Forward& out) { run_rows(p, out); }
void run(const Problem& p, const Backward& out) { run_rows(p, out); }

}  // namespace genfuse::reparameterize_kl::cpu

namespace genfuse {

void bind_reparameterize_kl(pybind11::module_& m) {
  using namespace reparameterize_kl;
  m.def("reparameterize_kl",
        [](int dtype, Address mu, int64_t mu_stride, Address logvar, int64_t logvar_stride, Address seed, Address noise,
           int64_t rows, int64_t cols, int64_t samples, Address z, Address kl, int device, Address stream) {
          const Problem p{
              dtype, at<void>(mu), at<void>(logvar), mu_stride, logvar_stride, at<uint64_t>(seed), at<void>(noise),
              rows,  cols,         samples};
          GENFUSE_RUN(p, (Forward{at<void>(z), at<void>(kl)}), device, stream);
        });
  m.def("reparameterize_kl_backward",
        [](int dtype, Address mu, int64_t mu_stride, Address logvar, int64_t logvar_stride, Address seed, Address noise,
           int64_t rows, int64_t cols, int64_t samples, Address gz, Address gkl, Address gmu, Address glogvar,
           int device, Address stream) {
          const Problem p{
              dtype, at<void>(mu), at<void>(logvar), mu_stride, logvar_stride, at<uint64_t>(seed), at<void>(noise),
              rows,  cols,         samples};
          GENFUSE_RUN(p, (Backward{at<void>(gz), at<void>(gkl), at<void>(gmu), at<void>(glogvar)}), device, stream);
        });
}

}  // namespace genfuse
