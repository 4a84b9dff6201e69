// Words of counters side by side, at each level of x86-64 that this processor has, beside those of one counter each:
// prints how many differ.
#include "noise.h"

#include <cstdio>
#include <random>

using namespace genfuse;

int main() {
  using Level = void (*)(uint64_t, int64_t, uint64_t, uint32_t (*)[kCounters]);
  const struct {
    const char* name;
    bool there;
    Level make_words;
  } levels[] = {{"512", bool(__builtin_cpu_supports("x86-64-v4")), make_words_512},
                {"256", bool(__builtin_cpu_supports("x86-64-v3")), make_words_256}};
  for (const auto& level : levels) {
    if (!level.there) continue;
    std::mt19937_64 random;
    int differ = 0;
    for (int64_t counters = 1; counters <= kBlock / 4 + 1; ++counters) {
      const uint64_t key = random(), first = counters % 3 ? random() : 0xfffffff8u;  // the lower half overflows
      uint32_t words[4][kCounters];
      level.make_words(first, counters, key, words);
      for (int64_t c = 0; c < counters; ++c) {
        const Words expected = philox(first + uint64_t(c), key);
        for (int w = 0; w < 4; ++w) differ += words[w][c] != expected.w[w];
      }
    }
    std::printf("%s %d\n", level.name, differ);
  }
}
