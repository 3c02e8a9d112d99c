#include "call.h"

#include <initializer_list>

namespace hf_lowrank {

std::atomic<int32_t> instruction_set{kAvx512};

namespace {

// The values of SERIAL_BYTES, FEW_TOKENS and FEW_TOKENS_BY_BFLOAT16 in products.py, which multiplies more tokens.
constexpr int64_t kSerialBytes = 1 << 17, kFewTokens = 16, kFewTokensByBfloat16 = 64;
constexpr int64_t kLargestGroup = INT32_MAX;  // so that no sum of sizes overflows

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

// Compares a size of the product with that of a tensor. It is −1 until the first tensor sets it; the others must
// agree.
bool agree(int64_t& size, int64_t found) {
    if (size < 0) size = found;
    return size == found;
}

}  // namespace

int64_t elements(const dlpack::Tensor& tensor) {
    int64_t count = 1;
    for (int i = 0; i < tensor.dimensions; ++i) count *= tensor.shape[i];
    return count;
}

View view_of(dlpack::Tensor tensor) {
    if (tensor.device.type != dlpack::kCpu || tensor.dtype.bits < 8 || !is_contiguous(tensor)) return {tensor, false};
    tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    const bool aligned = (reinterpret_cast<uintptr_t>(tensor.data) & (tensor.dtype.bits / 8 - 1)) == 0;  // or mapped from a file, anywhere
    return {tensor, (tensor.data || !elements(tensor)) && aligned};
}

Call::Call() {
    product_.rows = product_.kept = product_.binary_rank = product_.rank = -1;
    product_.values_dtype = product_.scale_dtype = product_.lowrank_dtype = product_.code_scale_dtype = kNone;
}

bool Call::input(const View& x) {
    x_ = x.tensor;
    if (!x.readable || x_.dimensions < 1 || float_type(x_) == kNone) return false;
    product_.x = x_.data, product_.x_dtype = float_type(x_);
    product_.columns = x_.shape[x_.dimensions - 1];
    product_.tokens = product_.columns ? elements(x_) / product_.columns : 0;
    return product_.tokens >= 1 && product_.tokens <= kFewTokensByBfloat16;
}

bool Call::bitmask(const View& values, const View& mask) {
    return floats(values, product_.rows, product_.kept, product_.values, product_.values_dtype) && bitmap(mask, product_.mask);
}

bool Call::binary(const View& signs, const View& scale_in, const View& scale_out) {
    return bitmap(signs, product_.signs) &&
           floats(scale_in, product_.binary_rank, product_.columns, product_.scale_in, product_.scale_dtype) &&
           floats(scale_out, product_.rows, product_.binary_rank, product_.scale_out, product_.scale_dtype);
}

bool Call::lowrank(const View& a, const View& b) {
    return floats(a, product_.rank, product_.columns, product_.lowrank_a, product_.lowrank_dtype) &&
           floats(b, product_.rows, product_.rank, product_.lowrank_b, product_.lowrank_dtype);
}

bool Call::pivots(const View& bits, int64_t outputs) {
    product_.outputs = outputs;
    if (!bits.readable || !is_bytes(bits.tensor) || outputs != product_.rows + product_.rank) return false;
    product_.pivots = static_cast<const uint8_t*>(bits.tensor.data);
    return elements(bits.tensor) == (outputs + 7) / 8;
}

bool Call::quantized(const View& codes, const View& scale, const View* mask, int64_t bits, int64_t group, int64_t kept) {
    product_.group = group, product_.kept = kept;
    if (!codes.readable || !is_bytes(codes.tensor) || codes.tensor.dimensions < 2) return false;
    if (bits < 2 || bits > 8 || kept < 0 || kept > product_.columns || group < 1 || group > kLargestGroup) return false;
    product_.code_bits = static_cast<int32_t>(bits);
    product_.codes = static_cast<const uint8_t*>(codes.tensor.data);
    product_.rows = codes.tensor.shape[0];
    stored_ += elements(codes.tensor);
    int64_t groups = (kept + group - 1) / group;
    return elements(codes.tensor) == product_.rows * ((kept * bits + 7) / 8) &&
           floats(scale, product_.rows, groups, product_.code_scale, product_.code_scale_dtype) &&
           (mask ? bitmap(*mask, product_.mask) : kept == product_.columns);
}

bool Call::complete() {
    const bool by_bfloat16 = product_.x_dtype == kBFloat16 && instruction_set == kAvx512;
    const bool many = by_bfloat16 && (product_.values || (product_.codes && product_.group % kUnit == 0));
    if (product_.rows < 1 || product_.tokens > (many ? kFewTokensByBfloat16 : kFewTokens)) return false;
    for (int64_t* size : {&product_.kept, &product_.binary_rank, &product_.rank}) *size = *size < 0 ? 0 : *size;
    if (!product_.outputs) product_.outputs = product_.rows;
    return true;
}

bool Call::is_small() const { return stored_ < kSerialBytes; }

bool Call::multiply(void* y, int32_t threads) {
    product_.y = y;
    product_.threads = threads;
    product_.instruction_set = instruction_set;
    return hf_lowrank_multiply(&product_) == 0;
}

bool Call::floats(const View& view, int64_t& rows, int64_t& columns, const void*& data, int32_t& dtype) {
    const dlpack::Tensor& tensor = view.tensor;
    if (!view.readable || tensor.dimensions != 2 || float_type(tensor) == kNone) return false;
    if (dtype == kNone) dtype = float_type(tensor);
    data = tensor.data;
    stored_ += elements(tensor) * element_size(DType(dtype));
    return dtype == float_type(tensor) && agree(rows, tensor.shape[0]) && agree(columns, tensor.shape[1]);
}

bool Call::bitmap(const View& view, const uint8_t*& data) {
    const dlpack::Tensor& tensor = view.tensor;
    if (!view.readable || !is_bytes(tensor) || tensor.dimensions != 2) return false;
    data = static_cast<const uint8_t*>(tensor.data);
    stored_ += elements(tensor);
    return agree(product_.rows, tensor.shape[0]) && tensor.shape[1] == (product_.columns + 7) / 8;
}

}  // namespace hf_lowrank

// Sets the instruction set of all calls that do not pass through products.py.
extern "C" __attribute__((visibility("default"))) void hf_lowrank_use_instruction_set(int32_t number) {
    hf_lowrank::instruction_set = number;
}
