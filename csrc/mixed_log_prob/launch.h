#pragma once
#include <cstdint>

namespace genfuse::mixed_log_prob {

// raw is (rows, 3 components numbers + choices), with a stride between rows in elements: of each number the logits,
// locations and log-scales of its components, then the logits of all choices. low and high (examples, numbers), chosen
// (examples, blocks), of which row i has example i % examples; block (choices). log_prob and g (rows), graw as raw,
// contiguous.
struct Problem {
  int dtype;
  const void* raw;
  int64_t raw_stride;
  const void *low, *high;
  const int64_t *chosen, *block;
  int64_t rows, examples, numbers, components, choices, blocks;

  int64_t cols() const { return 3 * components * numbers + choices; }
};

struct Forward {
  void* log_prob;
};

struct Backward {
  const void* g;
  void* graw;
};

}  // namespace genfuse::mixed_log_prob
