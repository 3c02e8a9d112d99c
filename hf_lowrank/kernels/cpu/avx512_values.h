// Steps for 32 values of a row in AVX-512 registers: loading, spreading by a mask word, widening, multiplying with 32
// columns of x.
#pragma once

#include "product.h"

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,popcnt,bmi2,f16c,fma")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline

namespace hf_lowrank {
namespace {

AVX512_INLINE __mmask64 first_of_64(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1ull; }
AVX512_INLINE __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1u; }

// --- 32 values of a row and their product with 32 columns of x ---------------------------------------------------------------

// Keeps a value in a register: expand instructions with a memory operand take a micro-operation per element on AMD.
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))

// vpexpandw waits for the old value of its destination although it zeroes it; a cleared register is never waited for.
AVX512_INLINE __m512i expand_words(__m512i values, __mmask32 mask) {
    __m512i out;
    __asm__("vpxord %x0, %x0, %x0\n\tvpexpandw %1, %0%{%2%}%{z%}" : "=&v"(out) : "v"(values), "Yk"(mask));
    return out;
}

// Loads eight bytes of a bitmap into a mask register, straight from memory: by way of a general register they would
// take the port that expands.
AVX512_INLINE __mmask64 load_mask(const uint8_t* bits) {
    __mmask64 mask;
    __asm__("kmovq %1, %0" : "=Yk"(mask) : "m"(*reinterpret_cast<const uint8_t(*)[8]>(bits)));
    return mask;
}

// Counts how many of the first 32 and of all 64 bits are set. They are read once, as the loops wait for loads more
// than for anything else.
struct BitCounts {
    int64_t first_half, all;
};
AVX512_INLINE BitCounts count_bits(const uint8_t* bits) {
    BitCounts counts;
    __asm__("movq %2, %1\n\tpopcntl %k1, %k0\n\tpopcntq %1, %1"
            : "=r"(counts.first_half), "=r"(counts.all)
            : "m"(*reinterpret_cast<const uint8_t(*)[8]>(bits)));
    return counts;
}

AVX512_INLINE int64_t count_bits_64(const uint8_t* bits) {
    int64_t count;
    __asm__("popcntq %1, %0" : "=r"(count) : "m"(*reinterpret_cast<const uint8_t(*)[8]>(bits)));
    return count;
}

struct Bits16 {
    using Element = uint16_t;
    using Unit = __m512i;
    AVX512_INLINE Unit load(const Element* values) { return _mm512_loadu_si512(values); }
    AVX512_INLINE Unit load_first(const Element* values, int64_t count) {
        return _mm512_maskz_loadu_epi16(first_of_32(count), values);
    }
    AVX512_INLINE Unit expand(Unit values, uint32_t mask) { return expand_words(values, mask); }
    // Spreads the next values of a row over 64 columns. The upper mask is shifted down, which takes no port of the
    // expansion.
    AVX512_INLINE void expand_64(const Element*& values, const uint8_t* mask, Unit& low, Unit& high) {
        const __mmask64 bits = load_mask(mask);
        const BitCounts counts = count_bits(mask);
        low = expand_words(load(values), static_cast<__mmask32>(bits));
        high = expand_words(load(values + counts.first_half), static_cast<__mmask32>(_kshiftri_mask64(bits, 32)));
        values += counts.all;
    }
};

// Values in bfloat16, multiplied by each of the pieces whose sum is x.
template <int Pieces>
struct BFloat16 : Bits16 {
    AVX512_INLINE void widen(const Unit& unit, __m512& low, __m512& high) {
        low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(unit)), 16));
        high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(unit, 1)), 16));
    }
    struct Inputs {
        const uint16_t* at;
        int64_t token_stride, piece_stride;
    };
    AVX512_INLINE Inputs inputs(const Prepared& x, const Rows& rows) {
        return {x.pieces + rows.first_token * x.padded, x.padded, x.tokens * x.padded};
    }
    AVX512_INLINE void multiply_add(__m512& sum, const Unit& unit, const Inputs& x, int64_t token, int64_t column) {
#pragma GCC unroll 4
        for (int piece = 0; piece < Pieces; ++piece) {
            const uint16_t* at = x.at + token * x.token_stride + piece * x.piece_stride + column;
            sum = _mm512_dpbf16_ps(sum, (__m512bh)unit, (__m512bh)_mm512_loadu_si512(at));
        }
    }
};

struct FloatInputs {
    struct Inputs {
        const float* at;
        int64_t token_stride;
    };
    AVX512_INLINE Inputs inputs(const Prepared& x, const Rows& rows) {
        return {x.values + rows.first_token * x.padded, x.padded};
    }
};

struct Float16 : Bits16, FloatInputs {
    AVX512_INLINE void widen(const Unit& unit, __m512& low, __m512& high) {
        low = _mm512_cvtph_ps(_mm512_castsi512_si256(unit));
        high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(unit, 1));
    }
    AVX512_INLINE void multiply_add(__m512& sum, const Unit& unit, const Inputs& x, int64_t token, int64_t column) {
        const float* at = x.at + token * x.token_stride + column;
        __m512 low, high;
        widen(unit, low, high);
        sum = _mm512_fmadd_ps(low, _mm512_loadu_ps(at), sum);
        sum = _mm512_fmadd_ps(high, _mm512_loadu_ps(at + 16), sum);
    }
};

struct Float32 : FloatInputs {
    using Element = float;
    struct Unit {
        __m512 low, high;
    };
    AVX512_INLINE void widen(const Unit& unit, __m512& low, __m512& high) {
        low = unit.low;
        high = unit.high;
    }
    AVX512_INLINE Unit load(const Element* values) { return {_mm512_loadu_ps(values), _mm512_loadu_ps(values + 16)}; }
    AVX512_INLINE Unit load_first(const Element* values, int64_t count) {
        uint32_t present = first_of_32(count);
        return {_mm512_maskz_loadu_ps(present & 0xffff, values), _mm512_maskz_loadu_ps(present >> 16, values + 16)};
    }
    AVX512_INLINE Unit expand(Unit values, uint32_t mask) {
        // The upper 16 columns take the values that the lower 16 left over: move them to the front first.
        __m512i index = _mm512_add_epi32(_mm512_set1_epi32(_mm_popcnt_u32(mask & 0xffff)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        __m512 rest = _mm512_permutex2var_ps(values.low, index, values.high);
        IN_REGISTER(values.low);
        return {_mm512_maskz_expand_ps(mask & 0xffff, values.low), _mm512_maskz_expand_ps(mask >> 16, rest)};
    }
    AVX512_INLINE void expand_64(const Element*& values, const uint8_t* mask, Unit& low, Unit& high) {
        const BitCounts counts = count_bits(mask);
        low = expand(load(values), load_bits(mask, 8, 0));
        high = expand(load(values + counts.first_half), load_bits(mask, 8, 4));
        values += counts.all;
    }
    AVX512_INLINE void multiply_add(__m512& sum, const Unit& unit, const Inputs& x, int64_t token, int64_t column) {
        const float* at = x.at + token * x.token_stride + column;
        sum = _mm512_fmadd_ps(unit.low, _mm512_loadu_ps(at), sum);
        sum = _mm512_fmadd_ps(unit.high, _mm512_loadu_ps(at + 16), sum);
    }
};

// --- signs -----------------------------------------------------------------------------------------------------------------------

// Positions that bring, for word j of 32, the bits of an eight-byte word that end with bit j (low) or 32 + j (high)
// into the word's upper byte.
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

// Returns ± scale, which is negative where the bit is clear.
AVX512_INLINE __m512i with_signs(__m512i bits, __m512i positions, __m512i scale) {
    __m512i moved = _mm512_multishift_epi64_epi8(positions, bits);
    return _mm512_ternarylogic_epi32(moved, scale, _mm512_set1_epi32(static_cast<int>(0x80008000u)), 0xc6);  // scale ^ (~moved & 0x8000)
}

AVX512_INLINE __m512i broadcast_8_bytes(const uint8_t* bytes) {
    long long word;
    __builtin_memcpy(&word, bytes, 8);
    return _mm512_set1_epi64(word);
}

// --- memory that will be read soon -----------------------------------------------------------------------------------------------

// This is assembly, so that the sum of both takes no register.
AVX512_INLINE void prefetch(const void* from, int64_t bytes_ahead) {
    __asm__ volatile("prefetcht0 (%0,%1)" : : "r"(from), "r"(bytes_ahead));
}

// --- sums of several rows and tokens ---------------------------------------------------------------------------------------------

// Returns the sums of four registers, side by side.
AVX512_INLINE __m128 sums_of_four(const __m512& a, const __m512& b, const __m512& c, const __m512& d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Adds the sums of `count` rows to those of a block from row `first` on.
AVX512_INLINE void store_sums(const __m512 (*of)[kBlockTokens], int64_t count, int64_t first, const Rows& rows) {
    for (int64_t t = 0; t < rows.token_count; ++t) {
        float* out = rows.sums + t * kBlockRows + first;
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const __m128 sums = sums_of_four(of[i][t], of[i + 1][t], of[i + 2][t], of[i + 3][t]);
            _mm_storeu_ps(out + i, _mm_add_ps(_mm_loadu_ps(out + i), sums));
        }
        for (; i < count; ++i) out[i] += _mm512_reduce_add_ps(of[i][t]);
    }
}

// Rows multiplied together: each part of x is loaded once for all of them, and their sums hide the multiply-add's
// latency.
template <int T, int R, class Values>
struct Sums {
    __m512 of[R][T];

    AVX512_INLINE void clear(Sums& sums) {
#pragma GCC unroll 4
        for (auto& row : sums.of)
#pragma GCC unroll 4
            for (auto& sum : row) sum = _mm512_setzero_ps();
    }

    AVX512_INLINE void add(Sums& sums, int row, const typename Values::Unit& unit, const typename Values::Inputs& x, int64_t column) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) Values::multiply_add(sums.of[row][t], unit, x, t, column);
    }

    // Stores to rows `first`, `first` + `step`, ... of the block.
    AVX512_INLINE void store(const Sums& sums, const Rows& rows, int64_t first, int64_t step) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + first + r * step] += _mm512_reduce_add_ps(sums.of[r][t]);
    }
};

}  // namespace
}  // namespace hf_lowrank
