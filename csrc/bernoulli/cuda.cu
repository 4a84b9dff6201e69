#include "bernoulli/launch.h"
#include "bernoulli/math.h"
#include "rows.cuh"

namespace genfuse::bernoulli {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads, kResident<S>) draw_kernel(Problem problem, Forward out) {
  constexpr int kWidth = kPack<S>;
  using T = compute_t<S>;
  const uint64_t key = *problem.seed;
  for (int64_t i = first_row<1>() * kWidth; i < problem.n; i += row_step<1>() * kWidth) {
    const Range range = {int(min(problem.n - i, int64_t(kWidth)))};
    const auto p = load_pack<kWidth>(static_cast<const S*>(problem.p) + i, range);
    Words words[kWidth / 4];
    GENFUSE_UNROLL(kWidth / 4)
    for (int c = 0; c < kWidth / 4; ++c) words[c] = philox(uint64_t(i / 4 + c), key);
    const auto drawn = [&](int k) { return draw(p[k], uniform<T>(words[k / 4].w[k % 4])); };
    store_pack<kWidth>(static_cast<S*>(out.x) + i, range, drawn);
  }
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    for_threads((p.n + kPack<S> - 1) / kPack<S>,
                [&](int blocks) { draw_kernel<S><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out); });
  });
}

}  // namespace genfuse::bernoulli
