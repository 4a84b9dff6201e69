#include "bindings.h"
#include "rows.cuh"

namespace genfuse {

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_));
  if (device != previous_) check(cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

}  // namespace genfuse
