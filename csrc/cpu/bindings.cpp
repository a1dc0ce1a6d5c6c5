// The module unike_kernels._cpu: addresses and sizes in, results written to the caller's memory. No torch headers, so that
// one build serves any torch; unike_kernels/native.py checks dtypes, shapes and devices.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "int8_search.h"
#include "operators.h"
#include "topk.h"

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

// The operators are called a dozen times for each decoded token, and have thirty arguments: read from the interpreter's
// own array, they cost a tenth of what pybind11's casters take. All are integers but for two floats.
class Arguments {
  public:
    Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), end_(values + count) {}

    int64_t integer() {
        const int64_t value = PyLong_AsLongLong(next());
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
    float real() {
        const double value = PyFloat_AsDouble(next());
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return float(value);
    }
    template <typename T>
    T* address() {
        return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
    }
    int64_t size() {
        const int64_t value = integer();
        if (value < 0) throw std::invalid_argument("a size is negative");
        return value;
    }
    unike::Dtype dtype() { return static_cast<unike::Dtype>(choice(3)); }
    int64_t choice(int64_t options) {
        const int64_t value = integer();
        if (value < 0 || value >= options) throw std::invalid_argument("an option is out of range");
        return value;
    }
    unike::Array array() {
        void* data = address<void>();
        return {data, dtype()};
    }
    void finish() const {
        if (values_ != end_) throw std::invalid_argument("too many arguments");
    }

  private:
    PyObject* next() {
        if (values_ == end_) throw std::invalid_argument("too few arguments");
        return *values_++;
    }
    PyObject* const* values_;
    PyObject* const* end_;
};

unike::NeuronCall neuron_call(Arguments& in) {
    unike::NeuronCall call;
    call.y = in.address<void>();
    call.y_dtype = in.dtype();
    call.add = in.choice(2) != 0;
    call.x = in.array();
    call.keys = in.array();
    call.key_bias = in.array();
    call.values = in.array();
    call.up = in.array();
    call.up_bias = in.array();
    call.zeta = in.array();
    call.route = in.array();
    call.zeta_of_group = in.choice(2) != 0;
    call.group_ptr = in.address<const int64_t>();
    call.token_to_case = in.address<const int64_t>();
    call.selected = in.address<const int64_t>();
    call.tokens = in.size();
    call.d = in.size();
    call.n = in.size();
    call.d_out = in.size();
    call.groups = in.size();
    call.rows = in.size();
    call.slots = in.size();
    call.beta = in.real();
    call.act = static_cast<unike::Act>(in.choice(5));
    return call;
}

unike::ShiftCall shift_call(Arguments& in) {
    unike::ShiftCall call;
    call.out = in.address<void>();
    call.used = in.address<float>();
    call.h_input = in.array();
    call.q = in.array();
    call.keys = in.array();
    call.values = in.array();
    call.alpha = in.array();
    call.indices = in.address<const int64_t>();
    call.token_to_case = in.address<const int64_t>();
    call.tokens = in.size();
    call.cases = in.size();
    call.items = in.size();
    call.heads = in.size();
    call.kv_heads = in.size();
    call.hd = in.size();
    call.hv = in.size();
    call.slots = in.size();
    call.scaling = in.real();
    call.softcap = in.real();
    call.alpha_of_case = in.choice(2) != 0;
    call.alpha_of_input = in.choice(2) != 0;
    call.rescale = in.choice(2) != 0;
    if (call.kv_heads == 0 || call.heads % call.kv_heads != 0) throw std::invalid_argument("heads must share kv_heads");
    return call;
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
    try {
        Arguments in(values, count);
        const unike::TopkTile tile = topk_tile(in);
        in.finish();
        py::gil_scoped_release release;
        unike::keep_best(tile);
    } catch (py::error_already_set& error) {
        error.restore();
        return nullptr;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

// One operator as a function of the interpreter's calling convention; its last argument: without AVX2.
template <typename Call, Call (*read)(Arguments&), const char* (*run)(const Call&, bool)>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t count) {
    try {
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
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::index_error& error) {
        PyErr_SetString(PyExc_IndexError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    }
    return nullptr;
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
    m.attr("interface") = 3;  // CPU_INTERFACE of unike_kernels/native.py: changes with any signature here
    m.def("instructions", &unike::instructions, "'avx2' or 'portable': what this machine runs");
    add_entry<entry<unike::NeuronCall, neuron_call, unike::extra_neurons>>(
        m, "extra_neurons", "The fields of NeuronCall (csrc/cpu/operators.h) in order, then whether to do without AVX2.");
    add_entry<entry<unike::ShiftCall, shift_call, unike::knowledge_shift>>(
        m, "knowledge_shift", "The fields of ShiftCall (csrc/cpu/operators.h) in order, then whether to do without AVX2.");
    add_entry<keep_best>(m, "keep_best", "The fields of TopkTile (csrc/cpu/topk.h) in order.");
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
