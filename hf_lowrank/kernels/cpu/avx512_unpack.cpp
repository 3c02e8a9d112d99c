// Unpacks a row of the dense matrix from its packed parts, with AVX-512.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_unpack.h"

namespace hf_lowrank {
namespace {

AVX512_INLINE void store_first(void* out, int64_t at, DType dtype, __m512 low, __m512 high, __mmask32 present) {
    if (dtype == kFloat32) {
        _mm512_mask_storeu_ps(static_cast<float*>(out) + at, present & 0xffff, low);
        _mm512_mask_storeu_ps(static_cast<float*>(out) + at + 16, present >> 16, high);
    } else {
        __m256i halves[2];
        if (dtype == kBFloat16) {
            halves[0] = (__m256i)_mm512_cvtneps_pbh(low);
            halves[1] = (__m256i)_mm512_cvtneps_pbh(high);
        } else {
            halves[0] = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
            halves[1] = _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
        }
        _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, present, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
    }
}

// Unpacks columns [column, column + 32) of a row. `whole` says that all 32 exist.
template <class Values, bool whole>
AVX512_INLINE void unpack_unit(const Product& product, const float* scale_in, int64_t padded, int64_t row, int64_t column,
                               const typename Values::Element*& values, const typename Values::Element* end, void* out) {
    const int64_t width = (product.columns + 7) / 8;
    __m512 low = _mm512_setzero_ps(), high = low;
    if (product.values) {
        uint32_t bits = load_bits(product.mask + row * width, width, column >> 3);
        int64_t used = _mm_popcnt_u32(bits);
        if (end - values >= kUnit) {
            Values::widen(Values::expand(Values::load(values), bits), low, high);
            values += used;
        } else {
            int64_t present = end - values;
            Values::widen(Values::expand(Values::load_first(values, present), bits), low, high);
            values += used < present ? used : present;
        }
    }
    if (product.signs) {
        __m512 magnitudes[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t term = 0; term < product.binary_rank; ++term) {
            __m512 scale = _mm512_set1_ps(load_as_float(product.scale_out, row * product.binary_rank + term, DType(product.scale_dtype)));
            magnitudes[0] = _mm512_fmadd_ps(scale, _mm512_loadu_ps(scale_in + term * padded + column), magnitudes[0]);
            magnitudes[1] = _mm512_fmadd_ps(scale, _mm512_loadu_ps(scale_in + term * padded + column + 16), magnitudes[1]);
        }
        const __m512 negative = _mm512_set1_ps(-0.0f);
        uint32_t minus = ~load_bits(product.signs + row * width, width, column >> 3);
        low = _mm512_add_ps(low, _mm512_mask_xor_ps(magnitudes[0], minus & 0xffff, magnitudes[0], negative));
        high = _mm512_add_ps(high, _mm512_mask_xor_ps(magnitudes[1], minus >> 16, magnitudes[1], negative));
    }
    store_first(out, column, DType(product.x_dtype), low, high, whole ? ~0u : first_of_32(product.columns - column));
}

template <class Values>
AVX512 void unpack_row(const Product& product, const float* scale_in, int64_t padded, int64_t row, void* out) {
    using Element = typename Values::Element;
    const Element* values = static_cast<const Element*>(product.values) + row * product.kept;
    const Element* end = static_cast<const Element*>(product.values) + product.rows * product.kept;
    int64_t column = 0;
    for (; column + kUnit <= product.columns; column += kUnit)
        unpack_unit<Values, true>(product, scale_in, padded, row, column, values, end, out);
    if (column < product.columns) unpack_unit<Values, false>(product, scale_in, padded, row, column, values, end, out);
}

constexpr int64_t kRowsAhead = 4;

template <bool signs>
AVX512 void unpack_bfloat16_row(const Product& product, int64_t row, void* out) {
    const uint16_t* values = static_cast<const uint16_t*>(product.values) + row * product.kept;
    unpack_bfloat16<signs, false>(product, row, 0, product.columns, values, kRowsAhead, static_cast<uint16_t*>(out));
}

}  // namespace

void avx512_unpack(const Product& product, const float* scale_in, int64_t padded, int64_t row, void* out) {
    const bool bfloat16 = product.values && product.values_dtype == kBFloat16 && product.x_dtype == kBFloat16;
    if (bfloat16 && !product.signs) return unpack_bfloat16_row<false>(product, row, out);
    if (bfloat16 && product.binary_rank == 1 && product.scale_dtype == kBFloat16) return unpack_bfloat16_row<true>(product, row, out);
    switch (product.values_dtype) {
        case kFloat32: unpack_row<Float32>(product, scale_in, padded, row, out); break;
        case kFloat16: unpack_row<Float16>(product, scale_in, padded, row, out); break;
        default: unpack_row<BFloat16<1>>(product, scale_in, padded, row, out);
    }
}

}  // namespace hf_lowrank

#endif
