// Converts the codes of a row to float32, in plain C++. Every instruction set that has no loop of its own compiles
// this one for itself.
#pragma once

#include "product.h"

namespace hf_lowrank {
namespace {

template <int bits>
inline void dequantize_bits(const Product& product, int64_t row, float* out) {
    const int64_t groups = (product.kept + product.group - 1) / product.group;
    const uint8_t* codes = product.codes + row * ((product.kept * bits + 7) / 8);
    constexpr float center = ((1 << bits) - 1) / 2.0f;
    for (int64_t group = 0, first = 0; first < product.kept; ++group, first += product.group) {
        const float scale = load_as_float(product.code_scale, row * groups + group, DType(product.code_scale_dtype));
        const int64_t last = product.kept - first < product.group ? product.kept : first + product.group;
        for (int64_t i = first; i < last; ++i) {
            const int64_t byte = i * bits / 8;
            const int shift = static_cast<int>(i * bits % 8);
            int code = codes[byte] >> shift;
            if (8 % bits != 0 && shift + bits > 8) code |= codes[byte + 1] << (8 - shift);
            out[i] = (static_cast<float>(code & ((1 << bits) - 1)) - center) * scale;
        }
    }
}

inline void dequantize_row(const Product& product, int64_t row, float* out) {
    switch (product.code_bits) {
        case 2: dequantize_bits<2>(product, row, out); break;
        case 3: dequantize_bits<3>(product, row, out); break;
        case 4: dequantize_bits<4>(product, row, out); break;
        case 5: dequantize_bits<5>(product, row, out); break;
        case 6: dequantize_bits<6>(product, row, out); break;
        case 7: dequantize_bits<7>(product, row, out); break;
        default: dequantize_bits<8>(product, row, out);
    }
}

}  // namespace
}  // namespace hf_lowrank
