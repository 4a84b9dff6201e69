#pragma once
// Counter-based noise: any element can be made again at any time, by any thread, on any device.
#include "portable.h"

namespace genfuse {

template <class W>
struct WordsOf {
  W w[4];
};
using Words = WordsOf<uint32_t>;

// All 64 bits. From the plain product nvcc makes one of 64 by 64 bits here, which is an instruction more.
GENFUSE_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && defined(__NVCC__)
  uint64_t whole;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(whole) : "r"(a), "r"(b));
  return whole;
#else
  return uint64_t(a) * b;
#endif
}

#ifdef GENFUSE_SIMD_LEVELS
#pragma GCC diagnostic ignored "-Wpsabi"  // of how vectors are returned: all that does is inlined
// Words side by side, each in the lower half of 64 bits: no product has to be taken apart.
template <int bytes>
struct Wide {
  typedef uint64_t words __attribute__((vector_size(bytes)));
  typedef uint32_t packed __attribute__((vector_size(bytes), aligned(4), may_alias));
};

// Of the lower halves, in one instruction: GCC takes all 64 bits of both, or makes shifts and sums of a constant.
template <class V, class = decltype(V{}[0])>
GENFUSE_HD V wide_product(uint32_t a, const V& b) {
  V whole;
  const V wide = V{} + uint64_t(a);
  asm("vpmuludq %2, %1, %0" : "=v"(whole) : "v"(wide), "v"(b));
  return whole;
}
#endif

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), of words or of many side by side.
template <class W>
GENFUSE_HD WordsOf<W> philox(const WordsOf<W>& counter, uint32_t k0, uint32_t k1) {
  W c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  GENFUSE_UNROLL(10)
  for (int round = 0; round < 10; ++round) {
    const auto a = wide_product(0xD2511F53u, c0), b = wide_product(0xCD9E8D57u, c2);
    const W n0 = W(b >> 32) ^ c1 ^ k0, n2 = W(a >> 32) ^ c3 ^ k1;
    c1 = W(b), c3 = W(a), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

GENFUSE_HD Words philox(uint64_t counter, uint64_t key) {
  return philox(Words{{uint32_t(counter), uint32_t(counter >> 32), 0u, 0u}}, uint32_t(key), uint32_t(key >> 32));
}

// (word + 0.5), rounded once: the high half is exact, and so is the low half with its 0.5.
GENFUSE_HD float centre(uint32_t word) {
  return float(int32_t(word >> 16)) * 65536.f + (float(int32_t(word & 0xffffu)) + 0.5f);
}

template <class T>
struct Pair {
  T first, second;
};

// Uniforms in (0, 1]: (word + 0.5) 2^-32, of which the largest are rounded to 1 in float32.
template <class T>
GENFUSE_HD T uniform(uint32_t word);
template <>
GENFUSE_HD float uniform<float>(uint32_t word) {
  return centre(word) * 0x1p-32f;
}
template <>
GENFUSE_HD double uniform<double>(uint32_t word) {
  return (double(word) + 0.5) * 0x1p-32;
}

// Box-Muller: sqrt(-2 ln u0) (cos, sin)(2 pi u1) with u = (word + 0.5) 2^-32.
GENFUSE_HD Pair<double> normals(uint32_t word0, uint32_t word1, double) {
  const double radius = sqrt(-2. * log(uniform<double>(word0)));
  const double angle = 6.283185307179586 * uniform<double>(word1);
  return {radius * cos(angle), radius * sin(angle)};
}

// Of what is neither 0 nor near the ends of the range, for which alone CUDA's sqrtf has a branch; to the same numbers.
GENFUSE_HD float sqrt_in_range(float x) {
#if defined(__CUDA_ARCH__) && defined(__NVCC__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float near = x * inverse;
  return fmaf(fmaf(-near, near, x), 0.5f * inverse, near);
#else
  return sqrtf(x);
#endif
}

// In float32 by log1p_near_0 and the polynomials of Cephes' sinf and cosf, reduced on the words themselves. So ln u
// keeps its relative accuracy next to u = 1, the angle is not rounded, the compiler can vectorise it (it would merge
// sinf and cosf into one scalar call), and the GPU computes the same.
GENFUSE_HD Pair<float> normals(uint32_t word0, uint32_t word1, float) {
  // ln u = e ln 2 + ln(1 + x) with 1 + x in [sqrt(1/2), sqrt(2)). For e = 0, x = u - 1 comes from the complement.
  const float u = uniform<float>(word0);
  const int32_t bits = bit_cast<int32_t>(u) - 0x3f3504f3;
  const int32_t e = bits >> 23;
  const float mantissa = bit_cast<float>((bits & 0x007fffff) + 0x3f3504f3);
  const float x = e == 0 ? -0x1p-32f * centre(~word0) : mantissa - 1.f;
  const float ln = ln_reduced(x, float(e));
  const float radius = sqrt_in_range(-2.f * ln);
  // 2 pi u1 = quarter (pi / 2) + angle, |angle| <= pi / 4.
  const uint32_t quarter = (word1 + 0x20000000u) >> 30;
  const float angle = (float(int32_t(word1 - (quarter << 30))) + 0.5f) * (6.283185307f * 0x1p-32f);
  const float z = angle * angle;
  const float s = angle + angle * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float c =
      1.f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const bool odd = quarter & 1u;
  const float cosine = odd ? s : c, sine = odd ? c : s;
  return {radius * ((quarter == 1u || quarter == 2u) ? -cosine : cosine), radius * ((quarter & 2u) ? -sine : sine)};
}

// The four normals of one counter.
template <class T>
GENFUSE_HD void normals(uint64_t key, uint64_t counter, T out[4]) {
  const Words words = philox(counter, key);
  const Pair<T> a = normals(words.w[0], words.w[1], T()), b = normals(words.w[2], words.w[3], T());
  out[0] = a.first, out[1] = a.second, out[2] = b.first, out[3] = b.second;
}

}  // namespace genfuse
