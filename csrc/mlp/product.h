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
  T* inner = nullptr;         // gets what is multiplied by the gate
  const T* gate = nullptr;
  const T* value = nullptr;   // of the activation through which a gradient goes back
  T* total = nullptr;         // is added to, and goes on instead
  bool rectified = false;
  T slope = 0;
};

// Result (m, n) = A (m, k) B (k, n).
template <class T>
struct Product {
  int64_t m, n, k;
  Matrix<T> a, b;
  Finish<T> finish;
  const int64_t* counts = nullptr;
  Masked masked = Masked::nothing;
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
GENFUSE_HD void pack(const Product<T>& p, int64_t j, int width, int64_t begin, int64_t end, T* to) {
  using V = typename Vector<T, bytes>::type;
  constexpr int lanes = Vector<T, bytes>::lanes;
  const int64_t columns = std::min<int64_t>(width, p.n - j);
  if (p.b.column == 1) {
    for (int64_t i = begin; i < end; ++i, to += width) {
      const int64_t seen = p.masked == Masked::b_rows ? std::clamp<int64_t>(p.counts[i] - j, 0, columns) : columns;
      const T* from = p.b.data + i * p.b.row + j;
      if (seen == width) {
        for (int l = 0; l < width; l += lanes) *reinterpret_cast<V*>(to + l) = *reinterpret_cast<const V*>(from + l);
      } else {
        for (int64_t l = 0; l < width; ++l) to[l] = l < seen ? from[l] : T(0);
      }
    }
    return;
  }
  for (int l0 = 0; l0 < width; l0 += lanes) {
    const int64_t here = std::clamp<int64_t>(columns - l0, 0, lanes);
    const T* from = p.b.data + (j + l0) * p.b.column;
    int64_t whole = here == lanes ? end : begin, i = begin;
    if (p.masked == Masked::b_columns) {
      for (int64_t l = 0; l < here; ++l) whole = std::min(whole, p.counts[j + l0 + l]);
    }
    for (; i + lanes <= whole; i += lanes) {
      V rows[lanes];
      GENFUSE_UNROLL(16)
      for (int l = 0; l < lanes; ++l) rows[l] = *reinterpret_cast<const V*>(from + l * p.b.column + i);
      transpose<T, bytes>(rows);
      GENFUSE_UNROLL(16)
      for (int l = 0; l < lanes; ++l) *reinterpret_cast<V*>(to + (i - begin + l) * width + l0) = rows[l];
    }
    for (int l = 0; l < lanes; ++l) {
      const int64_t seen =
          l >= here ? begin : (p.masked == Masked::b_columns ? std::clamp(p.counts[j + l0 + l], i, end) : end);
      T* column = to + l0 + l;
      for (int64_t r = i; r < end; ++r) column[(r - begin) * width] = r < seen ? from[l * p.b.column + r] : T(0);
    }
  }
}

// out (height, width lanes) = A (height, k) B (k, width lanes), plus what out was if `add`. A is given from its first
// element on, by rows or by columns; B is packed.
template <class T, int bytes, int height, int width, bool by_rows>
GENFUSE_HD void tile(const T* a, int64_t stride, const T* b, int64_t k, bool add, T* out) {
  using V = typename Vector<T, bytes>::type;
  constexpr int lanes = Vector<T, bytes>::lanes, threes = (height + 2) / 3;
  V sum[height][width];
  GENFUSE_UNROLL(16)
  for (int i = 0; i < height; ++i) {
    GENFUSE_UNROLL(4)
    for (int v = 0; v < width; ++v) sum[i][v] = V{};
  }
  // An address holds a base and one offset: three rows share a base, so that registers suffice.
  const T* base[threes];
  GENFUSE_UNROLL(16)
  for (int i = 0; i < threes; ++i) base[i] = a + (by_rows ? 3 * i * stride : 0);
  GENFUSE_UNROLL(4)
  for (int64_t j = 0; j < k; ++j) {
    V other[width];
    GENFUSE_UNROLL(4)
    for (int v = 0; v < width; ++v) other[v] = *reinterpret_cast<const V*>(b + (j * width + v) * lanes);
    GENFUSE_UNROLL(16)
    for (int i = 0; i < height; ++i) {
      const T one = by_rows ? base[i / 3][j + (i % 3) * stride] : a[j * stride + i];
      GENFUSE_UNROLL(4)
      for (int v = 0; v < width; ++v) sum[i][v] += one * other[v];
    }
  }
  GENFUSE_UNROLL(16)
  for (int i = 0; i < height; ++i) {
    GENFUSE_UNROLL(4)
    for (int v = 0; v < width; ++v) {
      V* to = reinterpret_cast<V*>(out + (i * width + v) * lanes);
      *to = add ? *to + sum[i][v] : sum[i][v];
    }
  }
}

// The sums of n columns from j on of row i, at most `most`, become results.
template <class T, int most>
GENFUSE_HD void finish_row(const Product<T>& p, int64_t i, int64_t j, int64_t n, T* sums) {
  const Finish<T>& f = p.finish;
  const int64_t at = i * p.n + j;
  if (f.bias) {
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) sums[l] += f.bias[j + l];
  }
  if (f.added) {
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) sums[l] += f.added[i * f.added_stride + j + l];
  }
  if (f.inner) std::copy_n(sums, n, f.inner + at);
  if (f.gate) {
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) sums[l] *= f.gate[at + l];
  }
  if (f.value) {
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) sums[l] = through(sums[l], f.value[at + l], f.slope);
  }
  if (f.total) {
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) sums[l] = f.total[at + l] += sums[l];
  }
  if (f.rectified) {
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) sums[l] = rectify(sums[l], f.slope);
  }
  if (p.masked == Masked::result_rows) {
    for (int64_t l = 0; l < n; ++l) sums[l] = j + l < p.counts[i] ? sums[l] : T(0);
  }
  if (n == most) {
    std::memcpy(f.out + at, sums, most * sizeof(T));
  } else {
    std::copy_n(sums, n, f.out + at);
  }
}

// Of which rows of B a panel of columns has elements that are not 0.
template <class T>
GENFUSE_HD std::pair<int64_t, int64_t> depth_of(const Product<T>& p, int64_t j, int64_t columns) {
  int64_t begin = 0, end = p.k;
  if (p.masked == Masked::b_columns) {
    end = *std::max_element(p.counts + j, p.counts + j + columns);
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
template <class T, int bytes, int tall>
GENFUSE_HD void panel(const Product<T>& p, int64_t first, int64_t last, int64_t j, Room<T>& room) {
  constexpr int width = 2, columns = width * Vector<T, bytes>::lanes;
  const int64_t n = std::min<int64_t>(columns, p.n - j);
  const auto [begin, end] = depth_of(p, j, n);
  room.packed.resize(size_t(kDepth * columns));
  const bool parts = end - begin > kDepth;
  room.sums.resize(size_t((parts ? last - first : tall) * columns));
  T* const sums = room.sums.data();
  for (int64_t k = begin; k < std::max(end, begin + 1); k += kDepth) {
    const int64_t depth = std::min(kDepth, end - k);
    pack<T, bytes>(p, j, columns, k, k + depth, room.packed.data());
    for (int64_t i = first; i < last;) {
      const T* a = p.a.data + i * p.a.row + k * p.a.column;
      T* to = sums + (parts ? (i - first) * columns : 0);
      const int64_t left = last - i;
      const auto run = [&](auto height) {
        constexpr int rows = decltype(height)::value;
        const bool seen = p.masked != Masked::result_rows || *std::max_element(p.counts + i, p.counts + i + rows) > j;
        if (p.a.column == 1) {
          tile<T, bytes, rows, width, true>(a, p.a.row, room.packed.data(), depth, k > begin, to);
        } else {
          tile<T, bytes, rows, width, false>(a, p.a.column, room.packed.data(), seen ? depth : 0, k > begin, to);
        }
        if (k + depth >= end) {
          for (int r = 0; r < rows; ++r) finish_row<T, columns>(p, i + r, j, n, to + r * columns);
        }
        i += rows;
      };
      if (left >= tall) {
        run(std::integral_constant<int, tall>());
      } else if (tall > 8 && left >= 8) {
        run(std::integral_constant<int, 8>());
      } else if (left >= 4) {
        run(std::integral_constant<int, 4>());
      } else if (left >= 2) {
        run(std::integral_constant<int, 2>());
      } else {
        run(std::integral_constant<int, 1>());
      }
    }
  }
}

template <class T>
struct Level {
  void (*run)(const Product<T>&, int64_t, int64_t, int64_t, Room<T>&);
  int columns;
};

#define GENFUSE_PANEL(T, name, bytes, tall)                                                               \
  void name(const Product<T>& p, int64_t first, int64_t last, int64_t j, Room<T>& room) {                 \
    panel<T, bytes, tall>(p, first, last, j, room);                                                       \
  }
#ifdef GENFUSE_SIMD_LEVELS
#define GENFUSE_PANELS(T)                                                             \
  __attribute__((target("arch=x86-64-v4"))) GENFUSE_PANEL(T, panel_v4, 64, 14)        \
  __attribute__((target("arch=x86-64-v3"))) GENFUSE_PANEL(T, panel_v3, 32, 6)         \
  GENFUSE_PANEL(T, panel_v1, 16, 6)                                                   \
  const Level<T> level_of(T) {                                                        \
    if (__builtin_cpu_supports("x86-64-v4")) return {panel_v4, 128 / sizeof(T)};      \
    if (__builtin_cpu_supports("x86-64-v3")) return {panel_v3, 64 / sizeof(T)};       \
    return {panel_v1, 32 / sizeof(T)};                                                \
  }
#else
#define GENFUSE_PANELS(T)              \
  GENFUSE_PANEL(T, panel_v1, 16, 12)   \
  const Level<T> level_of(T) { return {panel_v1, 32 / sizeof(T)}; }
#endif
GENFUSE_PANELS(float)
GENFUSE_PANELS(double)

// Runs a product on all threads where there is enough work.
template <class T>
void multiply(const Product<T>& p) {
  static const Level<T> level = level_of(T());
  const int64_t panels = (p.n + level.columns - 1) / level.columns, heights = (p.m + kHeight - 1) / kHeight;
#pragma omp parallel for schedule(static) if (p.m * p.n * p.k > (int64_t(1) << 19))
  for (int64_t task = 0; task < panels * heights; ++task) {
    thread_local Room<T> room;
    const int64_t first = task % heights * kHeight;
    level.run(p, first, std::min(first + kHeight, p.m), task / heights * level.columns, room);
  }
}

}  // namespace genfuse::mlp
