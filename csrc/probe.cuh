// What the compiled CUDA code can run on. No torch, no Python.
#pragma once

#include <cuda_runtime_api.h>

namespace unike {

// Writes the architecture (10 x major + minor) that the code now running was compiled for to *out, in device memory. The
// launch fails, with cudaErrorNoKernelImageForDevice, where the build has no code for the device.
cudaError_t probe(int* out, cudaStream_t stream);

}  // namespace unike
