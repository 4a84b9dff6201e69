#include "diffuse/launch.h"
#include "diffuse/math.h"
#include "philox.h"
#include "rows.cuh"

namespace genfuse::diffuse {
namespace {

// A thread takes the four elements of one counter, whatever rows they belong to.
constexpr int kWords = 4;

// The noise of elements [first, first + kWords); from memory only as far as they lie before `end`.
template <class S, class T>
__device__ void eps_at(const Problem& p, uint64_t key, int64_t first, int64_t end, T eps[kWords]) {
  if (!p.noise) return normals(key, uint64_t(first) / kWords, eps);
  GENFUSE_UNROLL(kWords)
  for (int k = 0; k < kWords; ++k) {
    if (first + k < end) eps[k] = load(static_cast<const S*>(p.noise)[first + k]);
  }
}

template <Target kind, class S>
__global__ void forward_kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  const int64_t end = p.rows * p.cols, step = int64_t(gridDim.x) * kThreads * kWords;
  for (int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWords; first < end; first += step) {
    T eps[kWords];
    eps_at<S>(p, key, first, end, eps);
    int64_t row = first / p.cols, column = first - row * p.cols;
    GENFUSE_UNROLL(kWords)
    for (int k = 0; k < kWords; ++k) {
      if (first + k >= end) continue;
      const T x0 = load(static_cast<const S*>(p.x0)[row * p.x0_stride + column]);
      const T alpha = static_cast<const T*>(out.alpha)[row], sigma = static_cast<const T*>(out.sigma)[row];
      store(static_cast<S*>(out.x_t)[first + k], sample(x0, eps[k], alpha, sigma));
      if constexpr (kind != Target::x0) {
        store(static_cast<S*>(out.target)[first + k], target<kind>(x0, eps[k], alpha, sigma));
      }
      if (++column == p.cols) column = 0, ++row;
    }
  }
}

template <int Lanes, bool is_v, class S>
__global__ void backward_kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  const uint64_t key = p.seed ? *p.seed : 0;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const S* x0 = static_cast<const S*>(p.x0) + row * p.x0_stride;
    const int64_t begin = row * p.cols, end = begin + p.cols;
    T galpha = 0, gsigma = 0;
    for (int64_t first = (begin / kWords + lane<Lanes>()) * kWords; first < end; first += Lanes * kWords) {
      T eps[kWords];
      eps_at<S>(p, key, first, end, eps);
      GENFUSE_UNROLL(kWords)
      for (int k = 0; k < kWords; ++k) {
        const int64_t i = first + k;
        if (i < begin || i >= end) continue;
        const T gx_t = load(static_cast<const S*>(out.gx_t)[i]);
        const T gv = is_v ? T(load(static_cast<const S*>(out.gv)[i])) : T(0);
        const Grad<T> g = grad<is_v>(gx_t, gv, T(load(x0[i - begin])), eps[k]);
        galpha += g.alpha;
        gsigma += g.sigma;
      }
    }
    galpha = row_sum<Lanes>(galpha);
    gsigma = row_sum<Lanes>(gsigma);
    if (lane<Lanes>() == 0) {
      static_cast<T*>(out.galpha)[row] = galpha;
      static_cast<T*>(out.gsigma)[row] = gsigma;
    }
  }
}

template <Target kind>
void launch(const Problem& p, const Forward& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    for_threads((p.rows * p.cols + kWords - 1) / kWords, [&](int blocks) {
      forward_kernel<kind, decltype(storage)><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out);
    });
  });
}

template <bool is_v>
void launch(const Problem& p, const Backward& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, 32 * kWords * 8, [&](auto lanes, int blocks) {
      backward_kernel<lanes, is_v, decltype(storage)><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out);
    });
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
  out.gv ? launch<true>(p, out, stream) : launch<false>(p, out, stream);
}

}  // namespace genfuse::diffuse
