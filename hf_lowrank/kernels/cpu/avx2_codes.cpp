// Codes with AVX2: eight at a time become float32, and are multiplied with x or stored.
#include "dequantize.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx2.h"

namespace hf_lowrank {
namespace {

// Eight codes of b bits, which are b bytes. A load reads up to kLoadBytes from the first one on.
constexpr int64_t kLoadBytes = 8;
// What lies this much further on is fetched meanwhile.
constexpr int64_t kBytesAhead = 4096;

template <int b>
struct Eight {
    __m256i mask;
    __m256 center;

    AVX2_INLINE Eight make() { return {_mm256_set1_epi32((1 << b) - 1), _mm256_set1_ps(((1 << b) - 1) / 2.0f)}; }

    AVX2_INLINE __m256i codes(const Eight& eight, const uint8_t* at) {
        if (b == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
        if (b <= 4) {  // all fit 32 bits
            int32_t word;
            __builtin_memcpy(&word, at, 4);
            const __m256i shifts = _mm256_setr_epi32(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
            return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), eight.mask);
        }
        long long word;
        __builtin_memcpy(&word, at, 8);
        // The lower halves of 64 bits are put side by side, two of one register and two of the other.
        const __m256i all = _mm256_set1_epi64x(word);
        const __m256 first = _mm256_castsi256_ps(_mm256_srlv_epi64(all, _mm256_setr_epi64x(0, b, 4 * b, 5 * b)));
        const __m256 second = _mm256_castsi256_ps(_mm256_srlv_epi64(all, _mm256_setr_epi64x(2 * b, 3 * b, 6 * b, 7 * b)));
        return _mm256_and_si256(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), eight.mask);
    }

    AVX2_INLINE __m256 levels(const Eight& eight, const uint8_t* at) {
        return _mm256_sub_ps(_mm256_cvtepi32_ps(codes(eight, at)), eight.center);
    }
};

// Multiplies rows without a bitmap, whose groups are whole units.
template <int b>
struct CodesFor {
    // Adds the products of one unit of 32 codes, times their scale.
    template <int T>
    AVX2_INLINE void add_unit(__m256 (&sums)[T], const Eight<b>& eight, const uint8_t* codes, float scale, const float* x, int64_t stride) {
        __m256 unit[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) unit[t] = _mm256_setzero_ps();
#pragma GCC unroll 4
        for (int k = 0; k < kUnit / kLanes; ++k) {
            const __m256 levels = Eight<b>::levels(eight, codes + k * b);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) unit[t] = _mm256_fmadd_ps(levels, _mm256_loadu_ps(x + t * stride + k * kLanes), unit[t]);
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sums[t] = _mm256_fmadd_ps(unit[t], _mm256_set1_ps(scale), sums[t]);
    }

    template <int T>
    struct Loop {
        AVX2 static void run(const Product& product, const Prepared& prepared, const Rows& rows) {
            const auto eight = Eight<b>::make();
            const int64_t kept = product.kept, width = (kept * b + 7) / 8, groups = (kept + product.group - 1) / product.group;
            const float* x = prepared.values + rows.first_token * prepared.padded;
            for (int64_t row = 0; row < rows.count; ++row) {
                const uint8_t *codes = product.codes + (rows.first + row) * width, *end = codes + width;
                __m256 sums[T];
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
                for (int64_t group = 0, column = 0; group < groups; ++group) {
                    const float scale = load_as_float(product.code_scale, (rows.first + row) * groups + group, DType(product.code_scale_dtype));
                    const int64_t last = kept - column < product.group ? kept : column + product.group;
                    for (; column < last; column += kUnit, codes += kUnit / 8 * b) {
                        _mm_prefetch(reinterpret_cast<const char*>(codes + kBytesAhead), _MM_HINT_T0);
                        if (__builtin_expect(end - codes >= kUnit / 8 * b + kLoadBytes, 1)) {
                            add_unit<T>(sums, eight, codes, scale, x + column, prepared.padded);
                            continue;
                        }
                        // Near the end a load could read beyond it. Codes that do not exist meet zeros of x.
                        uint8_t copy[kUnit / 8 * b + kLoadBytes] = {};
                        __builtin_memcpy(copy, codes, static_cast<unsigned long>(end - codes < kUnit / 8 * b ? end - codes : kUnit / 8 * b));
                        add_unit<T>(sums, eight, copy, scale, x + column, prepared.padded);
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + row] += sum_of_lanes(sums[t]);
            }
        }
    };

    static void multiply(const Product& product, const Prepared& x, const Rows& rows) { for_token_groups<Loop>(rows, product, x); }

    // Converts a row whose groups are whole bytes of codes; up to seven values more are written.
    AVX2 static void dequantize(const Product& product, int64_t row, float* out) {
        const auto eight = Eight<b>::make();
        const int64_t kept = product.kept, width = (kept * b + 7) / 8, groups = (kept + product.group - 1) / product.group;
        const uint8_t *codes = product.codes + row * width, *end = codes + width;
        for (int64_t group = 0, i = 0; group < groups; ++group) {
            const __m256 scale = _mm256_set1_ps(load_as_float(product.code_scale, row * groups + group, DType(product.code_scale_dtype)));
            const int64_t last = kept - i < product.group ? kept : i + product.group;
            for (; i < last; i += kLanes, codes += b) {
                uint8_t copy[kLoadBytes] = {};
                const bool whole = end - codes >= kLoadBytes;
                if (!whole) __builtin_memcpy(copy, codes, static_cast<unsigned long>(end - codes));
                _mm256_storeu_ps(out + i, _mm256_mul_ps(Eight<b>::levels(eight, whole ? codes : copy), scale));
            }
        }
    }
};

// The loops of 2 to 8 bits.
using Multiply = void (*)(const Product&, const Prepared&, const Rows&);
using Dequantize = void (*)(const Product&, int64_t, float*);
constexpr Multiply kMultiply[] = {CodesFor<2>::multiply, CodesFor<3>::multiply, CodesFor<4>::multiply, CodesFor<5>::multiply,
                                  CodesFor<6>::multiply, CodesFor<7>::multiply, CodesFor<8>::multiply};
constexpr Dequantize kDequantize[] = {CodesFor<2>::dequantize, CodesFor<3>::dequantize, CodesFor<4>::dequantize, CodesFor<5>::dequantize,
                                      CodesFor<6>::dequantize, CodesFor<7>::dequantize, CodesFor<8>::dequantize};

}  // namespace

void avx2_codes(const Product& product, const Prepared& x, const Rows& rows) { kMultiply[product.code_bits - 2](product, x, rows); }

void avx2_dequantize(const Product& product, int64_t row, float* out) {
    // Groups that do not begin with a whole byte are left to the plain loop.
    if (product.group % kLanes == 0 || product.group >= product.kept) kDequantize[product.code_bits - 2](product, row, out);
    else dequantize_row(product, row, out);
}

}  // namespace hf_lowrank

#endif
