#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "mixed_log_prob/launch.h"
#include "mixed_log_prob/math.h"
#include "rows.h"

namespace genfuse::mixed_log_prob {
namespace {

// Numbers are worked on in blocks, across rows, and components one after the other, so that loops are long where
// numbers and components are few: arrays of components are (components, width), all others of numbers (width).
template <class T>
struct Arrays {
  int64_t width;
  std::vector<T> memory;
  T *logit, *joint, *by_mu, *by_scale;  // of components; `logit` and `joint` become their exponentials
  T *low, *high, *top, *joint_top, *sum, *joint_sum, *g;
  T *shift, *exponential;  // of choices

  explicit Arrays(const Problem& p)
      : width(std::max<int64_t>(1, kBlock / std::max<int64_t>(1, p.components))),
        memory((4 * p.components + 7) * width + 2 * p.choices),
        logit(memory.data()) {
    joint = logit + p.components * width, by_mu = joint + p.components * width;
    by_scale = by_mu + p.components * width, low = by_scale + p.components * width;
    high = low + width, top = high + width, joint_top = top + width, sum = joint_top + width;
    joint_sum = sum + width, g = joint_sum + width, shift = g + width, exponential = shift + p.choices;
  }
};

// Calls f(i, row, column, at) for n numbers from the `first` on, counted over all rows; `at` is the edges' place.
template <class F>
GENFUSE_HD void each_number(const Problem& p, int64_t first, int64_t n, F f) {
  int64_t row = first / p.numbers, column = first % p.numbers, at = first % (p.examples * p.numbers);
  for (int64_t i = 0; i < n; ++i) {
    f(i, row, column, at);
    if (++column == p.numbers) column = 0, ++row;
    if (++at == p.examples * p.numbers) at = 0;
  }
}

// Reads n numbers from the `first` on, counted over all rows, and makes of each component the exponentials of its logit
// and of what that and its log-mass sum up to, less the largest ones, and the sums of both.
template <bool derivatives, class S, class T>
GENFUSE_HD void components(const Problem& p, Arrays<T>& a, int64_t first, int64_t n) {
  const int64_t k = p.components, width = a.width;
  T *logit = a.logit, *joint = a.joint, *by_mu = a.by_mu, *by_scale = a.by_scale, *low = a.low, *high = a.high;
  T *top = a.top, *joint_top = a.joint_top, *sum = a.sum, *joint_sum = a.joint_sum;
  each_number(p, first, n, [&](int64_t i, int64_t row, int64_t column, int64_t at) {
    const S* raw = element<S>(p.raw, row * p.raw_stride + column * 3 * k);
    const T from = *element<T>(p.low, at), to = *element<T>(p.high, at);
    low[i] = from == from ? from : T(-0.5);
    high[i] = from == from ? to : T(0.5);
    for (int64_t j = 0; j < k; ++j) {
      logit[j * width + i] = load(raw[j]);
      by_mu[j * width + i] = load(raw[k + j]);
      by_scale[j * width + i] = load(raw[2 * k + j]);
    }
  });
  std::fill_n(top, n, std::numeric_limits<T>::lowest());
  std::fill_n(joint_top, n, std::numeric_limits<T>::lowest());
  std::fill_n(sum, n, T(0));
  std::fill_n(joint_sum, n, T(0));
  for (int64_t j = 0; j < k * width; j += width) {
    GENFUSE_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) top[i] = logit[j + i] > top[i] ? logit[j + i] : top[i];
  }
  for (int64_t j = 0; j < k * width; j += width) {
    GENFUSE_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const Logistic<T> of(low[i], high[i], by_mu[j + i], by_scale[j + i]);
      logit[j + i] -= top[i];  // which may be so large that a mass beside it would lose its digits
      const T mass = logit[j + i] + of.log_mass();
      joint[j + i] = mass;
      joint_top[i] = mass > joint_top[i] ? mass : joint_top[i];
      if (derivatives) of.derivatives(by_mu[j + i], by_scale[j + i]);
    }
  }
  for (int64_t j = 0; j < k * width; j += width) {
    GENFUSE_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      logit[j + i] = exp_(logit[j + i]);
      joint[j + i] = exp_(joint[j + i] - joint_top[i]);
      sum[i] += logit[j + i];
      joint_sum[i] += joint[j + i];
    }
  }
}

// The end of the block of choices that begins at `start`.
GENFUSE_HD int64_t end_of_block(const Problem& p, int64_t start) {
  int64_t end = start + 1;
  while (end < p.choices && p.block[end] == p.block[start]) ++end;
  return end;
}

// Exponentials of a row's choices, each less the largest of its block, which is `shift`.
template <class S, class T>
GENFUSE_HD void choices(const Problem& p, Arrays<T>& a, const S* raw) {
  T *shift = a.shift, *exponential = a.exponential;
  for (int64_t start = 0, end; start < p.choices; start = end) {
    end = end_of_block(p, start);
    T top = load(raw[start]);
    for (int64_t j = start + 1; j < end; ++j) top = std::max(top, T(load(raw[j])));
    std::fill(shift + start, shift + end, top);
  }
  GENFUSE_INDEPENDENT
  for (int64_t j = 0; j < p.choices; ++j) exponential[j] = exp_(load(raw[j]) - shift[j]);
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Forward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Arrays<T> a(p);
  T* log_prob = element<T>(out.log_prob, 0);
  std::vector<double> totals(end - begin);  // long sums would lose digits
  for (int64_t row = begin; row < end; ++row) {
    const S* raw = element<S>(p.raw, row * p.raw_stride + 3 * p.components * p.numbers);
    choices(p, a, raw);
    T* log_total = a.shift;
    for (int64_t start = 0, last; start < p.choices; start = last) {
      last = end_of_block(p, start);
      T total = 0;
      for (int64_t j = start; j < last; ++j) total += a.exponential[j];
      std::fill(log_total + start, log_total + last, log_total[start] + log_(total));
    }
    for (int64_t b = 0; b < p.blocks; ++b) {
      const int64_t j = p.chosen[row % p.examples * p.blocks + b];
      totals[row - begin] += load(raw[j]) - log_total[j];
    }
  }
  for (int64_t first = begin * p.numbers; first < end * p.numbers; first += a.width) {
    const int64_t n = std::min(a.width, end * p.numbers - first);
    components<false, S>(p, a, first, n);
    T *joint_top = a.joint_top, *sum = a.sum, *joint_sum = a.joint_sum;
    GENFUSE_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) sum[i] = joint_top[i] + log_(joint_sum[i] / sum[i]);
    each_number(p, first, n, [&](int64_t i, int64_t row, int64_t, int64_t at) {
      const T low = *element<T>(p.low, at);
      if (low == low) totals[row - begin] += sum[i];
    });
  }
  for (int64_t row = begin; row < end; ++row) log_prob[row] = T(totals[row - begin]);
}

template <class S>
GENFUSE_HD void rows_of(const Problem& p, const Backward& out, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  Arrays<T> a(p);
  const T* gs = element<T>(out.g, 0);
  const int64_t k = p.components, width = a.width, cols = p.cols();
  for (int64_t row = begin; row < end; ++row) {
    const T g = gs[row];
    const S* raw = element<S>(p.raw, row * p.raw_stride + 3 * k * p.numbers);
    S* graw = element<S>(out.graw, row * cols + 3 * k * p.numbers);
    choices(p, a, raw);
    T *factor = a.shift, *exponential = a.exponential;
    for (int64_t start = 0, last; start < p.choices; start = last) {
      last = end_of_block(p, start);
      T total = 0;
      for (int64_t j = start; j < last; ++j) total += exponential[j];
      std::fill(factor + start, factor + last, -g / total);
    }
    GENFUSE_INDEPENDENT
    for (int64_t j = 0; j < p.choices; ++j) exponential[j] *= factor[j];
    for (int64_t b = 0; b < p.blocks; ++b) {
      const int64_t j = p.chosen[row % p.examples * p.blocks + b];
      exponential[j] += g;
    }
    GENFUSE_INDEPENDENT
    for (int64_t j = 0; j < p.choices; ++j) store(graw[j], exponential[j]);
  }
  for (int64_t first = begin * p.numbers; first < end * p.numbers; first += width) {
    const int64_t n = std::min(width, end * p.numbers - first);
    components<true, S>(p, a, first, n);
    T *logit = a.logit, *joint = a.joint, *by_mu = a.by_mu, *by_scale = a.by_scale, *sum = a.sum, *g = a.g;
    T* joint_sum = a.joint_sum;
    each_number(p, first, n, [&](int64_t i, int64_t row, int64_t, int64_t at) {
      const T low = *element<T>(p.low, at);
      g[i] = low == low ? gs[row] : T(0);
    });
    GENFUSE_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = g[i] / sum[i];
      joint_sum[i] = g[i] / joint_sum[i];
    }
    for (int64_t j = 0; j < k * width; j += width) {
      GENFUSE_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const T share = joint[j + i] * joint_sum[i];
        logit[j + i] = share - logit[j + i] * sum[i];
        by_mu[j + i] *= share;
        by_scale[j + i] *= share;
      }
    }
    each_number(p, first, n, [&](int64_t i, int64_t row, int64_t column, int64_t) {
      S* graw = element<S>(out.graw, row * cols + column * 3 * k);
      for (int64_t j = 0; j < k; ++j) {
        store(graw[j], logit[j * width + i]);
        store(graw[k + j], by_mu[j * width + i]);
        store(graw[2 * k + j], by_scale[j * width + i]);
      }
    });
  }
}
GENFUSE_SIMD_LOOPS(rows, Forward, rows_of<S>)
GENFUSE_SIMD_LOOPS(rows, Backward, rows_of<S>)

}  // namespace

void check(const Problem& p) {
  for (int64_t j = 0, last = -1; j < p.choices; last = p.block[j++]) {
    if (p.block[j] < std::max<int64_t>(last, 0) || p.block[j] > last + 1) {
      throw std::invalid_argument("block must rise from 0 by steps of 1");
    }
  }
  if (const int64_t blocks = p.choices ? p.block[p.choices - 1] + 1 : 0; blocks != p.blocks) {
    throw std::invalid_argument("chosen must have a column for each of the " + std::to_string(blocks) +
                                " blocks, got " + std::to_string(p.blocks));
  }
  for (int64_t i = 0; i < p.examples * p.blocks; ++i) {
    const int64_t j = p.chosen[i], b = i % p.blocks;
    if (j < 0 || j >= p.choices) {
      throw std::out_of_range("chosen must be from 0 to " + std::to_string(p.choices - 1) + ", got " +
                              std::to_string(j));
    }
    if (p.block[j] != b) {
      throw std::invalid_argument("chosen must be a choice of block " + std::to_string(b) + " in column " +
                                  std::to_string(b) + ", got " + std::to_string(j) + ", of block " +
                                  std::to_string(p.block[j]));
    }
  }
}

template <class Out>
void run_cpu(const Problem& p, const Out& out) {
  check(p);
  // A component takes as long as some ten cells of other operators.
  dispatch(p.dtype, [&](auto storage) {
    for_rows(p.rows, 4 * p.cols(), [&](int64_t begin, int64_t end) { rows(storage, p, out, begin, end); });
  });
}

void bind(pybind11::module_& m) {
  using P = Problem;
  const auto problem = fields(&P::dtype, &P::raw, &P::raw_stride, &P::low, &P::high, &P::chosen, &P::block, &P::rows,
                              &P::examples, &P::numbers, &P::components, &P::choices, &P::blocks);
  define(m, "mixed_log_prob", problem, fields(&Forward::log_prob));
  define(m, "mixed_log_prob_backward", problem, fields(&Backward::g, &Backward::graw));
}

}  // namespace genfuse::mixed_log_prob
