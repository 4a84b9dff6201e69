#include "interpolate/launch.h"
#include "interpolate/math.h"
#include "philox.h"
#include "rows.cuh"

namespace genfuse::interpolate {
namespace {

// Every lane makes its row's number anew: that is a few dozen instructions, and no traffic between lanes.
template <class T>
__device__ T eps_of(const Problem& p, int64_t row) {
  if (p.epsilon) return static_cast<const T*>(p.epsilon)[row];
  const Words words = philox(uint64_t(row) / 4, *p.seed);
  const int word = int(row & 3);
  return uniform<T>(word == 0 ? words.w[0] : word == 1 ? words.w[1] : word == 2 ? words.w[2] : words.w[3]);
}

template <int Lanes, class S>
__global__ void kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row<Lanes>(); row < p.rows; row += row_step<Lanes>()) {
    const T eps = eps_of<T>(p, row);
    const S* real = static_cast<const S*>(p.real) + row * p.real_stride;
    const S* fake = static_cast<const S*>(p.fake) + row * p.fake_stride;
    S* x = static_cast<S*>(out.x) + row * p.cols;
    for (int64_t j = lane<Lanes>(); j < p.cols; j += Lanes) {
      store(x[j], between(p.real ? T(load(real[j])) : T(0), p.fake ? T(load(fake[j])) : T(0), eps));
    }
  }
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, 1024, [&](auto lanes, int blocks) {
      kernel<lanes, decltype(storage)><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, out);
    });
  });
}

}  // namespace genfuse::interpolate
