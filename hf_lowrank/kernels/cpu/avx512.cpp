// AVX-512 (VBMI2 and BF16) loops.
//
// avx512_packed.cpp has kept values, and signs where everything is bfloat16. This file has dense matrices, and signs
// as lookups in tables.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_values.h"

namespace hf_lowrank {

// avx512_packed.cpp
void avx512_kept(const Product& product, const Prepared& x, const Rows& rows);
// avx512_tiles.cpp
void avx512_tiles(const Product& product, const Prepared& x, const Rows& rows);
// avx512_codes.cpp
void avx512_codes(const Product& product, const Prepared& x, const Rows& rows);
void avx512_arrange(int32_t code_bits, int64_t padded, uint16_t* x);
// avx512_dequantize.cpp
void avx512_dequantize(const Product& product, int64_t row, float* out);
void avx512_round(const Product& product, int64_t row, uint16_t* out);
// avx512_unpack.cpp
void avx512_unpack(const Product& product, const float* scale_in, int64_t padded, int64_t row, void* out);

namespace {

constexpr int64_t kGroupRows = 4;
// With more tokens than this it is faster to spread kept values once for all of them.
constexpr int64_t kSpreadTokens = 16;
// In bytes. In rows of kLongRow or more the processor's own prefetchers do better. In shorter ones the loop fetches
// what lies kBytesAhead.
constexpr int64_t kLongRow = 8192, kBytesAhead = 2048;

// --- dense -----------------------------------------------------------------------------------------------------------------

template <class Values>
struct DenseFor {
    using Element = typename Values::Element;

    // Multiplies R rows of the block, `step` apart, so that each is one of R long streams of memory. With `fetch`,
    // what comes next in each of them is fetched meanwhile.
    template <int T, int R, bool fetch>
    AVX512_INLINE void multiply(const void* matrix, const Prepared& prepared, const Rows& rows, int64_t first, int64_t step) {
        const auto x = Values::inputs(prepared, rows);
        const int64_t columns = prepared.columns, stride = step * columns;
        const Element* values = static_cast<const Element*>(matrix) + (rows.first + first) * columns;
        // Each stream is followed by that of the next block.
        const int64_t next = first + 1 < step ? kBytesAhead : (kBlockRows - step + 1) * columns * int64_t(sizeof(Element));
        Sums<T, R, Values> sums;
        Sums<T, R, Values>::clear(sums);
        int64_t column = 0;
        for (; column + kUnit <= columns; column += kUnit)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (fetch) prefetch(values + r * stride + column, next);
                Sums<T, R, Values>::add(sums, r, Values::load(values + r * stride + column), x, column);
            }
        if (column < columns)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                Sums<T, R, Values>::add(sums, r, Values::load_first(values + r * stride + column, columns - column), x, column);
        Sums<T, R, Values>::store(sums, rows, first, step);
    }

    template <int T>
    struct Loop {
        AVX512 static void run(const void* matrix, const Prepared& x, int64_t step, int64_t first, const Rows& rows) {
            if (first >= step) multiply<T, 1, false>(matrix, x, rows, first, 1);
            else if (x.columns * int64_t(sizeof(Element)) < kLongRow) multiply<T, kGroupRows, true>(matrix, x, rows, first, step);
            else multiply<T, kGroupRows, false>(matrix, x, rows, first, step);
        }
    };

    static void run(const void* matrix, const Prepared& x, const Rows& rows) {
        const int64_t step = rows.count / kGroupRows;
        for (int64_t first = 0; first < step; ++first) for_token_groups<Loop>(rows, matrix, x, step, first);
        for (int64_t first = step * kGroupRows; first < rows.count; ++first) for_token_groups<Loop>(rows, matrix, x, step, first);
    }
};

void dense_rows(const void* matrix, DType dtype, const Prepared& x, const Rows& rows) {
    switch (dtype) {
        case kFloat32: DenseFor<Float32>::run(matrix, x, rows); break;
        case kFloat16: DenseFor<Float16>::run(matrix, x, rows); break;
        default:
            if (x.piece_count == 1) DenseFor<BFloat16<1>>::run(matrix, x, rows);
            else if (x.piece_count == 2) DenseFor<BFloat16<2>>::run(matrix, x, rows);
            else DenseFor<BFloat16<3>>::run(matrix, x, rows);
    }
}

// --- binary ----------------------------------------------------------------------------------------------------------------

// Transposes 16 words of 32 sign bits of 16 rows: out[word] holds that word of each row.
AVX512_INLINE void transpose_words(__m512i (&rows)[16], __m512i* out, int64_t stride) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        half[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        half[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        half[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        half[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        out[i * stride] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        out[(i + 4) * stride] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0x88);
        out[(i + 8) * stride] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
        out[(i + 12) * stride] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0xdd);
    }
}

// Lanes are rows. Four sign bits of a row select one of the 16 sums ± s₀ ± s₁ ± s₂ ± s₃ of the scaled inputs, which
// stand in one register (vpermps looks at the low four bits of an index only): no multiplication, no horizontal sum,
// float32 throughout.
template <int T>
struct BinaryLoop {
    static constexpr int kParts = kBlockRows / 16;

    AVX512 static void run(const Product& product, const Prepared& x, const Rows& rows) {
        int64_t width = (x.columns + 7) / 8;
        int64_t table_size = x.padded / kTableColumns * kTableEntries;
        __m512i words[16][kParts];
        for (int64_t term = 0; term < product.binary_rank; ++term) {
            const float* tables = x.tables + (term * x.tokens + rows.first_token) * table_size;
            __m512 sums[T][kParts];
#pragma GCC unroll 4
            for (auto& token : sums)
#pragma GCC unroll 4
                for (auto& sum : token) sum = _mm512_setzero_ps();
            for (int64_t byte = 0; byte < width; byte += 64) {
                __mmask64 present = first_of_64(width - byte);
#pragma GCC unroll 4
                for (int part = 0; part < kParts; ++part) {
                    __m512i bits[16];
                    for (int i = 0; i < 16; ++i) {
                        int64_t row = part * 16 + i;
                        const uint8_t* at = product.signs + (rows.first + row) * width + byte;
                        _mm_prefetch(reinterpret_cast<const char*>(at + kBlockRows * width), _MM_HINT_T0);  // the next block's
                        bits[i] = row < rows.count ? _mm512_maskz_loadu_epi8(present, at) : _mm512_setzero_si512();
                    }
                    transpose_words(bits, &words[0][part], kParts);
                }
                int64_t word_count = (width - byte + 3) / 4 < 16 ? (width - byte + 3) / 4 : 16;
                for (int64_t word = 0; word < word_count; ++word) {
                    __m512i index[kParts];
#pragma GCC unroll 4
                    for (int part = 0; part < kParts; ++part) index[part] = words[word][part];
                    const float* table = tables + (byte / 4 + word) * (kUnit / kTableColumns) * kTableEntries;
#pragma GCC unroll 8
                    for (int group = 0; group < kUnit / kTableColumns; ++group) {
#pragma GCC unroll 4
                        for (int t = 0; t < T; ++t) {
                            __m512 entries = _mm512_load_ps(table + t * table_size + group * kTableEntries);
#pragma GCC unroll 4
                            for (int part = 0; part < kParts; ++part)
                                sums[t][part] = _mm512_add_ps(sums[t][part], _mm512_permutexvar_ps(index[part], entries));
                        }
#pragma GCC unroll 4
                        for (int part = 0; part < kParts; ++part) index[part] = _mm512_srli_epi32(index[part], kTableColumns);
                    }
                }
            }
            alignas(64) float scale[kBlockRows] = {};
            for (int64_t i = 0; i < rows.count; ++i)
                scale[i] = load_as_float(product.scale_out, (rows.first + i) * product.binary_rank + term, DType(product.scale_dtype));
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int part = 0; part < kParts; ++part) {
                    float* at = rows.sums + t * kBlockRows + 16 * part;
                    __m512 scaled = _mm512_mul_ps(sums[t][part], _mm512_load_ps(scale + 16 * part));
                    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), scaled));
                }
            }
        }
    }
};

void packed_rows(const Product& product, const Prepared& x, const Rows& rows) {
    if (x.multiplies_signs && x.tokens > kExactTokens) return avx512_tiles(product, x, rows);
    const bool bfloat16 = product.values && product.values_dtype == kBFloat16 && x.piece_count == 1;
    if (bfloat16 && !product.signs && x.tokens > kSpreadTokens) return avx512_tiles(product, x, rows);
    if (product.signs && !x.multiplies_signs) for_token_groups<BinaryLoop>(rows, product, x);
    if (product.values) avx512_kept(product, x, rows);
}

void codes_rows(const Product& product, const Prepared& x, const Rows& rows) {
    if (x.rounds_codes) avx512_tiles(product, x, rows);
    else avx512_codes(product, x, rows);
}

AVX512 void fill_tables(const float* scaled, int64_t padded, float* out) {
    // An entry adds column j where bit j of its index is set, and subtracts it where the bit is clear.
    const __m512 ones = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
    const __m512 signs[4] = {_mm512_mask_blend_ps(0xaaaa, minus, ones), _mm512_mask_blend_ps(0xcccc, minus, ones),
                             _mm512_mask_blend_ps(0xf0f0, minus, ones), _mm512_mask_blend_ps(0xff00, minus, ones)};
    for (int64_t column = 0; column < padded; column += kTableColumns, out += kTableEntries) {
        __m512 sum = _mm512_mul_ps(signs[0], _mm512_set1_ps(scaled[column]));
        for (int j = 1; j < 4; ++j) sum = _mm512_fmadd_ps(signs[j], _mm512_set1_ps(scaled[column + j]), sum);
        _mm512_store_ps(out, sum);
    }
}

}  // namespace

const Kernels& avx512_kernels() {
    static const Kernels kernels = {packed_rows, dense_rows,     fill_tables,  avx512_dequantize,
                                    codes_rows,  avx512_arrange, avx512_round, avx512_unpack,     true};
    return kernels;
}

}  // namespace hf_lowrank

#endif
