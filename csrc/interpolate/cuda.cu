#include "interpolate/launch.h"
#include "interpolate/math.h"
#include "rows.cuh"

namespace genfuse::interpolate::cuda {
namespace {

template <int Lanes, class S>
__global__ void kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  const uint64_t key = *p.seed;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const T e = epsilon<T>(row, key);
    if (lane<Lanes>() == 0) static_cast<T*>(out.epsilon)[row] = e;
    const S* real = static_cast<const S*>(p.real) + row * p.real_stride;
    const S* fake = static_cast<const S*>(p.fake) + row * p.fake_stride;
    S* x = static_cast<S*>(out.x) + row * p.cols;
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) {
      store(x[j], between(T(load(real[j])), T(load(fake[j])), e));
    }
  }
}

}  // namespace

void run(const Problem& p, const Forward& out, void* stream) {
  if (p.rows == 0) return;  // a launch of no blocks is an error
  const auto queue = static_cast<cudaStream_t>(stream);
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (p.cols <= 1024) {
      kernel<32, S><<<blocks_for<32>(p.rows), kThreads, 0, queue>>>(p, out);
    } else {
      kernel<kThreads, S><<<blocks_for<kThreads>(p.rows), kThreads, 0, queue>>>(p, out);
    }
  });
  check(cudaGetLastError());
}

}  // namespace genfuse::interpolate::cuda
