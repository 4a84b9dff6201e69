#pragma once
// A stream of random numbers for loops on the CPU: element i comes from word i % 4 of counter i / 4.
#include "philox.h"
#include "rows.h"

namespace genfuse {

// What becomes of two neighbouring words.
template <class T>
struct Normal {
  static GENFUSE_HD Pair<T> of(uint32_t word0, uint32_t word1) { return normals(word0, word1, T()); }
};
template <class T>
struct Uniform {
  static GENFUSE_HD Pair<T> of(uint32_t word0, uint32_t word1) { return {uniform<T>(word0), uniform<T>(word1)}; }
};

template <class T, class Distribution = Normal<T>>
class Noise {
 public:
  Noise(uint64_t key, int64_t ahead) : key_(key), ahead_(ahead) {}

  // Elements [first, first + n), n <= kBlock. Up to `ahead` elements are made at once, for a reader who goes on.
  GENFUSE_HD const T* at(int64_t first, int64_t n) {
    if (first < begin_ || first + n > end_) fill(first, std::max(n, std::min(ahead_, kBlock)));
    return buffer_ + (first - begin_);
  }

 private:
  static constexpr int kLanes = 16;

  GENFUSE_HD void fill(int64_t first, int64_t n) {
#ifdef GENFUSE_SIMD_LEVELS  // 64 bits by 64 are one instruction in AVX-512, and three before
    if (__builtin_cpu_supports("x86-64-v4")) return fill_by<uint64_t>(first, n);
#endif
    fill_by<uint32_t>(first, n);
  }

  template <class W>
  GENFUSE_HD void fill_by(int64_t first, int64_t n) {
    begin_ = first & ~int64_t(3);
    end_ = (first + n + 3) & ~int64_t(3);
    const int64_t counter = begin_ / 4, counters = (end_ - begin_) / 4;
    uint32_t words[4][kLanes];
    T planes[4][kLanes];
    for (int64_t c = 0; c < counters; c += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const Words out = philox<W>(uint64_t(counter + c + l), key_);
        words[0][l] = out.w[0], words[1][l] = out.w[1], words[2][l] = out.w[2], words[3][l] = out.w[3];
      }
      for (int w = 0; w < 4; w += 2) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          const Pair<T> pair = Distribution::of(words[w][l], words[w + 1][l]);
          planes[w][l] = pair.first, planes[w + 1][l] = pair.second;
        }
      }
      T* to = buffer_ + 4 * c;
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        to[4 * l] = planes[0][l], to[4 * l + 1] = planes[1][l], to[4 * l + 2] = planes[2][l],
               to[4 * l + 3] = planes[3][l];
      }
    }
  }

  uint64_t key_;
  int64_t ahead_, begin_ = 0, end_ = 0;
  alignas(64) T buffer_[kBlock + 8 + 4 * kLanes];
};

// Elements [first, first + n) of the noise: as it was given, where it was, or else made.
template <class S, class T>
GENFUSE_HD const T* eps_at(const void* given, Noise<T>& stream, int64_t first, int64_t n, T* buffer) {
  return given ? read(element<S>(given, first), n, buffer) : stream.at(first, n);
}

}  // namespace genfuse
