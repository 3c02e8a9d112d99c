// AVX-512 (VBMI2 and BF16) loops.
//
// Kept values: a mask word spreads the next values of the row over 32 columns (vpexpandw, register form), which are then
// multiplied as in a dense product. Signs: see binary_rows.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,popcnt,bmi2,f16c,fma")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) static inline

namespace hf_lowrank {
namespace {

AVX512_INLINE __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1u; }

AVX512_INLINE __mmask64 first_of_64(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1ull; }

// --- 32 values of a row and their product with 32 columns of x ---------------------------------------------------------------

// Keeps a value in a register: expand instructions with a memory operand take a micro-operation per element on AMD.
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))

// vpexpandw waits for the old value of its destination although it zeroes it; a cleared register is never waited for.
AVX512_INLINE __m512i expand_words(__m512i values, uint32_t mask) {
    __m512i out = _mm512_setzero_si512();
    __asm__("vpexpandw %1, %0%{%2%}%{z%}" : "+v"(out) : "v"(values), "Yk"(mask));
    return out;
}

struct Bits16 {
    using Element = uint16_t;
    using Unit = __m512i;
    AVX512_INLINE Unit load(const Element* values) { return _mm512_loadu_si512(values); }
    AVX512_INLINE Unit load_first(const Element* values, int64_t count) {
        return _mm512_maskz_loadu_epi16(first_of_32(count), values);
    }
    AVX512_INLINE Unit expand(Unit values, uint32_t mask) { return expand_words(values, mask); }
};

// bfloat16, multiplied by each of the pieces whose sum is x.
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
    AVX512_INLINE void multiply_add(__m512& sum, const Unit& unit, const Inputs& x, int64_t token, int64_t column) {
        const float* at = x.at + token * x.token_stride + column;
        sum = _mm512_fmadd_ps(unit.low, _mm512_loadu_ps(at), sum);
        sum = _mm512_fmadd_ps(unit.high, _mm512_loadu_ps(at + 16), sum);
    }
};

// --- sums of several rows and tokens ---------------------------------------------------------------------------------------

// Rows multiplied together: each part of x is loaded once for all of them, and their sums hide the multiply-add's latency.
constexpr int64_t kGroupRows = 4;

template <int T, int R, class Values>
struct Sums {
    __m512 of[R][T];

    AVX512_INLINE void clear(Sums& sums) {
        for (auto& row : sums.of)
            for (auto& sum : row) sum = _mm512_setzero_ps();
    }

    AVX512_INLINE void add(Sums& sums, int row, const typename Values::Unit& unit, const typename Values::Inputs& x, int64_t column) {
        for (int t = 0; t < T; ++t) Values::multiply_add(sums.of[row][t], unit, x, t, column);
    }

    AVX512_INLINE void store(const Sums& sums, const Rows& rows, int64_t first) {
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + first + r] += _mm512_reduce_add_ps(sums.of[r][t]);
    }
};

// --- sparse ----------------------------------------------------------------------------------------------------------------

// Memory that will be read soon, fetched a little at every step: kept values are read at irregular distances, which the
// processor's own prefetchers do not follow.
struct Ahead {
    const char* at;
    int64_t stride;

    // `bytes` from `start` on, over `steps` steps.
    AVX512_INLINE Ahead of(const void* start, int64_t bytes, int64_t steps) {
        return {static_cast<const char*>(start), (bytes + steps) / (steps + 1)};
    }
    AVX512_INLINE void fetch(Ahead& ahead) {
        for (int64_t line = 0; line < ahead.stride; line += 64) _mm_prefetch(ahead.at + line, _MM_HINT_T0);
        ahead.at += ahead.stride;
    }
};

template <class Values>
struct SparseFor {
    using Element = typename Values::Element;

    // Rows [first, first + R) of the block.
    template <int T, int R>
    AVX512_INLINE void multiply(const Product& product, const Prepared& prepared, const Rows& rows, int64_t first) {
        const auto x = Values::inputs(prepared, rows);
        const int64_t columns = prepared.columns, width = (columns + 7) / 8;
        const Element* end = static_cast<const Element*>(product.values) + product.rows * product.kept;
        const Element* values[R];
        const uint8_t* masks[R];
        for (int r = 0; r < R; ++r) {
            values[r] = static_cast<const Element*>(product.values) + (rows.first + first + r) * product.kept;
            masks[r] = product.mask + (rows.first + first + r) * width;
        }
        // While these rows are multiplied the next ones are fetched, and the signs of the next block.
        const uint8_t* signs = product.signs ? product.signs + (rows.first + kBlockRows + first) * width : masks[0];
        Ahead values_ahead = Ahead::of(values[0] + R * product.kept, R * product.kept * sizeof(Element), columns / 64);
        Ahead masks_ahead = Ahead::of(masks[0] + R * width, R * width, columns / 128);
        Ahead signs_ahead = Ahead::of(signs, R * width, columns / 128);
        Sums<T, R, Values> sums;
        Sums<T, R, Values>::clear(sums);
        int64_t column = 0;
        for (;;) {
            // Steps of 64 columns; as many as cannot read past the end of the tensor, whatever the mask says.
            int64_t steps = (columns - column) / 64;
            for (int r = 0; r < R; ++r) steps = (end - values[r]) / 64 < steps ? (end - values[r]) / 64 : steps;
            if (steps <= 0) break;
            for (int64_t stop = column + 64 * steps; column < stop; column += 64) {
                Ahead::fetch(values_ahead);
                Ahead::fetch(column & 64 ? signs_ahead : masks_ahead);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    uint64_t bits;
                    __builtin_memcpy(&bits, masks[r] + (column >> 3), 8);
                    uint32_t low = static_cast<uint32_t>(bits), high = bits >> 32;
                    auto left = Values::expand(Values::load(values[r]), low);
                    auto right = Values::expand(Values::load(values[r] + _mm_popcnt_u32(low)), high);
                    values[r] += _mm_popcnt_u64(bits);
                    Sums<T, R, Values>::add(sums, r, left, x, column);
                    Sums<T, R, Values>::add(sums, r, right, x, column + kUnit);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int64_t at = column; at < columns; at += kUnit) {
                uint32_t bits = load_bits(masks[r], width, at >> 3);
                int64_t present = end - values[r] < kUnit ? end - values[r] : kUnit, used = _mm_popcnt_u32(bits);
                Sums<T, R, Values>::add(sums, r, Values::expand(Values::load_first(values[r], present), bits), x, at);
                values[r] += used < present ? used : present;
            }
        }
        Sums<T, R, Values>::store(sums, rows, first);
    }

    template <int T>
    struct Loop {
        AVX512 static void run(const Product& product, const Prepared& x, int64_t first, const Rows& rows) {
            if (first + kGroupRows <= rows.count) multiply<T, kGroupRows>(product, x, rows, first);
            else
                for (; first < rows.count; ++first) multiply<T, 1>(product, x, rows, first);
        }
    };

    static void run(const Product& product, const Prepared& x, const Rows& rows) {
        for (int64_t first = 0; first < rows.count; first += kGroupRows) for_token_groups<Loop>(rows, product, x, first);
    }
};

void sparse_rows(const Product& product, const Prepared& x, const Rows& rows) {
    switch (product.values_dtype) {
        case kFloat32: SparseFor<Float32>::run(product, x, rows); break;
        case kFloat16: SparseFor<Float16>::run(product, x, rows); break;
        default:
            if (x.piece_count == 1) SparseFor<BFloat16<1>>::run(product, x, rows);
            else if (x.piece_count == 2) SparseFor<BFloat16<2>>::run(product, x, rows);
            else SparseFor<BFloat16<3>>::run(product, x, rows);
    }
}

// --- dense -----------------------------------------------------------------------------------------------------------------

template <class Values>
struct DenseFor {
    using Element = typename Values::Element;

    template <int T, int R>
    AVX512_INLINE void multiply(const void* matrix, const Prepared& prepared, const Rows& rows, int64_t first) {
        const auto x = Values::inputs(prepared, rows);
        const int64_t columns = prepared.columns;
        const Element* values = static_cast<const Element*>(matrix) + (rows.first + first) * columns;
        Sums<T, R, Values> sums;
        Sums<T, R, Values>::clear(sums);
        int64_t column = 0;
        for (; column + kUnit <= columns; column += kUnit)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) Sums<T, R, Values>::add(sums, r, Values::load(values + r * columns + column), x, column);
        if (column < columns)
            for (int r = 0; r < R; ++r)
                Sums<T, R, Values>::add(sums, r, Values::load_first(values + r * columns + column, columns - column), x, column);
        Sums<T, R, Values>::store(sums, rows, first);
    }

    template <int T>
    struct Loop {
        AVX512 static void run(const void* matrix, const Prepared& x, int64_t first, const Rows& rows) {
            if (first + kGroupRows <= rows.count) multiply<T, kGroupRows>(matrix, x, rows, first);
            else
                for (; first < rows.count; ++first) multiply<T, 1>(matrix, x, rows, first);
        }
    };

    static void run(const void* matrix, const Prepared& x, const Rows& rows) {
        for (int64_t first = 0; first < rows.count; first += kGroupRows) for_token_groups<Loop>(rows, matrix, x, first);
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

// 16 rows times 16 words of 32 sign bits, transposed: out[word] holds the word of each row.
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

// Lanes are rows. Four sign bits of a row select one of the 16 sums ± s₀ ± s₁ ± s₂ ± s₃ of the scaled inputs, which stand in one
// register (vpermps looks at the low four bits of an index only): no multiplication, no horizontal sum, float32 throughout.
template <int T>
struct BinaryLoop {
    static constexpr int kParts = kBlockRows / 16;

    AVX512 static void run(const Product& product, const Prepared& x, const Rows& rows) {
        int64_t width = (x.columns + 7) / 8;
        int64_t table_size = x.padded / kTableColumns * kTableEntries;
        __m512i words[16][kParts];
        // The memory would idle meanwhile: fetch the next block's signs, or the first rows that sparse_rows takes next.
        int64_t row_bytes = product.values ? product.kept * element_size(DType(product.values_dtype)) : width;
        const char* soon = product.values ? static_cast<const char*>(product.values) + rows.first * row_bytes
                                          : reinterpret_cast<const char*>(product.signs + (rows.first + kBlockRows) * width);
        Ahead ahead = Ahead::of(soon, row_bytes * (product.values ? kBlockRows / 4 : kBlockRows), (width + 63) / 64 * kBlockRows);
        for (int64_t term = 0; term < product.binary_rank; ++term) {
            const float* tables = x.tables + (term * x.tokens + rows.first_token) * table_size;
            __m512 sums[T][kParts];
            for (auto& token : sums)
                for (auto& sum : token) sum = _mm512_setzero_ps();
            for (int64_t byte = 0; byte < width; byte += 64) {
                __mmask64 present = first_of_64(width - byte);
                for (int part = 0; part < kParts; ++part) {
                    __m512i bits[16];
                    for (int i = 0; i < 16; ++i) {
                        int64_t row = part * 16 + i;
                        const uint8_t* at = product.signs + (rows.first + row) * width + byte;
                        Ahead::fetch(ahead);
                        bits[i] = row < rows.count ? _mm512_maskz_loadu_epi8(present, at) : _mm512_setzero_si512();
                    }
                    transpose_words(bits, &words[0][part], kParts);
                }
                int64_t word_count = (width - byte + 3) / 4 < 16 ? (width - byte + 3) / 4 : 16;
                for (int64_t word = 0; word < word_count; ++word) {
                    __m512i index[kParts];
                    for (int part = 0; part < kParts; ++part) index[part] = words[word][part];
                    const float* table = tables + (byte / 4 + word) * (kUnit / kTableColumns) * kTableEntries;
#pragma GCC unroll 8
                    for (int group = 0; group < kUnit / kTableColumns; ++group) {
                        for (int t = 0; t < T; ++t) {
                            __m512 entries = _mm512_load_ps(table + t * table_size + group * kTableEntries);
                            for (int part = 0; part < kParts; ++part)
                                sums[t][part] = _mm512_add_ps(sums[t][part], _mm512_permutexvar_ps(index[part], entries));
                        }
                        for (int part = 0; part < kParts; ++part) index[part] = _mm512_srli_epi32(index[part], kTableColumns);
                    }
                }
            }
            alignas(64) float scale[kBlockRows] = {};
            for (int64_t i = 0; i < rows.count; ++i)
                scale[i] = load_as_float(product.scale_out, (rows.first + i) * product.binary_rank + term, DType(product.scale_dtype));
            for (int t = 0; t < T; ++t) {
                for (int part = 0; part < kParts; ++part) {
                    float* at = rows.sums + t * kBlockRows + 16 * part;
                    __m512 scaled = _mm512_mul_ps(sums[t][part], _mm512_load_ps(scale + 16 * part));
                    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), scaled));
                }
            }
        }
    }
};

void binary_rows(const Product& product, const Prepared& x, const Rows& rows) { for_token_groups<BinaryLoop>(rows, product, x); }

AVX512 void fill_tables(const float* scaled, int64_t padded, float* out) {
    // Bit j of an entry's index set: + column j; clear: − column j.
    const __m512 ones = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
    const __m512 signs[4] = {_mm512_mask_blend_ps(0xaaaa, minus, ones), _mm512_mask_blend_ps(0xcccc, minus, ones),
                             _mm512_mask_blend_ps(0xf0f0, minus, ones), _mm512_mask_blend_ps(0xff00, minus, ones)};
    for (int64_t column = 0; column < padded; column += kTableColumns, out += kTableEntries) {
        __m512 sum = _mm512_mul_ps(signs[0], _mm512_set1_ps(scaled[column]));
        for (int j = 1; j < 4; ++j) sum = _mm512_fmadd_ps(signs[j], _mm512_set1_ps(scaled[column + j]), sum);
        _mm512_store_ps(out, sum);
    }
}

// --- unpacking -------------------------------------------------------------------------------------------------------------

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

// Columns [column, column + 32) of a row; `whole` where all 32 exist.
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

void unpack(const Product& product, const float* scale_in, int64_t padded, int64_t row, void* out) {
    switch (product.values_dtype) {
        case kFloat32: unpack_row<Float32>(product, scale_in, padded, row, out); break;
        case kFloat16: unpack_row<Float16>(product, scale_in, padded, row, out); break;
        default: unpack_row<BFloat16<1>>(product, scale_in, padded, row, out);
    }
}

}  // namespace

const Kernels& avx512_kernels() {
    static const Kernels kernels = {sparse_rows, binary_rows, dense_rows, fill_tables, unpack, true};
    return kernels;
}

}  // namespace hf_lowrank

#endif
