#include <vector>

#include "bindings.h"
#include "group_norm/launch.h"
#include "group_norm/math.h"
#include "rows.h"

namespace genfuse::group_norm {
namespace {

// One example at a time, in blocks of as many whole cells as fit kBlock, so that loops are long where channels are few:
// what belongs to a channel stands in the arrays once for each cell of a block.
template <class T>
struct Arrays {
  int64_t width;
  std::vector<T> memory;
  std::vector<double> totals;
  T *mean, *rstd, *factor, *shift, *of_g, *of_gx, *g;

  // `gradients`: an example's, of what is normalised, scaled and shifted.
  explicit Arrays(int64_t channels, int64_t gradients = 0)
      : width(std::max<int64_t>(1, kBlock / std::max<int64_t>(1, channels)) * channels),
        memory(6 * width + gradients),
        mean(memory.data()) {
    rstd = mean + width, factor = rstd + width, shift = factor + width;
    of_g = shift + width, of_gx = of_g + width, g = of_gx + width;
  }
};

// Calls f(j0, n) for the blocks of an example, which adds their terms up into two arrays of a block: of many, so many
// at a time, as long sums would lose digits.
template <class T, class F>
GENFUSE_HD void sum_blocks(Arrays<T>& a, int64_t size, T* first, T* second, F f) {
  constexpr int64_t kBlocksOfSum = 64;
  const int64_t step = kBlocksOfSum * a.width;
  std::fill_n(first, a.width, T(0));
  std::fill_n(second, a.width, T(0));
  a.totals.assign(size > step ? 2 * a.width : 0, 0);
  double *firsts = a.totals.data(), *seconds = firsts + a.width;
  for (int64_t begin = 0; begin < size; begin += step) {
    const int64_t end = std::min(begin + step, size);
    for (int64_t j0 = begin; j0 < end; j0 += a.width) f(j0, std::min(a.width, end - j0));
    for (int64_t j = 0; size > step && j < a.width; ++j) {
      firsts[j] += first[j], seconds[j] += second[j];
      first[j] = end < size ? T(0) : T(firsts[j]), second[j] = end < size ? T(0) : T(seconds[j]);
    }
  }
}

// Adds the sums of a block's cells up, into those of the first.
template <class T>
GENFUSE_HD void add_up(const Problem& p, int64_t width, T* sums) {
  for (int64_t j = p.channels; j < width; j += p.channels) {
    GENFUSE_INDEPENDENT
    for (int64_t c = 0; c < p.channels; ++c) sums[c] += sums[j + c];
  }
}

// Replaces what `add_up` has made by the groups' means, over cells and channels, and these a block wide.
template <class T>
GENFUSE_HD void means(const Problem& p, int64_t width, T* sums) {
  const int64_t each = p.channels / p.groups;
  for (int64_t first = 0; first < p.channels; first += each) {
    double sum = 0;
    for (int64_t c = first; c < first + each; ++c) sum += sums[c];
    std::fill_n(sums + first, each, T(sum / double(std::max<int64_t>(1, p.cells) * each)));
  }
  for (int64_t j = p.channels; j < width; ++j) sums[j] = sums[j - p.channels];
}

// Mean and reciprocal standard deviation, by two passes, of which the second corrects both (Chan et al., 1983, equation
// 1.7); the scale times this, and the shift.
template <class S, class T>
GENFUSE_HD void prepare(const Problem& p, Arrays<T>& a, int64_t i) {
  const int64_t size = p.cells * p.channels;
  const S* x = element<S>(p.x, i * size);
  const T *scale = element<T>(p.scale, i * p.channels), *shift = element<T>(p.shift, i * p.channels);
  T *mean = a.mean, *rstd = a.rstd, *rest = a.shift;
  sum_blocks(a, size, mean, rest, [=](int64_t j0, int64_t n) {
    GENFUSE_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) mean[j] += load(x[j0 + j]);
  });
  add_up(p, a.width, mean);
  means(p, a.width, mean);
  sum_blocks(a, size, rstd, rest, [=](int64_t j0, int64_t n) {
    GENFUSE_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const T centred = load(x[j0 + j]) - mean[j];
      rest[j] += centred;  // what rounding left out of the mean, which is all there is of constant groups
      rstd[j] += centred * centred;
    }
  });
  for (T* sums : {rest, rstd}) {
    add_up(p, a.width, sums);
    means(p, a.width, sums);
  }
  for (int64_t j = 0; j < a.width; ++j) {
    mean[j] += rest[j];
    rstd[j] = T(1) / std::sqrt(std::max(rstd[j] - rest[j] * rest[j], T(0)) + T(p.eps));
  }
  for (int64_t j = 0; j < a.width; j += p.channels) {
    for (int64_t c = 0; c < p.channels; ++c) a.factor[j + c] = scale[c] * rstd[j + c];
    std::copy_n(shift, p.channels, a.shift + j);
  }
}

template <bool silu, class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const int64_t size = p.cells * p.channels;
  Arrays<T> a(p.channels);
  for (int64_t i = begin; i < end; ++i) {
    prepare<S>(p, a, i);
    const T *mean = a.mean, *factor = a.factor, *shift = a.shift;
    const S* x = element<S>(p.x, i * size);
    S* y = element<S>(out.y, i * size);
    for (int64_t j0 = 0; j0 < size; j0 += a.width) {
      const int64_t n = std::min(a.width, size - j0);
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        store(y[j0 + j], activate<silu>((load(x[j0 + j]) - mean[j]) * factor[j] + shift[j]));
      }
    }
  }
}

template <bool silu, class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const int64_t size = p.cells * p.channels;
  Arrays<T> a(p.channels, size);
  for (int64_t i = begin; i < end; ++i) {
    prepare<S>(p, a, i);
    const T *mean = a.mean, *rstd = a.rstd, *factor = a.factor, *shift = a.shift;
    T *of_g = a.of_g, *of_gx = a.of_gx, *gs = a.g;
    const S *x = element<S>(p.x, i * size), *gy = element<S>(out.gy, i * size);
    S* gx = element<S>(out.gx, i * size);
    sum_blocks(a, size, of_g, of_gx, [=](int64_t j0, int64_t n) {
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        const T centred = load(x[j0 + j]) - mean[j];
        const T g = activation_grad<silu>(T(load(gy[j0 + j])), centred * factor[j] + shift[j]);
        gs[j0 + j] = g;
        of_g[j] += g;
        of_gx[j] += g * centred;
      }
    });
    add_up(p, a.width, of_g);
    add_up(p, a.width, of_gx);
    for (int64_t c = 0; c < p.channels; ++c) {
      *element<T>(out.gshift, i * p.channels + c) = of_g[c];
      *element<T>(out.gscale, i * p.channels + c) = of_gx[c] * rstd[c];
      of_g[c] *= factor[c];
      of_gx[c] *= factor[c];
    }
    means(p, a.width, of_g);
    means(p, a.width, of_gx);
    for (int64_t j = 0; j < a.width; ++j) of_gx[j] *= rstd[j] * rstd[j];
    for (int64_t j0 = 0; j0 < size; j0 += a.width) {
      const int64_t n = std::min(a.width, size - j0);
      GENFUSE_INDEPENDENT
      for (int64_t j = 0; j < n; ++j) {
        store(gx[j0 + j], grad(gs[j0 + j], T(load(x[j0 + j])) - mean[j], factor[j], of_g[j], of_gx[j]));
      }
    }
  }
}

template <class S>
GENFUSE_HD void either(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  p.silu ? rows_of<true, S>(p, out, begin, end) : rows_of<false, S>(p, out, begin, end);
}
template <class S>
GENFUSE_HD void either(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  p.silu ? rows_of<true, S>(p, out, begin, end) : rows_of<false, S>(p, out, begin, end);
}
GENFUSE_SIMD_LOOPS(rows, Forward, either<S>)
GENFUSE_SIMD_LOOPS(rows, Backward, either<S>)

}  // namespace

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, p.cells * p.channels, [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem =
      fields(&P::dtype, &P::x, &P::scale, &P::shift, &P::rows, &P::cells, &P::channels, &P::groups, &P::eps, &P::silu);
  define(m, "group_norm", problem, fields(&Forward::y));
  define(m, "group_norm_backward", problem, fields(&Backward::gy, &Backward::gx, &Backward::gscale, &Backward::gshift));
}

}  // namespace genfuse::group_norm
