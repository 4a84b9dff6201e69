#pragma once
#include "cuda_runtime.h"

enum CUresult { CUDA_SUCCESS = 0 };
using PFN_cuDevicePrimaryCtxGetState_v7000 = CUresult (*)(int device, unsigned* flags, int* active);
