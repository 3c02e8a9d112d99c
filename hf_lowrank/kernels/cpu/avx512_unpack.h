// Unpacks bfloat16 rows of the dense matrix from kept values, and signs with bfloat16 scales, with AVX-512.
#pragma once

#include "avx512_levels.h"

namespace hf_lowrank {
namespace {

// Returns unit + scale_out · signed_scale for 32 columns. Meanwhile two neighbors are float32 in the same lane of two
// registers.
AVX512_INLINE __m512i add_signed(__m512i unit, __m512i signed_scale, __m512 scale_out) {
    const __m512 even = _mm512_fmadd_ps(scale_out, even_words(signed_scale), even_words(unit));
    const __m512 odd = _mm512_fmadd_ps(scale_out, odd_words(signed_scale), odd_words(unit));
    return round_in_turn(even, odd);
}

// Unpacks columns [begin, end) of a row, where begin is a multiple of 64. With `in_tile`, zeros follow up to a
// multiple of 32. `values` is where the values of the columns begin, and afterwards where those of the next columns
// do. Meanwhile the bitmaps of the row `rows_ahead` further on are fetched, and its values unless `in_tile`.
template <bool signs, bool in_tile>
AVX512_INLINE void unpack_bfloat16(const Product& product, int64_t row, int64_t begin, int64_t end, const uint16_t*& values,
                                   int64_t rows_ahead, uint16_t* out) {
    constexpr int64_t step = 2 * kUnit;
    const int64_t width = (product.columns + 7) / 8;
    const uint8_t *mask = product.mask + row * width, *bits = signs ? product.signs + row * width : nullptr;
    const uint16_t* scale_in = static_cast<const uint16_t*>(product.scale_in);
    const uint16_t* values_end = static_cast<const uint16_t*>(product.values) + product.rows * product.kept;
    const __m512 scale_out = _mm512_set1_ps(signs ? from_bfloat16(static_cast<const uint16_t*>(product.scale_out)[row]) : 0.0f);
    const __m512i low_positions = _mm512_load_si512(kSignPositions.low), high_positions = _mm512_load_si512(kSignPositions.high);
    const int64_t values_ahead = rows_ahead * product.kept * 2, bits_ahead = rows_ahead * width;
    const bool many = product.kept * 2 > product.columns;
    int64_t column = begin;
    for (; column + step <= end && values_end - values >= step; column += step, out += step) {
        if (!in_tile) prefetch(values, values_ahead);
        if (!in_tile && many) prefetch(values, values_ahead + 64);
        if (column % 512 == 0) {
            prefetch(mask + column / 8, bits_ahead);
            if (signs) prefetch(bits + column / 8, bits_ahead);
        }
        __m512i low, high;
        Bits16::expand_64(values, mask + column / 8, low, high);
        if (signs) {
            const __m512i both = broadcast_8_bytes(bits + column / 8);
            low = add_signed(low, with_signs(both, low_positions, _mm512_loadu_si512(scale_in + column)), scale_out);
            high = add_signed(high, with_signs(both, high_positions, _mm512_loadu_si512(scale_in + column + kUnit)), scale_out);
        }
        _mm512_storeu_si512(out, low);
        _mm512_storeu_si512(out + kUnit, high);
    }
    for (; column < end; column += kUnit, out += kUnit) {
        const __mmask32 present = first_of_32(end - column);
        const uint32_t spread = load_bits(mask, width, column / 8) & present;
        const int64_t left = values_end - values < kUnit ? values_end - values : kUnit, used = _mm_popcnt_u32(spread);
        __m512i unit = Bits16::expand(Bits16::load_first(values, left), spread);
        values += used < left ? used : left;
        if (signs) {
            const __m512i word = _mm512_set1_epi64(load_bits(bits, width, column / 8));
            unit = add_signed(unit, with_signs(word, low_positions, _mm512_maskz_loadu_epi16(present, scale_in + column)), scale_out);
        }
        _mm512_mask_storeu_epi16(out, in_tile ? ~0u : present, unit);
    }
}

}  // namespace
}  // namespace hf_lowrank
