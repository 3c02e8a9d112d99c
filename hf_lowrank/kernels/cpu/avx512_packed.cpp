// Products with kept values, and in the same pass with signs where everything is bfloat16, with AVX-512 (VBMI2, BF16).
//
// A mask word spreads the next values of a row over 32 columns (vpexpandw, register form), which are then multiplied
// as in a dense product. Sign bits reach the sign positions of 32 lanes by vpmultishiftqb: mask registers would take
// the ports that vpexpandw needs. ± scale_in is multiplied with x, which is an exact product. Everything is added in
// float32.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_values.h"

namespace hf_lowrank {
namespace {

constexpr int64_t kLine = 64;                // bytes of a cache line
constexpr int64_t kStep = 64;                // columns per step: eight bytes of a bitmap
constexpr int64_t kLineColumns = kLine * 8;  // columns per cache line of a bitmap

// Where values are few, they are not spread: their columns among 64 are listed, and x is taken from these.
struct ColumnList {
    alignas(64) uint8_t numbers[64];
    constexpr ColumnList() : numbers() {
        for (int column = 0; column < 64; ++column) numbers[column] = static_cast<uint8_t>(0x80 | column);
    }
};
constexpr ColumnList kColumnList;

// Returns the numbers of the columns whose mask bits are set, one after the other, as words with the upper nine bits
// set. Zeros follow them.
AVX512_INLINE __m512i list_columns(__mmask64 mask, __m512i numbers) {
    __m512i bytes;
    __asm__("vpxord %x0, %x0, %x0\n\tvpcompressb %1, %0%{%2%}%{z%}" : "=&v"(bytes) : "v"(numbers), "Yk"(mask));
    return _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes));
}

// multiply_64 adds the products of the next values of a row with 64 columns of x to each token's sum. Where rows are
// apart, what lies kColumnsAhead in each, about half a microsecond, is fetched meanwhile; together it must leave room
// for x in the first cache. Where rows are in order, a step of them fetches lines(rows) cache lines of values.
template <class Values>
struct Spread : Values {
    static constexpr int64_t kColumnsAhead = 2048;
    static constexpr int lines(int rows) { return rows; }

    template <int T>
    AVX512_INLINE void multiply_64(__m512 (&sums)[T], const typename Values::Element*& values, const uint8_t* mask,
                                   const typename Values::Inputs& x, int64_t column) {
        typename Values::Unit low, high;
        Values::expand_64(values, mask, low, high);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            Values::multiply_add(sums[t], low, x, t, column);
            Values::multiply_add(sums[t], high, x, t, column + kUnit);
        }
    }
};

// Multiplies 64 columns where they are likely to have at most 32 values. What was loaded beyond these lies beside a
// zero of the list: only its lower seven bits are left, a number that vdpbf16ps takes for zero.
struct Listed : BFloat16<1> {
    static constexpr int64_t kColumnsAhead = 4096;
    static constexpr int lines(int rows) { return (rows + 1) / 2; }

    template <int T>
    AVX512_INLINE void multiply_64(__m512 (&sums)[T], const uint16_t*& values, const uint8_t* mask, const Inputs& x, int64_t column) {
        const int64_t count = count_bits_64(mask);
        if (__builtin_expect(count > kUnit, 0)) return Spread<BFloat16<1>>::multiply_64(sums, values, mask, x, column);
        const __m512i columns = list_columns(load_mask(mask), _mm512_load_si512(kColumnList.numbers));
        const __m512i present = _mm512_ternarylogic_epi32(load(values), columns, _mm512_set1_epi32(0x007f007f), 0xe0);
        values += count;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const uint16_t* at = x.at + t * x.token_stride + column;
            const __m512i chosen = _mm512_permutex2var_epi16(_mm512_load_si512(at), columns, _mm512_load_si512(at + kUnit));
            sums[t] = _mm512_dpbf16_ps(sums[t], (__m512bh)present, (__m512bh)chosen);
        }
    }
};

// Multiplies with kept values, and with `signs` also with the signs of x.multiplies_signs; Values are bfloat16 then,
// and x is one piece.
//
// What is read soon is fetched meanwhile, because the processor's own prefetchers help little: kept values are read at
// irregular distances, and rows of bitmaps are shorter than a page. With signs, neighboring rows are multiplied
// together, and the next ones are fetched in the order of memory, from the first byte to the last. Without signs, rows
// far apart are multiplied together. Each is one long stream of memory, and what comes further on in each is fetched;
// the other order gains nothing there.
template <class Values, bool signs>
struct Packed {
    using Element = typename Values::Element;
    static constexpr bool in_order = signs;

    // Multiplies R rows of the block, `step` apart, with T tokens.
    template <int T, int R>
    AVX512_INLINE void multiply(const Product& product, const Prepared& prepared, const Rows& rows, int64_t first, int64_t step) {
        const auto x = Values::inputs(prepared, rows);
        const uint16_t* scale = prepared.scale_in;
        const int64_t columns = prepared.columns, width = (columns + 7) / 8, stride = step * width, row = rows.first + first;
        const int64_t row_bytes = product.kept * int64_t(sizeof(Element)), line_values = row_bytes * kLineColumns / columns;
        const uint8_t* masks = product.mask + row * width;
        const uint8_t* bits = signs ? product.signs + row * width : nullptr;
        const Element* end = static_cast<const Element*>(product.values) + product.rows * product.kept;
        const Element* values[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) values[r] = static_cast<const Element*>(product.values) + (row + r * step) * product.kept;
        constexpr int64_t ahead = Values::kColumnsAhead;
        const int64_t values_ahead = ahead * row_bytes / columns;  // a division, and so not in the loop
        const bool near_end = end - values[R - 1] < columns;
        const uint8_t *next_masks = masks + R * width, *next_bits = signs ? bits + R * width : nullptr;
        const char* next_values = reinterpret_cast<const char*>(values[0]) + R * row_bytes;
        const int64_t next_step = R * row_bytes * kStep / columns;
        const __m512i low_positions = _mm512_load_si512(kSignPositions.low), high_positions = _mm512_load_si512(kSignPositions.high);
        Sums<T, R, Values> kept_sums, sign_sums;
        Sums<T, R, Values>::clear(kept_sums);
        Sums<T, R, Values>::clear(sign_sums);

        int64_t column = 0;
        for (;;) {
            // There are as many steps as cannot read past the end of the tensor, whatever the mask says.
            int64_t steps = (columns - column) / kStep;
            if (near_end)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) steps = (end - values[r]) / kStep < steps ? (end - values[r]) / kStep : steps;
            if (steps <= 0) break;
            if (steps > kLineColumns / kStep) steps = kLineColumns / kStep;
            // Each stream is followed by that of the next block.
            const int64_t jump = column + ahead < (step - first) * columns ? 0 : kBlockRows - step;
            const int64_t masks_ahead = ahead / 8 + jump * width, bytes_ahead = values_ahead + jump * row_bytes;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                if (in_order) {
                    prefetch(next_masks, r * kLine);
                    prefetch(next_bits, r * kLine);
                } else {
                    prefetch(masks + r * stride, masks_ahead);
                }
            }
            // Fetches the lines beyond the one that each step fetches.
            if (!in_order && line_values > kLineColumns)
                for (int64_t line = 0; line < line_values; line += kLine)
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) prefetch(values[r], bytes_ahead + line);
#pragma GCC unroll 1
            for (int64_t stop = column + steps * kStep; column < stop; column += kStep) {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    if (!in_order) prefetch(values[r], bytes_ahead);
                    else if (r < Values::lines(R)) prefetch(next_values, r * kLine);
                    Values::multiply_64(kept_sums.of[r], values[r], masks + r * stride, x, column);
                    if constexpr (signs) {
                        const __m512i both = broadcast_8_bytes(bits + r * stride);
                        const __m512i low = _mm512_load_si512(scale + column), high = _mm512_load_si512(scale + column + kUnit);
                        Sums<T, R, Values>::add(sign_sums, r, with_signs(both, low_positions, low), x, column);
                        Sums<T, R, Values>::add(sign_sums, r, with_signs(both, high_positions, high), x, column + kUnit);
                    }
                }
                masks += kStep / 8;
                bits += signs ? kStep / 8 : 0;
                next_values += next_step;
            }
            next_masks += R * kLine;
            next_bits += signs ? R * kLine : 0;
        }
        for (; column < columns; column += kUnit) {
            const int64_t left = width - column / 8;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                uint32_t mask = load_bits(masks + r * stride, left, 0);
                int64_t present = end - values[r] < kUnit ? end - values[r] : kUnit, used = _mm_popcnt_u32(mask);
                Sums<T, R, Values>::add(kept_sums, r, Values::expand(Values::load_first(values[r], present), mask), x, column);
                values[r] += used < present ? used : present;
                if constexpr (signs) {
                    const __m512i word = _mm512_set1_epi64(load_bits(bits + r * stride, left, 0));
                    Sums<T, R, Values>::add(sign_sums, r, with_signs(word, low_positions, _mm512_load_si512(scale + column)), x, column);
                }
            }
            masks += kUnit / 8;
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
        static constexpr int kRows = signs && T > 1 ? 2 : 4;

        AVX512 static void run(const Product& product, const Prepared& x, const Rows& rows) {
            const int64_t groups = rows.count / kRows;
            for (int64_t group = 0; group < groups; ++group)
                multiply<T, kRows>(product, x, rows, in_order ? group * kRows : group, in_order ? 1 : groups);
            for (int64_t row = groups * kRows; row < rows.count; ++row) multiply<T, 1>(product, x, rows, row, 1);
        }
    };
};

}  // namespace

void avx512_kept(const Product& product, const Prepared& x, const Rows& rows) {
    // Where a row keeps values for at most a quarter of its columns, hardly ever more than 32 of them lie among 64
    // columns. With several tokens spreading is worth while, as they share the spread values.
    const bool few = product.kept * 4 <= product.columns && rows.token_count == 1;
    if (x.multiplies_signs) {
        if (few) for_token_groups<Packed<Listed, true>::template Loop>(rows, product, x);
        else for_token_groups<Packed<Spread<BFloat16<1>>, true>::template Loop>(rows, product, x);
    } else if (product.values_dtype == kFloat32) {
        for_token_groups<Packed<Spread<Float32>, false>::template Loop>(rows, product, x);
    } else if (product.values_dtype == kFloat16) {
        for_token_groups<Packed<Spread<Float16>, false>::template Loop>(rows, product, x);
    } else if (x.piece_count == 1) {
        if (few) for_token_groups<Packed<Listed, false>::template Loop>(rows, product, x);
        else for_token_groups<Packed<Spread<BFloat16<1>>, false>::template Loop>(rows, product, x);
    } else if (x.piece_count == 2) {
        for_token_groups<Packed<Spread<BFloat16<2>>, false>::template Loop>(rows, product, x);
    } else {
        for_token_groups<Packed<Spread<BFloat16<3>>, false>::template Loop>(rows, product, x);
    }
}

}  // namespace hf_lowrank

#endif
