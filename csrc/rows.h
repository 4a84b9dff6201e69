#pragma once
// What kernels that walk over rows on the CPU share: the block that a row is worked on in, and how it is read.
#include <algorithm>
#include <type_traits>

#include "portable.h"

namespace genfuse {

// Columns worked on at a time: a handful of such buffers stays in the first-level cache.
constexpr int64_t kBlock = 512;

// Below this many elements the work is over before a second thread has woken up.
constexpr int64_t kParallel = 8192;

// The element at `offset` of an array of storage type S.
template <class S>
GENFUSE_HD const S* element(const void* base, int64_t offset) {
  return static_cast<const S*>(base) + offset;
}
template <class S>
GENFUSE_HD S* element(void* base, int64_t offset) {
  return static_cast<S*>(base) + offset;
}

// n values as the type that is computed in: where they lie, or converted into `buffer`.
template <class S, class T = compute_t<S>>
GENFUSE_HD const T* read(const S* from, int64_t n, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) buffer[j] = load(from[j]);
    return buffer;
  }
}

// Asks the cache for the start of a row that is worked on some rows from now. The rows of several arrays are more
// streams than hardware foresees where each of them is short. Addresses beyond an array do no harm.
constexpr int64_t kRowsAhead = 12;
template <class S>
GENFUSE_HD void prefetch([[maybe_unused]] const S* row, [[maybe_unused]] int64_t n) {
#ifdef __GNUC__
  constexpr int64_t kLine = 64 / sizeof(S), kMost = 8 * kLine;
  for (int64_t j = 0; j < std::min(n, kMost); j += kLine) __builtin_prefetch(row + j);
#endif
}

// Calls f(begin, end) for chunks of rows, on all threads where there is enough work.
template <class F>
void for_rows(int64_t rows, int64_t work_per_row, F f) {
  const int64_t work = std::max<int64_t>(work_per_row, 1);
  const int64_t chunk = std::max<int64_t>(kParallel / 2 / work, 1);
  const int64_t chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for schedule(static) if (rows > kParallel / work)
  for (int64_t c = 0; c < chunks; ++c) f(c * chunk, std::min((c + 1) * chunk, rows));
}

}  // namespace genfuse
