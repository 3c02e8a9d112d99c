// Kept values, and in the same pass the signs where all is bfloat16, with AVX-512 (VBMI2, BF16).
//
// A mask word spreads the next values of a row over 32 columns (vpexpandw, register form), which are then multiplied as in a dense
// product. Signs: the bits reach the sign positions of 32 lanes by vpmultishiftqb, which leaves the ports to vpexpandw that mask registers
// would take; ± scale_in is multiplied with x, an exact product. Everything is added in float32.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_values.h"

namespace hf_lowrank {
namespace {

constexpr int64_t kStep = 64;             // columns per step: eight bytes of a bitmap
constexpr int64_t kLineColumns = 64 * 8;  // columns per cache line of a bitmap

// For word j of 32: the bits of an eight-byte word that end with bit j (low) or 32 + j (high), in the word's upper byte.
struct SignPositions {
    alignas(64) uint8_t low[64], high[64];
    constexpr SignPositions() : low(), high() {
        for (int word = 0; word < 32; ++word) {
            low[2 * word + 1] = static_cast<uint8_t>((word + 57) % 64);
            high[2 * word + 1] = static_cast<uint8_t>((word + 25) % 64);
        }
    }
};
constexpr SignPositions kSignPositions;

// ± scale: negative where the bit is clear.
AVX512_INLINE __m512i with_signs(__m512i bits, __m512i positions, __m512i scale) {
    __m512i moved = _mm512_multishift_epi64_epi8(positions, bits);
    return _mm512_ternarylogic_epi32(moved, scale, _mm512_set1_epi32(static_cast<int>(0x80008000u)), 0xc6);  // scale ^ (~moved & 0x8000)
}

AVX512_INLINE __m512i broadcast_8_bytes(const uint8_t* bytes) {
    long long word;
    __builtin_memcpy(&word, bytes, 8);
    return _mm512_set1_epi64(word);
}

AVX512_INLINE void prefetch(const void* from, int64_t bytes_ahead) {
    _mm_prefetch(static_cast<const char*>(from) + bytes_ahead, _MM_HINT_T0);
}

// `kept`: there are values; `signs`: there are signs, and Values is BFloat16<1>.
template <class Values, bool kept, bool signs>
struct Packed {
    using Element = typename Values::Element;

    // R rows of the block, `step` apart, and T tokens: each of the rows is one of R long streams of memory. The row `next` rows further
    // in each is fetched meanwhile, for kept values are read at irregular distances, which the processor's own prefetchers do not follow,
    // and rows of bitmaps are shorter than a page.
    template <int T, int R>
    AVX512_INLINE void multiply(const Product& product, const Prepared& prepared, const Rows& rows, int64_t first, int64_t step, int64_t next) {
        const auto x = Values::inputs(prepared, rows);
        const uint16_t* scale = prepared.scale_in;
        const int64_t columns = prepared.columns, width = (columns + 7) / 8, stride = step * width, row = rows.first + first;
        const int64_t next_values = next * product.kept * int64_t(sizeof(Element)), next_bits = next * width;
        const int64_t line_values = product.kept * int64_t(sizeof(Element)) * kLineColumns / columns;  // bytes of them per kLineColumns
        const uint8_t* masks = kept ? product.mask + row * width : nullptr;
        const uint8_t* bits = signs ? product.signs + row * width : nullptr;
        const Element* end = kept ? static_cast<const Element*>(product.values) + product.rows * product.kept : nullptr;
        const Element* values[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) values[r] = kept ? static_cast<const Element*>(product.values) + (row + r * step) * product.kept : nullptr;
        const bool near_end = end - values[R - 1] < columns;
        const __m512i low_positions = _mm512_load_si512(kSignPositions.low), high_positions = _mm512_load_si512(kSignPositions.high);
        Sums<T, R, Values> kept_sums, sign_sums;
        Sums<T, R, Values>::clear(kept_sums);
        Sums<T, R, Values>::clear(sign_sums);

        int64_t column = 0;
        for (;;) {
            // As many steps as cannot read past the end of the tensor, whatever the mask says.
            int64_t steps = (columns - column) / kStep;
            if (kept && near_end)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) steps = (end - values[r]) / kStep < steps ? (end - values[r]) / kStep : steps;
            if (steps <= 0) break;
            if (steps > kLineColumns / kStep) steps = kLineColumns / kStep;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (kept) prefetch(masks + r * stride, next_bits);
                if (signs) prefetch(bits + r * stride, next_bits);
            }
            // More of them than the one line that is fetched at each step.
            if (kept && line_values > kLineColumns)
                for (int64_t line = 0; line < line_values; line += 64)
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) prefetch(values[r], next_values + line);
#pragma GCC unroll 1
            for (int64_t stop = column + steps * kStep; column < stop; column += kStep) {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    if (kept) {
                        prefetch(values[r], next_values);
                        typename Values::Unit low, high;
                        Values::expand_64(values[r], masks + r * stride, low, high);
                        Sums<T, R, Values>::add(kept_sums, r, low, x, column);
                        Sums<T, R, Values>::add(kept_sums, r, high, x, column + kUnit);
                    }
                    if constexpr (signs) {
                        const __m512i both = broadcast_8_bytes(bits + r * stride);
                        const __m512i low = _mm512_load_si512(scale + column), high = _mm512_load_si512(scale + column + kUnit);
                        Sums<T, R, Values>::add(sign_sums, r, with_signs(both, low_positions, low), x, column);
                        Sums<T, R, Values>::add(sign_sums, r, with_signs(both, high_positions, high), x, column + kUnit);
                    }
                }
                masks += kept ? kStep / 8 : 0;
                bits += signs ? kStep / 8 : 0;
            }
        }
        for (; column < columns; column += kUnit) {
            const int64_t left = width - column / 8;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (kept) {
                    uint32_t mask = load_bits(masks + r * stride, left, 0);
                    int64_t present = end - values[r] < kUnit ? end - values[r] : kUnit, used = _mm_popcnt_u32(mask);
                    Sums<T, R, Values>::add(kept_sums, r, Values::expand(Values::load_first(values[r], present), mask), x, column);
                    values[r] += used < present ? used : present;
                }
                if constexpr (signs) {
                    const __m512i word = _mm512_set1_epi64(load_bits(bits + r * stride, left, 0));
                    Sums<T, R, Values>::add(sign_sums, r, with_signs(word, low_positions, _mm512_load_si512(scale + column)), x, column);
                }
            }
            masks += kept ? kUnit / 8 : 0;
            bits += signs ? kUnit / 8 : 0;
        }
        if (signs)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512 scale_out = _mm512_set1_ps(from_bfloat16(static_cast<const uint16_t*>(product.scale_out)[row + r * step]));
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) kept_sums.of[r][t] = _mm512_fmadd_ps(scale_out, sign_sums.of[r][t], kept_sums.of[r][t]);
            }
        Sums<T, R, Values>::store(kept_sums, rows, first, step);
    }

    template <int T>
    struct Loop {
        static constexpr int kStreams = signs && T > 1 ? 2 : 4;

        AVX512 static void run(const Product& product, const Prepared& x, const Rows& rows) {
            const int64_t step = rows.count / kStreams;
            for (int64_t first = 0; first < step; ++first) {
                // After the last row of each stream come those of the next block.
                const int64_t next = first + 1 < step ? 1 : kBlockRows - first;
                multiply<T, kStreams>(product, x, rows, first, step, next);
            }
            for (int64_t first = step * kStreams; first < rows.count; ++first) multiply<T, 1>(product, x, rows, first, 1, 1);
        }
    };
};

}  // namespace

void avx512_kept(const Product& product, const Prepared& x, const Rows& rows) {
    if (x.multiplies_signs) {
        if (product.values) for_token_groups<Packed<BFloat16<1>, true, true>::template Loop>(rows, product, x);
        else for_token_groups<Packed<BFloat16<1>, false, true>::template Loop>(rows, product, x);
    } else if (product.values_dtype == kFloat32) {
        for_token_groups<Packed<Float32, true, false>::template Loop>(rows, product, x);
    } else if (product.values_dtype == kFloat16) {
        for_token_groups<Packed<Float16, true, false>::template Loop>(rows, product, x);
    } else if (x.piece_count == 1) {
        for_token_groups<Packed<BFloat16<1>, true, false>::template Loop>(rows, product, x);
    } else if (x.piece_count == 2) {
        for_token_groups<Packed<BFloat16<2>, true, false>::template Loop>(rows, product, x);
    } else {
        for_token_groups<Packed<BFloat16<3>, true, false>::template Loop>(rows, product, x);
    }
}

}  // namespace hf_lowrank

#endif
