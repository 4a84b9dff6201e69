#include <vector>

#include "bindings.h"
#include "rational_quadratic_spline/lanes.h"

namespace genfuse::rational_quadratic_spline {
namespace {

using namespace cpu;

// Grad of all lanes; of derivatives as they are before softplus.
template <class T>
struct Gradients {
  T gx[kLanes], x[kLanes], y[kLanes], w[kLanes], h[kLanes], d0[kLanes], d1[kLanes];
};

template <bool exponential, class T>
GENFUSE_HD void times_slopes(const T* raw, const Constants<T>& c, T* g) {
  const T least = c.min_derivative, clip = c.clip;
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) g[l] *= derivative<exponential>(raw[l], least, clip).slope;
}

template <bool Inverse, class T>
GENFUSE_HD void gradients_of(const Lanes<T>& lanes, const Constants<T>& c, const T* gy, const T* glogdet,
                             Gradients<T>& out) {
  const Columns<T> b = columns_of(lanes);
  T *gx = out.gx, *x = out.x, *y = out.y, *w = out.w, *h = out.h, *d0 = out.d0, *d1 = out.d1;
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const Folded<T> folded{b.at[l], b.turns[l], b.inside[l]};
    const Bin<T> bin{b.corner_x[l], b.corner_y[l], b.width[l], b.height[l], b.slope0[l], b.slope1[l]};
    const Grad<T> g = grad<Inverse>(gy[l], glogdet[l], folded, bin);
    gx[l] = g.gx, x[l] = g.x, y[l] = g.y, w[l] = g.w, h[l] = g.h, d0[l] = g.d0, d1[l] = g.d1;
  }
  if (c.clip != T(0)) {
    times_slopes<true>(b.d0, c, d0), times_slopes<true>(b.d1, c, d1);
  } else {
    times_slopes<false>(b.d0, c, d0), times_slopes<false>(b.d1, c, d1);
  }
}

// Turns the shares of one axis into the gradients of their raw parameters.
template <class T>
GENFUSE_HD void raw_gradients(T* share, int64_t bins, Axis<T> axis, const T* low, const T* high, const T* bin,
                              const Picked<T>& picked, const T* gknot, const T* gsize) {
  for (int64_t k = 0; k < bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T knot = gknot[l], size = gsize[l], mean = knot * picked.before[l] + size * picked.here[l];
      const T own = number == bin[l] ? size : T(0), g = number < bin[l] ? knot : own;
      share[k * kLanes + l] = axis.raw(share[k * kLanes + l], g - mean, low[l], high[l]);
    }
  }
}

// Puts the gradients of the raw parameters in the place of the parameters.
template <class T>
GENFUSE_HD void all_raw_gradients(Lanes<T>& b, const Problem& p, const Constants<T>& c, const Gradients<T>& g) {
  const int64_t bins = p.bins;
  T *heights = b.raw + bins * kLanes, *d = heights + bins * kLanes;
  raw_gradients(b.raw, bins, c.x, b.left, b.right, b.bin, b.w, g.x, g.w);
  raw_gradients(heights, bins, c.y, b.bottom, b.top, b.bin, b.h, g.y, g.h);
  if (c.clip != T(0)) {
    const T* slopes = d + (bins + 1) * kLanes;
    T* raw = b.raw;
    GENFUSE_INDEPENDENT
    for (int64_t i = 0; i < 2 * bins * kLanes; ++i) raw[i] *= slopes[i];
  }
  for (int64_t k = 0; k <= bins; ++k) {
    const T number = T(k);
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const T bin = b.bin[l], left = g.d0[l], right = g.d1[l];
      d[k * kLanes + l] = bin == number ? left : (bin == number - T(1) ? right : T(0));
    }
  }
  for (int l = 0; p.tails >= kCircular && l < kLanes; ++l) {
    T &first = d[l], &last = d[bins * kLanes + l];
    const int tails = p.tails == kMixed ? b.tails[l] : p.tails;
    if (tails == kCircular) first += last, last = T(0);
    if (tails == kLinear) first = last = T(0);
  }
}

// Each a function of its own: inlined into one, GCC gives up some of the loops.
#define GENFUSE_LANES(T)                                                                                             \
  GENFUSE_SIMD void find(Lanes<T>& b, const Problem& p, const Constants<T>& c) { find_bins(b, p, c); }               \
  GENFUSE_SIMD void values(const Lanes<T>& b, const Constants<T>& c, T* y, T* logdet) {                              \
    values_of<false>(b, c, y, logdet);                                                                               \
  }                                                                                                                  \
  GENFUSE_SIMD void inverse_values(const Lanes<T>& b, const Constants<T>& c, T* y, T* logdet) {                      \
    values_of<true>(b, c, y, logdet);                                                                                \
  }                                                                                                                  \
  GENFUSE_SIMD void gradients(const Lanes<T>& b, const Constants<T>& c, const T* gy, const T* gl, Gradients<T>& g) { \
    gradients_of<false>(b, c, gy, gl, g);                                                                            \
  }                                                                                                                  \
  GENFUSE_SIMD void inverse_gradients(const Lanes<T>& b, const Constants<T>& c, const T* gy, const T* gl,            \
                                      Gradients<T>& g) {                                                             \
    gradients_of<true>(b, c, gy, gl, g);                                                                             \
  }                                                                                                                  \
  GENFUSE_SIMD void to_raw(Lanes<T>& b, const Problem& p, const Constants<T>& c, const Gradients<T>& g) {            \
    all_raw_gradients(b, p, c, g);                                                                                   \
  }
GENFUSE_LANES(float)
GENFUSE_LANES(double)
#undef GENFUSE_LANES

// Takes up the coordinates from `first` on, up to `count` of them, counted over all rows.
template <class S, class T>
void load_lanes(Lanes<T>& b, const Problem& p, const Constants<T>& c, int64_t first, int64_t count) {
  b.n = int(std::min<int64_t>(kLanes, count));
  const int64_t bins = p.bins, inner = p.width() - 2 * bins;
  const S* from[kLanes];
  int64_t i = first / p.cols, j = first % p.cols;
  for (int l = 0; l < kLanes; ++l) {
    b.row[l] = i;
    b.x[l] = load(*element<S>(p.x, i * p.x_stride + j));
    from[l] = element<S>(p.params, i * p.params_stride + j * p.width());
    if (p.table) {
      const int64_t coordinate = i * p.cols + j;
      enclose(b, l, c.of(p, coordinate));
      b.tails[l] = int(element<T>(p.table, coordinate % p.boxes * 5)[4]);
    }
    if (l < b.n - 1 && ++j == p.cols) j = 0, ++i;  // lanes that are not in use repeat the last
  }
  turn(from, 2 * bins, b.raw);
  for (const S*& row : from) row += 2 * bins;
  turn(from, inner, inner_derivatives(b, p));
  close_ends(b, p);
}

template <class S, class T>
void rows(const Problem& p, const Forward& out, T* scratch, int64_t begin, int64_t end) {
  const Constants<T> c(p);
  Lanes<T> b;
  b.raw = scratch;
  T y[kLanes], logdet[kLanes];
  T* sums = element<T>(out.logdet, 0);
  for (int64_t i = begin; i < end; ++i) sums[i] = 0;
  double sum = 0;
  for (int64_t first = begin * p.cols; first < end * p.cols; first += kLanes) {
    load_lanes<S>(b, p, c, first, end * p.cols - first);
    find(b, p, c);
    if (p.inverse) {
      inverse_values(b, c, y, logdet);
    } else {
      values(b, c, y, logdet);
    }
    int64_t j = first % p.cols;
    for (int l = 0; l < b.n; ++l) {
      store(*element<S>(out.y, first + l), y[l]);
      sum += logdet[l];
      if (++j == p.cols) sums[b.row[l]] = T(sum), sum = 0, j = 0;
    }
  }
}

template <class S, class T>
void rows(const Problem& p, const Backward& out, T* scratch, int64_t begin, int64_t end) {
  const Constants<T> c(p);
  Lanes<T> b;
  b.raw = scratch;
  T gy[kLanes], glogdet[kLanes];
  Gradients<T> g;
  const int64_t bins = p.bins, width = p.width();
  const T* d = inner_derivatives(b, p);
  for (int64_t first = begin * p.cols; first < end * p.cols; first += kLanes) {
    load_lanes<S>(b, p, c, first, end * p.cols - first);
    find(b, p, c);
    for (int l = 0; l < kLanes; ++l) {
      gy[l] = l < b.n ? load(*element<S>(out.gy, first + l)) : T(0);
      glogdet[l] = *element<T>(out.glogdet, b.row[l]);
    }
    if (p.inverse) {
      inverse_gradients(b, c, gy, glogdet, g);
    } else {
      gradients(b, c, gy, glogdet, g);
    }
    to_raw(b, p, c, g);
    for (int l = 0; l < b.n; ++l) store(*element<S>(out.gx, first + l), g.gx[l]);
    S* to = element<S>(out.gparams, first * width);
    turn_back(scratch, 2 * bins, b.n, to, width);
    turn_back(d, width - 2 * bins, b.n, to + 2 * bins, width);
  }
}

}  // namespace

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = compute_t<S>;
    for_rows(p.rows, p.cols * p.bins, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(size_t(((p.clip > 0 ? 5 : 3) * p.bins + 1) * kLanes));
      rows<S>(p, out, scratch.data(), begin, end);
    });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem =
      fields(&P::dtype, &P::x, &P::x_stride, &P::params, &P::params_stride, &P::rows, &P::cols, &P::bins, &P::tails,
             &P::inverse, &P::min_width, &P::min_height, &P::min_derivative, &P::edge, &P::damping, &P::clip, &P::left,
             &P::right, &P::bottom, &P::top, &P::table, &P::boxes);
  define(m, "rational_quadratic_spline", problem, fields(&Forward::y, &Forward::logdet));
  using B = Backward;
  define(m, "rational_quadratic_spline_backward", problem, fields(&B::gy, &B::glogdet, &B::gx, &B::gparams));
}

}  // namespace genfuse::rational_quadratic_spline
