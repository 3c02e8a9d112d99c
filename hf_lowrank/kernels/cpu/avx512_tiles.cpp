// Products of kept values and signs with 9 to 32 tokens, all bfloat16, with AVX-512 (VBMI2, BF16).
//
// The entries of the sum of both parts are put together in small tiles and rounded to bfloat16. So they are multiplied
// once, instead of once with the value and once with the sign. A tile, the columns of x that it is multiplied with,
// and the sums are in the first cache together.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_unpack.h"

namespace hf_lowrank {
namespace {

constexpr int64_t kTileRows = 8, kTileColumns = 512;
// This many rows are multiplied together with a group of tokens, so that what is loaded is used several times.
constexpr int64_t kGroupRows = 4;

using Values = BFloat16<1>;

struct Tile {
    alignas(64) uint16_t entries[kTileRows][kTileColumns];
    __m512 sums[kTileRows][kBlockTokens];
    const uint16_t* values[kTileRows];  // where the values of the next columns begin
    // The values of the next rows are fetched from the first to the last, one cache line for each unit of a product.
    const char* next_values;
    int64_t next_step;
};

// Multiplies R rows of a tile from `row` on with T tokens from `token` on; x holds those tokens' columns of the tile.
template <int T, int R>
AVX512_INLINE void multiply_rows(Tile& tile, int64_t row, int64_t token, int64_t columns, const Values::Inputs& x) {
    Sums<T, R, Values> sums;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sums.of[r][t] = tile.sums[row + r][token + t];
    const char* next_values = tile.next_values;
    const int64_t next_step = tile.next_step;
#pragma GCC unroll 1
    for (int64_t column = 0; column < columns; column += kUnit, next_values += next_step) {
        prefetch(next_values, 0);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) Sums<T, R, Values>::add(sums, r, _mm512_load_si512(tile.entries[row + r] + column), x, column);
    }
    tile.next_values = next_values;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) tile.sums[row + r][token + t] = sums.of[r][t];
}

template <int T>
struct Loop {
    AVX512 static void run(Tile& tile, int64_t tile_rows, int64_t first_token, int64_t column, int64_t columns, const Prepared& prepared,
                           const Rows& rows) {
        Values::Inputs x = Values::inputs(prepared, rows);
        x.at += column;
        const int64_t token = rows.first_token - first_token;
        int64_t row = 0;
        for (; row + kGroupRows <= tile_rows; row += kGroupRows) multiply_rows<T, kGroupRows>(tile, row, token, columns, x);
        for (; row < tile_rows; ++row) multiply_rows<T, 1>(tile, row, token, columns, x);
    }
};

}  // namespace

AVX512 void avx512_tiles(const Product& product, const Prepared& x, const Rows& rows) {
    const int64_t row_bytes = product.kept * int64_t(sizeof(Values::Element)), units = (x.columns + kUnit - 1) / kUnit;
    const int64_t token_groups = (rows.token_count + kGroupTokens - 1) / kGroupTokens;
    Tile tile;
    tile.next_step = kTileRows * row_bytes / (units * token_groups * (kTileRows / kGroupRows)) + 1;
    for (int64_t first = 0; first < rows.count; first += kTileRows) {
        const int64_t count = rows.count - first < kTileRows ? rows.count - first : kTileRows, row = rows.first + first;
        for (int64_t i = 0; i < count; ++i) {
            tile.values[i] = static_cast<const Values::Element*>(product.values) + (row + i) * product.kept;
            for (int64_t t = 0; t < rows.token_count; ++t) tile.sums[i][t] = _mm512_setzero_ps();
        }
        tile.next_values = reinterpret_cast<const char*>(tile.values[0]) + kTileRows * row_bytes;
        for (int64_t column = 0; column < x.columns; column += kTileColumns) {
            const int64_t end = column + kTileColumns < x.columns ? column + kTileColumns : x.columns;
            for (int64_t i = 0; i < count; ++i)
                unpack_bfloat16<true, true>(product, row + i, column, end, tile.values[i], kTileRows, tile.entries[i]);
            for_token_groups<Loop>(rows, tile, count, rows.first_token, column, end - column, x);
        }
        for (int64_t i = 0; i < count; ++i)
            for (int64_t t = 0; t < rows.token_count; ++t) rows.sums[t * kBlockRows + first + i] += _mm512_reduce_add_ps(tile.sums[i][t]);
    }
}

}  // namespace hf_lowrank

#endif
