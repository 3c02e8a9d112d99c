// The operations of runtime/ops.py as functions of a Python module, for few tokens. Each takes the tensors themselves
// and makes the result, or returns None where it does not apply. One product of a layer takes half a millisecond, and
// whatever a call touches has left the caches since the last one. Reading six tensors through DLPack takes 2 µs, where
// Python took 50 (ctypes had 20 fields to set).
#if __has_include(<Python.h>)

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <initializer_list>
#include <new>

#include "call.h"

namespace hf_lowrank {
namespace {

constexpr int kMostDimensions = 8;

// Functions and types of torch, looked up once.
const dlpack::ExchangeApi* api;
PyObject *tensor_type, *parameter_type, *get_num_threads, *is_autocast_enabled, *is_tracing, *dispatch_modes, *cpu;

// Returns None: a call that does not apply is left to the caller, who also finds its errors.
PyObject* none() {
    PyErr_Clear();
    return Py_NewRef(Py_None);
}

// --- tensors ---------------------------------------------------------------------------------------------------------------------

// Reads a tensor. It is not readable if it is a subclass, or a wrapper without memory, such as those of torch.func.
View read(PyObject* object) {
    View view = {};
    if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(tensor_type) && Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(parameter_type))
        return view;
    if (api->tensor_from_object(object, &view.tensor)) {
        PyErr_Clear();
        return {};
    }
    return view_of(view.tensor);
}

// Reads a number, which is −1 if it is none or too large.
int64_t number(PyObject* object) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1) PyErr_Clear();
    return value;
}

// The memory of a new tensor, of which torch becomes the owner. This takes a third of the time in which torch makes a
// tensor. Its storage cannot grow.
struct alignas(64) Output {
    dlpack::ManagedTensor managed;
    int64_t shape[kMostDimensions], strides[kMostDimensions];

    // Makes an output in the shape of x, except for the last dimension. Returns null if there is no memory.
    static Output* of(const dlpack::Tensor& x, int64_t columns) {
        const int64_t bytes = elements(x) / x.shape[x.dimensions - 1] * columns * x.dtype.bits / 8;
        void* memory = std::aligned_alloc(64, sizeof(Output) + (bytes + 63) / 64 * 64);
        if (!memory) return nullptr;
        Output* out = new (memory) Output;
        int64_t stride = 1;
        for (int i = x.dimensions - 1; i >= 0; --i) {
            out->shape[i] = i == x.dimensions - 1 ? columns : x.shape[i];
            out->strides[i] = stride;
            stride *= out->shape[i];
        }
        out->managed = {{dlpack::kMajorVersion, 0}, memory, [](dlpack::ManagedTensor* self) { std::free(self->context); }, 0, x};
        out->managed.tensor.data = out + 1;
        out->managed.tensor.shape = out->shape, out->managed.tensor.strides = out->strides, out->managed.tensor.byte_offset = 0;
        return out;
    }
};

// --- one product -----------------------------------------------------------------------------------------------------------------

bool autocasts() {
    PyObject* answer = PyObject_CallOneArg(is_autocast_enabled, cpu);
    Py_XDECREF(answer);
    return answer != Py_False;
}

// Returns whether torch.jit.trace or a dispatch mode such as that of make_fx records what torch computes. What is computed
// here would be a constant to them.
bool is_watched() {
    PyObject* traces = PyObject_CallNoArgs(is_tracing);
    PyObject* modes = PyObject_CallNoArgs(dispatch_modes);
    const bool watched = traces != Py_False || !modes || PyLong_AsLong(modes) != 0;
    Py_XDECREF(traces);
    Py_XDECREF(modes);
    return watched;
}

int32_t torch_threads() {
    PyObject* answer = PyObject_CallNoArgs(get_num_threads);
    const long count = answer ? PyLong_AsLong(answer) : 1;
    Py_XDECREF(answer);
    return static_cast<int32_t>(count);
}

// Returns the product as a new tensor, None where it is left to the caller, or null with an error set.
PyObject* result(Call& call) {
    if (call.x().dimensions > kMostDimensions || !call.complete() || autocasts() || is_watched()) return none();
    Output* y = Output::of(call.x(), call.outputs());
    if (!y) return PyErr_NoMemory();
    const int32_t threads = call.is_small() ? 1 : torch_threads();
    bool done;
    Py_BEGIN_ALLOW_THREADS;
    done = call.multiply(y->managed.tensor.data, threads);
    Py_END_ALLOW_THREADS;
    if (!done) {
        y->managed.deleter(&y->managed);
        return none();
    }
    void* object;
    return api->object_from_managed(&y->managed, &object) ? nullptr : static_cast<PyObject*>(object);
}

// --- the module ------------------------------------------------------------------------------------------------------------------

using Arguments = PyObject* const*;

PyObject* bitmask_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool fits = count == 3 && call.input(read(given[0])) && call.bitmask(read(given[1]), read(given[2]));
    return fits ? result(call) : none();
}

PyObject* binary_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool fits = count == 4 && call.input(read(given[0])) && call.binary(read(given[1]), read(given[2]), read(given[3]));
    return fits ? result(call) : none();
}

PyObject* bitmask_binary_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool fits = count == 6 && call.input(read(given[0])) && call.bitmask(read(given[1]), read(given[2])) &&
                      call.binary(read(given[3]), read(given[4]), read(given[5]));
    return fits ? result(call) : none();
}

PyObject* lowrank_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool fits = count == 3 && call.input(read(given[0])) && call.lowrank(read(given[1]), read(given[2]));
    return fits ? result(call) : none();
}

PyObject* pivoted_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool fits = count == 5 && call.input(read(given[0])) && call.lowrank(read(given[1]), read(given[2])) &&
                      call.pivots(read(given[3]), number(given[4]));
    return fits ? result(call) : none();
}

PyObject* quantized_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    if (count != 7 || !call.input(read(given[0]))) return none();
    const bool masked = given[3] != Py_None;
    const View mask = masked ? read(given[3]) : View{};
    const bool fits = call.quantized(read(given[1]), read(given[2]), masked ? &mask : nullptr, number(given[4]), number(given[5]), number(given[6]));
    return fits ? result(call) : none();
}

template <PyObject* (*function)(PyObject*, Arguments, Py_ssize_t)>
constexpr PyMethodDef method(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<bitmask_linear>("bitmask_linear"),
    method<binary_linear>("binary_linear"),
    method<bitmask_binary_linear>("bitmask_binary_linear"),
    method<lowrank_linear>("lowrank_linear"),
    method<pivoted_linear>("pivoted_linear"),
    method<quantized_linear>("quantized_linear"),
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyObject* attribute(const char* module_name, const char* name) {
    PyObject* from = PyImport_ImportModule(module_name);
    PyObject* found = from ? PyObject_GetAttrString(from, name) : nullptr;
    Py_XDECREF(from);
    return found;
}

bool find_torch() {
    tensor_type = attribute("torch", "Tensor");
    parameter_type = attribute("torch.nn", "Parameter");
    get_num_threads = attribute("torch", "get_num_threads");
    is_autocast_enabled = attribute("torch", "is_autocast_enabled");
    is_tracing = attribute("torch._C", "_is_tracing");
    dispatch_modes = attribute("torch._C", "_len_torch_dispatch_stack");
    cpu = PyUnicode_InternFromString("cpu");
    for (PyObject* found : {tensor_type, parameter_type, get_num_threads, is_autocast_enabled, is_tracing, dispatch_modes, cpu})
        if (!found) return false;
    PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
    if (capsule) api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_XDECREF(capsule);
    return api && api->version.major == dlpack::kMajorVersion && api->tensor_from_object;
}

}  // namespace
}  // namespace hf_lowrank

// Raises ImportError where torch offers no tables of DLPack functions. The kernels in products.py compute there.
PyMODINIT_FUNC PyInit__native() {
    if (!hf_lowrank::find_torch()) {
        PyErr_SetString(PyExc_ImportError, "this torch has no __dlpack_c_exchange_api__ of DLPack 1");
        return nullptr;
    }
    PyObject* module = PyModule_Create(&hf_lowrank::module);
#ifdef Py_GIL_DISABLED
    if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    return module;
}

#endif
