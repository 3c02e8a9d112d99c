// Codes without a bitmap as levels in the order that takes the fewest steps, with AVX-512.
//
// A block is a register of codes. An eight-byte word of it gets `words` whole codes, which are shifted out four at a time
// to the registers of levels: lane by lane, a product of these has codes of one unit of 32, and so one scale.
#pragma once

#include "avx512_levels.h"

namespace hf_lowrank {
namespace {

enum Kind { kNarrow, kMedium, kWide };  // 2 to 4, 5 and 6, 7 and 8 bits

constexpr Kind kind_of(int bits) { return bits <= 4 ? kNarrow : bits <= kTableBits ? kMedium : kWide; }

template <Kind kind>
struct Block {
    static constexpr int words = kind == kNarrow ? 16 : 8, registers = words / 4, products = kind == kWide ? 2 * registers : registers;
    static constexpr int64_t columns = 8 * words;
};

// The byte positions of blocks, and the unit of 32 columns from which each lane of a product takes its scale.
struct BlockTables {
    alignas(64) uint8_t bytes[9][64], bits[9][4][64];
    alignas(64) uint16_t low[9][32], high[9][32];
    alignas(64) int32_t units[3][16];
    constexpr BlockTables() : bytes(), bits(), low(), high(), units() {
        for (int b = 2; b <= 8; ++b) {
            const int words = kind_of(b) == kNarrow ? 16 : 8;
            for (int i = 0; i < 64; ++i) {
                bytes[b][i] = static_cast<uint8_t>((i / 8 * (words * b / 8) + i % 8) % 64);
                for (int r = 0; r < 4; ++r) {
                    const int upper = kind_of(b) == kWide && r >= 2;
                    bits[b][r][i] = static_cast<uint8_t>(((4 * (upper ? r - 2 : r) + i % 8 / 2) * b + 4 * upper + i % 2 * 8) % 64);
                }
            }
        }
        for (int lane = 0; lane < 16; ++lane) {
            units[kNarrow][lane] = lane / 4;
            units[kMedium][lane] = units[kWide][lane] = lane / 8;
        }
        for (int b = 2; b <= 8; ++b)
            for (int i = 0; i < 32; ++i) {
                // The level of a wide code is that of its lower four bits and 16 times that of the others.
                low[b][i] = b <= kTableBits ? kLevelTables.levels[b][i] : level(i % 16, 4);
                high[b][i] = b <= kTableBits ? kLevelTables.levels[b][32 + i] : static_cast<uint16_t>(level(i % (1 << (b - 4)), b - 4) + (4 << 7));
            }
    }
};
constexpr BlockTables kBlockTables;

// From where the words of four products take their columns, among the first or the second 64 of 128.
struct Arrangement {
    alignas(64) uint16_t places[3][4][32];
    uint32_t in_second[3][4];
    constexpr Arrangement() : places(), in_second() {
        for (int kind = 0; kind < 3; ++kind) {
            const int products = kind == kNarrow ? 4 : 2;
            for (int r = 0; r < 4; ++r)
                for (int word = 0; word < 8; ++word)
                    for (int j = 0; j < 4; ++j) {
                        const int column = r / products * 64 + 4 * (products * word + r % products) + j;
                        const int place = 4 * word + j;
                        places[kind][r][place] = static_cast<uint16_t>(column % 64);
                        in_second[kind][r] |= static_cast<uint32_t>(column / 64) << place;
                    }
        }
    }
};
constexpr Arrangement kArrangement;

template <Kind kind>
struct BlockLevels : Block<kind> {
    using Block<kind>::registers;
    using Block<kind>::products;
    __m512i bytes, bits[products], low, high, units;

    AVX512_INLINE BlockLevels of(int b) {
        BlockLevels levels;
        levels.bytes = _mm512_load_si512(kBlockTables.bytes[b]);
#pragma GCC unroll 4
        for (int r = 0; r < products; ++r) levels.bits[r] = _mm512_load_si512(kBlockTables.bits[b][r]);
        levels.low = _mm512_load_si512(kBlockTables.low[b]);
        levels.high = _mm512_load_si512(kBlockTables.high[b]);
        levels.units = _mm512_load_si512(kBlockTables.units[kind]);
        return levels;
    }

    // Writes the next levels. Of wide codes, two more registers hold their upper parts.
    AVX512_INLINE void next(const BlockLevels& levels, __m512i codes, __m512i (&out)[products]) {
        const __m512i each = _mm512_permutexvar_epi8(levels.bytes, codes);
#pragma GCC unroll 4
        for (int r = 0; r < products; ++r) {
            const __m512i words = _mm512_multishift_epi64_epi8(levels.bits[r], each);
            if (kind == kMedium) out[r] = _mm512_permutex2var_epi16(levels.low, words, levels.high);
            else out[r] = _mm512_permutexvar_epi16(words, r < registers ? levels.low : levels.high);
        }
    }

    // Returns the scale of each lane of a product.
    AVX512_INLINE __m512 scales(const BlockLevels& levels, const float* of_units) {
        return _mm512_permutexvar_ps(levels.units, _mm512_castps128_ps512(_mm_loadu_ps(of_units)));
    }
};

}  // namespace
}  // namespace hf_lowrank
