// Quantized rows with AVX-512: converted to float32, and multiplied from their codes.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_values.h"

namespace hf_lowrank {
namespace {

// Positions by which 64 codes of b bits, which are 8 b bytes, reach a byte each. Eight codes make b bytes, which are
// moved into the same eight-byte word. The unaligned bytes of that word from bit 0, b, 2 b ... on begin with one code
// each.
struct CodePositions {
    alignas(64) uint8_t bytes[9][64], bits[9][64];
    constexpr CodePositions() : bytes(), bits() {
        for (int b = 2; b <= 8; ++b) {
            for (int i = 0; i < 64; ++i) {
                bytes[b][i] = static_cast<uint8_t>((i / 8 * b + i % 8) % 64);
                bits[b][i] = static_cast<uint8_t>(i % 8 * b);
            }
        }
    }
};
constexpr CodePositions kCodePositions;
// The codes of the row that lies this many rows ahead are fetched meanwhile: a row is too short for the processor's
// own prefetchers to help much.
constexpr int64_t kRowsAhead = 4;

AVX512 void dequantize_groups(const Product& product, int64_t row, float* out) {
    const int bits = product.code_bits;
    const int64_t width = (product.kept * bits + 7) / 8, groups = (product.kept + product.group - 1) / product.group;
    const uint8_t* codes = product.codes + row * width;
    const __m512i bytes = _mm512_load_si512(kCodePositions.bytes[bits]), positions = _mm512_load_si512(kCodePositions.bits[bits]);
    const __m512i code_mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    const __m512 center = _mm512_set1_ps(((1 << bits) - 1) / 2.0f);
    for (int64_t group = 0, first = 0; first < product.kept; ++group, first += product.group) {
        const __m512 scale = _mm512_set1_ps(load_as_float(product.code_scale, row * groups + group, DType(product.code_scale_dtype)));
        const int64_t last = product.kept - first < product.group ? product.kept : first + product.group;
        for (int64_t i = first; i < last; i += kCodeStep) {
            const int64_t byte = i / 8 * bits;
            _mm_prefetch(reinterpret_cast<const char*>(codes + byte + kRowsAhead * width), _MM_HINT_T0);
            __m512i packed = _mm512_maskz_loadu_epi8(first_of_64(width - byte), codes + byte);
            __m512i spread = _mm512_multishift_epi64_epi8(positions, _mm512_permutexvar_epi8(bytes, packed));
            __m512i each = _mm512_and_si512(spread, code_mask);
            const __m128i sixteens[4] = {_mm512_castsi512_si128(each), _mm512_extracti32x4_epi32(each, 1), _mm512_extracti32x4_epi32(each, 2),
                                         _mm512_extracti32x4_epi32(each, 3)};
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) {
                __m512 levels = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteens[part])), center);
                _mm512_storeu_ps(out + i + 16 * part, _mm512_mul_ps(levels, scale));
            }
        }
    }
}

// --- products of bfloat16 x with codes that fill whole units ------------------------------------------------------------------------

// A level q − (2ᵇ − 1)/2 has at most eight significant bits: it is a bfloat16, and vdpbf16ps multiplies it exactly.
constexpr uint16_t level(int code, int bits) {
    const int twice = 2 * code - ((1 << bits) - 1);
    const uint32_t magnitude = static_cast<uint32_t>(twice < 0 ? -twice : twice);
    int top = 0;
    while (magnitude >> (top + 1)) ++top;
    const uint32_t fraction = (magnitude << (7 - top)) & 0x7fu, exponent = static_cast<uint32_t>(top - 1 + 127);
    return static_cast<uint16_t>((twice < 0 ? 0x8000u : 0u) | exponent << 7 | fraction);
}

// Positions by which 32 codes, which are 4 b bytes, reach a word each: four codes go to an eight-byte word, from which
// they are shifted out. Codes of up to six bits then select among the levels, which are repeated to fill 64 places:
// the bits above the code's own select an equal level, and need not be cleared.
struct WordPositions {
    alignas(64) uint8_t bytes[9][64], bits[9][64];
    alignas(64) uint16_t levels[7][64];
    constexpr WordPositions() : bytes(), bits(), levels() {
        for (int b = 2; b <= 8; ++b) {
            for (int i = 0; i < 64; ++i) {
                const int start = 4 * (i / 8) * b;
                bytes[b][i] = static_cast<uint8_t>((start / 8 + i % 8) % 64);
                bits[b][i] = static_cast<uint8_t>(start % 8 + i % 8 / 2 * b);
                if (b <= 6) levels[b][i] = level(i % (1 << b), b);
            }
        }
    }
};
constexpr WordPositions kWordPositions;

template <bool selected>
struct Levels {
    __m512i bytes, bits, low, high, code_mask;
    __m512 center;

    AVX512_INLINE Levels of(int b) {
        const int table = b <= 6 ? b : 6;
        return {_mm512_load_si512(kWordPositions.bytes[b]),       _mm512_load_si512(kWordPositions.bits[b]),
                _mm512_load_si512(kWordPositions.levels[table]),  _mm512_load_si512(kWordPositions.levels[table] + 32),
                _mm512_set1_epi16(static_cast<short>((1 << b) - 1)), _mm512_set1_ps(((1 << b) - 1) / 2.0f)};
    }

    // Returns the next 32 levels in bfloat16. From `codes` on, `left` bytes of the row remain.
    AVX512_INLINE __m512i next(const Levels& levels, const uint8_t* codes, int64_t left) {
        __m512i packed = left >= 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(first_of_64(left), codes);
        __m512i words = _mm512_multishift_epi64_epi8(levels.bits, _mm512_permutexvar_epi8(levels.bytes, packed));
        if (selected) return _mm512_permutex2var_epi16(levels.low, words, levels.high);
        words = _mm512_and_si512(words, levels.code_mask);
        __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)));
        __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)));
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(second, levels.center), _mm512_sub_ps(first, levels.center));
    }
};

template <bool selected>
struct CodesFor {
    template <int T>
    struct Loop {
        AVX512 static void run(const Product& product, const Prepared& x, const Rows& rows) {
            const auto levels = Levels<selected>::of(product.code_bits);
            const int64_t kept = product.kept, width = (kept * product.code_bits + 7) / 8, unit_bytes = 4 * product.code_bits;
            const int64_t groups = (kept + product.group - 1) / product.group;
            const uint16_t* inputs = x.pieces + rows.first_token * x.padded;
            for (int64_t row = 0; row < rows.count; ++row) {
                const uint8_t* codes = product.codes + (rows.first + row) * width;
                int64_t left = width;
                __m512 sums[T];
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
                for (int64_t group = 0, column = 0; group < groups; ++group) {
                    const int64_t index = (rows.first + row) * groups + group;
                    const __m512 scale = _mm512_set1_ps(load_as_float(product.code_scale, index, DType(product.code_scale_dtype)));
                    const int64_t last = kept - column < product.group ? kept : column + product.group;
                    __m512 group_sums[T];
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) group_sums[t] = _mm512_setzero_ps();
                    for (; column < last; column += kUnit, codes += unit_bytes, left -= unit_bytes) {
                        _mm_prefetch(reinterpret_cast<const char*>(codes + kRowsAhead * width), _MM_HINT_T0);
                        __m512i values = Levels<selected>::next(levels, codes, left);
#pragma GCC unroll 4
                        for (int t = 0; t < T; ++t)
                            group_sums[t] = _mm512_dpbf16_ps(group_sums[t], (__m512bh)values,
                                                             (__m512bh)_mm512_load_si512(inputs + t * x.padded + column));
                    }
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) sums[t] = _mm512_fmadd_ps(group_sums[t], scale, sums[t]);
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + row] += _mm512_reduce_add_ps(sums[t]);
            }
        }
    };
};

}  // namespace

void avx512_dequantize(const Product& product, int64_t row, float* out) {
    // Groups that do not begin with a whole byte are left to the plain loop.
    if (product.group % 8 == 0 || product.group >= product.kept) dequantize_groups(product, row, out);
    else portable_kernels().dequantize(product, row, out);
}

// Multiplies rows of codes. Called where x is bfloat16, there is no bitmap, and groups are whole units.
void avx512_codes(const Product& product, const Prepared& x, const Rows& rows) {
    if (product.code_bits <= 6) for_token_groups<CodesFor<true>::Loop>(rows, product, x);
    else for_token_groups<CodesFor<false>::Loop>(rows, product, x);
}

}  // namespace hf_lowrank

#endif
