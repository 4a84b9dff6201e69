#pragma once
#include <pybind11/pybind11.h>

namespace genfuse {

// Tensors arrive as addresses, so nothing here depends on the version of PyTorch. 0 is "no tensor".
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef GENFUSE_CUDA
// Makes `device` current for as long as it lives: a launch goes to the current device, whatever its pointers.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();

 private:
  int previous_;
};
#endif

}  // namespace genfuse

// Runs an operator's launcher for the CPU (device -1) or for a GPU, without the interpreter's lock.
#ifdef GENFUSE_CUDA
#define GENFUSE_RUN(problem, out, device, stream)  \
  do {                                             \
    pybind11::gil_scoped_release nogil;            \
    if (device < 0) return cpu::run(problem, out); \
    DeviceGuard guard(device);                     \
    cuda::run(problem, out, at<void>(stream));     \
  } while (0)
#else
#define GENFUSE_RUN(problem, out, device, stream) \
  do {                                            \
    pybind11::gil_scoped_release nogil;           \
    cpu::run(problem, out);                       \
  } while (0)
#endif
