#pragma once
// Matrix products of a tile of registers at a time, with what follows a product done while its results are in the first
// cache. The BLAS that PyTorch comes with leaves half of an AMD core's vector unit idle, and a call of it for each
// product costs a small network more than the product.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "mlp/math.h"
#include "rows.h"

namespace genfuse::mlp {

template <class T, int bytes>
struct Vector {
  typedef T type __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index indices __attribute__((vector_size(bytes)));
  static constexpr int lanes = bytes / sizeof(T);
};

// A number, or some of them side by side.
template <class X, class T>
GENFUSE_HD X& at(T* p) {
  return *reinterpret_cast<X*>(p);
}
template <class X, class T>
GENFUSE_HD X at(const T* p) {
  return *reinterpret_cast<const X*>(p);
}

template <class T>
struct Single {
  using type = T;
};

// Element (i, j) lies at data[i row + j column]; one of both strides is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// Which elements are 0: all of those, of B or of the result, at or beyond counts[.] of their column or row.
enum class Masked { nothing, b_columns, b_rows, result_rows };

// What becomes of the sums of row i from column j on. All that has rows is (m, n), contiguous, or null.
template <class T>
struct Finish {
  T* out;
  const T *bias = nullptr, *added = nullptr;
  int64_t added_stride = 0;
  T* inner = nullptr;  // gets what is multiplied by the gate
  const T* gate = nullptr;
  const T* value = nullptr;  // of the activation through which a gradient goes back
  T* total = nullptr;        // is added to, and goes on instead
  bool rectified = false;
  T slope = 0;
};

// Result (m, n) = A (m, k) B (k, n), to which more of the same may be added before it is finished.
template <class T>
struct Product {
  int64_t m, n, k;
  Matrix<T> a, b;
  Finish<T> finish;
  const int64_t* counts = nullptr;
  Masked masked = Masked::nothing;
  int64_t more_k = 0;
  Matrix<T> more_a = {}, more_b = {};
};

constexpr int64_t kDepth = 512;   // of what is summed in registers, and of B packed at a time: long sums lose digits
constexpr int64_t kHeight = 504;  // rows of A that meet a panel of B at a time

template <int distance, bool high, class V, class I, size_t... lane>
GENFUSE_HD V exchanged(V a, V b, std::index_sequence<lane...>) {
  constexpr int lanes = sizeof...(lane);
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, ((lane & distance) ? lanes + int(lane) - (high ? 0 : distance) : int(lane) + (high ? distance : 0))...);
#else
  return __builtin_shuffle(
      a, b, I{((lane & distance) ? lanes + int(lane) - (high ? 0 : distance) : int(lane) + (high ? distance : 0))...});
#endif
}

// Transposes lanes x lanes numbers: stage by stage, rows exchange halves, quarters and so on.
template <class T, int bytes, int distance = Vector<T, bytes>::lanes / 2>
GENFUSE_HD void transpose(typename Vector<T, bytes>::type* rows) {
  using V = typename Vector<T, bytes>::type;
  using I = typename Vector<T, bytes>::indices;
  constexpr int lanes = Vector<T, bytes>::lanes;
  GENFUSE_UNROLL(16)
  for (int i = 0; i < lanes; ++i) {
    if (i & distance) continue;
    const V low = rows[i], high = rows[i + distance];
    rows[i] = exchanged<distance, false, V, I>(low, high, std::make_index_sequence<lanes>());
    rows[i + distance] = exchanged<distance, true, V, I>(low, high, std::make_index_sequence<lanes>());
  }
  if constexpr (distance > 1) transpose<T, bytes, distance / 2>(rows);
}

// Columns [j, j + width) of B's rows [begin, end), row after row, with 0 for those beyond B.
template <class T, int bytes>
GENFUSE_HD void pack(const Product<T>& p, const Matrix<T>& b, int64_t j, int width, int64_t begin, int64_t end, T* to) {
  using V = typename Vector<T, bytes>::type;
  constexpr int lanes = Vector<T, bytes>::lanes;
  const int64_t columns = std::min<int64_t>(width, p.n - j);
  if (b.column == 1 && p.masked != Masked::b_columns) {  // of one row, both strides are 1
    for (int64_t i = begin; i < end; ++i, to += width) {
      const int64_t seen = p.masked == Masked::b_rows ? std::clamp<int64_t>(p.counts[i] - j, 0, columns) : columns;
      const T* from = b.data + i * b.row + j;
      if (seen == width) {
        for (int l = 0; l < width; l += lanes) at<V>(to + l) = at<V>(from + l);
      } else {
        for (int64_t l = 0; l < width; ++l) to[l] = l < seen ? from[l] : T(0);
      }
    }
    return;
  }
  for (int l0 = 0; l0 < width; l0 += lanes) {
    const int64_t here = std::clamp<int64_t>(columns - l0, 0, lanes);
    const T* from = b.data + (j + l0) * b.column;
    int64_t whole = here == lanes ? end : begin, i = begin;
    if (p.masked == Masked::b_columns) {
      for (int64_t l = 0; l < here; ++l) whole = std::min(whole, p.counts[j + l0 + l]);
    }
    for (; i + lanes <= whole; i += lanes) {
      V rows[lanes];
      GENFUSE_UNROLL(16)
      for (int l = 0; l < lanes; ++l) rows[l] = at<V>(from + l * b.column + i);
      transpose<T, bytes>(rows);
      GENFUSE_UNROLL(16)
      for (int l = 0; l < lanes; ++l) at<V>(to + (i - begin + l) * width + l0) = rows[l];
    }
    for (int l = 0; l < lanes; ++l) {
      const int64_t seen =
          l >= here ? begin : (p.masked == Masked::b_columns ? std::clamp(p.counts[j + l0 + l], i, end) : end);
      T* column = to + l0 + l;
      for (int64_t r = i; r < end; ++r) column[(r - begin) * width] = r < seen ? from[l * b.column + r] : T(0);
    }
  }
}

// out (height, width lanes) = A (height, k) B (k, width lanes), plus what out was if `add`. A is given from its first
// element on, by rows or by columns; B is packed. Sums are written out one by one, since GCC may keep them in memory
// in a loop over them.
template <class T, int bytes, int height, int width, bool by_rows, size_t... t>
GENFUSE_HD void sum_tile(const T* a, int64_t stride, const T* b, int64_t k, bool add, T* out,
                         std::index_sequence<t...>) {
  using V = typename Vector<T, bytes>::type;
  constexpr int lanes = Vector<T, bytes>::lanes;
  V sum[height * width] = {};
  // An address holds a base and one offset: three rows share a base, so that registers suffice.
  const T* const base[] = {a, a + 3 * stride, a + 6 * stride, a + 9 * stride, a + 12 * stride};
  GENFUSE_UNROLL(4)
  for (int64_t j = 0; j < k; ++j) {
    const V other[] = {at<V>(b + j * width * lanes), at<V>(b + (j * width + width - 1) * lanes)};
    ((sum[t] +=
      (by_rows ? base[t / width / 3][j + t / width % 3 * stride] : a[j * stride + t / width]) * other[t % width]),
     ...);
  }
  if (add) ((sum[t] += at<V>(out + t * lanes)), ...);
  ((at<V>(out + t * lanes) = sum[t]), ...);
}

// Sums of `rows` rows from i on and of columns from j on, `width` times as many as X has, become results. What there is
// to be done is asked once for all of them: asked for each, it takes longer than a product of a few summands.
template <int width, class X, class T>
GENFUSE_HD void finish(const Product<T>& p, T* sums, int64_t stride, int rows, int64_t i, int64_t j) {
  constexpr int lanes = sizeof(X) / sizeof(T);
  const Finish<T>& f = p.finish;
  const auto each = [&](auto change) {
    for (int r = 0; r < rows; ++r) {
      for (int l = 0; l < width * lanes; l += lanes) {
        change(at<X>(sums + r * stride + l), r, l, (i + r) * p.n + j + l);
      }
    }
  };
  if (f.bias) each([&](X& x, int, int l, int64_t) { x += at<X>(f.bias + j + l); });
  if (f.added) each([&](X& x, int r, int l, int64_t) { x += at<X>(f.added + (i + r) * f.added_stride + j + l); });
  if (f.inner) each([&](X& x, int, int, int64_t to) { at<X>(f.inner + to) = x; });
  if (f.gate) each([&](X& x, int, int, int64_t to) { x *= at<X>(f.gate + to); });
  if (f.value) each([&](X& x, int, int, int64_t to) { x = through(x, at<X>(f.value + to), f.slope); });
  if (f.total) each([&](X& x, int, int, int64_t to) { at<X>(f.total + to) = x += at<X>(f.total + to); });
  if (f.rectified) each([&](X& x, int, int, int64_t) { x = rectify(x, f.slope); });
  each([&](X& x, int, int, int64_t to) { at<X>(f.out + to) = x; });
}

// Of a tile that the result ends in, n columns: as many at a time as there are, so halves of vectors at the end.
template <class T, int bytes>
GENFUSE_HD void finish_lanes(const Product<T>& p, T* sums, int64_t stride, int rows, int64_t i, int64_t j, int64_t n) {
  constexpr int lanes = bytes / sizeof(T);
  using X = typename std::conditional_t<lanes == 1, Single<T>, Vector<T, bytes>>::type;
  for (; n >= lanes; n -= lanes, j += lanes, sums += lanes) finish<1, X>(p, sums, stride, rows, i, j);
  if constexpr (lanes > 1) finish_lanes<T, bytes / 2>(p, sums, stride, rows, i, j, n);
}

template <class T, int bytes, int width>
GENFUSE_HD void finish_tile(const Product<T>& p, T* sums, int rows, int64_t i, int64_t j, int64_t n) {
  constexpr int64_t columns = width * Vector<T, bytes>::lanes;
  if (p.masked == Masked::result_rows) {
    for (int r = 0; r < rows; ++r) {
      for (int64_t l = std::max<int64_t>(p.counts[i + r] - j, 0); l < n; ++l) sums[r * columns + l] = 0;
    }
  }
  if (n == columns) return finish<width, typename Vector<T, bytes>::type>(p, sums, columns, rows, i, j);
  finish_lanes<T, bytes>(p, sums, columns, rows, i, j, n);
}

// Of which rows of B a panel of columns has elements that are not 0.
template <class T>
GENFUSE_HD std::pair<int64_t, int64_t> depth_of(const Product<T>& p, int64_t j, int64_t columns) {
  int64_t begin = 0, end = p.k;
  if (p.masked == Masked::b_columns) {
    end = std::clamp<int64_t>(*std::max_element(p.counts + j, p.counts + j + columns), 0, p.k);
  } else if (p.masked == Masked::b_rows) {
    while (begin < end && p.counts[begin] <= j) ++begin;
    while (begin < end && p.counts[end - 1] <= j) --end;
  }
  return {begin, end};
}

template <class T>
struct Room {
  std::vector<T> packed, sums;
};

// Rows [first, last) of the columns from j on, width vectors of them. `tall` rows at a time, fewer at the end.
template <class T, class Level, int width>
GENFUSE_HD void panel(const Product<T>& p, int64_t first, int64_t last, int64_t j, Room<T>& room) {
  constexpr int bytes = Level::bytes, tall = Level::tall, columns = width * Vector<T, bytes>::lanes;
  const int64_t n = std::min<int64_t>(columns, p.n - j);
  auto [begin, end] = depth_of(p, j, n);
  room.packed.resize(size_t(kDepth * columns));
  const bool parts = end - begin > kDepth || p.more_k;
  room.sums.resize(size_t((parts ? last - first : tall) * columns));
  T* const sums = room.sums.data();
  Matrix<T> a_of = p.a, b_of = p.b;
  bool add = false, more = p.more_k > 0;
  for (int64_t k = begin;;) {
    const int64_t depth = std::min(kDepth, end - k);
    const bool ends = k + depth >= end && !more;
    pack<T, bytes>(p, b_of, j, columns, k, k + depth, room.packed.data());
    for (int64_t i = first; i < last;) {
      const T* a = a_of.data + i * a_of.row + k * a_of.column;
      T* to = sums + (parts ? (i - first) * columns : 0);
      const int64_t left = last - i;
      const auto run = [&](auto height) {
        constexpr int rows = decltype(height)::value;
        const bool seen = p.masked != Masked::result_rows || *std::max_element(p.counts + i, p.counts + i + rows) > j;
        if (a_of.column == 1) {
          Level::template tile<T, rows, width, true>(a, a_of.row, room.packed.data(), depth, add, to);
        } else {
          Level::template tile<T, rows, width, false>(a, a_of.column, room.packed.data(), seen ? depth : 0, add, to);
        }
        return rows;
      };
      const int rows = left >= tall            ? run(std::integral_constant<int, tall>())
                       : tall > 8 && left >= 8 ? run(std::integral_constant<int, 8>())
                       : left >= 4             ? run(std::integral_constant<int, 4>())
                       : left >= 2             ? run(std::integral_constant<int, 2>())
                                               : run(std::integral_constant<int, 1>());
      if (ends) finish_tile<T, bytes, width>(p, to, rows, i, j, n);
      i += rows;
    }
    if (ends) return;
    add = true, k += depth;
    if (k >= end) {
      a_of = p.more_a, b_of = p.more_b, k = 0, end = p.more_k, more = false;
    }
  }
}

// A level of x86-64: bytes of a vector, and rows of a tile that its registers have room for. Each tile is a function of
// its own: in one that has all of them GCC does not keep the sums in registers.
#define GENFUSE_LEVEL(name, attributes, bytes_of_vector, rows_of_tile)                                                 \
  struct name {                                                                                                        \
    static constexpr int bytes = bytes_of_vector, tall = rows_of_tile;                                                 \
    template <class T, int height, int width, bool by_rows>                                                            \
    attributes __attribute__((noinline)) static void tile(const T* a, int64_t stride, const T* b, int64_t k, bool add, \
                                                          T* out) {                                                    \
      sum_tile<T, bytes, height, width, by_rows>(a, stride, b, k, add, out,                                            \
                                                 std::make_index_sequence<height * width>());                          \
    }                                                                                                                  \
    template <class T>                                                                                                 \
    attributes static void run(const Product<T>& p, int64_t first, int64_t last, int64_t j, Room<T>& room) {           \
      p.n - j > Vector<T, bytes>::lanes ? panel<T, name, 2>(p, first, last, j, room)                                   \
                                        : panel<T, name, 1>(p, first, last, j, room);                                  \
    }                                                                                                                  \
  };
GENFUSE_LEVEL(V4, __attribute__((target("arch=x86-64-v4"))), 64, 14)
GENFUSE_LEVEL(V3, __attribute__((target("arch=x86-64-v3"))), 32, 6)

template <class T>
struct Panels {
  void (*run)(const Product<T>&, int64_t, int64_t, int64_t, Room<T>&);
  int64_t columns;

  template <class Level>
  static Panels of() {
    return {&Level::template run<T>, 2 * Vector<T, Level::bytes>::lanes};
  }
};

// Runs a product on all threads where there is enough work.
template <class T>
void multiply(const Product<T>& p) {
  static const auto level =
      __builtin_cpu_supports("x86-64-v4") ? Panels<T>::template of<V4>() : Panels<T>::template of<V3>();
  const int64_t panels = (p.n + level.columns - 1) / level.columns, heights = (p.m + kHeight - 1) / kHeight;
  for_each(panels * heights, p.m * p.n * p.k > (int64_t(1) << 19), [&](int64_t task) {
    thread_local Room<T> room;
    const int64_t first = task % heights * kHeight;
    level.run(p, first, std::min(first + kHeight, p.m), task / heights * level.columns, room);
  });
}

}  // namespace genfuse::mlp
