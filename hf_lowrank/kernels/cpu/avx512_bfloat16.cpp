// Kept values and signs in one pass over the columns, where x, the values and the one scale_in are bfloat16 (AVX-512 VBMI2, BF16).
//
// vdpbf16ps multiplies the spread values with x, and ± scale_in with x; both are exact products, added in float32. The sign bits
// reach the sign positions of 32 lanes by vpmultishiftqb, which leaves the ports to vpexpandw that mask registers would take.
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
AVX512_INLINE __m512i with_signs(uint64_t bits, __m512i positions, __m512i scale) {
    __m512i moved = _mm512_multishift_epi64_epi8(positions, _mm512_set1_epi64(static_cast<long long>(bits)));
    return _mm512_ternarylogic_epi32(moved, scale, _mm512_set1_epi32(static_cast<int>(0x80008000u)), 0xc6);  // scale ^ (~moved & 0x8000)
}

AVX512_INLINE void multiply_add(__m512& sum, __m512i values, __m512i x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)values, (__m512bh)x);
}

template <bool values_too>
struct Pass {
    // Rows [first, first + R) of the block and T tokens.
    template <int T, int R>
    AVX512_INLINE void multiply(const Product& product, const Prepared& prepared, const Rows& rows, int64_t first) {
        constexpr int kChains = T * R <= 4 ? 2 : 1;  // sums enough to hide the multiply-add's latency
        const int64_t columns = prepared.columns, padded = prepared.padded, width = (columns + 7) / 8, kept = product.kept;
        const uint16_t* x = prepared.pieces + rows.first_token * padded;
        const uint16_t* scale = prepared.scale_in;
        const uint8_t* masks = product.mask + (rows.first + first) * width;
        const uint8_t* signs = product.signs + (rows.first + first) * width;
        const uint16_t* end = static_cast<const uint16_t*>(product.values) + product.rows * kept;
        const uint16_t* values[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) values[r] = static_cast<const uint16_t*>(product.values) + (rows.first + first + r) * kept;
        NextValues next = NextValues::of(values[0] + R * kept, R * kept * 2, columns);
        const __m512i low = _mm512_load_si512(kSignPositions.low), high = _mm512_load_si512(kSignPositions.high);
        __m512 kept_sums[R][T][kChains], sign_sums[R][T][kChains];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
                for (int chain = 0; chain < kChains; ++chain) kept_sums[r][t][chain] = sign_sums[r][t][chain] = _mm512_setzero_ps();

        int64_t column = 0;
        for (;;) {
            // As many steps as cannot read past the end of the tensor, whatever the mask says.
            int64_t steps = (columns - column) / kStep;
            if (values_too)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) steps = (end - values[r]) / kStep < steps ? (end - values[r]) / kStep : steps;
            if (steps <= 0) break;
            if (steps > kLineColumns / kStep) steps = kLineColumns / kStep;
            if (values_too) NextValues::fetch(next);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (values_too) _mm_prefetch(reinterpret_cast<const char*>(masks + (R + r) * width), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(signs + (R + r) * width), _MM_HINT_T0);
            }
#pragma GCC unroll 1
            for (int64_t stop = column + steps * kStep; column < stop; column += kStep, masks += kStep / 8, signs += kStep / 8) {
                __m512i scale_low = _mm512_load_si512(scale + column), scale_high = _mm512_load_si512(scale + column + 32);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    __m512i kept_low, kept_high;
                    if (values_too) {
                        const uint8_t* mask = masks + r * width;
                        uint64_t bits;
                        __builtin_memcpy(&bits, mask, 8);
                        if (!next.lines) _mm_prefetch(reinterpret_cast<const char*>(values[r] + R * kept), _MM_HINT_T0);
                        kept_low = expand_words(_mm512_loadu_si512(values[r]), load_mask(mask));
                        kept_high = expand_words(_mm512_loadu_si512(values[r] + _mm_popcnt_u32(static_cast<uint32_t>(bits))), load_mask(mask + 4));
                        values[r] += _mm_popcnt_u64(bits);
                    }
                    uint64_t sign_bits;
                    __builtin_memcpy(&sign_bits, signs + r * width, 8);
                    __m512i signed_low = with_signs(sign_bits, low, scale_low), signed_high = with_signs(sign_bits, high, scale_high);
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) {
                        __m512i x_low = _mm512_load_si512(x + t * padded + column), x_high = _mm512_load_si512(x + t * padded + column + 32);
                        if (values_too) {
                            multiply_add(kept_sums[r][t][0], kept_low, x_low);
                            multiply_add(kept_sums[r][t][kChains - 1], kept_high, x_high);
                        }
                        multiply_add(sign_sums[r][t][0], signed_low, x_low);
                        multiply_add(sign_sums[r][t][kChains - 1], signed_high, x_high);
                    }
                }
            }
        }
        for (; column < columns; column += kUnit, masks += kUnit / 8, signs += kUnit / 8) {
            const int64_t left = width - column / 8;
            __m512i scale_here = _mm512_load_si512(scale + column);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                __m512i kept_here = _mm512_setzero_si512();
                if (values_too) {
                    uint32_t bits = load_bits(masks + r * width, left, 0);
                    int64_t present = end - values[r] < kUnit ? end - values[r] : kUnit, used = _mm_popcnt_u32(bits);
                    kept_here = expand_words(_mm512_maskz_loadu_epi16(first_of_32(present), values[r]), bits);
                    values[r] += used < present ? used : present;
                }
                __m512i signed_here = with_signs(load_bits(signs + r * width, left, 0), low, scale_here);
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    __m512i x_here = _mm512_load_si512(x + t * padded + column);
                    if (values_too) multiply_add(kept_sums[r][t][0], kept_here, x_here);
                    multiply_add(sign_sums[r][t][0], signed_here, x_here);
                }
            }
        }

#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            float scale_out = from_bfloat16(static_cast<const uint16_t*>(product.scale_out)[rows.first + first + r]);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int chain = 1; chain < kChains; ++chain) {
                    kept_sums[r][t][0] = _mm512_add_ps(kept_sums[r][t][0], kept_sums[r][t][chain]);
                    sign_sums[r][t][0] = _mm512_add_ps(sign_sums[r][t][0], sign_sums[r][t][chain]);
                }
                __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(scale_out), sign_sums[r][t][0], kept_sums[r][t][0]);
                rows.sums[t * kBlockRows + first + r] += _mm512_reduce_add_ps(sum);
            }
        }
    }

    template <int T>
    struct Loop {
        static constexpr int kGroupRows = T == 1 ? 4 : 2;

        AVX512 static void run(const Product& product, const Prepared& x, const Rows& rows) {
            int64_t first = 0;
            for (; first + kGroupRows <= rows.count; first += kGroupRows) multiply<T, kGroupRows>(product, x, rows, first);
            for (; first < rows.count; ++first) multiply<T, 1>(product, x, rows, first);
        }
    };
};

}  // namespace

void avx512_bfloat16_rows(const Product& product, const Prepared& x, const Rows& rows) {
    if (product.values) for_token_groups<Pass<true>::Loop>(rows, product, x);
    else for_token_groups<Pass<false>::Loop>(rows, product, x);
}

}  // namespace hf_lowrank

#endif
