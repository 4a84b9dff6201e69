// Kernels that are right, and kernels with a mistake each, which the emulator or a sanitizer must find: mistakes NAME
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

constexpr int kThreads = 128;

// Right ones first.

template <int Lanes, class T>
__global__ void __launch_bounds__(kThreads) row_sums(const T* x, T* y, int cols) {  // a second dimension of the grid
  __shared__ alignas(16) T tile[Lanes][kThreads / Lanes], again[kThreads];
  const int in_block = threadIdx.x / Lanes, row = blockIdx.y * (kThreads / Lanes) + in_block,
            lane = threadIdx.x % Lanes;
  T s = 0;
#pragma unroll
  for (int i = lane; i < cols; i += Lanes) s += __ldg(x + row * cols + i);
  tile[lane][in_block] = s;
  __syncthreads();
  again[threadIdx.x] = tile[Lanes - 1 - lane][in_block];
  s = again[threadIdx.x];
  for (int d = Lanes / 2; d; d /= 2) s += __shfl_xor_sync(~0u, s, d, Lanes);
  if (lane == 0) y[row] = s;
}
struct Doubled {
  float x[1000];
};
__global__ void four_at_a_time(const __grid_constant__ Doubled from, float* y, int n) {
  extern __shared__ __align__(16) unsigned char bytes[];
  float4* tile = reinterpret_cast<float4*>(bytes);
  for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
    const float4 v = *reinterpret_cast<const float4*>(from.x + 4 * i);
    tile[threadIdx.x] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
    *reinterpret_cast<uint4*>(y + 4 * i) = reinterpret_cast<uint4*>(tile)[threadIdx.x];
  }
}
__global__ void count(int* at) { atomicAdd(at, 1); }

// What is wrong.

__global__ void no_barrier(const float* x, float* y, int n) {  // thread 0 reads what others have yet to write
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = x[threadIdx.x % n];
  if (threadIdx.x == 0) {
    float s = 0;
    for (int i = 0; i < kThreads; ++i) s += partial[i];
    y[0] = s;
  }
}
__global__ void divergent_shuffle(const float* x, float* y, int n) {
  float s = x[threadIdx.x % n];
  if (threadIdx.x < 16) s += __shfl_down_sync(~0u, s, 1);
  __syncthreads();
  y[threadIdx.x] = s;
}
__global__ void absent_lane(const float* x, float* y, int n) {
  if (threadIdx.x >= 8) return;
  y[threadIdx.x] = __shfl_down_sync(0xffu, x[threadIdx.x % n], 1);
}
__global__ void divergent_barrier(const float*, float* y, int) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 0;
}
__global__ void returns_before_barrier(const float*, float* y, int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  y[threadIdx.x] = 0;
}
__global__ void not_aligned(const float* x, float* y, int) {
  const float4 v = reinterpret_cast<const float4*>(x + 1)[threadIdx.x];
  y[threadIdx.x] = v.x + v.w;
}
__global__ void nowhere(const float*, float* y, int) { (y - threadIdx.x)[int64_t(1) << 40] = 0; }
__global__ void beyond_shared(const float* x, float* y, int n) {
  __shared__ float a[kThreads];
  a[threadIdx.x + 1] = x[threadIdx.x % n];
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x];
}
__global__ void beyond_dynamic(const float* x, float* y, int n) {
  extern __shared__ float b[];
  b[threadIdx.x + 1] = x[threadIdx.x % n];
  __syncthreads();
  y[threadIdx.x] = b[threadIdx.x];
}
__global__ void beyond_memory(const float* x, float* y, int n) { y[threadIdx.x + 2] = x[threadIdx.x % n]; }
__global__ void no_barrier_before_reuse(const float* x, float* y, int n) {
  __shared__ float partial[kThreads / 32];
  for (int row = 0; row < 3; ++row) {
    float s = x[(threadIdx.x + row) % n];
    for (int d = 16; d; d /= 2) s += __shfl_down_sync(~0u, s, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x < 32) {
      s = threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : 0;
      for (int d = kThreads / 64; d; d /= 2) s += __shfl_down_sync(~0u, s, d);
      if (threadIdx.x == 0) y[row] = s;
    }
  }
}
__global__ void race_in_memory(const float*, float* y, int) { y[0] = float(threadIdx.x); }

template <class F>
void with_lanes(F f) {
  f(std::integral_constant<int, 8>());
}

void require(bool right) {
  if (!right) throw std::runtime_error("a result is wrong");
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  std::vector<float> x(1000), y(kThreads + 1, -1.f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  const std::map<std::string, void (*)(const float*, float*, int)> wrong = {
      {"divergent_shuffle", divergent_shuffle},
      {"absent_lane", absent_lane},
      {"divergent_barrier", divergent_barrier},
      {"returns_before_barrier", returns_before_barrier},
      {"not_aligned", not_aligned},
      {"nowhere", nowhere},
      {"beyond_shared", beyond_shared},
      {"beyond_memory", beyond_memory},
      {"no_barrier_before_reuse", no_barrier_before_reuse},
      {"race_in_memory", race_in_memory},
  };
  try {
    if (name == "right") {
      with_lanes([&](auto lanes) {                                                 // three rows of blocks, 16 rows each
        row_sums<lanes, float><<<dim3(1, 3), kThreads>>>(x.data(), y.data(), 20);  // kernel<<<a comment>>>(is none)
      });
      for (int row = 0; row < 48; ++row) require(y[size_t(row)] == 400.f * float(row) + 190.f);
      Doubled from;
      std::copy(x.begin(), x.end(), from.x);
      std::vector<float> twice(1000);
      four_at_a_time<<<1, 64, 64 * sizeof(float4)>>>(from, twice.data(), 1000);
      for (size_t i = 0; i < x.size(); ++i) require(twice[i] == 2 * x[i]);
      int threads = 0;
      count<<<dim3(2, 3, 4), dim3(5, 6)>>>(&threads);
      require(threads == 2 * 3 * 4 * 5 * 6);
    } else if (name == "no_barrier") {
      no_barrier<<<1, kThreads>>>(x.data(), y.data(), 1000);
      require(y[0] == 8128.f);
    } else if (name == "grid") {
      race_in_memory<<<dim3(1, 65536), kThreads>>>(x.data(), y.data(), 1000);
    } else if (name == "no_blocks") {
      race_in_memory<<<0, kThreads>>>(x.data(), y.data(), 1000);
    } else if (name == "much_shared") {
      beyond_dynamic<<<1, kThreads, 50000>>>(x.data(), y.data(), 1000);
    } else if (name == "beyond_dynamic") {
      beyond_dynamic<<<1, kThreads, kThreads * 4>>>(x.data(), y.data(), 1000);
    } else {
      const auto kernel = wrong.at(name);
      kernel<<<1, kThreads>>>(x.data(), y.data(), 1000);
    }
  } catch (const std::exception& error) {
    puts(error.what());
    return 1;
  }
  if (const cudaError_t error = cudaGetLastError()) {
    puts(cudaGetErrorString(error));
    return 1;
  }
}
