#include <numeric>

#include "bindings.h"
#include "interpolate/math.h"
#include "mlp/launch.h"

// What has no levels of x86-64 has no kernels, and runs PyTorch's layers.
#ifdef GENFUSE_SIMD_LEVELS
#include "mlp/product.h"

namespace genfuse::mlp {
namespace {

// Where what a network hands from layer to layer lies in `hidden`.
template <class T, class Memory>
struct Layout {
  const Problem& p;
  Memory* hidden;

  Memory* value(int64_t layer) const {
    Memory* at = hidden;
    for (int64_t i = 0; i < layer; ++i) at += p.rows * p.widths[i + 1];
    return at;
  }
  Memory* inner(int64_t block) const { return value(p.layers() - 1) + block * p.rows * p.widths[1]; }
};

// Room that a thread keeps from call to call: memory that is new each time has to be given by the system page by page.
template <class T>
T* scratch(int64_t size) {
  thread_local std::vector<T> room;
  constexpr size_t kMostKept = (size_t(64) << 20) / sizeof(T);
  if (room.size() < size_t(size) || room.size() > kMostKept) std::vector<T>(size_t(size)).swap(room);
  return room.data();
}

template <class T>
Product<T> layer(const Problem& p, int64_t i, Matrix<T> in) {
  const int64_t inputs = p.widths[i], outputs = p.widths[i + 1];
  Product<T> product{p.rows, outputs, inputs, in, {element<T>(p.weights[i], 0), 1, inputs}, {}};
  if (p.counts) {
    product.counts = p.counts, product.masked = Masked::b_columns;
    for (int64_t j = 0; j < i; ++j) product.counts += p.widths[j + 1];
  }
  return product;
}

template <class T>
void forward(const Problem& p, const Forward& out) {
  const int64_t last = p.layers() - 1;
  const Layout<T, T> at{p, element<T>(out.hidden, 0)};
  T* const total = p.residual ? scratch<T>(p.rows * p.widths[1]) : nullptr;
  if (total) std::fill_n(total, p.rows * p.widths[1], T(0));
  Matrix<T> in{element<T>(p.x, 0), p.x_stride, 1};
  for (int64_t i = 0; i <= last; ++i) {
    Product<T> product = layer(p, i, in);
    Finish<T>& f = product.finish;
    f.out = i < last ? at.value(i) : element<T>(out.y, 0);
    f.bias = element<T>(p.biases[i], 0);
    f.slope = T(p.slope);
    if (i == 0 && p.added) f.added = element<T>(p.added, 0), f.added_stride = p.added_stride;
    f.rectified = i < last && !(p.residual && i + 1 == last);
    if (p.residual && i < last && i % 2 == 0) {
      f.total = total;
      if (i && p.gates.count) f.inner = at.inner(i / 2 - 1), f.gate = element<T>(p.gates[i / 2 - 1], 0);
    }
    multiply(product);
    in = {f.out, p.widths[i + 1], 1};
  }
}

// Sums of each column of g (rows, columns), in blocks: a long sum would lose digits.
template <class T>
GENFUSE_HD void sum_columns(const T* g, int64_t rows, int64_t columns, int64_t begin, int64_t end, T* out) {
  constexpr int64_t kRowsOfSum = 16;
  T part[kBlock];
  double total[kBlock] = {};
  for (int64_t i0 = 0; i0 < rows; i0 += kRowsOfSum) {
    std::fill(part, part + (end - begin), T(0));
    for (int64_t i = i0; i < std::min(i0 + kRowsOfSum, rows); ++i) {
      const T* row = g + i * columns + begin;
#pragma omp simd
      for (int64_t j = 0; j < end - begin; ++j) part[j] += row[j];
    }
    for (int64_t j = 0; j < end - begin; ++j) total[j] += part[j];
  }
  for (int64_t j = begin; j < end; ++j) out[j] = T(total[j - begin]);
}
// What a gate passes of a gradient, and the gate's own.
template <class T>
GENFUSE_HD void pass_gate(const T* g, const T* gate, const T* inner, T* passed, T* own, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) passed[j] = g[j] * gate[j];
  if (own) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) own[j] = g[j] * inner[j];
  }
}
// Points between the rows of real and fake examples follow these, and all are rectified.
template <class T>
GENFUSE_HD void mix_rows(T* h, const T* epsilon, int64_t rows, int64_t columns, T slope) {
  for (int64_t i = 0; i < rows; ++i) {
    T *real = h + i * columns, *fake = real + rows * columns, *mixed = fake + rows * columns;
    const T share = epsilon[i];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      mixed[j] = rectify(interpolate::between(real[j], fake[j], share), slope);
      real[j] = rectify(real[j], slope), fake[j] = rectify(fake[j], slope);
    }
  }
}
#define GENFUSE_STEPS(T)                                                                                  \
  GENFUSE_SIMD void sums(const T* g, int64_t rows, int64_t columns, int64_t begin, int64_t end, T* out) { \
    sum_columns(g, rows, columns, begin, end, out);                                                       \
  }                                                                                                       \
  GENFUSE_SIMD void gated(const T* g, const T* gate, const T* inner, T* passed, T* own, int64_t n) {      \
    pass_gate(g, gate, inner, passed, own, n);                                                            \
  }                                                                                                       \
  GENFUSE_SIMD void mix(T* h, const T* epsilon, int64_t rows, int64_t columns, T slope) {                 \
    mix_rows(h, epsilon, rows, columns, slope);                                                           \
  }
GENFUSE_STEPS(float)
GENFUSE_STEPS(double)
#undef GENFUSE_STEPS

template <class T>
void sum_blocks(const T* g, int64_t rows, int64_t columns, T* out) {
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  for_each(blocks, rows * columns > (int64_t(1) << 18),
           [&](int64_t b) { sums(g, rows, columns, b * kBlock, std::min((b + 1) * kBlock, columns), out); });
}

// Gradient of a layer's weight, given what it takes in and the gradient of what it puts out.
template <class T>
Product<T> weight_product(const Problem& p, int64_t i, const T* g, Matrix<T> in, T* out) {
  Product<T> product = layer(p, i, in);
  if (p.counts) product.masked = Masked::result_rows;
  product.m = p.widths[i + 1], product.n = p.widths[i], product.k = p.rows;
  product.a = {g, 1, product.m}, product.b = in;
  product.finish.out = out;
  return product;
}

// The gradient of what a layer takes in: through an activation, if its value is given, and added to a total.
template <class T>
void multiply_back(const Problem& p, int64_t i, const T* g, const T* value, T* total, T* out) {
  Product<T> product = layer(p, i, Matrix<T>{g, p.widths[i + 1], 1});
  if (p.counts) product.masked = Masked::b_rows;
  product.n = p.widths[i], product.k = p.widths[i + 1], product.b = {product.b.data, p.widths[i], 1};
  product.finish.out = out, product.finish.value = value, product.finish.total = total;
  product.finish.slope = T(p.slope);
  multiply(product);
}

template <class T>
void backward(const Gradients& p, const Backward& made) {
  const int64_t n = p.layers();
  const auto out = [&](int64_t i) { return static_cast<T*>(made.gradients[i]); };
  T *const of_x = out(0), *const of_added = out(1);
  const auto of_weight = [&](int64_t i) { return out(2 + i); };
  const auto of_bias = [&](int64_t i) { return out(2 + n + i); };
  const auto of_gate = [&](int64_t i) { return out(2 + 2 * n + i); };
  const int64_t last = n - 1, widest = *std::max_element(p.widths.items, p.widths.items + p.widths.count);
  const Layout<T, const T> at{p, element<T>(p.hidden, 0)};
  T *g = scratch<T>(p.rows * widest * 3), *next = g + p.rows * widest, *const total = next + p.rows * widest;

  // Gradients of a layer's weight and bias, given that of what it puts out.
  const auto of_layer = [&](int64_t i, const T* from) {
    const int64_t outputs = p.widths[i + 1];
    const Matrix<T> in = i ? Matrix<T>{at.value(i - 1), p.widths[i], 1} : Matrix<T>{element<T>(p.x, 0), p.x_stride, 1};
    if (of_weight(i)) multiply(weight_product(p, i, from, in, of_weight(i)));
    if (of_bias(i)) sum_blocks(from, p.rows, outputs, of_bias(i));
  };
  const auto through_layer = [&](int64_t i, const T* from, const T* value, T* sum, T* to) {
    multiply_back(p, i, from, value, sum, to);
  };

  const T* now = element<T>(p.gy, 0);
  if (p.residual) {
    of_layer(last, now);
    through_layer(last, now, nullptr, nullptr, total);
    for (int64_t i = last - 1; i > 0; i -= 2) {
      const int64_t block = i / 2 - 1, units = p.rows * p.widths[1];
      const T* from = total;
      if (p.gates.count) {
        T* own = of_gate(block);
        for_blocks(units, [&](int64_t begin, int64_t end) {
          const int64_t at0 = begin * kBlock, count = std::min(end * kBlock, units) - at0;
          gated(total + at0, element<T>(p.gates[block], at0), at.inner(block) + at0, next + at0,
                own ? own + at0 : nullptr, count);
        });
        from = next;
      }
      of_layer(i, from);
      through_layer(i, from, at.value(i - 1), nullptr, g);
      of_layer(i - 1, g);
      through_layer(i - 1, g, at.value(i - 2), total, next);
    }
    // A network of one hidden layer hands it on as it is.
    now = total;
  } else {
    for (int64_t i = last; i > 0; --i) {
      of_layer(i, now);
      through_layer(i, now, at.value(i - 1), nullptr, g);
      now = g;
      std::swap(g, next);
    }
  }
  of_layer(0, now);
  if (of_added) std::copy_n(now, p.rows * p.widths[1], of_added);
  if (of_x) through_layer(0, now, nullptr, nullptr, of_x);
}

template <class T>
void chain(const Gradients& p, const Chain& out) {
  const Layout<T, const T> at{p, element<T>(p.hidden, 0)};
  const Layout<T, T> kept{p, element<T>(out.kept, 0)};
  const T* g = element<T>(p.gy, 0);
  for (int64_t i = p.layers() - 1; i > 0; --i) {
    multiply_back(p, i, g, at.value(i - 1), static_cast<T*>(nullptr), kept.value(i - 1));
    g = kept.value(i - 1);
  }
  multiply_back<T>(p, 0, g, nullptr, nullptr, element<T>(out.x, 0));
}

template <class T>
void chain_backward(const ChainGradients& p, const Backward& made) {
  const int64_t last = p.layers() - 1, widest = *std::max_element(p.widths.items, p.widths.items + p.widths.count);
  const Layout<T, const T> at{p, element<T>(p.hidden, 0)}, kept{p, element<T>(p.kept, 0)};
  T *u = scratch<T>(p.rows * widest * 2), *next = u + p.rows * widest;
  Matrix<T> in{element<T>(p.gx, 0), p.widths[0], 1};
  for (int64_t i = 0; i <= last; ++i) {
    const T* g = i < last ? kept.value(i) : element<T>(p.gy, 0);
    if (T* out = static_cast<T*>(made.gradients[1 + i])) multiply(weight_product(p, i, g, in, out));
    T* const out = i < last ? u : static_cast<T*>(made.gradients[0]);
    if (!out) return;
    Product<T> product = layer(p, i, in);
    product.finish.out = out, product.finish.slope = T(p.slope);
    if (i < last) product.finish.value = at.value(i);
    multiply(product);
    in = {out, p.widths[i + 1], 1};
    std::swap(u, next);
  }
}

template <class T>
GENFUSE_HD void show_rows(const Seen& p, const Shown& out, int64_t begin, int64_t end) {
  const int64_t columns = p.shown + p.context_columns;
  const T limit = T(p.limit);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = element<T>(p.x, i * p.x_stride + p.first);
    T* seen = element<T>(out.seen, i * columns);
#pragma omp simd
    for (int64_t j = 0; j < p.shown; ++j) seen[j] = squash(x[j], limit);
    if (p.context) std::copy_n(element<T>(p.context, i * p.context_stride), p.context_columns, seen + p.shown);
  }
}
template <class T>
GENFUSE_HD void show_rows(const SeenGradients& p, const ShownGradients& out, int64_t begin, int64_t end) {
  const T limit = T(p.limit);
  for (int64_t i = begin; i < end; ++i) {
    const T *x = element<T>(p.x, i * p.x_stride + p.first), *gmoved, *passed;
    const T* gseen = element<T>(p.gseen, i * (p.shown + p.context_columns));
    T* gx = element<T>(out.gx, i * p.features);
    if (p.gy) {
      const int64_t moved = p.features - p.shown;
      gmoved = element<T>(p.gmoved, i * moved), passed = element<T>(p.gy, i * p.gy_stride + p.first);
      std::copy_n(gmoved, moved, p.first ? gx : gx + p.shown);
    } else {
      gmoved = element<T>(p.gmoved, i * p.features), passed = gmoved + p.first;
      std::copy_n(gmoved, p.features, gx);
    }
#pragma omp simd
    for (int64_t j = 0; j < p.shown; ++j) gx[p.first + j] = passed[j] + through_squash(gseen[j], x[j], limit);
  }
}
#define GENFUSE_SHOW(T, P, Out)                                                       \
  GENFUSE_SIMD void show(T, const P& p, const Out& out, int64_t begin, int64_t end) { \
    show_rows<T>(p, out, begin, end);                                                 \
  }
GENFUSE_SHOW(float, Seen, Shown)
GENFUSE_SHOW(double, Seen, Shown)
GENFUSE_SHOW(float, SeenGradients, ShownGradients)
GENFUSE_SHOW(double, SeenGradients, ShownGradients)
#undef GENFUSE_SHOW

template <class P, class Out>
void show_all(const P& p, const Out& out) {
  for_rows(p.rows, p.features, [&](int64_t begin, int64_t end) {
    p.dtype == 0 ? show(float(), p, out, begin, end) : show(double(), p, out, begin, end);
  });
}

Problem of_rows(Problem p, int64_t rows) {
  p.rows = rows;
  return p;
}

// The first layer is linear, so that its outputs at the points between are had from those of both ends.
template <class T>
void judge(const Critic& p, const Judged& out) {
  const int64_t n = p.rows, last = p.layers() - 1;
  const Problem ends = of_rows(p, 2 * n), all = of_rows(p, 3 * n);
  const Layout<T, T> at{all, element<T>(out.hidden, 0)}, kept{p, element<T>(out.kept, 0)};
  for (int64_t i = 0; i <= last; ++i) {
    const Matrix<T> in = i ? Matrix<T>{at.value(i - 1), p.widths[i], 1} : Matrix<T>{element<T>(p.x, 0), p.x_stride, 1};
    Product<T> product = layer(i && i < last ? all : ends, i, in);
    Finish<T>& f = product.finish;
    f.out = i < last ? at.value(i) : element<T>(out.scores, 0);
    f.bias = element<T>(p.biases[i], 0), f.slope = T(p.slope), f.rectified = i && i < last;
    multiply(product);
    if (!i) mix(at.value(0), element<T>(p.epsilon, 0), n, p.widths[1], T(p.slope));
  }
  T* const ones = scratch<T>(n);
  std::fill_n(ones, n, T(1));
  const T* g = ones;
  for (int64_t i = last; i > 0; --i) {
    multiply_back(p, i, g, at.value(i - 1) + 2 * n * p.widths[i], static_cast<T*>(nullptr), kept.value(i - 1));
    g = kept.value(i - 1);
  }
  multiply_back<T>(p, 0, g, nullptr, nullptr, element<T>(out.gradient, 0));
}

template <class T>
void judge_backward(const CriticGradients& p, const Backward& made) {
  const int64_t n = p.rows, last = p.layers() - 1,
                widest = *std::max_element(p.widths.items, p.widths.items + p.widths.count);
  const Problem ends = of_rows(p, 2 * n), all = of_rows(p, 3 * n);
  const Layout<T, const T> at{all, element<T>(p.hidden, 0)}, kept{p, element<T>(p.kept, 0)};
  const int64_t units = std::accumulate(p.widths.items + 1, p.widths.items + last + 1, int64_t(0));
  T *u = scratch<T>(n * (units + 1) + 4 * n * widest), *const ones = u + n * units;
  T *g = ones + n, *next = g + 2 * n * widest;
  std::fill_n(ones, n, T(1));
  // What the gradient's gradient becomes on its way through the layers, laid out as `kept`.
  const Layout<T, T> up{p, u};
  const auto risen = [&](int64_t i) {
    return i ? Matrix<T>{up.value(i - 1), p.widths[i], 1} : Matrix<T>{element<T>(p.gx, 0), p.widths[0], 1};
  };
  for (int64_t i = 0; i < last; ++i) {
    Product<T> product = layer<T>(p, i, risen(i));
    product.finish.out = up.value(i), product.finish.slope = T(p.slope);
    product.finish.value = at.value(i) + 2 * n * p.widths[i + 1];
    multiply(product);
  }
  const T* now = element<T>(p.gy, 0);
  for (int64_t i = last; i >= 0; --i) {
    const int64_t outputs = p.widths[i + 1];
    const Matrix<T> in = i ? Matrix<T>{at.value(i - 1), p.widths[i], 1} : Matrix<T>{element<T>(p.x, 0), p.x_stride, 1};
    if (T* out = static_cast<T*>(made.gradients[i])) {
      Product<T> product = weight_product(ends, i, now, in, out);
      product.more_k = n, product.more_b = risen(i);
      product.more_a = {i < last ? kept.value(i) : ones, 1, outputs};
      multiply(product);
    }
    if (T* out = static_cast<T*>(made.gradients[last + 1 + i])) sum_blocks(now, 2 * n, outputs, out);
    if (!i) return;
    multiply_back(ends, i, now, at.value(i - 1), static_cast<T*>(nullptr), g);
    now = g;
    std::swap(g, next);
  }
}

}  // namespace

void run_cpu(const Problem& p, const Forward& out) { p.dtype == 0 ? forward<float>(p, out) : forward<double>(p, out); }
void run_cpu(const Gradients& p, const Backward& out) {
  p.dtype == 0 ? backward<float>(p, out) : backward<double>(p, out);
}

void run_cpu(const Seen& p, const Shown& out) { show_all(p, out); }
void run_cpu(const SeenGradients& p, const ShownGradients& out) { show_all(p, out); }

void run_cpu(const Critic& p, const Judged& out) { p.dtype == 0 ? judge<float>(p, out) : judge<double>(p, out); }
void run_cpu(const CriticGradients& p, const Backward& out) {
  p.dtype == 0 ? judge_backward<float>(p, out) : judge_backward<double>(p, out);
}

void run_cpu(const Gradients& p, const Chain& out) { p.dtype == 0 ? chain<float>(p, out) : chain<double>(p, out); }
void run_cpu(const ChainGradients& p, const Backward& out) {
  p.dtype == 0 ? chain_backward<float>(p, out) : chain_backward<double>(p, out);
}

template <class P, class... More>
auto seen(More... more) {
  return fields_of<P>(&P::dtype, &P::x, &P::x_stride, &P::rows, &P::features, &P::first, &P::shown, &P::context,
                      &P::context_stride, &P::context_columns, &P::limit, more...);
}

// A network's fields, as Python hands them over, and more of its problem.
template <class P, class... More>
auto network(More... more) {
  return fields_of<P>(&P::dtype, &P::x, &P::x_stride, &P::rows, &P::added, &P::added_stride, &P::weights, &P::biases,
                      &P::gates, &P::widths, &P::counts, &P::slope, &P::residual, more...);
}

void bind(pybind11::module_& m) {
  using G = Gradients;
  using C = ChainGradients;
  using J = CriticGradients;
  const auto gradients = fields(&Backward::gradients);
  define(m, "mlp", network<Problem>(), fields(&Forward::y, &Forward::hidden));
  define(m, "mlp_backward", network<G>(&G::gy, &G::hidden), gradients);
  define(m, "mlp_chain", network<G>(&G::gy, &G::hidden), fields(&Chain::x, &Chain::kept));
  define(m, "mlp_chain_backward", network<C>(&C::gy, &C::hidden, &C::gx, &C::kept), gradients);
  using S = SeenGradients;
  define(m, "mlp_seen", seen<Seen>(), fields(&Shown::seen));
  define(m, "mlp_seen_backward", seen<S>(&S::gseen, &S::gy, &S::gy_stride, &S::gmoved), fields(&ShownGradients::gx));
  define(m, "mlp_critic", network<Critic>(&Critic::epsilon),
         fields(&Judged::scores, &Judged::gradient, &Judged::hidden, &Judged::kept));
  define(m, "mlp_critic_backward", network<J>(&J::epsilon, &J::gy, &J::gx, &J::hidden, &J::kept), gradients);
}

}  // namespace genfuse::mlp

#else
namespace genfuse::mlp {
void bind(pybind11::module_&) {}
}  // namespace genfuse::mlp
#endif
