// Memory that kernels find full of zeros and leave full of zeros. No torch, no Python.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace unike {

// Allocates `bytes` zeros on the current device, also while streams capture; the host waits until they are there.
cudaError_t allocate_zeros(int64_t bytes, void*& zeros);

// A number that no other stream has had or will have.
cudaError_t stream_number(cudaStream_t stream, unsigned long long& number);

}  // namespace unike
