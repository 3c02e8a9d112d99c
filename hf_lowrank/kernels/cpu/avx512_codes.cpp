// Products of codes with few tokens, with AVX-512.
//
// Levels are multiplied with x as bfloat16, which is exact, and the sums of a few columns with their scales. Codes
// without a bitmap are multiplied in an order of their own: whatever takes the fewest steps to unpack. x is brought into that
// order once per call (`avx512_arrange`). With a bitmap, the columns of x that have a value are put side by side for each row.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_blocks.h"
#include "scratch.h"

namespace hf_lowrank {
namespace {

// What lies this much further on is fetched meanwhile, from the first byte to the last: rows are too short for the
// processor's own prefetchers to help much.
constexpr int64_t kBytesAhead = 8192;
constexpr int64_t kRowsAhead = 4;  // of scales and of bitmaps

// --- without a bitmap ------------------------------------------------------------------------------------------------------------

template <Kind kind>
struct BlocksFor {
    using Levels = BlockLevels<kind>;
    static constexpr int64_t kPartUnits = kScaleUnits;  // of a row, whose scales are converted together

    template <int T>
    AVX512_INLINE void add_block(__m512 (&sums)[T], const Levels& levels, __m512i codes, const float* scales,
                                 const uint16_t* const (&x)[T], int64_t column) {
        __m512i values[Levels::products];
        Levels::next(levels, codes, values);
        const __m512 scale = Levels::scales(levels, scales);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int r = 0; r < Levels::products; ++r)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)values[r], (__m512bh)_mm512_load_si512(x[t] + column + r % Levels::registers * kUnit));
            sums[t] = _mm512_fmadd_ps(sum, scale, sums[t]);
        }
    }

    template <int T>
    struct Loop {
        AVX512 static void run(const Product& product, const uint16_t* piece, int64_t stride, const Rows& rows) {
            const uint16_t* x[T];
            for (int t = 0; t < T; ++t) x[t] = piece + (rows.first_token + t) * stride;
            const auto levels = Levels::of(product.code_bits);
            const int64_t width = (product.kept * product.code_bits + 7) / 8, block_bytes = Levels::columns / 8 * product.code_bits;
            const int64_t units = (product.kept + kUnit - 1) / kUnit;
            const __mmask64 whole = first_of_64(block_bytes);
            const auto unit_scales = UnitScales::of(product);
            alignas(64) float scales[kPartUnits + kScalePadding];
            for (int64_t row = 0; row < rows.count; ++row) {
                const uint8_t* codes = product.codes + (rows.first + row) * width;
                const uint8_t* end = codes + width;
                UnitScales::fetch(unit_scales, product, rows.first + row + kRowsAhead, 1);
                __m512 sums[T];
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
                for (int64_t unit = 0; unit < units; unit += kPartUnits) {
                    const int64_t part = units - unit < kPartUnits ? units - unit : kPartUnits;
                    UnitScales::write(unit_scales, product, rows.first + row, unit, part, scales);
                    const float* scale = scales;
                    int64_t column = unit * kUnit;
                    const int64_t whole_blocks = (product.kept - column) / Levels::columns, most = kPartUnits * kUnit / Levels::columns;
                    for (int64_t block = 0; block < (whole_blocks < most ? whole_blocks : most); ++block) {
                        prefetch(codes, kBytesAhead);
                        add_block<T>(sums, levels, _mm512_maskz_loadu_epi8(whole, codes), scale, x, column);
                        codes += block_bytes;
                        scale += Levels::columns / kUnit;
                        column += Levels::columns;
                    }
                    if (scale < scales + part)
                        add_block<T>(sums, levels, _mm512_maskz_loadu_epi8(first_of_64(end - codes), codes), scale, x, column);
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + row] += _mm512_reduce_add_ps(sums[t]);
            }
        }
    };
};

// --- with a bitmap ---------------------------------------------------------------------------------------------------------------

AVX512_INLINE __m512i compress_words(__m512i words, __mmask32 mask) {
    __m512i out;
    __asm__("vpxord %x0, %x0, %x0\n\tvpcompressw %1, %0%{%2%}%{z%}" : "=&v"(out) : "v"(words), "Yk"(mask));
    return out;
}

// Writes those columns of T tokens side by side whose bits of a bitmap row are set, as many as there are values. Zeros
// follow up to a whole unit, or where bits are too few.
template <int T>
AVX512_INLINE void side_by_side(const Product& product, const uint8_t* mask, const uint16_t* x, int64_t stride, uint16_t* out,
                                int64_t out_stride) {
    const int64_t columns = product.columns, width = (columns + 7) / 8;
    int64_t count = 0, column = 0;
    for (; column + 2 * kUnit <= columns; column += 2 * kUnit) {
        const __mmask64 bits = load_mask(mask + column / 8);
        const BitCounts counts = count_bits(mask + column / 8);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            uint16_t* at = out + t * out_stride + count;
            const uint16_t* from = x + t * stride + column;
            const __mmask32 low = static_cast<__mmask32>(bits), high = static_cast<__mmask32>(_kshiftri_mask64(bits, 32));
            _mm512_storeu_si512(at, compress_words(_mm512_load_si512(from), low));
            _mm512_storeu_si512(at + counts.first_half, compress_words(_mm512_load_si512(from + kUnit), high));
        }
        count += counts.all;
    }
    for (; column < columns; column += kUnit) {
        const uint32_t bits = load_bits(mask, width, column / 8) & first_of_32(columns - column);
        for (int t = 0; t < T; ++t) {
            const __m512i chosen = compress_words(_mm512_load_si512(x + t * stride + column), bits);
            _mm512_storeu_si512(out + t * out_stride + count, chosen);
        }
        count += _mm_popcnt_u32(bits);
    }
    if (count > product.kept) count = product.kept;
    for (int t = 0; t < T; ++t) {
        uint16_t* at = out + t * out_stride;
        for (int64_t i = count; i < product.kept; i += kUnit) _mm512_storeu_si512(at + i, _mm512_setzero_si512());
        _mm512_storeu_si512(at + product.kept, _mm512_setzero_si512());
    }
}

template <LevelKind kind>
struct MaskedFor {
    static constexpr int kTurns = 2;

    template <int T>
    AVX512_INLINE void add_unit(__m512 (&sums)[T], const Levels<kind>& levels, const uint8_t* codes, __mmask64 present, float scale,
                                const uint16_t* columns, int64_t stride) {
        const __m512i values = Levels<kind>::next(levels, codes, present);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const __m512bh at = (__m512bh)_mm512_loadu_si512(columns + t * stride);
            sums[t] = _mm512_fmadd_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)values, at), _mm512_set1_ps(scale), sums[t]);
        }
    }

    template <int T>
    struct Loop {
        AVX512 static void run(const Product& product, const uint16_t* piece, int64_t stride, const Rows& rows) {
            const uint16_t* x = piece + rows.first_token * stride;
            const auto levels = Levels<kind>::of(product.code_bits);
            const int64_t kept = product.kept, width = (kept * product.code_bits + 7) / 8, mask_width = (product.columns + 7) / 8;
            const int64_t units = (kept + kUnit - 1) / kUnit, row_columns = product.columns + 4 * kUnit;
            thread_local Scratch scratch;
            const __mmask64 whole = Levels<kind>::present(levels, levels.unit_bytes);
            uint16_t* columns = reinterpret_cast<uint16_t*>(scratch.at_least(T * row_columns * 2));
            const auto unit_scales = UnitScales::of(product);
            alignas(64) float scales[kScaleUnits + kScalePadding];
            for (int64_t row = 0; row < rows.count; ++row) {
                const uint8_t* mask = product.mask + (rows.first + row) * mask_width;
                const uint8_t *codes = product.codes + (rows.first + row) * width, *end = codes + width;
                for (int64_t byte = 0; byte < mask_width; byte += 64) prefetch(mask, byte + kRowsAhead * mask_width);
                UnitScales::fetch(unit_scales, product, rows.first + row + kRowsAhead, 1);
                side_by_side<T>(product, mask, x, stride, columns, row_columns);
                // Units take turns with kTurns sums, so that none waits for the one before it.
                __m512 sums[kTurns][T];
#pragma GCC unroll 4
                for (auto& turn : sums)
#pragma GCC unroll 4
                    for (auto& sum : turn) sum = _mm512_setzero_ps();
                for (int64_t first = 0; first < units; first += kScaleUnits) {
                    const int64_t part = units - first < kScaleUnits ? units - first : kScaleUnits;
                    UnitScales::write(unit_scales, product, rows.first + row, first, part, scales);
                    const uint16_t* at = columns + first * kUnit;
                    int64_t unit = 0;
                    for (; unit + kTurns < part; unit += kTurns) {
                        prefetch(codes, kBytesAhead);
#pragma GCC unroll 4
                        for (int turn = 0; turn < kTurns; ++turn, codes += levels.unit_bytes)
                            add_unit<T>(sums[turn], levels, codes, whole, scales[unit + turn], at + (unit + turn) * kUnit, row_columns);
                    }
                    for (; unit < part; ++unit, codes += levels.unit_bytes) {
                        const __mmask64 present = Levels<kind>::present(levels, end - codes);
                        add_unit<T>(sums[0], levels, codes, present, scales[unit], at + unit * kUnit, row_columns);
                    }
                }
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t)
                    rows.sums[t * kBlockRows + row] += _mm512_reduce_add_ps(_mm512_add_ps(sums[0][t], sums[1][t]));
            }
        }
    };
};

// Multiplies each of the pieces whose sum is x.
template <template <int> class Loop>
void for_pieces(const Product& product, const Prepared& x, const Rows& rows) {
    for (int piece = 0; piece < x.piece_count; ++piece)
        for_token_groups<Loop>(rows, product, x.pieces + piece * x.tokens * x.padded, x.padded);
}

template <LevelKind kind>
struct MaskedPieces {
    static void run(const Product& product, const Prepared& x, const Rows& rows) {
        for_pieces<MaskedFor<kind>::template Loop>(product, x, rows);
    }
};

}  // namespace

// Brings `padded` columns of one piece of a token, a multiple of kArrangedUnit, into the order of codes of `bits` bits.
AVX512 void avx512_arrange(int32_t bits, int64_t padded, uint16_t* x) {
    const Kind kind = kind_of(bits);
    for (uint16_t* end = x + padded; x < end; x += kArrangedUnit) {
        __m512i from[4];
        for (int r = 0; r < 4; ++r) from[r] = _mm512_load_si512(x + r * kUnit);
        for (int r = 0; r < 4; ++r) {
            const __m512i places = _mm512_load_si512(kArrangement.places[kind][r]);
            const __m512i first = _mm512_permutex2var_epi16(from[0], places, from[1]);
            const __m512i second = _mm512_permutex2var_epi16(from[2], places, from[3]);
            _mm512_store_si512(x + r * kUnit, _mm512_mask_blend_epi16(kArrangement.in_second[kind][r], first, second));
        }
    }
}

// Multiplies rows of codes whose groups are whole units with the pieces of x, exactly.
void avx512_codes(const Product& product, const Prepared& x, const Rows& rows) {
    if (!product.kept) return;
    if (product.mask) return for_level_kind<MaskedPieces>(product.code_bits, product, x, rows);
    switch (kind_of(product.code_bits)) {
        case kNarrow: for_pieces<BlocksFor<kNarrow>::Loop>(product, x, rows); break;
        case kMedium: for_pieces<BlocksFor<kMedium>::Loop>(product, x, rows); break;
        default: for_pieces<BlocksFor<kWide>::Loop>(product, x, rows);
    }
}

}  // namespace hf_lowrank

#endif
