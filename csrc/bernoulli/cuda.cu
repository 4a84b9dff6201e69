#include "bernoulli/launch.h"
#include "bernoulli/math.h"
#include "philox.h"
#include "rows.cuh"

namespace genfuse::bernoulli {
namespace {

constexpr int kWords = 4;  // of one counter, for as many elements of one thread

template <class S>
__global__ void draw_kernel(Problem problem, Forward out) {
  using T = compute_t<S>;
  const uint64_t key = *problem.seed;
  const int64_t step = int64_t(gridDim.x) * kThreads * kWords;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWords; i < problem.n; i += step) {
    const Words words = philox(uint64_t(i) / kWords, key);
    GENFUSE_UNROLL(kWords)
    for (int k = 0; k < kWords; ++k) {
      if (i + k >= problem.n) continue;
      const T p = load(static_cast<const S*>(problem.p)[i + k]);
      store(static_cast<S*>(out.x)[i + k], draw(p, uniform<T>(words.w[k])));
    }
  }
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    for_threads((p.n + kWords - 1) / kWords, [&](int blocks) {
      draw_kernel<decltype(storage)><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out);
    });
  });
}

}  // namespace genfuse::bernoulli
