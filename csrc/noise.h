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

constexpr int kLanes = 16;                      // counters at a time
constexpr int kCounters = kBlock / 4 + kLanes;  // at most, with one more where the first element is not a counter's

#ifdef GENFUSE_SIMD_LEVELS
template <int bytes>
GENFUSE_HD void make_words_by(uint64_t counter, int64_t counters, uint64_t key, uint32_t (*words)[kCounters]) {
  using V = typename Wide<bytes>::words;
  using P = typename Wide<bytes>::packed;
  constexpr int lanes = bytes / 8;
  V lane;  // two vectors at a time, which 128 bits of each in turn fill when they are packed
  P order;
  for (int l = 0; l < lanes; ++l) lane[l] = uint64_t(l / 2 * 4 + l % 2);
  for (int l = 0; l < 2 * lanes; ++l) order[l] = uint32_t(l / 4 * 4 + l % 2 * 2 + l % 4 / 2 * 2 * lanes);
  for (int64_t c = 0; c < counters; c += 2 * lanes) {
    const V each = lane + (counter + uint64_t(c)), next = each + 2;
    const auto a = philox(WordsOf<V>{{each, each >> 32, V{}, V{}}}, uint32_t(key), uint32_t(key >> 32));
    const auto b = philox(WordsOf<V>{{next, next >> 32, V{}, V{}}}, uint32_t(key), uint32_t(key >> 32));
    GENFUSE_UNROLL(4)
    for (int w = 0; w < 4; ++w) {
      *reinterpret_cast<P*>(words[w] + c) = __builtin_shuffle(P(a.w[w]), P(b.w[w]), order);
    }
  }
}
__attribute__((target("arch=x86-64-v4"))) inline void make_words_512(uint64_t counter, int64_t counters, uint64_t key,
                                                                     uint32_t (*words)[kCounters]) {
  make_words_by<64>(counter, counters, key, words);
}
__attribute__((target("arch=x86-64-v3"))) inline void make_words_256(uint64_t counter, int64_t counters, uint64_t key,
                                                                     uint32_t (*words)[kCounters]) {
  make_words_by<32>(counter, counters, key, words);
}
#endif

// The words of so many counters from one on, and of those after them up to a multiple of kLanes.
GENFUSE_HD void make_words(uint64_t counter, int64_t counters, uint64_t key, uint32_t (*words)[kCounters]) {
  counters = (counters + kLanes - 1) / kLanes * kLanes;
#ifdef GENFUSE_SIMD_LEVELS  // a function of several levels does not know which of them it is
  if (__builtin_cpu_supports("x86-64-v4")) return make_words_512(counter, counters, key, words);
  if (__builtin_cpu_supports("x86-64-v3")) return make_words_256(counter, counters, key, words);
#endif
  for (int64_t c = 0; c < counters; c += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const Words out = philox(counter + uint64_t(c + l), key);
      for (int w = 0; w < 4; ++w) words[w][c + l] = out.w[w];
    }
  }
}

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
  GENFUSE_HD void fill(int64_t first, int64_t n) {
    begin_ = first & ~int64_t(3);
    end_ = (first + n + 3) & ~int64_t(3);
    const int64_t counters = (end_ - begin_) / 4;
    uint32_t words[4][kCounters];
    make_words(begin_ / 4, counters, key_, words);
    T planes[4][kLanes];
    for (int64_t c = 0; c < counters; c += kLanes) {
      for (int w = 0; w < 4; w += 2) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          const Pair<T> pair = Distribution::of(words[w][c + l], words[w + 1][c + l]);
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
