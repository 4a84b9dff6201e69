#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "lu_product/launch.h"
#include "rows.h"

namespace genfuse::lu_product {
namespace {

constexpr int64_t kRows = 4;  // that are added at a time

// Adds to `sum` the sum over k < n of factors[k * step] times the row k of `rows`, in columns [j0, j1).
template <class T>
GENFUSE_HD void add_rows(T* sum, const T* factors, int64_t step, const T* rows, int64_t n, int64_t j0, int64_t j1,
                         int64_t size) {
  int64_t k = 0;
  for (; k + kRows <= n; k += kRows) {
    const T *r = rows + k * size, *f = factors + k * step;
    const T f0 = f[0], f1 = f[step], f2 = f[2 * step], f3 = f[3 * step];
    GENFUSE_INDEPENDENT
    for (int64_t j = j0; j < j1; ++j) {
      sum[j] += (f0 * r[j] + f1 * r[size + j]) + (f2 * r[2 * size + j] + f3 * r[3 * size + j]);
    }
  }
  for (; k < n; ++k) {
    const T f = factors[k * step], *r = rows + k * size;
    GENFUSE_INDEPENDENT
    for (int64_t j = j0; j < j1; ++j) sum[j] += f * r[j];
  }
}

// U with zeros below its diagonal, and L with ones on its diagonal and zeros above.
template <class T>
GENFUSE_HD void factors_of(const Problem& p, T* lower, T* upper) {
  const T *triangles = element<T>(p.triangles, 0), *log_diagonal = element<T>(p.log_diagonal, 0);
  const T* signs = element<T>(p.signs, 0);
  for (int64_t i = 0; i < p.size; ++i) {
    const T* from = triangles + i * p.size;
    std::fill_n(std::copy_n(from, i, lower + i * p.size), p.size - i, T(0));
    lower[i * p.size + i] = 1;
    std::fill_n(upper + i * p.size, i, T(0));
    std::copy_n(from + i, p.size - i, upper + i * p.size + i);
    upper[i * p.size + i] = signs[i] * std::exp(log_diagonal[i]);
  }
}

template <class T>
GENFUSE_HD void whole(const Problem& p, const Forward& out, int64_t, int64_t) {
  const int64_t n = p.size;
  std::vector<T> memory(2 * n * n + 2 * n);
  T *lower = memory.data(), *upper = lower + n * n, *row = upper + n * n, *scale = row + n;
  factors_of(p, lower, upper);
  for (int64_t j = 0; p.log_scale && j < n; ++j) scale[j] = std::exp(*element<T>(p.log_scale, j));
  double logdet = 0;
  for (int64_t i = 0; i < n; ++i) {
    std::fill_n(row, n, T(0));
    add_rows(row, lower + i * n, 1, upper, i + 1, 0, n, n);
    T* weight = element<T>(out.weight, i * n);
    for (int64_t j = 0; j < n; ++j) weight[j] = row[p.back[j]];
    logdet += *element<T>(p.log_diagonal, i);
    if (p.log_scale) {
      *element<T>(out.offset, i) = *element<T>(p.bias, i) + dot<T>(weight, element<T>(p.shift, 0), n);
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) weight[j] *= scale[j];
      logdet += *element<T>(p.log_scale, i);
    }
  }
  *element<T>(out.logdet, 0) = T(logdet);
}

template <class T>
GENFUSE_HD void whole(const Problem& p, const Backward& out, int64_t, int64_t) {
  const int64_t n = p.size;
  std::vector<T> memory(5 * n * n + 4 * n);
  T *lower = memory.data(), *upper = lower + n * n, *turned = upper + n * n, *g = turned + n * n, *all = g + n * n;
  T *row = all + n * n, *scale = row + n, *of_scale = scale + n, *of_shift = of_scale + n;
  factors_of(p, lower, upper);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) turned[j * n + i] = upper[i * n + j];
  }
  const T *gweight = element<T>(out.gweight, 0), glogdet = *element<T>(out.glogdet, 0);
  const T *shift = element<T>(p.shift, 0), *goffset = element<T>(out.goffset, 0);
  for (int64_t j = 0; j < n; ++j) scale[j] = p.log_scale ? std::exp(*element<T>(p.log_scale, p.order[j])) : T(1);
  for (int64_t i = 0; i < n; ++i) {  // of L U: what the weight has of it, and all
    for (int64_t j = 0; j < n; ++j) {
      const T of_weight = gweight[i * n + p.order[j]] * scale[j];
      g[i * n + j] = of_weight;
      all[i * n + j] = of_weight + (p.log_scale ? goffset[i] * shift[p.order[j]] : T(0));
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    T* to = element<T>(out.gtriangles, i * n);
    std::fill_n(row, n, T(0));
    add_rows(row, all + i * n, 1, turned, n, 0, i, n);
    std::copy_n(row, i, to);
    std::fill_n(row, n, T(0));
    add_rows(row, lower + i * n + i, n, g + i * n, n - i, i, n, n);  // the transpose of L: rows from i on
    if (p.log_scale) {
      T of_offset = 0;
      for (int64_t k = i; k < n; ++k) of_offset += lower[k * n + i] * goffset[k];
      for (int64_t j = i; j < n; ++j) {
        of_scale[j] += upper[i * n + j] * row[j];
        of_shift[j] += upper[i * n + j] * of_offset;
        row[j] += of_offset * shift[p.order[j]];
      }
    }
    *element<T>(out.glog_diagonal, i) = glogdet + row[i] * upper[i * n + i];
    to[i] = 0;
    std::copy(row + i + 1, row + n, to + i + 1);
  }
  for (int64_t j = 0; p.log_scale && j < n; ++j) {
    *element<T>(out.glog_scale, p.order[j]) = of_scale[j] + glogdet;
    *element<T>(out.gshift, p.order[j]) = of_shift[j];
  }
}

GENFUSE_SIMD_LOOP(float, run, Forward, whole<float>)
GENFUSE_SIMD_LOOP(double, run, Forward, whole<double>)
GENFUSE_SIMD_LOOP(float, run, Backward, whole<float>)
GENFUSE_SIMD_LOOP(double, run, Backward, whole<double>)

}  // namespace

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  for (const int64_t* columns : {p.back, p.order}) {
    if (std::any_of(columns, columns + p.size, [&](int64_t j) { return j < 0 || j >= p.size; })) {
      throw std::out_of_range("back and order must be of columns from 0 to " + std::to_string(p.size - 1));
    }
  }
  for (int64_t j = 0; j < p.size; ++j) {
    if (p.order[p.back[j]] != j) throw std::invalid_argument("order must undo back");
  }
  p.dtype == 1 ? run(double(), p, out, 0, 0) : run(float(), p, out, 0, 0);
}

void bind(pybind11::module_& m) {
  using P = Problem;
  using B = Backward;
  const auto problem = fields(&P::dtype, &P::triangles, &P::log_diagonal, &P::signs, &P::back, &P::order, &P::size);
  define(m, "lu_product", problem, fields(&Forward::weight, &Forward::logdet));
  define(m, "lu_product_backward", problem, fields(&B::gweight, &B::glogdet, &B::gtriangles, &B::glog_diagonal));
  const auto affine = fields(&P::dtype, &P::triangles, &P::log_diagonal, &P::log_scale, &P::shift, &P::bias, &P::signs,
                             &P::back, &P::order, &P::size);
  define(m, "lu_affine", affine, fields(&Forward::weight, &Forward::offset, &Forward::logdet));
  define(m, "lu_affine_backward", affine,
         fields(&B::gweight, &B::goffset, &B::glogdet, &B::gtriangles, &B::glog_diagonal, &B::glog_scale, &B::gshift));
}

}  // namespace genfuse::lu_product
