#pragma once
#include <cstdint>

#include "portable.h"

namespace genfuse::mlp {

// A network of layers y = W x + b, with (Leaky)ReLU between them. x is (rows, widths[0]), weights[i] (widths[i + 1],
// widths[i]), biases[i] (widths[i + 1]); all but x and added is contiguous. Not given are null: added (rows,
// widths[1]), which goes to the first layer; counts, of each unit of all layers, how many inputs it sees, the first
// ones. A residual network's hidden layers after the first are in pairs, each a block h + gate (W2 r(W1 r(h) + b1) +
// b2), and gates (rows, widths[1]), if there are any, are one a block. `hidden` has the values that each hidden layer
// hands on, (rows, widths[i + 1]), and then for each gate what it multiplies.
struct Problem {
  int dtype;
  const void* x;
  int64_t x_stride, rows;
  const void* added;
  int64_t added_stride;
  List<const void*> weights, biases, gates;
  List<int64_t> widths;
  const int64_t* counts;
  double slope;
  bool residual;

  int64_t layers() const { return weights.count; }
};

struct Forward {
  void *y, *hidden;
};

// gy (rows, outputs), and what the forward pass kept.
struct Gradients : Problem {
  const void *gy, *hidden;
};

// Of x, added, weights, biases and gates, one list after the other; of a chain, of gy and weights. Null where none is
// wanted.
struct Backward {
  List<void*> gradients;
};

// Of a plain network the gradient gy (rows, outputs) for x, which is linear in gy and in the weights, and those on the
// way to it, laid out as `hidden` is.
struct Chain {
  void *x, *kept;
};

// Given a gradient for that gradient.
struct ChainGradients : Gradients {
  const void *gx, *kept;
};

// A critic of at least two plain layers. x is (2 rows, widths[0]), real examples and then fake ones, between which lie
// `rows` points at shares epsilon (rows) of the real one.
struct Critic : Problem {
  const void* epsilon;
};

// scores (2 rows, 1), and the gradient of the score for x (rows, widths[0]) at the points between. `hidden` is of all
// 3 rows; `kept` of the points, as a chain's.
struct Judged {
  void *scores, *gradient, *hidden, *kept;
};

// gy (2 rows, 1), and gx (rows, widths[0]): the gradients for both. Those of weights and biases are made.
struct CriticGradients : Critic {
  const void *gy, *gx, *hidden, *kept;
};

// What a layer's network sees, (rows, shown + context_columns): the features of x (rows, features) from `first` on,
// within `limit`, or of 0 their asinh; and the context beside them.
struct Seen {
  int dtype;
  const void* x;
  int64_t x_stride, rows, features, first, shown;
  const void* context;
  int64_t context_stride, context_columns;
  double limit;
};

struct Shown {
  void* seen;
};

// gseen, of what was seen, is added to the gradient of the features that were shown: gx (rows, features). That is gy's
// and all else gmoved's (rows, features - shown), or if gy is null gmoved (rows, features) has both.
struct SeenGradients : Seen {
  const void *gseen, *gy;
  int64_t gy_stride;
  const void* gmoved;
};

struct ShownGradients {
  void* gx;
};

}  // namespace genfuse::mlp
