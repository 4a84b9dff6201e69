#pragma once
// What every kernel needs to compile for both CPU and GPU: markers, elementary functions, storage types.
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GENFUSE_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GENFUSE_HD inline __attribute__((always_inline))
#else
#define GENFUSE_HD inline
#endif

// A loop inside a loop is not vectorised unless it is unrolled first.
#if defined(__CUDACC__)
#define GENFUSE_UNROLL(n) _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__)
#define GENFUSE_DO_PRAGMA(text) _Pragma(#text)
#define GENFUSE_UNROLL(n) GENFUSE_DO_PRAGMA(GCC unroll n)
#else
#define GENFUSE_UNROLL(n)
#endif

// Says of the loop that follows that its iterations are independent. GCC heeds `omp simd` less than this: it still
// checks whether arrays overlap, in blocks, and takes neighbours in one array for overlapping.
#if defined(__GNUC__) && !defined(__clang__)
#define GENFUSE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define GENFUSE_INDEPENDENT _Pragma("omp simd")
#endif

// A function marked so is compiled once per level of x86-64 and chosen when the module is loaded (an ifunc, hence
// glibc). It cannot stand on a template, and what it calls must be inlined into it to be compiled for its level.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#ifdef GENFUSE_ONLY  // the only one that is built
#define GENFUSE_SIMD __attribute__((target("arch=" GENFUSE_ONLY)))
#else
#define GENFUSE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#define GENFUSE_SIMD_LEVELS 1
#else
#define GENFUSE_SIMD
#endif

namespace genfuse {

template <class To, class From>
GENFUSE_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
#if defined(__GNUC__) && !defined(__CUDACC__)
  return __builtin_bit_cast(To, from);  // a copy through memory may keep a loop from being vectorised
#else
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
#endif
}

// x within [-most, most], or NaN. By its bits: of a comparison of floats GCC makes branches, and computes what follows
// once for each.
GENFUSE_HD float clamp(float x, float most) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu, limit = bit_cast<uint32_t>(most);
  const uint32_t nan = (0u - uint32_t(magnitude > 0x7f800000u)) & 0x7fc00000u;
  return bit_cast<float>((magnitude < limit ? magnitude : limit) | nan | (bits & 0x80000000u));
}

// e^x = result * 2^n for |x| <= 104: polynomial of Cephes' expf. NaN has any n, and stays NaN.
GENFUSE_HD float exp_reduced(float x, int32_t& n) {
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer, held in the low bits
  n = bit_cast<int32_t>(shifted) - 0x4b400000;
  const float k = shifted - 12582912.f;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.f;
}

// exp for a loop that the compiler can vectorise without -ffast-math, which would break NaN and inf, and without the
// C library's SIMD functions, which only glibc on x86 has. Within 2 ulp; overflow, denormal results, inf and NaN as in
// expf.
GENFUSE_HD float exp_(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  int32_t n;
  const float p = exp_reduced(clamp(x, 104.f), n);
  const int32_t half = n >> 1;  // 2^n in two factors, since n itself reaches from -150 to 128
  return p * bit_cast<float>(uint32_t(half + 127) << 23) * bit_cast<float>(uint32_t(n - half + 127) << 23);
#endif
}
GENFUSE_HD double exp_(double x) { return exp(x); }

// exp for |x| <= 1, within 3 ulp and at a third of exp_'s work: minimax polynomial of the relative error.
GENFUSE_HD float exp_of_unit(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  float p = 2.4196166123e-5f;
  p = p * x + 2.0424167451e-4f;
  p = p * x + 1.3907487737e-3f;
  p = p * x + 8.3294035867e-3f;
  p = p * x + 4.1665475816e-2f;
  p = p * x + 1.6666758060e-1f;
  p = p * x + 5.0000017881e-1f;
  p = p * x + 9.9999994040e-1f;
  return p * x + 1.f;
#endif
}
GENFUSE_HD double exp_of_unit(double x) { return exp(x); }

// k ln 2 + ln(1 + x) for 1 + x in [sqrt(1/2), sqrt(2)): polynomial of Cephes' logf.
GENFUSE_HD float ln_reduced(float x, float k) {
  float p = 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  return k * 0.693359375f + (x + (x * x * (x * p - 0.5f) - k * 2.12194440e-4f));
}

// log as exp_ is exp, within 2 ulp; 0, denormals, negative numbers, inf and NaN as in logf.
GENFUSE_HD float log_(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  const bool denormal = x < 0x1p-126f;
  const int32_t bits = bit_cast<int32_t>(denormal ? x * 0x1p23f : x) - 0x3f3504f3;
  const float mantissa = bit_cast<float>((bits & 0x007fffff) + 0x3f3504f3);
  const float ln = ln_reduced(mantissa - 1.f, float(bits >> 23) - (denormal ? 23.f : 0.f));
  const float special = x == 0.f ? -HUGE_VALF : (x > 0.f ? x : NAN);
  return (x > 0.f) & (x < HUGE_VALF) ? ln : special;
#endif
}
GENFUSE_HD double log_(double x) { return log(x); }

// asinh, relatively accurate for all x.
GENFUSE_HD float asinh_(float x) {
#ifdef __CUDA_ARCH__
  return asinhf(x);
#else
  const float size = fabsf(x);
  const bool large = size > 1e10f;  // whose square would overflow
  const float s = large ? 0.f : size, u = s + s * s / (1.f + std::sqrt(1.f + s * s));
  const float ln = log_(large ? size : 1.f + u) + (large ? 0.693147182f : 0.f);
  return copysignf(u < 0.41421356f && !large ? ln_reduced(u, 0.f) : ln, x);
#endif
}
GENFUSE_HD double asinh_(double x) { return asinh(x); }

// ln(1 + e^-|x|), relatively accurate for all x: what softplus is above max(x, 0).
GENFUSE_HD float softplus_above(float x) {
  const float z = exp_(-fabsf(x));
#ifdef __CUDA_ARCH__
  return log1pf(z);
#else
  const bool small = z < 0.41421356f;
  return ln_reduced(small ? z : 0.5f * (z - 1.f), small ? 0.f : 1.f);
#endif
}
GENFUSE_HD double softplus_above(double x) { return log1p(exp(-fabs(x))); }

// ln(1 + e^x), relatively accurate for all x.
template <class T>
GENFUSE_HD T softplus(T x) {
  return (x > 0 ? x : T(0)) + softplus_above(x);
}

template <class T>
GENFUSE_HD T sigmoid(T x) {
  const T z = exp_(x < 0 ? x : -x);
  return (x < 0 ? z : T(1)) / (T(1) + z);
}

// The same but for what is below 1e-38, at two thirds of the work. NaN becomes some number.
GENFUSE_HD float sigmoid_of(float x) {
#ifdef __CUDA_ARCH__
  return sigmoid(x);
#else
  int32_t n;
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu, most = 0x42ae0000u;  // of 87
  const float p = exp_reduced(bit_cast<float>((magnitude < most ? magnitude : most) | (~bits & 0x80000000u)), n);
  return 1.f / (1.f + p * bit_cast<float>(uint32_t(n + 127) << 23));
#endif
}
GENFUSE_HD double sigmoid_of(double x) { return sigmoid(x); }

// tanh for a vectorised loop: the rational function of Eigen's ptanh, within 5 ulp, and 1 from 9 on, where tanh rounds
// to it. Of the magnitude, whose limits are cheaper by bits (see `clamp`); NaN stays.
GENFUSE_HD float tanh_(float x) {
#ifdef __CUDA_ARCH__
  return tanhf(x);
#else
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu, nine = 0x41100000u, one = 0x3f800000u;
  const uint32_t nan = (0u - uint32_t(magnitude > 0x7f800000u)) & 0x7fc00000u;
  const float c = bit_cast<float>(magnitude < nine ? magnitude : nine);
  const float z = c * c;
  float p = -2.76076847742355e-16f;
  p = p * z + 2.00018790482477e-13f;
  p = p * z - 8.60467152213735e-11f;
  p = p * z + 5.12229709037114e-08f;
  p = p * z + 1.48572235717979e-05f;
  p = p * z + 6.37261928875436e-04f;
  p = p * z + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * z + 1.18534705686654e-04f;
  q = q * z + 2.26843463243900e-03f;
  q = q * z + 4.89352518554385e-03f;
  const uint32_t y = bit_cast<uint32_t>(c * p / q);  // above 1 by two roundings in places
  return bit_cast<float>((y < one ? y : one) | nan | (bits & 0x80000000u));
#endif
}
GENFUSE_HD double tanh_(double x) { return tanh(x); }

// float16 and bfloat16 as they lie in memory. All arithmetic on them is float32's.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

GENFUSE_HD float load(float x) { return x; }
GENFUSE_HD double load(double x) { return x; }
GENFUSE_HD float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
GENFUSE_HD float load(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_cast<__half>(x.bits));
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
  // Moved into float's exponent field, the value is 2^-112 of itself, denormals included.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(sign | ((x.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite));
#endif
}

GENFUSE_HD void store(float& to, float x) { to = x; }
GENFUSE_HD void store(double& to, double x) { to = x; }
GENFUSE_HD void store(BFloat16& to, float x) {
#ifdef __CUDA_ARCH__
  to.bits = bit_cast<uint16_t>(__float2bfloat16(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0u : rounded);
#endif
}
GENFUSE_HD void store(Half& to, float x) {
#ifdef __CUDA_ARCH__
  to.bits = bit_cast<uint16_t>(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is denormal: adding 0.5 lets the float adder shift and round to its 2^-24 steps.
  const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // from 65520 on: inf
  to.bits = uint16_t(sign | (magnitude < 0x477ff000u ? finite : large));
#endif
}

// The type in which values of a storage type are computed.
template <class Storage>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};
template <class Storage>
using compute_t = typename compute<Storage>::type;

// A few values that go to a GPU as they are, among the parameters of a launch, which are 4 KiB at most.
constexpr int kMostListed = 64;
template <class T>
struct List {
  T items[kMostListed];
  int64_t count;

  GENFUSE_HD T operator[](int64_t i) const { return items[i]; }
};

// Calls f with a value of the storage type that `dtype` numbers; Python's _op.py has the same numbers.
template <class F>
void dispatch(int dtype, F f) {
  switch (dtype) {
    case 0: return f(float());
    case 1: return f(double());
    case 2: return f(Half());
    case 3: return f(BFloat16());
  }
}

}  // namespace genfuse
