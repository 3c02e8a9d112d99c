// Codes converted to float32 or rounded to bfloat16, with AVX-512.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_levels.h"

namespace hf_lowrank {
namespace {

// The codes of the row that lies this many rows ahead are fetched meanwhile: a row is too short for the processor's
// own prefetchers to help much.
constexpr int64_t kRowsAhead = 8;

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

template <LevelKind kind>
struct RoundedRow {
    AVX512 static void run(const Product& product, int64_t row, uint16_t* out) {
        RoundedCodes<kind>::write(RoundedCodes<kind>::of(product), product, row, 0, product.kept, kRowsAhead, out);
    }
};

}  // namespace

void avx512_dequantize(const Product& product, int64_t row, float* out) {
    // Groups that do not begin with a whole byte are left to the plain loop.
    if (product.group % 8 == 0 || product.group >= product.kept) dequantize_groups(product, row, out);
    else portable_kernels().dequantize(product, row, out);
}

// Writes the values of a row, rounded to bfloat16. Groups are whole units.
void avx512_round(const Product& product, int64_t row, uint16_t* out) {
    if (product.kept) for_level_kind<RoundedRow>(product.code_bits, product, row, out);
}

}  // namespace hf_lowrank

#endif
