// The module unike_kernels._cuda: addresses, sizes and a stream in. No torch headers and a CUDA runtime of its own, linked
// statically: one build serves any torch. Importing it touches no driver.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "probe.cuh"

namespace py = pybind11;

namespace {

void require(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

int device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorNoDevice) return 0;
    require(error, "no CUDA driver answers");
    return count;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of unike_kernels";
    m.attr("architectures") = UNIKE_ARCHS;  // what the build has code for, such as "80 89 90a 100 ptx100"
    m.attr("toolkit") = CUDART_VERSION;
    m.def("device_count", &device_count, "CUDA devices here; RuntimeError where no usable driver is installed");
    m.def(
        "probe",
        [](uintptr_t out, uintptr_t stream) {
            if (out == 0) throw std::invalid_argument("probe writes an int32 to device memory, but got a null pointer");
            require(unike::probe(reinterpret_cast<int*>(out), reinterpret_cast<cudaStream_t>(stream)), "launching probe");
        },
        py::arg("out"), py::arg("stream"),
        "Writes the architecture of the code that runs on the current device (90 for sm_90a) to an int32 at `out`.");
}
