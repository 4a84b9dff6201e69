#include "bernoulli/launch.h"
#include "bernoulli/math.h"
#include "philox.h"
#include "rows.cuh"

namespace genfuse::bernoulli::cuda {
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

void run(const Problem& p, const Forward& out, void* stream) {
  if (p.n == 0) return;  // a launch of no blocks is an error
  dispatch(p.dtype, [&](auto storage) {
    const int64_t blocks = (p.n + kThreads * kWords - 1) / (kThreads * kWords);
    draw_kernel<decltype(storage)>
        <<<int(std::min<int64_t>(blocks, kMostBlocks)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, out);
  });
  check(cudaGetLastError());
}

}  // namespace genfuse::bernoulli::cuda
