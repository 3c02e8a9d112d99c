// Products of codes without a bitmap with 9 to 16 tokens, exactly, with AVX-512.
//
// The levels of a few rows are unpacked once for all tokens, and stay in the first cache with the columns of x that they are
// multiplied with. The sums of a block are multiplied with its scales.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_blocks.h"

namespace hf_lowrank {
namespace {

constexpr int64_t kTileRows = 8, kTileColumns = 1024;
constexpr int64_t kGroupRows = 2;  // multiplied together with a group of tokens

template <Kind kind>
struct LevelTile {
    using Levels = BlockLevels<kind>;
    static constexpr int64_t kBlocks = kTileColumns / Levels::columns;
    static constexpr int registers = Levels::registers;

    alignas(64) uint16_t levels[kTileRows][kTileColumns];
    __m512 scales[kTileRows][kBlocks], sums[kTileRows][kBlockTokens];
    // The codes of the next rows are fetched from the first to the last byte, one cache line for each block of a product.
    const uint8_t* next_codes;
    int64_t next_step;

    // Adds the upper parts of wide codes to the lower ones. The sums are levels, and so bfloat16.
    AVX512_INLINE void join(__m512i (&parts)[Levels::products]) {
#pragma GCC unroll 2
        for (int r = 0; r < registers; ++r) {
            const __m512i upper = parts[Levels::products - registers + r];
            const __m512 even = _mm512_add_ps(even_words(parts[r]), even_words(upper)), odd = _mm512_add_ps(odd_words(parts[r]), odd_words(upper));
            parts[r] = round_in_turn(even, odd);
        }
    }

    // Unpacks columns from `column` on, at most kTileColumns, of a row of the product to a row of the tile.
    AVX512_INLINE void unpack(LevelTile& tile, const Product& product, const Levels& levels, const UnitScales& unit_scales, int64_t row,
                              int64_t column, int64_t tile_row) {
        const int64_t width = (product.kept * product.code_bits + 7) / 8, block_bytes = Levels::columns / 8 * product.code_bits;
        const int64_t columns = product.kept - column < kTileColumns ? product.kept - column : kTileColumns;
        const uint8_t *codes = product.codes + row * width + column / 8 * product.code_bits, *end = product.codes + (row + 1) * width;
        alignas(64) float scales[kTileColumns / kUnit + kScalePadding];
        UnitScales::write(unit_scales, product, row, column / kUnit, (columns + kUnit - 1) / kUnit, scales);
        for (int64_t block = 0; block * Levels::columns < columns; ++block, codes += block_bytes) {
            __m512i values[Levels::products];
            Levels::next(levels, _mm512_maskz_loadu_epi8(first_of_64(end - codes < block_bytes ? end - codes : block_bytes), codes), values);
            if (kind == kWide) join(values);
#pragma GCC unroll 4
            for (int r = 0; r < registers; ++r) _mm512_store_si512(tile.levels[tile_row] + block * Levels::columns + r * kUnit, values[r]);
            tile.scales[tile_row][block] = Levels::scales(levels, scales + block * (Levels::columns / kUnit));
        }
    }

    // Multiplies R rows of the tile from `row` on with T tokens from `token` on; x holds those tokens' columns of the tile.
    template <int T, int R>
    AVX512_INLINE void multiply_rows(LevelTile& tile, int64_t row, int64_t token, int64_t columns, const uint16_t* x, int64_t stride) {
        // A pointer for each token, so that all share one offset.
        const uint16_t* of_token[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) of_token[t] = x + t * stride;
        const uint8_t* next_codes = tile.next_codes;
        const int64_t next_step = tile.next_step;
        const uint16_t* levels = tile.levels[row];
        const __m512* scales = tile.scales[row];
        __m512 sums[R][T];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sums[r][t] = tile.sums[row + r][token + t];
#pragma GCC unroll 1
        for (int64_t column = 0; column < columns; column += Levels::columns, ++scales, next_codes += next_step) {
            prefetch(next_codes, 0);
            __m512 of_block[R][T];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) of_block[r][t] = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int k = 0; k < registers; ++k)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    const __m512bh inputs = (__m512bh)_mm512_load_si512(of_token[t] + column + k * kUnit);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        const __m512i values = _mm512_load_si512(levels + r * kTileColumns + column + k * kUnit);
                        of_block[r][t] = _mm512_dpbf16_ps(of_block[r][t], (__m512bh)values, inputs);
                    }
                }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) sums[r][t] = _mm512_fmadd_ps(of_block[r][t], scales[r * kBlocks], sums[r][t]);
        }
        tile.next_codes = next_codes;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) tile.sums[row + r][token + t] = sums[r][t];
    }

    template <int T>
    struct Loop {
        AVX512 static void run(LevelTile& tile, int64_t tile_rows, int64_t first_token, int64_t columns, const uint16_t* x, int64_t stride,
                               const Rows& rows) {
            const int64_t token = rows.first_token - first_token;
            const uint16_t* at = x + rows.first_token * stride;
            int64_t row = 0;
            for (; row + kGroupRows <= tile_rows; row += kGroupRows) multiply_rows<T, kGroupRows>(tile, row, token, columns, at, stride);
            for (; row < tile_rows; ++row) multiply_rows<T, 1>(tile, row, token, columns, at, stride);
        }
    };

    AVX512 static void run(const Product& product, const Prepared& x, const Rows& rows) {
        const auto levels = Levels::of(product.code_bits);
        const auto unit_scales = UnitScales::of(product);
        const int64_t width = (product.kept * product.code_bits + 7) / 8, blocks = (product.kept + Levels::columns - 1) / Levels::columns;
        const int64_t steps = blocks * ((rows.token_count + kGroupTokens - 1) / kGroupTokens) * (kTileRows / kGroupRows);
        LevelTile tile;
        tile.next_step = kTileRows * width / steps + 1;
        for (int64_t first = 0; first < rows.count; first += kTileRows) {
            const int64_t count = rows.count - first < kTileRows ? rows.count - first : kTileRows;
            tile.next_codes = product.codes + (rows.first + first + kTileRows) * width;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t t = 0; t < rows.token_count; ++t) tile.sums[i][t] = _mm512_setzero_ps();
            for (int64_t column = 0; column < product.kept; column += kTileColumns) {
                const int64_t columns = product.kept - column < kTileColumns ? product.kept - column : kTileColumns;
                for (int64_t i = 0; i < count; ++i) unpack(tile, product, levels, unit_scales, rows.first + first + i, column, i);
                for_token_groups<Loop>(rows, tile, count, rows.first_token, columns, x.pieces + column, x.padded);
            }
            store_sums(tile.sums, count, first, rows);
        }
    }
};

}  // namespace

void avx512_level_tiles(const Product& product, const Prepared& x, const Rows& rows) {
    switch (kind_of(product.code_bits)) {
        case kNarrow: LevelTile<kNarrow>::run(product, x, rows); break;
        case kMedium: LevelTile<kMedium>::run(product, x, rows); break;
        default: LevelTile<kWide>::run(product, x, rows);
    }
}

}  // namespace hf_lowrank

#endif
