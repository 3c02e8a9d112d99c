// AVX2 (with FMA and F16C) loops: eight columns at a time, converted to float32.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx2.h"

namespace hf_lowrank {

// avx2_codes.cpp
void avx2_codes(const Product& product, const Prepared& x, const Rows& rows);
void avx2_dequantize(const Product& product, int64_t row, float* out);

namespace {

// For every mask byte, the index of the value that each of eight columns takes, or 0x80 where the column's bit is
// clear.
struct Spread {
    alignas(16) uint8_t words[256][16];  // as byte positions of 16-bit values, for pshufb
    uint8_t lanes[256][8];               // as positions
    constexpr Spread() : words(), lanes() {
        for (int mask = 0; mask < 256; ++mask) {
            int position = 0;
            for (int column = 0; column < 8; ++column) {
                bool kept = mask >> column & 1;
                lanes[mask][column] = static_cast<uint8_t>(kept ? position : 0x80);
                words[mask][2 * column] = static_cast<uint8_t>(kept ? 2 * position : 0x80);
                words[mask][2 * column + 1] = static_cast<uint8_t>(kept ? 2 * position + 1 : 0x80);
                position += kept;
            }
        }
    }
};
constexpr Spread kSpread;

// --- eight values of a row as float32 ----------------------------------------------------------------------------------------

struct Bits16 {
    using Element = uint16_t;
    AVX2_INLINE __m128i load_bits16(const Element* values) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)); }
    AVX2_INLINE __m128i expand_bits16(const Element* values, uint8_t mask) {
        return _mm_shuffle_epi8(load_bits16(values), _mm_load_si128(reinterpret_cast<const __m128i*>(kSpread.words[mask])));
    }
};

struct BFloat16 : Bits16 {
    AVX2_INLINE __m256 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
    AVX2_INLINE __m256 load(const Element* values) { return widen(load_bits16(values)); }
    AVX2_INLINE __m256 expand(const Element* values, uint8_t mask) { return widen(expand_bits16(values, mask)); }
};

struct Float16 : Bits16 {
    AVX2_INLINE __m256 load(const Element* values) { return _mm256_cvtph_ps(load_bits16(values)); }
    AVX2_INLINE __m256 expand(const Element* values, uint8_t mask) { return _mm256_cvtph_ps(expand_bits16(values, mask)); }
};

struct Float32 {
    using Element = float;
    AVX2_INLINE __m256 load(const Element* values) { return _mm256_loadu_ps(values); }
    AVX2_INLINE __m256 expand(const Element* values, uint8_t mask) {
        __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.lanes[mask])));
        __m256 moved = _mm256_permutevar8x32_ps(load(values), index);
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), moved);
    }
};

// --- sums of several rows and tokens ---------------------------------------------------------------------------------------

// Rows multiplied together: each part of x is loaded once for all of them, and their sums hide the multiply-add's
// latency.
template <int T>
constexpr int kGroupRows = T == 1 ? 4 : T == 2 ? 2 : 1;

template <int T, int R>
struct Sums {
    __m256 of[R][T];

    AVX2_INLINE void clear(Sums& sums) {
#pragma GCC unroll 4
        for (auto& row : sums.of)
#pragma GCC unroll 4
            for (auto& sum : row) sum = _mm256_setzero_ps();
    }

    AVX2_INLINE void add(Sums& sums, int row, __m256 values, const float* x, int64_t token_stride) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sums.of[row][t] = _mm256_fmadd_ps(values, _mm256_loadu_ps(x + t * token_stride), sums.of[row][t]);
    }

    AVX2_INLINE void store(const Sums& sums, const Rows& rows, int64_t first) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + first + r] += sum_of_lanes(sums.of[r][t]);
        }
    }
};

// --- sparse ----------------------------------------------------------------------------------------------------------------

// Byte k of the result is the number of bits set in bytes 0 to k − 1.
AVX2_INLINE uint64_t bits_before_each_byte(uint64_t bits) {
    uint64_t counts = bits - ((bits >> 1) & 0x5555555555555555u);
    counts = (counts & 0x3333333333333333u) + ((counts >> 2) & 0x3333333333333333u);
    counts = (counts + (counts >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return (counts * 0x0101010101010101u) << 8;
}

template <class Values>
struct SparseFor {
    using Element = typename Values::Element;

    // Multiplies rows [first, first + R) of the block.
    template <int T, int R>
    AVX2_INLINE void multiply(const Product& product, const Prepared& prepared, const Rows& rows, int64_t first) {
        const float* x = prepared.values + rows.first_token * prepared.padded;
        const int64_t width = (prepared.columns + 7) / 8, kept = product.kept;
        const Element* end = static_cast<const Element*>(product.values) + product.rows * kept;
        const Element* values[R];
        const uint8_t* masks[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            values[r] = static_cast<const Element*>(product.values) + (rows.first + first + r) * kept;
            masks[r] = product.mask + (rows.first + first + r) * width;
        }
        Sums<T, R> sums;
        Sums<T, R>::clear(sums);
        int64_t byte = 0;
        for (;;) {
            // A step takes eight mask bytes. There are as many as cannot read past the end of the tensor, whatever the
            // mask says.
            int64_t steps = (width - byte) / 8;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) steps = (end - values[r]) / 64 < steps ? (end - values[r]) / 64 : steps;
            if (steps <= 0) break;
            for (int64_t stop = byte + 8 * steps; byte < stop; byte += 8) {
                uint64_t bits[R], before[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    // The values of the next rows lie at irregular distances, which the processor's own prefetchers do
                    // not follow.
                    _mm_prefetch(reinterpret_cast<const char*>(values[r] + R * kept), _MM_HINT_T0);
                    _mm_prefetch(reinterpret_cast<const char*>(masks[r] + R * width + byte), _MM_HINT_T0);
                    __builtin_memcpy(&bits[r], masks[r] + byte, 8);
                    before[r] = bits_before_each_byte(bits[r]);
                }
#pragma GCC unroll 8
                for (int k = 0; k < 8; ++k) {
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        __m256 unit = Values::expand(values[r] + (before[r] >> 8 * k & 0xff), static_cast<uint8_t>(bits[r] >> 8 * k));
                        Sums<T, R>::add(sums, r, unit, x + (byte + k) * kLanes, prepared.padded);
                    }
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) values[r] += _mm_popcnt_u64(bits[r]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            for (int64_t at = byte; at < width; ++at) {
                Element next[kLanes] = {};
                int64_t present = end - values[r] < kLanes ? end - values[r] : kLanes, used = _mm_popcnt_u32(masks[r][at]);
                for (int64_t j = 0; j < present; ++j) next[j] = values[r][j];
                Sums<T, R>::add(sums, r, Values::expand(next, masks[r][at]), x + at * kLanes, prepared.padded);
                values[r] += used < present ? used : present;
            }
        }
        Sums<T, R>::store(sums, rows, first);
    }

    template <int T>
    struct Loop {
        AVX2 static void run(const Product& product, const Prepared& x, const Rows& rows) {
            int64_t first = 0;
            for (; first + kGroupRows<T> <= rows.count; first += kGroupRows<T>) multiply<T, kGroupRows<T>>(product, x, rows, first);
            for (; first < rows.count; ++first) multiply<T, 1>(product, x, rows, first);
        }
    };
};

void sparse_rows(const Product& product, const Prepared& x, const Rows& rows) {
    switch (product.values_dtype) {
        case kFloat32: for_token_groups<SparseFor<Float32>::Loop>(rows, product, x); break;
        case kFloat16: for_token_groups<SparseFor<Float16>::Loop>(rows, product, x); break;
        default: for_token_groups<SparseFor<BFloat16>::Loop>(rows, product, x);
    }
}

// --- dense -----------------------------------------------------------------------------------------------------------------

template <class Values>
struct DenseFor {
    using Element = typename Values::Element;

    template <int T, int R>
    AVX2_INLINE void multiply(const void* matrix, const Prepared& prepared, const Rows& rows, int64_t first) {
        const float* x = prepared.values + rows.first_token * prepared.padded;
        const int64_t columns = prepared.columns;
        const Element* values = static_cast<const Element*>(matrix) + (rows.first + first) * columns;
        Sums<T, R> sums;
        Sums<T, R>::clear(sums);
        int64_t column = 0;
        for (; column + kLanes <= columns; column += kLanes)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                Sums<T, R>::add(sums, r, Values::load(values + r * columns + column), x + column, prepared.padded);
#pragma GCC unroll 4
        for (int r = 0; r < R && column < columns; ++r) {
            Element next[kLanes] = {};
            for (int64_t j = 0; column + j < columns; ++j) next[j] = values[r * columns + column + j];
            Sums<T, R>::add(sums, r, Values::load(next), x + column, prepared.padded);
        }
        Sums<T, R>::store(sums, rows, first);
    }

    template <int T>
    struct Loop {
        AVX2 static void run(const void* matrix, const Prepared& x, const Rows& rows) {
            int64_t first = 0;
            for (; first + kGroupRows<T> <= rows.count; first += kGroupRows<T>) multiply<T, kGroupRows<T>>(matrix, x, rows, first);
            for (; first < rows.count; ++first) multiply<T, 1>(matrix, x, rows, first);
        }
    };
};

void dense_rows(const void* matrix, DType dtype, const Prepared& x, const Rows& rows) {
    switch (dtype) {
        case kFloat32: for_token_groups<DenseFor<Float32>::Loop>(rows, matrix, x); break;
        case kFloat16: for_token_groups<DenseFor<Float16>::Loop>(rows, matrix, x); break;
        default: for_token_groups<DenseFor<BFloat16>::Loop>(rows, matrix, x);
    }
}

// --- binary ----------------------------------------------------------------------------------------------------------------

// Transposes eight words of 32 sign bits of eight rows: out[word * stride] holds that word of each row.
AVX2_INLINE void transpose_words(const __m256i (&rows)[8], __m256i* out, int stride) {
    __m256i pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        out[i * stride] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        out[(i + 4) * stride] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

// Lanes are rows. Three sign bits select one of the eight sums ± s₀ ± s₁ ± s₂ of the scaled inputs, which stand in one
// register (vpermps looks at the low three bits of an index only); 32 columns make ten such groups and one of two
// columns.
constexpr int kGroupColumns = 3, kGroups = 11, kEntries = 8;
constexpr int64_t kWordTable = kUnit / kTableColumns * kTableEntries;  // room for the sums of 32 columns, of which 88 are used

template <int T>
struct BinaryLoop {
    static constexpr int kParts = T == 1 ? 4 : T <= 3 ? 2 : 1;
    static constexpr int64_t kStep = 32;  // bytes of a row's bits per transposition

    AVX2_INLINE void load_words(const Product& product, const Rows& rows, int64_t row, int64_t byte, int64_t width, __m256i* out) {
        __m256i bits[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint8_t* signs = product.signs + (rows.first + (row + lane < rows.count ? row + lane : 0)) * width + byte;
            alignas(32) uint8_t last[kStep];
            if (byte + kStep > width) {
                __builtin_memset(last, 0, kStep);
                __builtin_memcpy(last, signs, static_cast<unsigned long>(width - byte));
                signs = last;
            }
            _mm_prefetch(reinterpret_cast<const char*>(signs + kBlockRows * width), _MM_HINT_T0);  // the next block's
            bits[lane] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(signs));
        }
        transpose_words(bits, out, kParts);
    }

    AVX2 static void run(const Product& product, const Prepared& x, const Rows& rows) {
        const int64_t width = (x.columns + 7) / 8, table_size = x.padded / kTableColumns * kTableEntries;
        for (int64_t term = 0; term < product.binary_rank; ++term) {
            const float* tables = x.tables + (term * x.tokens + rows.first_token) * table_size;
            for (int64_t first = 0; first < rows.count; first += kParts * kLanes) {
                __m256 sums[T][kParts];
#pragma GCC unroll 4
                for (auto& token : sums)
#pragma GCC unroll 4
                    for (auto& sum : token) sum = _mm256_setzero_ps();
                for (int64_t byte = 0; byte < width; byte += kStep) {
                    __m256i words[kStep / 4][kParts];
#pragma GCC unroll 4
                    for (int part = 0; part < kParts; ++part)
                        load_words(product, rows, first + part * kLanes, byte, width, &words[0][part]);
                    for (int64_t word = 0; word < kStep / 4 && byte + 4 * word < width; ++word) {
                        const float* table = tables + (byte / 4 + word) * kWordTable;
#pragma GCC unroll 11
                        for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 4
                            for (int t = 0; t < T; ++t) {
                                __m256 entries = _mm256_load_ps(table + t * table_size + group * kEntries);
#pragma GCC unroll 4
                                for (int part = 0; part < kParts; ++part) {
                                    __m256i index = _mm256_srli_epi32(words[word][part], group * kGroupColumns);
                                    sums[t][part] = _mm256_add_ps(sums[t][part], _mm256_permutevar8x32_ps(entries, index));
                                }
                            }
                        }
                    }
                }
                for (int64_t i = first; i < rows.count && i < first + kParts * kLanes; ++i) {
                    float scale = load_as_float(product.scale_out, (rows.first + i) * product.binary_rank + term, DType(product.scale_dtype));
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t) {
                        alignas(32) float lanes[kLanes];
                        _mm256_store_ps(lanes, sums[t][(i - first) / kLanes]);
                        rows.sums[t * kBlockRows + i] += scale * lanes[i % kLanes];
                    }
                }
            }
        }
    }
};

void packed_rows(const Product& product, const Prepared& x, const Rows& rows) {
    if (product.signs) for_token_groups<BinaryLoop>(rows, product, x);
    if (product.values) sparse_rows(product, x, rows);
}

AVX2 void fill_tables(const float* scaled, int64_t padded, float* out) {
    // An entry adds column j where bit j of its index is set, and subtracts it where the bit is clear.
    const __m256 signs[3] = {_mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), _mm256_setr_ps(-1, -1, 1, 1, -1, -1, 1, 1),
                             _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1)};
    for (int64_t first = 0; first < padded; first += kUnit, out += kWordTable) {
        for (int group = 0; group < kGroups; ++group) {
            __m256 sum = _mm256_setzero_ps();
            for (int j = 0; j < 3 && kGroupColumns * group + j < kUnit; ++j)
                sum = _mm256_fmadd_ps(signs[j], _mm256_set1_ps(scaled[first + kGroupColumns * group + j]), sum);
            _mm256_store_ps(out + group * kEntries, sum);
        }
    }
}

}  // namespace

const Kernels& avx2_kernels() {
    static const Kernels kernels = {packed_rows, dense_rows, fill_tables, avx2_dequantize, avx2_codes,
                                    nullptr,     nullptr,    portable_kernels().unpack,     false};
    return kernels;
}

}  // namespace hf_lowrank

#endif
