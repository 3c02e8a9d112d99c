// A call of one of the operations of runtime/ops.py for few tokens, from the tensors that either Python (direct.cpp) or
// torch's dispatcher (operators.cpp) hands over. Whatever does not fit is left to the caller.
#pragma once

#include <atomic>
#include <cstdint>

#include "dlpack.h"
#include "product.h"

extern "C" int32_t hf_lowrank_multiply(const hf_lowrank::Product*);

namespace hf_lowrank {

// Number of the instruction set in use, which native.py sets.
extern std::atomic<int32_t> instruction_set;

// A tensor of a caller. It is readable if it is an ordinary, contiguous one in this process's memory.
struct View {
    dlpack::Tensor tensor;
    bool readable;
};

int64_t elements(const dlpack::Tensor& tensor);

// Returns the view of a tensor: its data begins at the first element.
View view_of(dlpack::Tensor tensor);

// The arguments of a call. The reading methods return false where a part is not what the loops read, or does not fit
// the parts before it.
class Call {
   public:
    Call();
    bool input(const View& x);
    bool bitmask(const View& values, const View& mask);
    bool binary(const View& signs, const View& scale_in, const View& scale_out);
    bool lowrank(const View& a, const View& b);
    bool pivots(const View& bits, int64_t outputs);
    bool quantized(const View& codes, const View& scale, const View* mask, int64_t bits, int64_t group, int64_t kept);

    // Completes the arguments, once all parts were read. Returns false if there is nothing to compute.
    bool complete();
    const dlpack::Tensor& x() const { return x_; }
    int64_t outputs() const { return product_.outputs; }
    // Returns whether the layer is so small that waking a second thread would cost more than it saves.
    bool is_small() const;
    // Computes the product into memory of `outputs` values per token. Returns false if it is left to the caller.
    bool multiply(void* y, int32_t threads);

   private:
    bool floats(const View& view, int64_t& rows, int64_t& columns, const void*& data, int32_t& dtype);
    bool bitmap(const View& view, const uint8_t*& data);

    Product product_ = {};
    dlpack::Tensor x_;
    int64_t stored_ = 0;
};

}  // namespace hf_lowrank
