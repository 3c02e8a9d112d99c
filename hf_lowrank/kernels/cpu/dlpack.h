// The part of DLPack 1.x's C interface (https://dmlc.github.io/dlpack) by which a Python package's tensors are read
// and made without calling its Python functions. It is `type(tensor).__dlpack_c_exchange_api__`, a capsule
// "dlpack_exchange_api", which torch has from 2.10 on.
#pragma once

#include <cstdint>

namespace hf_lowrank {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;
enum TypeCode : uint8_t { kUInt = 1, kFloat = 2, kBFloat = 4 };

struct Version {
    uint32_t major, minor;
};

struct Device {
    int32_t type, number;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t dimensions;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct ManagedTensor {
    Version version;
    void* context;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

struct ExchangeApi {
    Version version;
    void* older;
    int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context, void (*set_error)(void*, const char* kind, const char* message));
    int (*managed_from_object)(void* object, ManagedTensor** out);
    int (*object_from_managed)(ManagedTensor* tensor, void** out);
    int (*tensor_from_object)(void* object, Tensor* out);  // the object keeps the memory
    int (*current_stream)(int32_t device_type, int32_t device_number, void** out);
};

}  // namespace dlpack
}  // namespace hf_lowrank
