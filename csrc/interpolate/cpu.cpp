#include "bindings.h"
#include "interpolate/launch.h"
#include "interpolate/math.h"
#include "noise.h"

namespace genfuse::interpolate::cpu {
namespace {

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Noise<T, Uniform<T>> stream(p.seed ? *p.seed : 0, end - begin);
  for (int64_t i = begin; i < end; ++i) {
    const T eps = p.epsilon ? *element<T>(p.epsilon, i) : *stream.at(i, 1);
    const S *real = element<S>(p.real, i * p.real_stride), *fake = element<S>(p.fake, i * p.fake_stride);
    S* x = element<S>(out.x, i * p.cols);
    if (p.real && p.fake) {
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(load(real[j])), T(load(fake[j])), eps));
    } else if (p.real) {
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(load(real[j])), T(0), eps));
    } else {
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < p.cols; ++j) store(x[j], between(T(0), T(load(fake[j])), eps));
    }
  }
}

#define GENFUSE_ROWS(S)                                                                         \
  GENFUSE_SIMD void rows(S, const Problem& p, const Forward& out, int64_t begin, int64_t end) { \
    rows_of<S>(p, out, begin, end);                                                             \
  }
GENFUSE_ROWS(float)
GENFUSE_ROWS(double)
GENFUSE_ROWS(Half)
GENFUSE_ROWS(BFloat16)
#undef GENFUSE_ROWS

}  // namespace

void run(const Problem& p, const Forward& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

}  // namespace genfuse::interpolate::cpu

namespace genfuse {

void bind_interpolate(pybind11::module_& m) {
  using namespace interpolate;
  m.def("interpolate", [](int dtype, Address real, int64_t real_stride, Address fake, int64_t fake_stride, Address seed,
                          Address epsilon, int64_t rows, int64_t cols, Address x, int device, Address stream) {
    const Problem p{dtype,       at<void>(real),     at<void>(fake),    real_stride,
                    fake_stride, at<uint64_t>(seed), at<void>(epsilon), rows,
                    cols};
    GENFUSE_RUN(p, Forward{at<void>(x)}, device, stream);
  });
}

}  // namespace genfuse
