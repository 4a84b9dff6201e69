#include "interpolate/launch.h"
#include "interpolate/math.h"
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

template <class S>
__global__ void __launch_bounds__(kThreads, kResident<S>) kernel(Problem p, Forward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const T eps = eps_of<T>(p, row);
    const S* real = static_cast<const S*>(out.real) + row * out.real_stride;
    const S* fake = static_cast<const S*>(out.fake) + row * out.fake_stride;
    S* x = static_cast<S*>(out.x) + row * p.cols;
    for (auto at = columns<S>(p.cols, real, fake, x); at; ++at) {
      const auto of_real = at.load(real), of_fake = at.load(fake);
      at.store(x, [&](int k) { return between(of_real[k], of_fake[k], eps); });
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, kFewerResident<S>) kernel(Problem p, Backward out) {
  using T = compute_t<S>;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const T eps = eps_of<T>(p, row);
    const S* g = static_cast<const S*>(out.g) + row * p.cols;
    S *greal = static_cast<S*>(out.greal) + row * p.cols, *gfake = static_cast<S*>(out.gfake) + row * p.cols;
    for (auto at = columns<S>(p.cols, g, greal, gfake); at; ++at) {
      const auto of_g = at.load(g);
      at.store(greal, [&](int k) { return grad(of_g[k], eps).real; });
      at.store(gfake, [&](int k) { return grad(of_g[k], eps).fake; });
    }
  }
}

template <class Out>
void run(const Problem& p, const Out& out, void* stream) {
  run_columns(p, out, stream, [](auto s) -> Kernel<Problem, Out> { return kernel<decltype(s)>; });
}

}  // namespace

void run_cuda(const Problem& p, const Forward& out, void* stream) { run(p, out, stream); }
void run_cuda(const Problem& p, const Backward& out, void* stream) { run(p, out, stream); }

}  // namespace genfuse::interpolate
