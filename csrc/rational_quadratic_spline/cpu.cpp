#include <vector>

#include "bindings.h"
#include "rational_quadratic_spline/launch.h"
#include "rational_quadratic_spline/math.h"
#include "rows.h"

namespace genfuse::rational_quadratic_spline::cpu {
namespace {

// Coordinates worked on at a time, across rows. Their parameters are turned so that one parameter of all lanes lies
// together; loops over bins stand outside of those over lanes, which are vectorised.
constexpr int kLanes = 32;

template <class T>
GENFUSE_HD void softmax(T* e, int64_t bins) {
  alignas(64) T most[kLanes], sum[kLanes];
  for (int l = 0; l < kLanes; ++l) most[l] = e[l], sum[l] = 0;
  for (int64_t k = 1; k < bins; ++k) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) most[l] = e[k * kLanes + l] > most[l] ? e[k * kLanes + l] : most[l];
  }
  for (int64_t k = 0; k < bins; ++k) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      e[k * kLanes + l] = exp_(e[k * kLanes + l] - most[l]);
      sum[l] += e[k * kLanes + l];
    }
  }
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) sum[l] = T(1) / sum[l];
  for (int64_t k = 0; k < bins; ++k) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) e[k * kLanes + l] *= sum[l];
  }
}

// Of one axis: the share of the bin that each lane is in, and that of all before it.
template <class T>
struct Picked {
  alignas(64) T before[kLanes], here[kLanes];
};

// Finds the bins, and numbers them as T so that all lanes are of one width.
template <class T>
GENFUSE_HD void search(const T* share, int64_t bins, const Axis<T>& axis, const T* at, T* bin, Picked<T>& to) {
  alignas(64) T sum[kLanes];
  for (int l = 0; l < kLanes; ++l) bin[l] = to.before[l] = 0, sum[l] = to.here[l] = share[l];
  for (int64_t k = 1; k < bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T next = share[k * kLanes + l];
      const bool past = at[l] >= axis.knot(number, sum[l]);
      bin[l] = past ? number : bin[l];
      to.before[l] = past ? sum[l] : to.before[l];
      to.here[l] = past ? next : to.here[l];
      sum[l] += next;
    }
  }
}

template <class T>
GENFUSE_HD void pick(const T* share, int64_t bins, const T* bin, Picked<T>& to) {
  for (int l = 0; l < kLanes; ++l) to.before[l] = 0, to.here[l] = share[l];
  alignas(64) T sum[kLanes];
  for (int l = 0; l < kLanes; ++l) sum[l] = share[l];
  for (int64_t k = 1; k < bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T next = share[k * kLanes + l];
      const bool past = bin[l] >= number;
      to.before[l] = past ? sum[l] : to.before[l];
      to.here[l] = past ? next : to.here[l];
      sum[l] += next;
    }
  }
}

template <class S>
struct Block {
  using T = compute_t<S>;
  const Problem& p;
  const Constants<T> c;
  T* raw;  // 3 bins + 1 rows of kLanes: raw parameters, of which widths and heights become shares
  int n;   // lanes in use
  int64_t row[kLanes];
  alignas(64) T x[kLanes], at[kLanes], bin[kLanes], d0[kLanes], d1[kLanes];
  Picked<T> w, h;

  GENFUSE_HD Block(const Problem& p, T* raw) : p(p), c(p), raw(raw) {}

  // Takes up the n coordinates from `first` on, counted over all rows.
  GENFUSE_HD void load_at(int64_t first, int64_t count) {
    n = int(std::min<int64_t>(kLanes, count));
    const int64_t bins = p.bins, inner = p.width() - 2 * bins;
    T* d = raw + 2 * bins * kLanes;
    int64_t i = first / p.cols, j = first % p.cols;
    for (int l = 0; l < kLanes; ++l) {
      row[l] = i;
      const S* from = element<S>(p.params, i * p.params_stride + j * p.width());
      x[l] = load(*element<S>(p.x, i * p.x_stride + j));
      for (int64_t k = 0; k < 2 * bins; ++k) raw[k * kLanes + l] = load(from[k]);
      T* to = d + (p.tails == kLinear ? kLanes : 0);
      for (int64_t k = 0; k < inner; ++k) to[k * kLanes + l] = load(from[2 * bins + k]);
      if (l < n - 1 && ++j == p.cols) j = 0, ++i;  // lanes that are not in use repeat the last
    }
    if (p.tails == kNone) return;
    for (int l = 0; l < kLanes; ++l) {
      if (p.tails == kLinear) d[l] = T(p.edge);
      d[bins * kLanes + l] = d[l];
    }
  }

  GENFUSE_HD void find() {
    const int64_t bins = p.bins;
    softmax(raw, bins);
    softmax(raw + bins * kLanes, bins);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) at[l] = fold(x[l], c).at;
    if (c.inverse) {
      search(raw + bins * kLanes, bins, c.y, at, bin, h);
      pick(raw, bins, bin, w);
    } else {
      search(raw, bins, c.x, at, bin, w);
      pick(raw + bins * kLanes, bins, bin, h);
    }
    const T* d = raw + 2 * bins * kLanes;
    for (int l = 0; l < kLanes; ++l) d0[l] = d[l], d1[l] = d[kLanes + l];
    for (int64_t k = 1; k < bins; ++k) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const bool past = bin[l] >= T(k);
        d0[l] = past ? d[k * kLanes + l] : d0[l];
        d1[l] = past ? d[(k + 1) * kLanes + l] : d1[l];
      }
    }
  }

  GENFUSE_HD Bin<T> at_lane(int l) const {
    return {c.x.knot(bin[l], w.before[l]), c.y.knot(bin[l], h.before[l]),   c.x.size(w.here[l]),
            c.y.size(h.here[l]),           c.min_derivative + softplus(d0[l]), c.min_derivative + softplus(d1[l])};
  }
};

template <class S, class T>
GENFUSE_HD void compute(const Problem& p, const Forward& out, T* scratch, int64_t begin, int64_t end) {
  Block<S> block(p, scratch);
  alignas(64) T y[kLanes], logdet[kLanes];
  T* sums = element<T>(out.logdet, 0);
  for (int64_t i = begin; i < end; ++i) sums[i] = 0;
  double sum = 0;
  for (int64_t first = begin * p.cols; first < end * p.cols; first += kLanes) {
    block.load_at(first, end * p.cols - first);
    block.find();
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Value<T> v = value(block.x[l], fold(block.x[l], block.c), block.at_lane(l), block.c);
      y[l] = v.y, logdet[l] = v.logdet;
    }
    int64_t j = first % p.cols;
    for (int l = 0; l < block.n; ++l) {
      store(*element<S>(out.y, first + l), y[l]);
      sum += logdet[l];
      if (++j == p.cols) sums[block.row[l]] = T(sum), sum = 0, j = 0;
    }
  }
}

// Turns the shares of one axis into the gradients of their raw parameters.
template <class T>
GENFUSE_HD void raw_gradients(T* share, int64_t bins, const Axis<T>& axis, const T* bin, const Picked<T>& picked,
                              const T* gknot, const T* gsize) {
  for (int64_t k = 0; k < bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T mean = gknot[l] * picked.before[l] + gsize[l] * picked.here[l];
      const T g = number < bin[l] ? gknot[l] : (number == bin[l] ? gsize[l] : T(0));
      share[k * kLanes + l] = axis.raw(share[k * kLanes + l], g - mean);
    }
  }
}

template <class S, class T>
GENFUSE_HD void compute(const Problem& p, const Backward& out, T* scratch, int64_t begin, int64_t end) {
  Block<S> block(p, scratch);
  const int64_t bins = p.bins, width = p.width();
  T *raw = scratch, *d = raw + 2 * bins * kLanes;
  alignas(64) T gy[kLanes], glogdet[kLanes], gx[kLanes], gxk[kLanes], gyk[kLanes], gw[kLanes], gh[kLanes], gd0[kLanes],
      gd1[kLanes];
  for (int64_t first = begin * p.cols; first < end * p.cols; first += kLanes) {
    block.load_at(first, end * p.cols - first);
    block.find();
    for (int l = 0; l < kLanes; ++l) {
      gy[l] = l < block.n ? load(*element<S>(out.gy, first + l)) : T(0);
      glogdet[l] = *element<T>(out.glogdet, block.row[l]);
    }
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Grad<T> g = grad(gy[l], glogdet[l], fold(block.x[l], block.c), block.at_lane(l), block.c);
      gx[l] = g.gx, gxk[l] = g.x, gyk[l] = g.y, gw[l] = g.w, gh[l] = g.h;
      gd0[l] = g.d0 * sigmoid(block.d0[l]), gd1[l] = g.d1 * sigmoid(block.d1[l]);
    }
    raw_gradients(raw, bins, block.c.x, block.bin, block.w, gxk, gw);
    raw_gradients(raw + bins * kLanes, bins, block.c.y, block.bin, block.h, gyk, gh);
    for (int64_t k = 0; k <= bins; ++k) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        d[k * kLanes + l] = (block.bin[l] == T(k) ? gd0[l] : T(0)) + (block.bin[l] == T(k - 1) ? gd1[l] : T(0));
      }
    }
    if (p.tails == kCircular) {
      for (int l = 0; l < kLanes; ++l) d[l] += d[bins * kLanes + l];
    }
    for (int l = 0; l < block.n; ++l) {
      store(*element<S>(out.gx, first + l), gx[l]);
      S* to = element<S>(out.gparams, (first + l) * width);
      for (int64_t k = 0; k < 2 * bins; ++k) store(to[k], raw[k * kLanes + l]);
      const T* from = d + (p.tails == kLinear ? kLanes : 0);
      for (int64_t k = 0; k < width - 2 * bins; ++k) store(to[2 * bins + k], from[k * kLanes + l]);
    }
  }
}

#define GENFUSE_ROWS(S, Out)                                                                                        \
  GENFUSE_SIMD void rows(S, const Problem& p, const Out& out, compute_t<S>* scratch, int64_t begin, int64_t end) { \
    compute<S>(p, out, scratch, begin, end);                                                                        \
  }
GENFUSE_ROWS(float, Forward)
GENFUSE_ROWS(double, Forward)
GENFUSE_ROWS(Half, Forward)
GENFUSE_ROWS(BFloat16, Forward)
GENFUSE_ROWS(float, Backward)
GENFUSE_ROWS(double, Backward)
GENFUSE_ROWS(Half, Backward)
GENFUSE_ROWS(BFloat16, Backward)
#undef GENFUSE_ROWS

template <class Out>
void run_rows(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    using T = compute_t<decltype(storage)>;
    for_rows(p.rows, p.cols * p.bins, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(size_t((3 * p.bins + 1) * kLanes));
      rows(storage, p, out, scratch.data(), begin, end);
    });
  });
}

}  // namespace

void run(const Problem& p, const Forward& out) { run_rows(p, out); }
void run(const Problem& p, const Backward& out) { run_rows(p, out); }

}  // namespace genfuse::rational_quadratic_spline::cpu

namespace genfuse {

void bind_rational_quadratic_spline(pybind11::module_& m) {
  using namespace rational_quadratic_spline;
  m.def("rational_quadratic_spline",
        [](int dtype, Address x, int64_t x_stride, Address params, int64_t params_stride, int64_t rows, int64_t cols,
           int64_t bins, int tails, bool inverse, double bound, double min_width, double min_height,
           double min_derivative, double edge, Address y, Address logdet, int device, Address stream) {
          const Problem p{dtype, at<void>(x), at<void>(params), x_stride,       params_stride, rows, cols, bins, tails,
                          inverse, bound,     min_width,        min_height,     min_derivative, edge};
          GENFUSE_RUN(p, (Forward{at<void>(y), at<void>(logdet)}), device, stream);
        });
  m.def("rational_quadratic_spline_backward",
        [](int dtype, Address x, int64_t x_stride, Address params, int64_t params_stride, int64_t rows, int64_t cols,
           int64_t bins, int tails, bool inverse, double bound, double min_width, double min_height,
           double min_derivative, double edge, Address gy, Address glogdet, Address gx, Address gparams, int device,
           Address stream) {
          const Problem p{dtype, at<void>(x), at<void>(params), x_stride,       params_stride, rows, cols, bins, tails,
                          inverse, bound,     min_width,        min_height,     min_derivative, edge};
          GENFUSE_RUN(p, (Backward{at<void>(gy), at<void>(glogdet), at<void>(gx), at<void>(gparams)}), device, stream);
        });
}

}  // namespace genfuse
