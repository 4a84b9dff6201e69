#include "bindings.h"

#include <pybind11/stl.h>

#include "philox.h"

namespace genfuse {

// CMakeLists.txt gives GENFUSE_OPS, a list of OP(name).
#define OP(name)                 \
  namespace name {               \
  void bind(pybind11::module_&); \
  }
GENFUSE_OPS
#undef OP

namespace {

// The level of x86-64 whose clones of GENFUSE_SIMD functions run here.
const char* simd() {
#if defined(GENFUSE_SIMD_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64 (SSE2)";
#elif defined(__aarch64__)
  return "aarch64 (NEON)";
#else
  return "compiler's default";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["simd"] = simd();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["compiler"] = GENFUSE_COMPILER;
#ifdef GENFUSE_CUDA
  info["cuda"] = GENFUSE_CUDA_COMPILER;
  info["cuda_architectures"] = GENFUSE_CUDA_ARCHITECTURES;
#endif
  return info;
}

}  // namespace
}  // namespace genfuse

// Kernels run without the GIL anyway, and share nothing.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled kernels. They take tensors for their memory alone; genfuse.ops checks what it hands them.";
  m.def("build_info", &genfuse::build_info);
  // The raw generator, for its known answers.
  m.def("philox", [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    const genfuse::Words out = genfuse::philox(genfuse::Words{{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
    return std::array<uint32_t, 4>{out.w[0], out.w[1], out.w[2], out.w[3]};
  });
#define OP(name) genfuse::name::bind(m);
  GENFUSE_OPS
#undef OP
}
