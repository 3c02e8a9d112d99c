// Products of kept values, signs and codes with more tokens, all bfloat16, with AVX-512 (VBMI2, BF16).
//
// The entries of the matrix are put together in small tiles and rounded to bfloat16. So they are unpacked once for all tokens, and
// multiplied once, instead of once with the value and once with the sign. A tile, the columns of x that it is multiplied
// with, and the sums are in the first caches together.
#include "product.h"

#if defined(__x86_64__) || defined(_M_X64)

#include "avx512_unpack.h"
#include "scratch.h"

namespace hf_lowrank {
namespace {

constexpr int64_t kTileRows = 8, kTileColumns = 1024;
// This many rows are multiplied together with a group of tokens, so that what is loaded is used several times.
constexpr int64_t kGroupRows = 4;

using Values = BFloat16<1>;

struct Tile {
    alignas(64) uint16_t entries[kTileRows][kTileColumns];
    __m512 sums[kTileRows][kBlockTokens];
    const uint16_t* values[kTileRows];  // where the values of the next columns begin
    // What is stored for the next rows is fetched from the first to the last byte, one cache line for each unit of a product.
    const char* next_bytes;
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
    const char* next_bytes = tile.next_bytes;
    const int64_t next_step = tile.next_step;
#pragma GCC unroll 1
    for (int64_t column = 0; column < columns; column += kUnit, next_bytes += next_step) {
        prefetch(next_bytes, 0);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) Sums<T, R, Values>::add(sums, r, _mm512_load_si512(tile.entries[row + r] + column), x, column);
    }
    tile.next_bytes = next_bytes;
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

// What a tile is unpacked from. `begin_rows` gives the tile's rows, which follow `row`; `unpack` writes the columns
// [begin, end) of one of them, with zeros up to a multiple of 32.
template <LevelKind kind>
struct Codes {
    const Product& product;
    RoundedCodes<kind> codes;
    int64_t first = 0;

    AVX512_INLINE Codes of(const Product& product) { return {product, RoundedCodes<kind>::of(product)}; }
    AVX512_INLINE void begin_rows(Codes& from, Tile&, int64_t row, int64_t count) {
        from.first = row;
        UnitScales::fetch(from.codes.scales, from.product, row + count, count);
    }
    AVX512_INLINE void unpack(const Codes& from, Tile& tile, int64_t i, int64_t begin, int64_t end) {
        uint16_t* out = tile.entries[i];
        if ((end - begin) % kUnit) _mm512_store_si512(out + (end - begin) / kUnit * kUnit, _mm512_setzero_si512());
        RoundedCodes<kind>::write(from.codes, from.product, from.first + i, begin, end, kTileRows, out);
    }
};

template <bool signs>
struct Kept {
    const Product& product;
    int64_t first = 0;

    AVX512_INLINE Kept of(const Product& product) { return {product}; }
    AVX512_INLINE void begin_rows(Kept& from, Tile& tile, int64_t row, int64_t count) {
        from.first = row;
        for (int64_t i = 0; i < count; ++i)
            tile.values[i] = static_cast<const Values::Element*>(from.product.values) + (row + i) * from.product.kept;
    }
    AVX512_INLINE void unpack(const Kept& from, Tile& tile, int64_t i, int64_t begin, int64_t end) {
        unpack_bfloat16<signs, true>(from.product, from.first + i, begin, end, tile.values[i], kTileRows, tile.entries[i]);
    }
};

// Codes with a bitmap: the values of the tile's rows are converted to memory of the calling thread.
template <LevelKind kind>
struct KeptCodes {
    const Product& product;
    RoundedCodes<kind> codes;
    uint16_t* values;
    Product rows;

    AVX512_INLINE KeptCodes of(const Product& product) {
        thread_local Scratch scratch;
        uint16_t* values = reinterpret_cast<uint16_t*>(scratch.at_least(static_cast<size_t>(kTileRows * product.kept * 2)));
        KeptCodes from = {product, RoundedCodes<kind>::of(product), values, product};
        from.rows.values = values;
        return from;
    }
    AVX512_INLINE void begin_rows(KeptCodes& from, Tile& tile, int64_t row, int64_t count) {
        const int64_t kept = from.product.kept;
        UnitScales::fetch(from.codes.scales, from.product, row + count, count);
        for (int64_t i = 0; i < count; ++i) {
            tile.values[i] = from.values + i * kept;
            RoundedCodes<kind>::write(from.codes, from.product, row + i, 0, kept, kTileRows, from.values + i * kept);
        }
        from.rows.rows = count;
        from.rows.mask = from.product.mask + row * ((from.product.columns + 7) / 8);
    }
    AVX512_INLINE void unpack(const KeptCodes& from, Tile& tile, int64_t i, int64_t begin, int64_t end) {
        unpack_bfloat16<false, true>(from.rows, i, begin, end, tile.values[i], kTileRows, tile.entries[i]);
    }
};

template <class From>
AVX512 void multiply(const Product& product, const Prepared& x, const Rows& rows) {
    const int64_t row_bytes = product.codes ? (product.kept * product.code_bits + 7) / 8 : product.kept * int64_t(sizeof(Values::Element));
    const char* stored = static_cast<const char*>(product.codes ? product.codes : product.values);
    const int64_t units = (x.columns + kUnit - 1) / kUnit, token_groups = (rows.token_count + kGroupTokens - 1) / kGroupTokens;
    From from = From::of(product);
    Tile tile;
    tile.next_step = kTileRows * row_bytes / (units * token_groups * (kTileRows / kGroupRows)) + 1;
    for (int64_t first = 0; first < rows.count; first += kTileRows) {
        const int64_t count = rows.count - first < kTileRows ? rows.count - first : kTileRows;
        tile.next_bytes = stored + (rows.first + first + kTileRows) * row_bytes;
        From::begin_rows(from, tile, rows.first + first, count);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t t = 0; t < rows.token_count; ++t) tile.sums[i][t] = _mm512_setzero_ps();
        for (int64_t column = 0; column < x.columns; column += kTileColumns) {
            const int64_t end = column + kTileColumns < x.columns ? column + kTileColumns : x.columns;
            for (int64_t i = 0; i < count; ++i) From::unpack(from, tile, i, column, end);
            for_token_groups<Loop>(rows, tile, count, rows.first_token, column, end - column, x);
        }
        store_sums(tile.sums, count, first, rows);
    }
}

template <LevelKind kind>
struct MultiplyCodes {
    static void run(const Product& product, const Prepared& x, const Rows& rows) {
        if (product.mask) multiply<KeptCodes<kind>>(product, x, rows);
        else multiply<Codes<kind>>(product, x, rows);
    }
};

}  // namespace

void avx512_tiles(const Product& product, const Prepared& x, const Rows& rows) {
    if (product.signs) multiply<Kept<true>>(product, x, rows);
    else if (!product.kept) return;
    else if (product.codes) for_level_kind<MultiplyCodes>(product.code_bits, product, x, rows);
    else multiply<Kept<false>>(product, x, rows);
}

}  // namespace hf_lowrank

#endif
