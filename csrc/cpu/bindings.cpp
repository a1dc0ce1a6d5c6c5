// The module unike_kernels._cpu: addresses and sizes in, results written to the caller's memory. No torch headers, so that
// one build serves any torch; unike_kernels/native.py checks dtypes, shapes and devices.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "int8_search.h"

namespace py = pybind11;

namespace {

unike::Dtype dtype_of(const std::string& name) {
    if (name == "float32") return unike::Dtype::float32;
    if (name == "bfloat16") return unike::Dtype::bfloat16;
    if (name == "float16") return unike::Dtype::float16;
    throw std::invalid_argument("keys must be float32, bfloat16 or float16, but got " + name);
}

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of unike_kernels";
    m.def("instructions", &unike::instructions, "'avx2' or 'portable': what this machine runs");
    py::class_<unike::Int8Index>(m, "Int8Index")
        .def(py::init([](uintptr_t rows, const std::string& dtype, int64_t n, int64_t d, int64_t stride, uintptr_t norm,
                         bool portable, int threads) {
                 if (n < 0 || d < 1 || stride < d || threads < 1)
                     throw std::invalid_argument("keys need n >= 0, d >= 1, stride >= d, threads >= 1");
                 const unike::Keys keys{pointer<void>(rows), dtype_of(dtype), n, d, stride, pointer<float>(norm)};
                 py::gil_scoped_release release;
                 return std::make_unique<unike::Int8Index>(keys, portable, threads);
             }),
             py::arg("rows"), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("stride"), py::arg("norm"),
             py::arg("portable"), py::arg("threads"))
        .def(
            "search",
            [](const unike::Int8Index& index, uintptr_t q, int64_t t, int64_t k, uintptr_t ranges, uintptr_t scores,
               uintptr_t indices, uintptr_t reranked, int threads) {
                if (t < 0 || k < 0 || threads < 1) throw std::invalid_argument("t, k >= 0 and threads >= 1, please");
                py::gil_scoped_release release;
                index.search(pointer<float>(q), t, k, pointer<int64_t>(ranges), pointer<float>(scores),
                             pointer<int64_t>(indices), pointer<int64_t>(reranked), threads);
            },
            py::arg("q"), py::arg("t"), py::arg("k"), py::arg("ranges"), py::arg("scores"), py::arg("indices"),
            py::arg("reranked"), py::arg("threads"))
        .def_property_readonly("bytes", &unike::Int8Index::bytes);
}
