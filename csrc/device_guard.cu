#include "bindings.h"
#include "rows.cuh"

namespace genfuse {
namespace {

// Whether the process has a context on a device. (cudaSetDevice creates one, of some hundred megabytes.) Asked of
// the driver by way of the runtime, so that the module needs no libcuda to be loaded.
bool has_context(int device) {
  static const auto state = [] {
    void* function = nullptr;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 12000, cudaEnableDefault);
#else
    cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &function, cudaEnableDefault);
#endif
    return reinterpret_cast<int (*)(int device, unsigned* flags, int* active)>(function);
  }();
  unsigned flags;
  int active = 0;
  return state && state(device, &flags, &active) == 0 && active;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check(cudaGetDevice(&previous_));
  if (device_ != previous_) check(cudaSetDevice(device_));
}

// Making a device current that has no context would create it: then this one stays current.
DeviceGuard::~DeviceGuard() {
  if (device_ != previous_ && has_context(previous_)) cudaSetDevice(previous_);
}

}  // namespace genfuse
