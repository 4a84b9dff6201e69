#include "bernoulli/launch.h"
#include "bernoulli/math.h"
#include "bindings.h"
#include "noise.h"

namespace genfuse::bernoulli::cpu {
namespace {

template <class S>
GENFUSE_HD void draw_blocks(const Problem& problem, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T, Uniform<T>> stream(*problem.seed, kBlock);
  T buffer[kBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, n = std::min(kBlock, problem.n - first);
    const T* u = stream.at(first, n);
    const T* p = read(element<S>(problem.p, first), n, buffer);
    S* x = element<S>(out.x, first);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(x[j], draw(p[j], u[j]));
  }
}

#define GENFUSE_BLOCKS(S)                                                                         \
  GENFUSE_SIMD void blocks(S, const Problem& p, const Forward& out, int64_t begin, int64_t end) { \
    draw_blocks<S>(p, out, begin, end);                                                           \
  }
GENFUSE_BLOCKS(float)
GENFUSE_BLOCKS(double)
GENFUSE_BLOCKS(Half)
GENFUSE_BLOCKS(BFloat16)
#undef GENFUSE_BLOCKS

}  // namespace

void run(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows((p.n + kBlock - 1) / kBlock, kBlock,
             [&](int64_t begin, int64_t end) { blocks(storage, p, out, begin, end); });
  });
}

}  // namespace genfuse::bernoulli::cpu

namespace genfuse {

void bind_bernoulli(pybind11::module_& m) {
  using namespace bernoulli;
  m.def("bernoulli", [](int dtype, Address p, Address seed, int64_t n, Address x, int device, Address stream) {
    const Problem problem{dtype, at<void>(p), at<uint64_t>(seed), n};
    GENFUSE_RUN(problem, Forward{at<void>(x)}, device, stream);
  });
}

}  // namespace genfuse
