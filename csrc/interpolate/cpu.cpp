#include "bindings.h"
#include "interpolate/launch.h"
#include "interpolate/math.h"
#include "rows.h"

namespace genfuse::interpolate::cpu {
namespace {

template <class S>
GENFUSE_HD void mix_rows(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  for (int64_t row = begin; row < end; ++row) {
    const T e = epsilon<T>(row, *p.seed);
    *element<T>(out.epsilon, row) = e;
    const S* real = element<S>(p.real, row * p.real_stride);
    const S* fake = element<S>(p.fake, row * p.fake_stride);
    S* x = element<S>(out.x, row * p.cols);
#pragma omp simd
    for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(load(real[j])), T(load(fake[j])), e));
  }
}

#define GENFUSE_MIX(S)                                                                         \
  GENFUSE_SIMD void mix(S, const Problem& p, const Forward& out, int64_t begin, int64_t end) { \
    mix_rows<S>(p, out, begin, end);                                                           \
  }
GENFUSE_MIX(float)
GENFUSE_MIX(double)
GENFUSE_MIX(Half)
GENFUSE_MIX(BFloat16)
#undef GENFUSE_MIX

}  // namespace

void run(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { mix(storage, p, out, begin, end); });
  });
}

}  // namespace genfuse::interpolate::cpu

namespace genfuse {

void bind_interpolate(pybind11::module_& m) {
  using namespace interpolate;
  m.def("interpolate", [](int dtype, Address real, int64_t real_stride, Address fake, int64_t fake_stride, Address seed,
                          int64_t rows, int64_t cols, Address x, Address epsilon, int device, Address stream) {
    const Problem p{dtype, at<void>(real), real_stride, at<void>(fake), fake_stride, at<uint64_t>(seed), rows, cols};
    GENFUSE_RUN(p, (Forward{at<void>(x), at<void>(epsilon)}), device, stream);
  });
}

}  // namespace genfuse
