// The module unike_kernels._cuda: addresses, sizes and a stream in. No torch headers and a CUDA runtime of its own, linked
// statically: one build serves any torch. Importing it touches no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "knowledge_shift.cuh"
#include "probe.cuh"

namespace py = pybind11;

namespace {

using Place = std::tuple<uintptr_t, int64_t, int64_t, std::string>;  // address, strides of rows and heads, dtype

unike::Dtype dtype_of(const std::string& name) {
    if (name == "float32") return unike::Dtype::float32;
    if (name == "bfloat16") return unike::Dtype::bfloat16;
    if (name == "float16") return unike::Dtype::float16;
    throw std::invalid_argument("a kernel takes float32, bfloat16 or float16, but got " + name);
}

unike::Heads heads_of(const Place& place) {
    const auto& [address, row, head, dtype] = place;
    return {reinterpret_cast<const void*>(address), row, head, dtype_of(dtype)};
}

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

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
    m.def(
        "knowledge_shift",
        [](const Place& q, const Place& keys, const Place& values, const Place& h_input, uintptr_t indices,
           uintptr_t token_to_case, uintptr_t case_tokens, uintptr_t alpha, const std::string& alpha_dtype, bool alpha_per_case,
           uintptr_t out, uintptr_t used, int tokens, int cases, int items, int key_heads, int group, int key_columns,
           int value_columns, float scaling, float softcap, bool input, bool clamp, bool rescale, int split, int rows,
           uintptr_t stream) {
            const unike::KnowledgeShift shift{
                heads_of(q), heads_of(keys), heads_of(values), heads_of(h_input), at<const int64_t>(indices),
                at<const int64_t>(token_to_case), at<const int64_t>(case_tokens), at<const void>(alpha), dtype_of(alpha_dtype),
                alpha_per_case, at<void>(out), at<float>(used), tokens, cases, items, key_heads, group, key_columns,
                value_columns, scaling, softcap, input, clamp, rescale};
            require(unike::knowledge_shift(shift, split, rows, at<CUstream_st>(stream)), "launching knowledge_shift");
        },
        "The arguments of csrc/knowledge_shift.cuh in their order; a missing tensor is address 0.");
}
