#pragma once
// Enough of CUDA to run kernels on a CPU: one block at a time, each of its threads a fiber. See ../emulator.cpp.
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900  // the device's side of #ifdef
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATED_VECTORS(T, name)                                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                 \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }         \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(unsigned char, uchar)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(long long, longlong)
EMULATED_VECTORS(unsigned long long, ulonglong)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)
#undef EMULATED_VECTORS

// The runtime: all is done when a launch returns, and errors stay until they are asked for.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
};
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);

#define CUDART_VERSION 13000
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long) {
  return cudaErrorInvalidValue;  // there is no driver
}

namespace emulated {

struct Grid {
  dim3 blocks, threads;
  size_t shared;
  Grid(dim3 blocks, dim3 threads, size_t shared = 0, cudaStream_t = nullptr)
      : blocks(blocks), threads(threads), shared(shared) {}
};

struct Place {  // what the running thread knows of itself
  dim3 thread, block, blocks, threads;
};
extern Place* here;

struct Line {  // of the source that calls
  const char* file;
  int number;
  static Line current(const char* file = __builtin_FILE(), int number = __builtin_LINE()) { return {file, number}; }
};

void launch(const char* kernel, Grid grid, size_t parameters, const std::function<void()>& thread);
void barrier(Line line);
void* shared_variable(const void* key, size_t size, size_t alignment);
void* dynamic_shared();

// The lanes of `mask` meet, each with a value, and each gets what CUDA's intrinsic gives it.
enum class Exchange { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot };
uint64_t meet(Exchange kind, unsigned mask, uint64_t value, int argument, int width, Line line);

template <class T>
T exchange(Exchange kind, unsigned mask, T value, int argument, int width, Line line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = meet(kind, mask, bits, argument, width, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// One variable for all threads of a block, full of NaN when the block starts. A tag is of one declaration.
template <class T, class Tag>
T& shared(Tag, size_t alignment = 1) {
  static const char key = 0;
  return *static_cast<T*>(shared_variable(&key, sizeof(T), std::max(alignment, alignof(T))));
}

template <class Kernel, class... Arguments>
void run(const char* name, Grid grid, Kernel kernel, const Arguments&... arguments) {
  launch(name, grid, (sizeof(Arguments) + ... + 0), [&] { kernel(arguments...); });
}

}  // namespace emulated

#define threadIdx (::emulated::here->thread)
#define blockIdx (::emulated::here->block)
#define blockDim (::emulated::here->threads)
#define gridDim (::emulated::here->blocks)
#define warpSize 32

#define EMULATED_SHUFFLE(kind)                                                                        \
  template <class T>                                                                                  \
  T __shfl##kind##_sync(unsigned mask, T value, int argument, int width = 32,                         \
                        emulated::Line line = emulated::Line::current()) {                            \
    return emulated::exchange(emulated::Exchange::shuffle##kind, mask, value, argument, width, line); \
  }
EMULATED_SHUFFLE()
EMULATED_SHUFFLE(_up)
EMULATED_SHUFFLE(_down)
EMULATED_SHUFFLE(_xor)
#undef EMULATED_SHUFFLE
inline unsigned __ballot_sync(unsigned mask, bool predicate, emulated::Line line = emulated::Line::current()) {
  return unsigned(emulated::meet(emulated::Exchange::ballot, mask, predicate, 0, 32, line));
}
inline bool __any_sync(unsigned mask, bool predicate, emulated::Line line = emulated::Line::current()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, emulated::Line line = emulated::Line::current()) {
  return __ballot_sync(mask, !predicate, line) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, emulated::Line line = emulated::Line::current()) {
  emulated::meet(emulated::Exchange::sync, mask, 0, 0, 32, line);
}
inline void __syncthreads(emulated::Line line = emulated::Line::current()) { emulated::barrier(line); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stwb(T* to, T value) {
  *to = value;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* to, T value) {  // a fiber is never interrupted
  const T old = *to;
  *to = old + value;
  return old;
}

using std::max;
using std::min;
