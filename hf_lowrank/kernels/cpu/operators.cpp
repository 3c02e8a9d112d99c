// The operations that compiled graphs call, `<name>_inference` of runtime/ops.py, as kernels of torch's dispatcher. Such
// a graph calls them without a step of Python in between. They are registered through the C functions of torch's stable
// ABI. operators.py hands over their addresses, so that this library is not linked with any version of torch.
//
// A kernel owns the tensors that it is handed and gives its result back in their place. What a call for few tokens does
// not read is left to the operation of the same name without `_inference`.
#include <atomic>
#include <stdexcept>
#include <string>

#include "call.h"

namespace hf_lowrank {
namespace {

// The version of torch that made the promise which is relied on here, 2.10.
constexpr uint64_t kAbiVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);
constexpr int kMostArguments = 7;

using Tensor = void*;
using Value = uint64_t;  // a tensor, an integer, or a pointer to the value of an optional argument, null if it has none
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t results);
using Error = int32_t;

// Functions of torch, in the order of FUNCTIONS in operators.py.
struct Torch {
    int32_t (*cpu)();
    int32_t (*uint8)();
    int32_t (*float16)();
    int32_t (*bfloat16)();
    int32_t (*float32)();
    Error (*get_data_ptr)(Tensor, void**);
    Error (*get_dim)(Tensor, int64_t*);
    Error (*get_sizes)(Tensor, int64_t**);
    Error (*get_strides)(Tensor, int64_t**);
    Error (*get_dtype)(Tensor, int32_t*);
    Error (*get_device_type)(Tensor, int32_t*);
    Error (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t dtype, int32_t device, int32_t device_index, Tensor*);
    Error (*delete_tensor)(Tensor);
    Error (*get_num_threads)(uint32_t*);
    Error (*call_dispatcher)(const char* name, const char* overload, Value* stack, uint64_t abi_version);
    Error (*library_init)(const char* name, const char* key, const char* file, uint32_t line, void** library);
    Error (*library_impl)(void* library, const char* name, Kernel, uint64_t abi_version);
    const char* (*error_text)();  // null before torch 2.12
};
Torch torch;
std::atomic<bool> in_use{false};

Tensor tensor_of(Value value) { return reinterpret_cast<Tensor>(value); }

// Returns the view of a tensor, not readable unless it is of a dtype that the loops read.
View view(Value value) {
    const Tensor tensor = tensor_of(value);
    dlpack::Tensor out = {};
    int64_t dimensions;
    int32_t dtype, device;
    if (torch.get_dim(tensor, &dimensions) || torch.get_dtype(tensor, &dtype) || torch.get_device_type(tensor, &device)) return {};
    if (device != torch.cpu() || torch.get_sizes(tensor, &out.shape) || torch.get_strides(tensor, &out.strides)) return {};
    out.dimensions = static_cast<int32_t>(dimensions), out.device.type = dlpack::kCpu;
    if (dtype == torch.uint8())
        out.dtype = {dlpack::kUInt, 8, 1};
    else if (dtype == torch.bfloat16())
        out.dtype = {dlpack::kBFloat, 16, 1};
    else if (dtype == torch.float16())
        out.dtype = {dlpack::kFloat, 16, 1};
    else if (dtype == torch.float32())
        out.dtype = {dlpack::kFloat, 32, 1};
    else
        return {};
    if (torch.get_data_ptr(tensor, &out.data)) return {};
    return view_of(out);
}

// Returns a new tensor in the shape of x, except for the last dimension, or null if there is no memory.
Tensor empty(Tensor x, const dlpack::Tensor& shape_of_x, int64_t columns) {
    constexpr int kMostDimensions = 64;  // of any tensor of torch
    int64_t shape[kMostDimensions], strides[kMostDimensions], stride = 1;
    int32_t dtype;
    Tensor y;
    if (shape_of_x.dimensions > kMostDimensions || torch.get_dtype(x, &dtype)) return nullptr;
    for (int i = shape_of_x.dimensions - 1; i >= 0; --i) {
        shape[i] = i == shape_of_x.dimensions - 1 ? columns : shape_of_x.shape[i];
        strides[i] = stride;
        stride *= shape[i];
    }
    return torch.empty_strided(shape_of_x.dimensions, shape, strides, dtype, torch.cpu(), 0, &y) ? nullptr : y;
}

// Returns the product of a call whose arguments fit, or null where it is left to the other operation.
Tensor product(Call& call, Value x) {
    uint32_t threads = 1;
    if (!call.complete() || (!call.is_small() && torch.get_num_threads(&threads))) return nullptr;
    Tensor y = empty(tensor_of(x), call.x(), call.outputs());
    void* memory;
    if (!y) return nullptr;
    if (!torch.get_data_ptr(y, &memory) && call.multiply(memory, static_cast<int32_t>(threads))) return y;
    torch.delete_tensor(y);
    return nullptr;
}

// Ends a call: with its result, or with that of the operation of the given name, which takes the same arguments.
void answer(Tensor result, const char* name, Value* stack, int tensors, int arguments) {
    if (result) {
        for (int i = 0; i < tensors; ++i) torch.delete_tensor(tensor_of(stack[i]));
        stack[0] = reinterpret_cast<Value>(result);
        return;
    }
    Value given[kMostArguments];
    for (int i = 0; i < arguments; ++i) given[i] = stack[i];
    // Errors leave torch's C functions as numbers, and this function as an exception, which torch passes on.
    if (torch.call_dispatcher(name, "", given, kAbiVersion))
        throw std::runtime_error(torch.error_text ? torch.error_text() : std::string(name) + " failed, for the reason that torch has logged");
    stack[0] = given[0];
}

// --- the operations --------------------------------------------------------------------------------------------------------------

void bitmask_linear(Value* stack, uint64_t, uint64_t) {
    Call call;
    const bool fits = in_use && call.input(view(stack[0])) && call.bitmask(view(stack[1]), view(stack[2]));
    answer(fits ? product(call, stack[0]) : nullptr, "hf_lowrank::bitmask_linear", stack, 3, 3);
}

void binary_linear(Value* stack, uint64_t, uint64_t) {
    Call call;
    const bool fits = in_use && call.input(view(stack[0])) && call.binary(view(stack[1]), view(stack[2]), view(stack[3]));
    answer(fits ? product(call, stack[0]) : nullptr, "hf_lowrank::binary_linear", stack, 4, 4);
}

void bitmask_binary_linear(Value* stack, uint64_t, uint64_t) {
    Call call;
    const bool fits = in_use && call.input(view(stack[0])) && call.bitmask(view(stack[1]), view(stack[2])) &&
                      call.binary(view(stack[3]), view(stack[4]), view(stack[5]));
    answer(fits ? product(call, stack[0]) : nullptr, "hf_lowrank::bitmask_binary_linear", stack, 6, 6);
}

void lowrank_linear(Value* stack, uint64_t, uint64_t) {
    Call call;
    const bool fits = in_use && call.input(view(stack[0])) && call.lowrank(view(stack[1]), view(stack[2]));
    answer(fits ? product(call, stack[0]) : nullptr, "hf_lowrank::lowrank_linear", stack, 3, 3);
}

void pivoted_linear(Value* stack, uint64_t, uint64_t) {
    Call call;
    const bool fits = in_use && call.input(view(stack[0])) && call.lowrank(view(stack[1]), view(stack[2])) &&
                      call.pivots(view(stack[3]), static_cast<int64_t>(stack[4]));
    answer(fits ? product(call, stack[0]) : nullptr, "hf_lowrank::pivoted_linear", stack, 4, 5);
}

void quantized_linear(Value* stack, uint64_t, uint64_t) {
    Call call;
    Value* optional_mask = reinterpret_cast<Value*>(stack[3]);
    const View mask = optional_mask ? view(*optional_mask) : View{};
    const bool fits = in_use && call.input(view(stack[0])) &&
                      call.quantized(view(stack[1]), view(stack[2]), optional_mask ? &mask : nullptr, static_cast<int64_t>(stack[4]),
                                     static_cast<int64_t>(stack[5]), static_cast<int64_t>(stack[6]));
    const Tensor result = fits ? product(call, stack[0]) : nullptr;
    if (result && optional_mask) {
        torch.delete_tensor(tensor_of(*optional_mask));
        delete optional_mask;
    }
    answer(result, "hf_lowrank::quantized_linear", stack, 3, 7);
}

}  // namespace
}  // namespace hf_lowrank

// Registers the kernels for CPUs, from the addresses of torch's functions. Returns 0 unless torch refuses.
extern "C" __attribute__((visibility("default"))) int32_t hf_lowrank_register_operators(const hf_lowrank::Torch* functions) {
    using namespace hf_lowrank;
    torch = *functions;
    void* library;
    if (torch.library_init("hf_lowrank", "CPU", "operators.cpp", __LINE__, &library)) return 1;
    const struct {
        const char* name;
        Kernel kernel;
    } kernels[] = {
        {"bitmask_linear_inference", bitmask_linear},   {"binary_linear_inference", binary_linear},
        {"bitmask_binary_linear_inference", bitmask_binary_linear}, {"lowrank_linear_inference", lowrank_linear},
        {"pivoted_linear_inference", pivoted_linear},   {"quantized_linear_inference", quantized_linear},
    };
    // The library stays for as long as the process does.
    for (const auto& entry : kernels)
        if (torch.library_impl(library, entry.name, entry.kernel, kAbiVersion)) return 1;
    return 0;
}

// Lets the kernels compute, or leave every call to the operations without `_inference`.
extern "C" __attribute__((visibility("default"))) void hf_lowrank_use_operators(int32_t use) { hf_lowrank::in_use = use != 0; }
