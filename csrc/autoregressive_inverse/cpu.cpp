#include <vector>

#include "affine_coupling/math.h"
#include "autoregressive_inverse/launch.h"
#include "bindings.h"
#include "rational_quadratic_spline/lanes.h"
#include "rows.h"

namespace genfuse::autoregressive_inverse {
namespace {

// Tensors arrive as addresses; 0 is "no tensor".
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

namespace spline = rational_quadratic_spline;
using affine_coupling::Kind;
using spline::cpu::Lanes;

// Rows worked on at a time, which are the lanes of the spline. Values of a unit for all of them lie together.
constexpr int kRows = spline::cpu::kLanes;

// Adds to some units what the first n inputs give them. Their sums for a few rows stay in registers.
template <int units, class T>
GENFUSE_HD void add_inputs(const T* weight, int64_t stride, int64_t n, const T* in, T* out) {
  constexpr int kSome = (units == 1 ? 128 : 64) / sizeof(T);  // one unit alone would wait for its own sums
  for (int r = 0; r < kRows; r += kSome) {
    T sum[units][kSome];
    for (int u = 0; u < units; ++u) {
#pragma omp simd
      for (int l = 0; l < kSome; ++l) sum[u][l] = out[u * kRows + r + l];
    }
    for (int64_t j = 0; j < n; ++j) {
      const T* x = in + j * kRows + r;
      GENFUSE_UNROLL(8)
      for (int u = 0; u < units; ++u) {
        const T w = weight[u * stride + j];
#pragma omp simd
        for (int l = 0; l < kSome; ++l) sum[u][l] += x[l] * w;
      }
    }
    for (int u = 0; u < units; ++u) {
#pragma omp simd
      for (int l = 0; l < kSome; ++l) out[u * kRows + r + l] = sum[u][l];
    }
  }
}

template <class T>
GENFUSE_HD void add_all(const T* weight, int64_t stride, int64_t n, const T* in, T* out, int64_t units) {
  for (; units >= 6; units -= 6, weight += 6 * stride, out += 6 * kRows) add_inputs<6>(weight, stride, n, in, out);
  switch (units) {
    case 5: return add_inputs<5>(weight, stride, n, in, out);
    case 4: return add_inputs<4>(weight, stride, n, in, out);
    case 3: return add_inputs<3>(weight, stride, n, in, out);
    case 2: return add_inputs<2>(weight, stride, n, in, out);
    case 1: return add_inputs<1>(weight, stride, n, in, out);
  }
}

template <class T>
GENFUSE_HD void rectify(T* a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = a[i] < T(0) ? T(0) : a[i];  // NaN stays NaN
}

template <Kind kind, class T>
GENFUSE_HD void undo_affine(const T* y, const T* params, T* x, T* logdet) {
#pragma omp simd
  for (int l = 0; l < kRows; ++l) {
    const T s = affine_coupling::log_scale<kind>(params[l]).value, t = params[kRows + l];
    x[l] =
        affine_coupling::apply(affine_coupling::factor(y[l], t, true), affine_coupling::scale<kind>(s, true), t, true);
    logdet[l] = -s;
  }
}

#define GENFUSE_STEPS(T)                                                                                     \
  GENFUSE_SIMD void linear(const T* weight, int64_t stride, int64_t n, const T* in, T* out, int64_t units) { \
    add_all(weight, stride, n, in, out, units);                                                              \
  }                                                                                                          \
  GENFUSE_SIMD void relu(T* a, int64_t n) { rectify(a, n); }                                                 \
  GENFUSE_SIMD void undo_tanh(const T* y, const T* params, T* x, T* logdet) {                                \
    undo_affine<Kind::tanh>(y, params, x, logdet);                                                           \
  }                                                                                                          \
  GENFUSE_SIMD void undo_exp(const T* y, const T* params, T* x, T* logdet) {                                 \
    undo_affine<Kind::exp>(y, params, x, logdet);                                                            \
  }                                                                                                          \
  GENFUSE_SIMD void undo_sigmoid(const T* y, const T* params, T* x, T* logdet) {                             \
    undo_affine<Kind::sigmoid>(y, params, x, logdet);                                                        \
  }                                                                                                          \
  GENFUSE_SIMD void find(Lanes<T>& b, const spline::Problem& p, const spline::Constants<T>& c) {             \
    spline::cpu::find_bins(b, p, c);                                                                         \
  }                                                                                                          \
  GENFUSE_SIMD void undo_spline(const Lanes<T>& b, const spline::Constants<T>& c, T* x, T* logdet) {         \
    spline::cpu::values_of<true>(b, c, x, logdet);                                                           \
  }
GENFUSE_STEPS(float)
GENFUSE_STEPS(double)
#undef GENFUSE_STEPS

template <class T>
void fill(T value, T* to) {
  for (int l = 0; l < kRows; ++l) to[l] = value;
}

template <class T>
class Tile {
 public:
  explicit Tile(const Problem& p)
      : p_(p),
        constants_(p.spline),
        values_(size_t((p.cols + p.units) * kRows)),
        raw_(size_t((p.spline.bins ? 3 * p.spline.bins + 1 : 2) * kRows)) {
    lanes_.raw = raw_.data();
  }

  // The sweep over up to kRows rows; lanes that are not in use repeat the last.
  void run(const Forward& out, int64_t begin, int64_t n) {
    const auto row = [&](int l) { return begin + std::min<int64_t>(l, n - 1); };
    start_units(row);
    double sum[kRows] = {};
    T y[kRows], logdet[kRows];
    for (int64_t k = 0; k < p_.cols; ++k) {
      T *x = values_.data(), *now = x + k * kRows;
      for (int l = 0; l < kRows; ++l) y[l] = *element<T>(p_.y, row(l) * p_.y_stride + k);
      undo(k, next_units(k), y, now, logdet);
      for (int l = 0; l < kRows; ++l) sum[l] += logdet[l];
      for (int l = 0; l < n; ++l) *element<T>(out.x, (begin + l) * p_.cols + k) = now[l];
    }
    for (int l = 0; l < n; ++l) *element<T>(out.logdet, begin + l) = T(sum[l]);
  }

 private:
  struct Known {
    const T* values;
    int64_t count;
  };

  // All hidden units without their inputs.
  template <class Row>
  void start_units(Row row) {
    T* a = values_.data() + p_.cols * kRows;
    for (int64_t i = 0; i < p_.hidden; ++i) {
      for (int64_t u = 0; u < p_.layers[i].units; ++u, a += kRows) {
        fill(*element<T>(p_.layers[i].bias, u), a);
        if (i == 0 && p_.context) {
          for (int l = 0; l < kRows; ++l) a[l] += *element<T>(p_.context, row(l) * p_.context_stride + u);
        }
      }
    }
  }

  // The hidden units of degree k; returns what is known of the last layer.
  Known next_units(int64_t k) {
    T* a = values_.data();
    Known known{a, k};
    int64_t inputs = p_.cols;
    for (int64_t i = 0; i < p_.hidden; ++i) {
      a += inputs * kRows;
      const int64_t first = p_.start(i, k), last = p_.start(i, k + 1);
      linear(element<T>(p_.layers[i].weight, first * inputs), inputs, known.count, known.values, a + first * kRows,
             last - first);
      relu(a + first * kRows, (last - first) * kRows);
      known = {a, last}, inputs = p_.layers[i].units;
    }
    return known;
  }

  // Some parameters of a column, counted over all columns.
  void parameters(int64_t first, int64_t count, Known known, T* to) {
    const Layer& layer = p_.layers[p_.hidden];
    const int64_t inputs = p_.layers[p_.hidden - 1].units;
    for (int64_t j = 0; j < count; ++j) fill(*element<T>(layer.bias, first + j), to + j * kRows);
    linear(element<T>(layer.weight, first * inputs), inputs, known.count, known.values, to, count);
  }

  void undo(int64_t k, Known known, const T* y, T* x, T* logdet) {
    const int64_t first = k * p_.width(), sizes = 2 * p_.spline.bins;
    if (p_.spline.bins) {
      parameters(first, sizes, known, lanes_.raw);
      parameters(first + sizes, p_.width() - sizes, known, spline::cpu::inner_derivatives(lanes_, p_.spline));
      spline::cpu::close_ends(lanes_, p_.spline);
      for (int l = 0; l < kRows; ++l) lanes_.x[l] = y[l];
      find(lanes_, p_.spline, constants_);
      return undo_spline(lanes_, constants_, x, logdet);
    }
    parameters(first, 2, known, raw_.data());
    switch (Kind(p_.scale)) {
      case Kind::tanh: return undo_tanh(y, raw_.data(), x, logdet);
      case Kind::exp: return undo_exp(y, raw_.data(), x, logdet);
      case Kind::sigmoid: return undo_sigmoid(y, raw_.data(), x, logdet);
    }
  }

  const Problem& p_;
  spline::Constants<T> constants_;
  std::vector<T> values_, raw_;  // of x and all hidden units; of the parameters of a column
  Lanes<T> lanes_;
};

template <class T>
void run_tiles(const Problem& p, const Forward& out) {
  for_rows((p.rows + kRows - 1) / kRows, kRows * (p.cols + p.units), [&](int64_t begin, int64_t end) {
    Tile<T> tile(p);
    for (int64_t i = begin; i < end; ++i) {
      tile.run(out, i * kRows, std::min<int64_t>(kRows, p.rows - i * kRows));
    }
  });
}

}  // namespace

void run_cpu(const Problem& p, const Forward& out) {
  if (p.dtype == 0) return run_tiles<float>(p, out);
  run_tiles<double>(p, out);
}

void bind(pybind11::module_& m) {
  const auto problem = [](int dtype, Address y, int64_t y_stride, Address context, int64_t context_stride, int64_t rows,
                          int64_t cols, Address layers, int64_t hidden, int64_t units, Address starts, int scale,
                          int64_t bins, int tails, double bound, double min_width, double min_height,
                          double min_derivative, double edge, double damping) {
    const rational_quadratic_spline::Problem spline{dtype,      nullptr,        nullptr, 0,      0,     rows,
                                                    cols,       bins,           tails,   true,   bound, min_width,
                                                    min_height, min_derivative, edge,    damping};
    return Problem{dtype,
                   at<void>(y),
                   y_stride,
                   at<void>(context),
                   context_stride,
                   rows,
                   cols,
                   at<Layer>(layers),
                   hidden,
                   units,
                   at<int64_t>(starts),
                   scale,
                   spline};
  };
  pybind11::class_<Problem>(m, "AutoregressiveInverse", pybind11::module_local()).def(pybind11::init(problem));
  m.def("autoregressive_inverse",
        [](const Problem& p, Address x, Address logdet, Address workspace, int device, Address stream) {
          run(p, Forward{at<void>(x), at<void>(logdet), at<void>(workspace)}, device, stream);
        });
#ifdef GENFUSE_CUDA
  m.def("autoregressive_inverse_workspace", &workspace);
#endif
}

}  // namespace genfuse::autoregressive_inverse
