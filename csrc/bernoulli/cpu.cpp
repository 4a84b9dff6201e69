#include "bernoulli/launch.h"
#include "bernoulli/math.h"
#include "bindings.h"
#include "noise.h"

namespace genfuse::bernoulli {
namespace {

template <class S>
GENFUSE_HD void draw_blocks(const Problem& problem, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T, Uniform<T>> stream(*problem.seed, 0);  // each block asks for all that it takes
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
GENFUSE_SIMD_LOOPS(blocks, Forward, draw_blocks<S>)

}  // namespace

void run_cpu(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_blocks(p.n, [&](int64_t begin, int64_t end) { blocks(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  define(m, "bernoulli", fields(&P::dtype, &P::p, &P::seed, &P::n), fields(&Forward::x));
}

}  // namespace genfuse::bernoulli
