// One operator of one layer, prepared once and called in every step of decoding with the tensors that are new in it.
//
// Python looks at sizes and layouts when it prepares a step. The step itself looks at what may have changed since: whether
// the tensors that stay are still in their places, and whether those that are given are plain, dense ones of the same dtype
// and size on the CPU. Between two layers all that they touch has left the caches, so the interpreter took 4 us for it, and
// asking a tensor for its address takes three misses: those that stay are asked once, and kept alive by an alias. What
// torch does not count, a new storage through `.data`, is not seen until the next step is prepared.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings_arguments.h"
#include "operators.h"

namespace unike {

constexpr const char* kStepDoc =
    "A step: the arguments of the operator, addresses zero, given ((field, elements), ...) of them, stay ((field, dict or\n"
    "None, name, tensor), ...; Stays of cpu_kernels.py; no field: the step reads a copy, while the tensor's _version is the\n"
    "same), their type and dtype, own (None or a tensor of the caller's that suits, whenever it is given). It returns True\n"
    "(done), False (a given tensor does not suit) or None (something that stays is not where it was).";

template <typename Call>
using Setter = void (*)(Call&, void*);

inline Setter<NeuronCall> setter(const NeuronCall*, const std::string& field) {
    if (field == "y") return [](NeuronCall& c, void* p) { c.y = p; };
    if (field == "x") return [](NeuronCall& c, void* p) { c.x.data = p; };
    if (field == "keys") return [](NeuronCall& c, void* p) { c.keys.data = p; };
    if (field == "key_bias") return [](NeuronCall& c, void* p) { c.key_bias.data = p; };
    if (field == "values") return [](NeuronCall& c, void* p) { c.values.data = p; };
    if (field == "up") return [](NeuronCall& c, void* p) { c.up.data = p; };
    if (field == "up_bias") return [](NeuronCall& c, void* p) { c.up_bias.data = p; };
    if (field == "group_ptr") return [](NeuronCall& c, void* p) { c.group_ptr = static_cast<int64_t*>(p); };
    if (field == "token_to_case") return [](NeuronCall& c, void* p) { c.token_to_case = static_cast<int64_t*>(p); };
    if (field == "selected") return [](NeuronCall& c, void* p) { c.selected = static_cast<int64_t*>(p); };
    throw std::invalid_argument("extra_neurons has no tensor " + field);
}

inline Setter<ShiftCall> setter(const ShiftCall*, const std::string& field) {
    if (field == "out") return [](ShiftCall& c, void* p) { c.out = p; };
    if (field == "h_input") return [](ShiftCall& c, void* p) { c.h_input.data = p; };
    if (field == "q") return [](ShiftCall& c, void* p) { c.q.data = p; };
    if (field == "keys") return [](ShiftCall& c, void* p) { c.keys.data = p; };
    if (field == "values") return [](ShiftCall& c, void* p) { c.values.data = p; };
    if (field == "alpha") return [](ShiftCall& c, void* p) { c.alpha.data = p; };
    if (field == "indices") return [](ShiftCall& c, void* p) { c.indices = static_cast<int64_t*>(p); };
    if (field == "token_to_case") return [](ShiftCall& c, void* p) { c.token_to_case = static_cast<int64_t*>(p); };
    throw std::invalid_argument("knowledge_shift has no tensor " + field);
}

// The attributes and methods of a tensor that a step asks for.
struct Asked {
    PyObject *data_ptr, *dtype, *is_cpu, *is_contiguous, *numel, *version;

    static const Asked& names() {
        static const Asked all = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("dtype"),
                                  PyUnicode_InternFromString("is_cpu"), PyUnicode_InternFromString("is_contiguous"),
                                  PyUnicode_InternFromString("numel"), PyUnicode_InternFromString("_version")};
        return all;
    }
};

inline py::object method(PyObject* tensor, PyObject* name) {
    py::object result = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
    if (!result) throw py::error_already_set();
    return result;
}

inline py::object attribute(PyObject* tensor, PyObject* name) {
    py::object result = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
    if (!result) throw py::error_already_set();
    return result;
}

inline void* address_of(PyObject* tensor) {
    const py::object address = method(tensor, Asked::names().data_ptr);
    void* p = PyLong_AsVoidPtr(address.ptr());
    if (p == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return p == nullptr ? reinterpret_cast<void*>(8) : p;  // an empty tensor has none, but is there
}

template <typename Call, const char* (*run)(const Call&, bool)>
class Step {
  public:
    Step(const Call& call, bool portable, const py::tuple& given, const py::tuple& stay, py::object type, py::object dtype,
         py::object own)
        : call_(call), portable_(portable), type_(std::move(type)), dtype_(std::move(dtype)), own_(std::move(own)),
          own_address_(own_.is_none() ? nullptr : address_of(own_.ptr())) {
        for (const py::handle each : given) {
            const auto [field, elements] = each.cast<std::pair<std::string, int64_t>>();
            given_.push_back({setter(&call_, field), elements});
        }
        for (const py::handle each : stay) {
            const auto of = each.cast<py::tuple>();
            if (of[0].is_none()) {
                stay_.push_back({of[1], of[2], of[3], py::none(), of[3].attr("_version").cast<int64_t>()});
                continue;
            }
            const py::object alias = of[3].attr("detach")();
            setter(&call_, of[0].cast<std::string>())(call_, address_of(alias.ptr()));
            stay_.push_back({of[1], of[2], of[3], alias, kUncounted});
        }
    }

    PyObject* operator()(PyObject* const* values, Py_ssize_t count) {
        if (size_t(count) != given_.size()) throw std::invalid_argument("a step takes as many tensors as were announced");
        const Asked& ask = Asked::names();
        for (const Stays& one : stay_) {
            if (one.owner.is_none()) continue;
            PyObject* there = PyDict_GetItemWithError(one.owner.ptr(), one.name.ptr());
            if (there == nullptr && PyErr_Occurred()) throw py::error_already_set();
            if (there != one.tensor.ptr()) Py_RETURN_NONE;
            if (one.version != kUncounted && PyLong_AsLongLong(attribute(there, ask.version).ptr()) != one.version)
                Py_RETURN_NONE;
        }
        for (Py_ssize_t i = 0; i < count; ++i) {
            PyObject* tensor = values[i];
            if (tensor == own_.ptr()) {
                given_[size_t(i)].set(call_, own_address_);
                continue;
            }
            if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != type_.ptr()) Py_RETURN_FALSE;
            if (attribute(tensor, ask.dtype).ptr() != dtype_.ptr() || attribute(tensor, ask.is_cpu).ptr() != Py_True)
                Py_RETURN_FALSE;
            if (method(tensor, ask.is_contiguous).ptr() != Py_True) Py_RETURN_FALSE;
            if (PyLong_AsLongLong(method(tensor, ask.numel).ptr()) != given_[size_t(i)].elements) Py_RETURN_FALSE;
            given_[size_t(i)].set(call_, address_of(tensor));
        }
        if (const char* wrong = run(call_, portable_)) throw py::index_error(wrong);
        Py_RETURN_TRUE;
    }

  private:
    static constexpr int64_t kUncounted = -1;
    struct Given {
        Setter<Call> set;
        int64_t elements;
    };
    struct Stays {
        py::object owner, name, tensor, alias;  // owner[name] is the tensor; None: it belongs to nobody else
        int64_t version;                        // of a tensor that is only to be what it was; else kUncounted
    };
    Call call_;
    bool portable_;
    py::object type_, dtype_, own_;
    void* own_address_;
    std::vector<Given> given_;
    std::vector<Stays> stay_;
};

// What `function` throws, as an error of the interpreter.
template <typename Function>
PyObject* guarded(const Function& function) {
    try {
        return function();
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

template <typename Call, Call (*read)(Arguments&), const char* (*run)(const Call&, bool)>
py::object make_step(const py::tuple& arguments, const py::tuple& given, const py::tuple& stay, py::object type,
                     py::object dtype, py::object own) {
    using Made = Step<Call, run>;
    static PyMethodDef definition = {
        "step",
        reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
            +[](PyObject* self, PyObject* const* values, Py_ssize_t count) -> PyObject* {
                return guarded([&] {
                    return (*static_cast<Made*>(PyCapsule_GetPointer(self, nullptr)))(values, count);
                });
            })),
        METH_FASTCALL, nullptr};
    Arguments in(arguments.ptr());
    const Call call = read(in);
    const bool portable = in.choice(2) != 0;
    in.finish();
    auto made = std::make_unique<Made>(call, portable, given, stay, std::move(type), std::move(dtype), std::move(own));
    py::capsule owner(made.get(), [](void* step) { delete static_cast<Made*>(step); });
    made.release();
    return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, owner.ptr(), nullptr));
}

}  // namespace unike
