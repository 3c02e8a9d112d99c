// The operations of runtime/ops.py as functions of a Python module, for few tokens. Each takes the tensors themselves
// and makes the result, or returns None where it does not apply. One product of a layer takes half a millisecond, and
// whatever a call touches has left the caches since the last one. Reading six tensors through DLPack takes 2 µs, where
// Python took 50 (ctypes had 20 fields to set).
#if __has_include(<Python.h>)

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "dlpack.h"
#include "product.h"

extern "C" int32_t hf_lowrank_multiply(const hf_lowrank::Product*);

namespace hf_lowrank {
namespace {

// The values of SERIAL_BYTES and FEW_TOKENS in products.py, which multiplies more tokens.
constexpr int64_t kSerialBytes = 1 << 17, kFewTokens = 16;
constexpr int kMostDimensions = 8;
constexpr int64_t kLargestGroup = INT32_MAX;  // so that no sum of sizes overflows

// Functions and types of torch, looked up once.
const dlpack::ExchangeApi* api;
PyObject *tensor_type, *parameter_type, *get_num_threads, *is_autocast_enabled, *is_tracing, *dispatch_modes, *cpu;
std::atomic<int32_t> instruction_set{kAvx512};

// Returns None: a call that does not apply is left to the caller, who also finds its errors.
PyObject* none() {
    PyErr_Clear();
    return Py_NewRef(Py_None);
}

// --- tensors ---------------------------------------------------------------------------------------------------------------------

int64_t elements(const dlpack::Tensor& tensor) {
    int64_t count = 1;
    for (int i = 0; i < tensor.dimensions; ++i) count *= tensor.shape[i];
    return count;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
    int64_t expected = 1;
    for (int i = tensor.dimensions - 1; i >= 0; --i) {
        if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return elements(tensor) == 0;
        expected *= tensor.shape[i];
    }
    return true;
}

bool is_bytes(const dlpack::Tensor& tensor) { return tensor.dtype.code == dlpack::kUInt && tensor.dtype.bits == 8; }

DType float_type(const dlpack::Tensor& tensor) {
    if (tensor.dtype.code == dlpack::kBFloat && tensor.dtype.bits == 16) return kBFloat16;
    if (tensor.dtype.code != dlpack::kFloat) return kNone;
    return tensor.dtype.bits == 32 ? kFloat32 : tensor.dtype.bits == 16 ? kFloat16 : kNone;
}

// Reads a tensor. Returns false if it is not an ordinary, contiguous tensor in this process's memory.
bool read(PyObject* object, dlpack::Tensor& out) {
    if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(tensor_type) && Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(parameter_type))
        return false;
    if (api->tensor_from_object(object, &out)) {
        PyErr_Clear();  // a wrapper without memory, such as those of torch.func
        return false;
    }
    if (out.device.type != dlpack::kCpu || !is_contiguous(out)) return false;
    out.data = static_cast<char*>(out.data) + out.byte_offset;
    const bool aligned = (reinterpret_cast<uintptr_t>(out.data) & (out.dtype.bits / 8 - 1)) == 0;  // or mapped from a file, anywhere
    return (out.data || !elements(out)) && aligned;
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

// Compares a size of the product with that of a tensor. It is −1 until the first tensor sets it; the others must
// agree.
bool agree(int64_t& size, int64_t found) {
    if (size < 0) size = found;
    return size == found;
}

// The arguments of a call. The reading methods return false where a part is not what the loops read, or does not fit
// the parts before it.
class Call {
   public:
    Call() {
        product_.rows = product_.kept = product_.binary_rank = product_.rank = -1;
        product_.values_dtype = product_.scale_dtype = product_.lowrank_dtype = product_.code_scale_dtype = kNone;
    }

    bool input(PyObject* x) {
        if (!read(x, x_) || x_.dimensions < 1 || x_.dimensions > kMostDimensions || float_type(x_) == kNone) return false;
        product_.x = x_.data, product_.x_dtype = float_type(x_);
        product_.columns = x_.shape[x_.dimensions - 1];
        product_.tokens = product_.columns ? elements(x_) / product_.columns : 0;
        return product_.tokens >= 1 && product_.tokens <= kFewTokens;
    }

    bool bitmask(PyObject* values, PyObject* mask) {
        return floats(values, product_.rows, product_.kept, product_.values, product_.values_dtype) && bitmap(mask, product_.mask);
    }

    bool binary(PyObject* signs, PyObject* scale_in, PyObject* scale_out) {
        return bitmap(signs, product_.signs) &&
               floats(scale_in, product_.binary_rank, product_.columns, product_.scale_in, product_.scale_dtype) &&
               floats(scale_out, product_.rows, product_.binary_rank, product_.scale_out, product_.scale_dtype);
    }

    bool lowrank(PyObject* a, PyObject* b) {
        return floats(a, product_.rank, product_.columns, product_.lowrank_a, product_.lowrank_dtype) &&
               floats(b, product_.rows, product_.rank, product_.lowrank_b, product_.lowrank_dtype);
    }

    bool pivots(PyObject* bits, PyObject* outputs) {
        dlpack::Tensor tensor;
        product_.outputs = PyLong_AsLongLong(outputs);
        if (!read(bits, tensor) || !is_bytes(tensor) || product_.outputs != product_.rows + product_.rank) return false;
        product_.pivots = static_cast<const uint8_t*>(tensor.data);
        return elements(tensor) == (product_.outputs + 7) / 8;
    }

    bool quantized(PyObject* codes, PyObject* scale, PyObject* mask, PyObject* bits, PyObject* group, PyObject* kept) {
        dlpack::Tensor tensor;
        const int64_t code_bits = PyLong_AsLongLong(bits);
        product_.group = PyLong_AsLongLong(group), product_.kept = PyLong_AsLongLong(kept);
        if (!read(codes, tensor) || !is_bytes(tensor) || tensor.dimensions < 2) return false;
        if (code_bits < 2 || code_bits > 8 || product_.kept < 0 || product_.kept > product_.columns) return false;
        if (product_.group < 1 || product_.group > kLargestGroup) return false;
        product_.code_bits = static_cast<int32_t>(code_bits);
        product_.codes = static_cast<const uint8_t*>(tensor.data);
        product_.rows = tensor.shape[0];
        stored_ += elements(tensor);
        int64_t groups = (product_.kept + product_.group - 1) / product_.group;
        return elements(tensor) == product_.rows * ((product_.kept * product_.code_bits + 7) / 8) &&
               floats(scale, product_.rows, groups, product_.code_scale, product_.code_scale_dtype) &&
               (mask == Py_None ? product_.kept == product_.columns : bitmap(mask, product_.mask));
    }

    // Returns the product as a new tensor, None where it is left to the caller, or null with an error set.
    PyObject* result() {
        if (product_.rows < 1 || autocasts() || is_watched()) return none();
        for (int64_t* size : {&product_.kept, &product_.binary_rank, &product_.rank}) *size = *size < 0 ? 0 : *size;
        if (!product_.outputs) product_.outputs = product_.rows;
        Output* y = Output::of(x_, product_.outputs);
        if (!y) return PyErr_NoMemory();
        product_.y = y->managed.tensor.data;
        product_.threads = stored_ < kSerialBytes ? 1 : threads();
        product_.instruction_set = instruction_set;
        int32_t left_to_caller;
        Py_BEGIN_ALLOW_THREADS;
        left_to_caller = hf_lowrank_multiply(&product_);
        Py_END_ALLOW_THREADS;
        if (left_to_caller) {
            y->managed.deleter(&y->managed);
            return none();
        }
        void* object;
        return api->object_from_managed(&y->managed, &object) ? nullptr : static_cast<PyObject*>(object);
    }

   private:
    bool floats(PyObject* object, int64_t& rows, int64_t& columns, const void*& data, int32_t& dtype) {
        dlpack::Tensor tensor;
        if (!read(object, tensor) || tensor.dimensions != 2 || float_type(tensor) == kNone) return false;
        if (dtype == kNone) dtype = float_type(tensor);
        data = tensor.data;
        stored_ += elements(tensor) * element_size(DType(dtype));
        return dtype == float_type(tensor) && agree(rows, tensor.shape[0]) && agree(columns, tensor.shape[1]);
    }

    bool bitmap(PyObject* object, const uint8_t*& data) {
        dlpack::Tensor tensor;
        if (!read(object, tensor) || !is_bytes(tensor) || tensor.dimensions != 2) return false;
        data = static_cast<const uint8_t*>(tensor.data);
        stored_ += elements(tensor);
        return agree(product_.rows, tensor.shape[0]) && tensor.shape[1] == (product_.columns + 7) / 8;
    }

    static bool autocasts() {
        PyObject* answer = PyObject_CallOneArg(is_autocast_enabled, cpu);
        Py_XDECREF(answer);
        return answer != Py_False;
    }

    // Returns whether torch.jit.trace or a dispatch mode such as that of make_fx records what torch computes. What is computed
    // here would be a constant to them.
    static bool is_watched() {
        PyObject* traces = PyObject_CallNoArgs(is_tracing);
        PyObject* modes = PyObject_CallNoArgs(dispatch_modes);
        const bool watched = traces != Py_False || !modes || PyLong_AsLong(modes) != 0;
        Py_XDECREF(traces);
        Py_XDECREF(modes);
        return watched;
    }

    static int32_t threads() {
        PyObject* answer = PyObject_CallNoArgs(get_num_threads);
        const long count = answer ? PyLong_AsLong(answer) : 1;
        Py_XDECREF(answer);
        return static_cast<int32_t>(count);
    }

    Product product_ = {};
    dlpack::Tensor x_;
    int64_t stored_ = 0;
};

// --- the module ------------------------------------------------------------------------------------------------------------------

using Arguments = PyObject* const*;

PyObject* bitmask_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    return count == 3 && call.input(given[0]) && call.bitmask(given[1], given[2]) ? call.result() : none();
}

PyObject* binary_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    return count == 4 && call.input(given[0]) && call.binary(given[1], given[2], given[3]) ? call.result() : none();
}

PyObject* bitmask_binary_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool read = count == 6 && call.input(given[0]) && call.bitmask(given[1], given[2]) && call.binary(given[3], given[4], given[5]);
    return read ? call.result() : none();
}

PyObject* lowrank_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    return count == 3 && call.input(given[0]) && call.lowrank(given[1], given[2]) ? call.result() : none();
}

PyObject* pivoted_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool read = count == 5 && call.input(given[0]) && call.lowrank(given[1], given[2]) && call.pivots(given[3], given[4]);
    return read ? call.result() : none();
}

PyObject* quantized_linear(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    const bool read =
        count == 7 && call.input(given[0]) && call.quantized(given[1], given[2], given[3], given[4], given[5], given[6]);
    return read ? call.result() : none();
}

PyObject* use_instruction_set(PyObject*, PyObject* number) {
    instruction_set = static_cast<int32_t>(PyLong_AsLong(number));
    return none();
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
    {"use_instruction_set", use_instruction_set, METH_O, nullptr},
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
