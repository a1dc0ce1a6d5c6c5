#include "zeros.cuh"

namespace unike {

cudaError_t allocate_zeros(int64_t bytes, void*& zeros) {
    // Allowed while a stream captures, and on a stream of its own: the default one would be drawn into the capture.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) return error;
    cudaStream_t stream = nullptr;
    error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    void* at = nullptr;
    if (error == cudaSuccess) error = cudaMalloc(&at, static_cast<size_t>(bytes));
    if (error == cudaSuccess) error = cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (stream != nullptr) cudaStreamDestroy(stream);
    if (error == cudaSuccess)
        zeros = at;
    else if (at != nullptr)
        cudaFree(at);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
}

cudaError_t stream_number(cudaStream_t stream, unsigned long long& number) { return cudaStreamGetId(stream, &number); }

}  // namespace unike
