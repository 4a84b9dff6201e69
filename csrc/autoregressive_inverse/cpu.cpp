#include <vector>

#include "affine_coupling/math.h"
#include "autoregressive_inverse/launch.h"
#include "bindings.h"
#include "rational_quadratic_spline/lanes.h"
#include "rows.h"

namespace genfuse::autoregressive_inverse {
namespace {

namespace spline = rational_quadratic_spline;
using affine_coupling::Kind;
using spline::cpu::Lanes;

// Rows worked on at a time, which are the lanes of the spline. Values of a unit for all of them lie together.
constexpr int kRows = spline::cpu::kLanes;

// Adds to some units what n inputs give them. Weights of units lie `across` apart, of inputs `along`. Sums for a few
// rows stay in registers.
template <int units, class T>
GENFUSE_HD void add_inputs(const T* weight, int64_t across, int64_t along, int64_t n, const T* in, T* out) {
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
        const T w = weight[u * across + j * along];
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
GENFUSE_HD void add_all(const T* weight, int64_t across, int64_t along, int64_t n, const T* in, T* out, int64_t units) {
  for (; units >= 6; units -= 6, weight += 6 * across, out += 6 * kRows) {
    add_inputs<6>(weight, across, along, n, in, out);
  }
  switch (units) {
    case 5: return add_inputs<5>(weight, across, along, n, in, out);
    case 4: return add_inputs<4>(weight, across, along, n, in, out);
    case 3: return add_inputs<3>(weight, across, along, n, in, out);
    case 2: return add_inputs<2>(weight, across, along, n, in, out);
    case 1: return add_inputs<1>(weight, across, along, n, in, out);
  }
}

template <class T>
GENFUSE_HD void rectify(T* a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = a[i] < T(0) ? T(0) : a[i];  // NaN stays NaN
}

template <Kind kind, class T>
GENFUSE_HD void undo_affine(T constant, const T* y, const T* params, T* x, T* logdet) {
#pragma omp simd
  for (int l = 0; l < kRows; ++l) {
    const T s = affine_coupling::log_scale<kind>(params[l], constant).value, t = params[kRows + l];
    x[l] =
        affine_coupling::apply(affine_coupling::factor(y[l], t, true), affine_coupling::scale<kind>(s, true), t, true);
    logdet[l] = -s;
  }
}

template <class T>
GENFUSE_HD void undo_affine(Kind kind, T constant, const T* y, const T* params, T* x, T* logdet) {
  switch (kind) {
    case Kind::tanh: return undo_affine<Kind::tanh>(constant, y, params, x, logdet);
    case Kind::exp: return undo_affine<Kind::exp>(constant, y, params, x, logdet);
    case Kind::sigmoid: return undo_affine<Kind::sigmoid>(constant, y, params, x, logdet);
    case Kind::softclip: return undo_affine<Kind::softclip>(constant, y, params, x, logdet);
    case Kind::floored: return undo_affine<Kind::floored>(constant, y, params, x, logdet);
    case Kind::factored: return undo_affine<Kind::factored>(constant, y, params, x, logdet);
  }
}

// From the gradients for what a unit puts out, those for what it takes in: through ReLU if there is an activation, plus
// those for a sum of which it is a part.
template <class T>
GENFUSE_HD void through_unit(const T* activation, const T* sum, T* g, int n) {
  if (activation) {
#pragma omp simd
    for (int l = 0; l < n; ++l) g[l] = activation[l] <= T(0) ? T(0) : g[l];
  }
  if (sum) {
#pragma omp simd
    for (int l = 0; l < n; ++l) g[l] += sum[l];
  }
}

template <class T>
GENFUSE_HD void multiply_add(const T* slope, const T* x, const T* offset, T* y, int n) {
#pragma omp simd
  for (int l = 0; l < n; ++l) y[l] = slope[l] * x[l] + offset[l];
}

#define GENFUSE_STEPS(T)                                                                                             \
  GENFUSE_SIMD void linear(const T* weight, int64_t across, int64_t along, int64_t n, const T* in, T* out,           \
                           int64_t units) {                                                                          \
    add_all(weight, across, along, n, in, out, units);                                                               \
  }                                                                                                                  \
  GENFUSE_SIMD void relu(T* a, int64_t n) { rectify(a, n); }                                                         \
  GENFUSE_SIMD void undo(Kind kind, T constant, const T* y, const T* params, T* x, T* logdet) {                      \
    undo_affine(kind, constant, y, params, x, logdet);                                                               \
  }                                                                                                                  \
  GENFUSE_SIMD void find(Lanes<T>& b, const spline::Problem& p, const spline::Constants<T>& c) {                     \
    spline::cpu::find_bins(b, p, c);                                                                                 \
  }                                                                                                                  \
  GENFUSE_SIMD void undo(const Lanes<T>& b, const spline::Constants<T>& c, T* x, T* logdet) {                        \
    spline::cpu::values_of<true>(b, c, x, logdet);                                                                   \
  }                                                                                                                  \
  GENFUSE_SIMD void through(const T* activation, const T* sum, T* g, int n) { through_unit(activation, sum, g, n); } \
  GENFUSE_SIMD void affine(const T* slope, const T* x, const T* offset, T* y, int n) {                               \
    multiply_add(slope, x, offset, y, n);                                                                            \
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
        constants_(p),
        values_(size_t(p.kept * kRows)),
        raw_(size_t((p.bins ? (p.clip > 0 ? 5 : 3) * p.bins + 1 : 2) * kRows)) {
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
      for (int l = 0; l < kRows; ++l) y[l] = *element<T>(p_.x, row(l) * p_.x_stride + k);
      undo_column(k, next_units(k), y, now, logdet);
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

  // All hidden units without their inputs, and a residual sum of 0.
  template <class Row>
  void start_units(Row row) {
    T* a = values_.data() + p_.cols * kRows;
    for (int64_t i = 0; i < p_.hidden(); ++i) {
      for (int64_t u = 0; u < p_.size(i); ++u, a += kRows) {
        fill(*element<T>(p_.biases[i], u), a);
        if (i == 0 && p_.context) {
          for (int l = 0; l < kRows; ++l) a[l] += *element<T>(p_.context, row(l) * p_.context_stride + u);
        }
      }
    }
    if (p_.residual) std::fill_n(a, p_.size(0) * kRows, T(0));
    sum_ = a;
  }

  // The hidden units of degree k; returns what is known of the last layer.
  Known next_units(int64_t k) {
    T* a = values_.data();
    Known known{a, k};
    int64_t inputs = p_.cols;
    for (int64_t i = 0; i < p_.hidden(); ++i) {
      a += inputs * kRows;
      const int64_t first = p_.start(i, k), last = p_.start(i, k + 1);
      T *own = a + first * kRows, *sum = sum_ + first * kRows;
      linear(element<T>(p_.weights[i], first * inputs), inputs, 1, known.count, known.values, own, last - first);
      if (p_.adds(i)) {
        for (int64_t l = 0; l < (last - first) * kRows; ++l) own[l] = sum[l] += own[l];
      }
      if (p_.rectified(i)) relu(own, (last - first) * kRows);
      known = {a, last}, inputs = p_.size(i);
    }
    return known;
  }

  // Some parameters of a column, counted over all columns.
  void parameters(int64_t first, int64_t count, Known known, T* to) {
    const int64_t last = p_.hidden(), inputs = p_.size(last - 1);
    for (int64_t j = 0; j < count; ++j) fill(*element<T>(p_.biases[last], first + j), to + j * kRows);
    linear(element<T>(p_.weights[last], first * inputs), inputs, 1, known.count, known.values, to, count);
  }

  void undo_column(int64_t k, Known known, const T* y, T* x, T* logdet) {
    const int64_t first = k * p_.width(), sizes = 2 * p_.bins;
    if (!p_.bins) {
      parameters(first, 2, known, raw_.data());
      const T constant = p_.factor ? *element<T>(p_.factor, k) : T(p_.constant);
      return undo(Kind(p_.scale), constant, y, raw_.data(), x, logdet);
    }
    parameters(first, sizes, known, lanes_.raw);
    parameters(first + sizes, p_.width() - sizes, known, spline::cpu::inner_derivatives(lanes_, p_));
    spline::cpu::close_ends(lanes_, p_);
    for (int l = 0; l < kRows; ++l) lanes_.x[l] = y[l];
    find(lanes_, p_, constants_);
    undo(lanes_, constants_, x, logdet);
  }

  const Problem& p_;
  spline::Constants<T> constants_;
  std::vector<T> values_, raw_;  // of x, all hidden units and the residual sum; of the parameters of a column
  T* sum_;
  Lanes<T> lanes_;
};

// The sweep backwards over n rows from `begin` on: when all units of degree k and above have their gradients, that for
// column k - 1 is complete. `room` is what the results are, of kRows rows.
template <class T>
void sweep(const Sweep& p, const Backward& out, int64_t begin, int n, std::vector<T>& room) {
  const int64_t outputs = p.hidden(), units = int64_t(room.size()) / kRows;
  const auto at = [&](const void* base, int64_t unit) { return element<T>(base, unit * p.rows + begin); };
  T* x = room.data();
  for (int64_t k = 0; k < p.cols(); ++k) std::copy_n(at(p.gx, k), n, x + k * kRows);
  for (int64_t k = p.cols() - 1; k >= 0; --k) {
    T* g = x + (units - p.size(outputs)) * kRows;  // of a layer, from the last to the first
    int64_t from = p.start(outputs, k);
    for (int64_t j = from; j < p.start(outputs, k + 1); ++j) {
      affine(at(p.slope, j), x + k * kRows, at(p.offset, j), g + j * kRows, n);
    }
    for (int64_t i = outputs - 1; i >= 0; --i) {
      const int64_t size = p.size(i), above = p.size(i + 1), first = p.start(i, k), count = p.start(i, k + 1) - first;
      const T* in = g;
      g -= size * kRows;
      std::fill_n(g + first * kRows, count * kRows, T(0));
      linear(element<T>(p.weights[i + 1], from * size + first), 1, size, above - from, in + from * kRows,
             g + first * kRows, count);
      for (int64_t u = first; u < first + count; ++u) {
        through(p.rectified(i) ? at(p.activations[i], u) : nullptr,
                p.adds(i) && i + 2 < outputs ? in + (above + u) * kRows : nullptr, g + u * kRows, n);
      }
      from = first;
    }
    if (k) {
      linear(element<T>(p.weights[0], from * p.cols() + k - 1), 1, p.cols(), p.size(0) - from, g + from * kRows,
             x + (k - 1) * kRows, 1);
    }
  }
  for (int64_t u = 0; u < units; ++u) std::copy_n(x + u * kRows, n, element<T>(out.gradients, u * p.rows + begin));
}

// Calls f(begin, n) for tiles of rows, with an f that make() makes for each chunk of them.
template <class Make>
void for_tiles(int64_t rows, int64_t kept, Make make) {
  for_rows((rows + kRows - 1) / kRows, kRows * kept, [&](int64_t begin, int64_t end) {
    auto f = make();
    for (int64_t i = begin; i < end; ++i) f(i * kRows, int(std::min<int64_t>(kRows, rows - i * kRows)));
  });
}

template <class T>
void run_tiles(const Problem& p, const Forward& out) {
  for_tiles(p.rows, p.kept,
            [&] { return [&, tile = Tile<T>(p)](int64_t begin, int n) mutable { tile.run(out, begin, n); }; });
}

template <class T>
void run_tiles(const Sweep& p, const Backward& out) {
  int64_t* degree = element<int64_t>(out.degrees, 0);
  for (int64_t k = 1; k <= p.cols(); ++k) *degree++ = k;
  for (int64_t i = 0; i <= p.hidden(); ++i) {
    for (int64_t k = 0; k < p.cols(); ++k) degree = std::fill_n(degree, p.start(i, k + 1) - p.start(i, k), k);
  }
  const int64_t units = degree - element<int64_t>(out.degrees, 0);
  for_tiles(p.rows, units, [&] {
    return [&, room = std::vector<T>(size_t(units * kRows))](int64_t begin, int n) mutable {
      sweep(p, out, begin, n, room);
    };
  });
}

}  // namespace

template <class P, class Out>
void run_cpu(const P& p, const Out& out) {
  p.dtype == 0 ? run_tiles<float>(p, out) : run_tiles<double>(p, out);
}

void bind(pybind11::module_& m) {
  using P = Problem;
  define(m, "autoregressive_inverse",
         fields_of<P>(&P::dtype, &P::x, &P::x_stride, &P::rows, &P::cols, &P::context, &P::context_stride, &P::weights,
                      &P::starts, &P::degrees, &P::biases, &P::kept, &P::workspace, &P::residual, &P::scale,
                      &P::constant, &P::factor, &P::bins, &P::tails, &P::inverse, &P::min_width, &P::min_height,
                      &P::min_derivative, &P::edge, &P::damping, &P::clip, &P::left, &P::right, &P::bottom, &P::top),
         fields(&Forward::x, &Forward::logdet));
  using S = Sweep;
  define(m, "autoregressive_inverse_backward",
         fields_of<S>(&S::dtype, &S::rows, &S::gx, &S::slope, &S::offset, &S::activations, &S::weights, &S::starts,
                      &S::degrees, &S::residual),
         fields(&Backward::gradients, &Backward::degrees));
#ifdef GENFUSE_CUDA
  m.def("autoregressive_inverse_workspace", &workspace);
#endif
}

}  // namespace genfuse::autoregressive_inverse
