#include "probe.cuh"

#include <device.cuh>

namespace unike {
namespace {

// One thread, 4 bytes written.
__global__ void write_architecture(int* out) {
#ifdef __CUDA_ARCH__
    *out = __CUDA_ARCH__ / 10;
#endif
}

}  // namespace

cudaError_t probe(int* out, cudaStream_t stream) {
    Launch how;
    how.stream = stream;
    return launch(write_architecture, how, out);
}

}  // namespace unike
