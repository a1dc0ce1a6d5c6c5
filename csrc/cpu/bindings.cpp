// The module unike_kernels._cpu: addresses and sizes in, results written to the caller's memory. No torch headers, so that
// one build serves any torch; unike_kernels/native.py checks dtypes, shapes and devices.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "bindings_arguments.h"
#include "int8_search.h"
#include "operators.h"
#include "scan.h"
#include "bindings_steps.h"
#include "topk.h"
#include "vectors.h"

namespace py = pybind11;

namespace {

using unike::Arguments;

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

unike::TopkTile topk_tile(Arguments& in) {
    unike::TopkTile tile;
    tile.products = in.address<const float>();
    tile.key_norm = in.address<const float>();
    tile.ranges = in.address<const int64_t>();
    tile.scores = in.address<float>();
    tile.indices = in.address<int64_t>();
    tile.found = in.address<int64_t>();
    tile.queries = in.size();
    tile.n = in.size();
    tile.first = in.size();
    tile.k = in.size();
    return tile;
}

PyObject* keep_best(PyObject*, PyObject* const* values, Py_ssize_t count) {
    return unike::guarded([&]() -> PyObject* {
        Arguments in(values, count);
        const unike::TopkTile tile = topk_tile(in);
        in.finish();
        {
            py::gil_scoped_release release;
            unike::keep_best(tile);
        }
        Py_RETURN_NONE;
    });
}

unike::ScanCall scan_call(Arguments& in) {
    unike::ScanCall call;
    call.q = in.address<const float>();
    call.bf16 = in.address<const uint16_t>();
    call.keys.rows = in.address<const void>();
    call.keys.dtype = in.dtype();
    call.keys.n = in.size();
    call.keys.d = in.size();
    call.keys.stride = in.size();
    call.keys.norm = in.address<const float>();
    call.ranges = in.address<const int64_t>();
    call.scores = in.address<float>();
    call.indices = in.address<int64_t>();
    call.found = in.address<int64_t>();
    call.queries = in.size();
    call.k = in.size();
    call.threads = int(in.size());
    return call;
}

PyObject* scan(PyObject*, PyObject* const* values, Py_ssize_t count) {
    return unike::guarded([&]() -> PyObject* {
        Arguments in(values, count);
        const unike::ScanCall call = scan_call(in);
        const auto level = static_cast<unike::Level>(in.choice(3));
        in.finish();
        if (!unike::can_scan(level)) throw std::invalid_argument("this machine has no instructions for it");
        {
            py::gil_scoped_release release;
            unike::scan(call, level);
        }
        Py_RETURN_NONE;
    });
}

// One operator as a function of the interpreter's calling convention; its last argument: without AVX2.
template <typename Call, Call (*read)(Arguments&), const char* (*run)(const Call&, bool)>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
    return unike::guarded([&]() -> PyObject* {
        Arguments in(values, count);
        const Call call = read(in);
        const bool portable = in.choice(2) != 0;
        in.finish();
        const char* wrong;
        {
            py::gil_scoped_release release;
            wrong = run(call, portable);
        }
        if (wrong) throw py::index_error(wrong);
        Py_RETURN_NONE;
    });
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
void add_entry(py::module_& m, const char* name, const char* doc) {
    static PyMethodDef definition;
    definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
    m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, nullptr));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of unike_kernels";
    m.attr("interface") = 10;  // CPU_INTERFACE of unike_kernels/native.py: changes with any signature here
    add_entry<entry<unike::NeuronCall, unike::neuron_call, unike::extra_neurons>>(
        m, "extra_neurons", "The fields of NeuronCall (csrc/cpu/operators.h) in order, then whether to do without AVX2.");
    add_entry<entry<unike::ShiftCall, unike::shift_call, unike::knowledge_shift>>(
        m, "knowledge_shift", "The fields of ShiftCall (csrc/cpu/operators.h) in order, then whether to do without AVX2.");
    m.def("neurons_step", &unike::make_step<unike::NeuronCall, unike::neuron_call, unike::extra_neurons>, unike::kStepDoc);
    m.def("shift_step", &unike::make_step<unike::ShiftCall, unike::shift_call, unike::knowledge_shift>, unike::kStepDoc);
    m.attr("avx512") = unike::has_avx512();
    m.def("can_scan", [](int level) { return unike::can_scan(static_cast<unike::Level>(level)); });
    add_entry<scan>(m, "scan", "The fields of ScanCall (csrc/cpu/scan.h) in order, then the level of instructions.");
    add_entry<keep_best>(m, "keep_best", "The fields of TopkTile (csrc/cpu/topk.h) in order.");
    py::class_<unike::Int8Index>(m, "Int8Index")
        .def(py::init([](uintptr_t rows, const std::string& dtype, int64_t n, int64_t d, int64_t stride, uintptr_t norm,
                         int level, int threads) {
                 if (n < 0 || d < 1 || stride < d || threads < 1 || level < 0 || level > 2)
                     throw std::invalid_argument("keys need n >= 0, d >= 1, stride >= d, threads >= 1, level 0 to 2");
                 const unike::Keys keys{pointer<void>(rows), dtype_of(dtype), n, d, stride, pointer<float>(norm)};
                 py::gil_scoped_release release;
                 return std::make_unique<unike::Int8Index>(keys, static_cast<unike::Level>(level), threads);
             }),
             py::arg("rows"), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("stride"), py::arg("norm"),
             py::arg("level"), py::arg("threads"))
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
