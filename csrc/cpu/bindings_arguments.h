// The arguments of the operators, as the interpreter hands them over.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "operators.h"

namespace unike {

namespace py = pybind11;

// The operators are called a dozen times for each decoded token, and have twenty-five arguments: read from the interpreter's
// own array, they cost a tenth of what pybind11's casters take. All are integers but for arrays and two floats. They come in
// the order of a call's fields: NeuronCall and ShiftCall of unike_kernels/cpu_kernels.py have the same, by name.
class Arguments {
  public:
    Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), end_(values + count) {}
    explicit Arguments(PyObject* tuple)
        : Arguments(reinterpret_cast<PyTupleObject*>(tuple)->ob_item, PyTuple_GET_SIZE(tuple)) {}

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
    Dtype dtype() { return static_cast<Dtype>(choice(3)); }
    int64_t choice(int64_t options) {
        const int64_t value = integer();
        if (value < 0 || value >= options) throw std::invalid_argument("an option is out of range");
        return value;
    }
    Array array() {  // a tuple of its address and its dtype
        PyObject* pair = next();
        if (!PyTuple_Check(pair)) throw std::invalid_argument("an array is no tuple of its address and dtype");
        Arguments in(pair);
        void* data = in.address<void>();
        const Array array{data, in.dtype()};
        in.finish();
        return array;
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

inline NeuronCall neuron_call(Arguments& in) {
    NeuronCall call;
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
    call.act = static_cast<Act>(in.choice(5));
    return call;
}

inline ShiftCall shift_call(Arguments& in) {
    ShiftCall call;
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
    call.clamp = in.choice(2) != 0;
    if (call.kv_heads == 0 || call.heads % call.kv_heads != 0) throw std::invalid_argument("heads must share kv_heads");
    return call;
}

}  // namespace unike
