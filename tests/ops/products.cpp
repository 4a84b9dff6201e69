// Random products beside plain loops, by the tiles of each level that this processor has: prints the largest error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "mlp/product.h"

using namespace genfuse::mlp;

namespace {

int64_t below(int n) { return std::rand() % n; }

template <class T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> made(static_cast<size_t>(n) + 1);
  for (T& each : made) each = T(std::rand()) / T(RAND_MAX) - T(0.5);
  return made;
}

template <class T, class Level>
double error(unsigned seed) {
  std::srand(seed);
  const int64_t m = below(40) + (below(6) ? 0 : 600), n = below(80), k = below(70) + (below(5) ? 0 : 1100);
  const bool by_rows = below(2), copied = below(2);
  const auto a = numbers<T>(m * k), b = numbers<T>(k * n), bias = numbers<T>(n), added = numbers<T>(m * n);
  const auto value = numbers<T>(m * n), gate = numbers<T>(m * n), before = numbers<T>(m * n);
  auto total = before, inner = before, out = before;
  Product<T> p{m, n, k, {a.data(), by_rows ? k : 1, by_rows ? 1 : m}, {b.data(), copied ? n : 1, copied ? 1 : k}, {}};
  Finish<T>& f = p.finish;
  f.out = out.data();
  if (below(2)) f.bias = bias.data();
  if (below(2)) f.added = added.data(), f.added_stride = n;
  if (below(2)) f.value = value.data();
  if (below(2)) f.gate = gate.data(), f.inner = inner.data();
  if (below(2)) f.total = total.data();
  f.rectified = below(2), f.slope = below(2) ? T(0.25) : T(0);
  const Masked kinds[] = {Masked::nothing, copied ? Masked::b_rows : Masked::b_columns, Masked::result_rows};
  p.masked = kinds[below(3)];
  std::vector<int64_t> counts(size_t(std::max({m, n, k})) + 1);
  for (int64_t& each : counts) each = below(int(p.masked == Masked::b_columns ? k : n) + 1);
  p.counts = counts.data();

  Room<T> room;
  const auto level = Panels<T>::template of<Level>();
  for (int64_t i = 0; i < m; i += kHeight) {
    for (int64_t j = 0; j < n; j += level.columns) level.run(p, i, std::min(i + kHeight, m), j, room);
  }
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const size_t at = size_t(i * n + j);
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        const bool zero = (p.masked == Masked::b_columns && l >= counts[size_t(j)]) ||
                          (p.masked == Masked::b_rows && j >= counts[size_t(l)]) ||
                          (p.masked == Masked::result_rows && j >= counts[size_t(i)]);
        if (!zero)
          sum += double(p.a.data[i * p.a.row + l * p.a.column]) * double(p.b.data[l * p.b.row + j * p.b.column]);
      }
      if (f.bias) sum += bias[size_t(j)];
      if (f.added) sum += added[at];
      if (f.gate) sum *= gate[at];
      if (f.value && value[at] <= 0) sum *= f.slope;
      if (f.total) sum += before[at];
      if (f.rectified && sum <= 0) sum *= f.slope;
      const double off = std::fabs(sum - double(out[at]));
      worst = off <= worst ? worst : off;  // NaN is the worst
    }
  }
  return worst;
}

template <class Level>
void run(const char* name, unsigned count) {
  double of_float = 0, of_double = 0;
  for (unsigned seed = 0; seed < count; ++seed) {
    of_float = std::fmax(of_float, error<float, Level>(seed));
    of_double = std::fmax(of_double, error<double, Level>(seed));
  }
  std::printf("%s %g %g\n", name, of_float, of_double);
}

}  // namespace

int main() {
  constexpr unsigned kCount = 400;
  if (__builtin_cpu_supports("x86-64-v3")) run<V3>("AVX2", kCount);
  if (__builtin_cpu_supports("x86-64-v4")) run<V4>("AVX-512", kCount);
}
