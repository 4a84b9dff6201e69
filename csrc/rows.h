#pragma once
// What kernels that walk over rows on the CPU share: the block that a row is worked on in, and how it is read.
#include <algorithm>
#include <type_traits>

#include "portable.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

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

// The sum of term(j), j < n <= kBlock (a longer one would lose digits), as kSums sums side by side, the rest one by
// one. GCC's code for `omp simd reduction` takes twice as long in short rows.
template <class T, class F>
GENFUSE_HD T sum_of(int64_t n, F term) {
  constexpr int64_t kSums = 16;
  const int64_t whole = n - n % kSums;
  T total = 0;
  if (whole > 0) {
    T sums[kSums];
#pragma omp simd
    for (int64_t k = 0; k < kSums; ++k) sums[k] = term(k);
    for (int64_t j = kSums; j < whole; j += kSums) {
#pragma omp simd
      for (int64_t k = 0; k < kSums; ++k) sums[k] += term(j + k);
    }
#pragma omp simd
    for (int64_t k = 0; k < kSums / 2; ++k) sums[k] += sums[k + kSums / 2];
#pragma omp simd
    for (int64_t k = 0; k < kSums / 4; ++k) sums[k] += sums[k + kSums / 4];
    total = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }
  for (int64_t j = whole; j < n; ++j) total += term(j);
  return total;
}
template <class T>
GENFUSE_HD T sum_of(const T* terms, int64_t n) {
  return sum_of<T>(n, [=](int64_t j) { return terms[j]; });
}

// The inner product of two rows, in blocks, whose sums are added up in double: a long sum would lose digits.
template <class S, class T = compute_t<S>>
GENFUSE_HD T dot(const S* a, const S* b, int64_t n) {
  double sum = 0;
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    sum += sum_of<T>(std::min(kBlock, n - j0), [=](int64_t j) { return load(a[j0 + j]) * load(b[j0 + j]); });
  }
  return T(sum);
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

// A result of more bytes than this has left a core's caches before it is complete.
constexpr int64_t kCached = 1 << 21;

// Writes value(j), j < n, to a row: past the caches if asked to, so that lines which are overwritten whole are not read
// first, and what is cached stays. Then for_rows_again has to run it, which makes it visible to other threads.
template <class S, class F>
GENFUSE_HD void write(S* to, int64_t n, [[maybe_unused]] bool past_caches, F value) {
  int64_t j = 0;
#ifdef __SSE2__
  constexpr int64_t kBuffer = 128, kUnit = sizeof(__m128i) / sizeof(S);
  alignas(64) S buffer[kBuffer];
  for (; past_caches && j + kBuffer <= n && reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0; j += kBuffer) {
    GENFUSE_INDEPENDENT
    for (int64_t k = 0; k < kBuffer; ++k) store(buffer[k], value(j + k));
    for (int64_t k = 0; k < kBuffer; k += kUnit) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j + k), *reinterpret_cast<const __m128i*>(buffer + k));
    }
  }
#endif
  GENFUSE_INDEPENDENT
  for (int64_t k = j; k < n; ++k) store(to[k], value(k));
}

// Calls f(i), i < count, on all threads if there is `much` to do. OpenMP's `if` makes a team even of one thread, which
// takes longer than a small kernel.
template <class F>
void for_each(int64_t count, bool much, F f) {
  if (!much) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) f(i);
}

// Rows in chunks that are worth a thread's while.
struct Chunks {
  int64_t rows, size, count;
  bool many;

  Chunks(int64_t rows, int64_t work_per_row) : rows(rows) {
    const int64_t work = std::max<int64_t>(work_per_row, 1);
    size = std::max<int64_t>(kParallel / 2 / work, 1);
    count = (rows + size - 1) / size;
    many = rows > kParallel / work;
  }

  template <class F>
  void run(int64_t chunk, F& f) const {
    f(chunk * size, std::min((chunk + 1) * size, rows));
  }
};

// Calls f(begin, end) for chunks of rows, on all threads where there is enough work.
template <class F>
void for_rows(int64_t rows, int64_t work_per_row, F f) {
  const Chunks chunks(rows, work_per_row);
  for_each(chunks.count, chunks.many, [&](int64_t c) { chunks.run(c, f); });
}

// The same, each thread's last chunk first: a second pass over rows finds there what the first one left in a cache.
template <class F>
void for_rows_again(int64_t rows, int64_t work_per_row, F f) {
  const Chunks chunks(rows, work_per_row);
  if (!chunks.many) return for_rows(rows, work_per_row, f);
#pragma omp parallel
  {
    int64_t first = 0, end = 0;  // of the thread's chunks, which are neighbours
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks.count; ++c) {
      if (end == 0) first = c;
      end = c + 1;
    }
    for (int64_t c = end - 1; c >= first; --c) chunks.run(c, f);
#ifdef __SSE2__
    _mm_sfence();
#endif
  }
}

// The same for blocks of kBlock elements.
template <class F>
void for_blocks(int64_t n, F f) {
  for_rows((n + kBlock - 1) / kBlock, kBlock, f);
}

}  // namespace genfuse

// Defines name(S, p, out, begin, end), an overload for each storage type S, which calls the loop of rows that comes
// last, such as loop<S>: GENFUSE_SIMD cannot stand on a template.
#define GENFUSE_SIMD_LOOP(Storage, name, Out, ...)                                                \
  GENFUSE_SIMD void name(Storage, const Problem& p, const Out& out, int64_t begin, int64_t end) { \
    using S = Storage;                                                                            \
    __VA_ARGS__(p, out, begin, end);                                                              \
  }
#define GENFUSE_SIMD_LOOPS(name, Out, ...)          \
  GENFUSE_SIMD_LOOP(float, name, Out, __VA_ARGS__)  \
  GENFUSE_SIMD_LOOP(double, name, Out, __VA_ARGS__) \
  GENFUSE_SIMD_LOOP(Half, name, Out, __VA_ARGS__)   \
  GENFUSE_SIMD_LOOP(BFloat16, name, Out, __VA_ARGS__)
