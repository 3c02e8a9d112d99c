// Codes as the levels that they stand for, in bfloat16, with AVX-512.
//
// A level q − (2ᵇ − 1)/2 has at most eight significant bits: it is a bfloat16, and vdpbf16ps multiplies it exactly. Codes
// of up to six bits select their level from a table of 64, where the levels are repeated: so bits above the code's own
// need not be cleared. Wider codes are written into the fraction of a float32, from which a constant is subtracted.
#pragma once

#include "avx512_values.h"

namespace hf_lowrank {
namespace {

constexpr uint16_t level(int code, int bits) {
    const int twice = 2 * code - ((1 << bits) - 1);
    const uint32_t magnitude = static_cast<uint32_t>(twice < 0 ? -twice : twice);
    int top = 0;
    while (magnitude >> (top + 1)) ++top;
    const uint32_t fraction = (magnitude << (7 - top)) & 0x7fu, exponent = static_cast<uint32_t>(top - 1 + 127);
    return static_cast<uint16_t>((twice < 0 ? 0x8000u : 0u) | exponent << 7 | fraction);
}

constexpr int kTableBits = 6;  // of the widest code that selects from a table

// Positions by which 32 codes, which are 4 b bytes, reach a word each: four codes go to an eight-byte word, from which
// they are shifted out.
struct LevelTables {
    alignas(64) uint8_t bytes[9][64], bits[9][64];
    alignas(64) uint16_t levels[kTableBits + 1][64];
    constexpr LevelTables() : bytes(), bits(), levels() {
        for (int b = 2; b <= 8; ++b) {
            for (int i = 0; i < 64; ++i) {
                const int start = 4 * (i / 8) * b;
                bytes[b][i] = static_cast<uint8_t>((start / 8 + i % 8) % 64);
                bits[b][i] = static_cast<uint8_t>(start % 8 + i % 8 / 2 * b + i % 2 * 8);
                if (b <= kTableBits) levels[b][i] = level(i % (1 << b), b);
            }
        }
    }
};
constexpr LevelTables kLevelTables;

// The order that takes 32 words in turn from one half of a register and from the other.
struct InTurn {
    alignas(64) uint16_t lanes[32];
    constexpr InTurn() : lanes() {
        for (int word = 0; word < 32; ++word) lanes[word] = static_cast<uint16_t>(word / 2 + word % 2 * 16);
    }
};
constexpr InTurn kInTurn;

// Returns the even and the odd ones of 32 bfloat16 words in float32.
AVX512_INLINE __m512 even_words(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
AVX512_INLINE __m512 odd_words(__m512i words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Rounds two halves to bfloat16 and puts the words in turn.
AVX512_INLINE __m512i round_in_turn(__m512 even, __m512 odd) {
    return _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn.lanes), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// The levels of codes that lie in the low word (even) or in the high word (odd) of 32 bits, from `position` on.
struct WideLevels {
    // From here on, a float32 counts in halves. So the code is where it was multiplied by two.
    static constexpr uint32_t kMagic = 0x4a800000u;
    static constexpr int kPosition = 1;
    __m512i mask, magic;
    __m512 offset;

    AVX512_INLINE WideLevels of(int b) {
        return {_mm512_set1_epi32(((1 << b) - 1) << kPosition), _mm512_set1_epi32(static_cast<int>(kMagic)),
                _mm512_set1_ps(from_bits(kMagic) + ((1 << b) - 1) / 2.0f)};
    }
    AVX512_INLINE __m512 even(const WideLevels& levels, __m512i words) {
        const __m512i number = _mm512_ternarylogic_epi32(words, levels.mask, levels.magic, 0xea);  // (words & mask) | magic
        return _mm512_sub_ps(_mm512_castsi512_ps(number), levels.offset);
    }
    AVX512_INLINE __m512 odd(const WideLevels& levels, __m512i words) { return even(levels, _mm512_srli_epi32(words, 16)); }
};

// How levels are found: selected among 32 or among 64, or from wide codes.
enum LevelKind { kFewLevels, kManyLevels, kWideCodes };

constexpr LevelKind level_kind(int bits) { return bits <= 5 ? kFewLevels : bits <= kTableBits ? kManyLevels : kWideCodes; }

// Levels in the order of the codes.
template <LevelKind kind>
struct Levels {
    __m512i bytes, bits, low, high;
    __m512 low_floats, high_floats;  // the first 16 levels and the next 16
    WideLevels wide;
    int64_t unit_bytes;

    AVX512_INLINE Levels of(int b) {
        const uint16_t* table = kLevelTables.levels[b <= kTableBits ? b : kTableBits];
        // A wide code is taken one bit early, and so stands one bit further up. The junk before the first one of an
        // eight-byte word is cleared.
        const __m512i early = _mm512_set1_epi8(kind == kWideCodes ? WideLevels::kPosition : 0);
        const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
        const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(table + 16));
        return {_mm512_load_si512(kLevelTables.bytes[b]), _mm512_sub_epi8(_mm512_load_si512(kLevelTables.bits[b]), early),
                _mm512_load_si512(table), _mm512_load_si512(table + kUnit), even_words(_mm512_cvtepu16_epi32(first)),
                even_words(_mm512_cvtepu16_epi32(second)), WideLevels::of(b), 4 * b};
    }

    // Returns which bytes hold the next 32 codes where `left` bytes of the row remain.
    AVX512_INLINE __mmask64 present(const Levels& levels, int64_t left) {
        return first_of_64(left < levels.unit_bytes ? left : levels.unit_bytes);
    }

    // Returns the words that begin with the next 32 codes.
    AVX512_INLINE __m512i words(const Levels& levels, const uint8_t* codes, __mmask64 present) {
        const __m512i packed = _mm512_maskz_loadu_epi8(present, codes);
        return _mm512_multishift_epi64_epi8(levels.bits, _mm512_permutexvar_epi8(levels.bytes, packed));
    }

    AVX512_INLINE __m512i next(const Levels& levels, const uint8_t* codes, __mmask64 present) {
        const __m512i at = words(levels, codes, present);
        if (kind == kFewLevels) return _mm512_permutexvar_epi16(at, levels.low);
        if (kind == kManyLevels) return _mm512_permutex2var_epi16(levels.low, at, levels.high);
        return round_in_turn(WideLevels::even(levels.wide, at), WideLevels::odd(levels.wide, at));
    }

    // Returns the next 32 levels times a scale, rounded to bfloat16. Where levels are few, they are multiplied before one is
    // selected.
    AVX512_INLINE __m512i next_scaled(const Levels& levels, const uint8_t* codes, __mmask64 present, __m512 scale) {
        const __m512i at = words(levels, codes, present);
        if (kind == kFewLevels) {
            const __m512bh scaled = _mm512_cvtne2ps_pbh(_mm512_mul_ps(levels.high_floats, scale), _mm512_mul_ps(levels.low_floats, scale));
            return _mm512_permutexvar_epi16(at, (__m512i)scaled);
        }
        if (kind == kManyLevels) {
            const __m512i level = _mm512_permutex2var_epi16(levels.low, at, levels.high);
            return round_in_turn(_mm512_mul_ps(even_words(level), scale), _mm512_mul_ps(odd_words(level), scale));
        }
        return round_in_turn(_mm512_mul_ps(WideLevels::even(levels.wide, at), scale), _mm512_mul_ps(WideLevels::odd(levels.wide, at), scale));
    }
};

// Calls Function<kind>::run(arguments...) for codes of `bits` bits.
template <template <LevelKind> class Function, typename... Arguments>
inline void for_level_kind(int bits, Arguments&&... arguments) {
    switch (level_kind(bits)) {
        case kFewLevels: Function<kFewLevels>::run(arguments...); break;
        case kManyLevels: Function<kManyLevels>::run(arguments...); break;
        default: Function<kWideCodes>::run(arguments...);
    }
}

// --- scales ----------------------------------------------------------------------------------------------------------------------

// Scales are read for this many units of 32 codes at a time.
constexpr int64_t kScaleUnits = 128;
// Loops load a few scales at once, and may read beyond the last.
constexpr int64_t kScalePadding = 16;

AVX512_INLINE __m512 load_scales(const Product& product, int64_t index, int64_t count) {
    const __mmask16 present = static_cast<__mmask16>(first_of_32(count));
    if (product.code_scale_dtype == kFloat32) return _mm512_maskz_loadu_ps(present, static_cast<const float*>(product.code_scale) + index);
    const __m256i words = _mm256_maskz_loadu_epi16(present, static_cast<const uint16_t*>(product.code_scale) + index);
    if (product.code_scale_dtype == kFloat16) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// The scale of each unit of 32 codes of a row. Groups are whole units, of which there are at least one.
struct UnitScales {
    int64_t groups, each;  // units of a group
    int32_t whole, rest;   // 16 units are `whole` groups and `rest` units
    __m512i lanes, inverse;

    AVX512_INLINE UnitScales of(const Product& product) {
        UnitScales scales;
        scales.groups = (product.kept + product.group - 1) / product.group;
        scales.each = scales.groups > 1 ? product.group / kUnit : (product.kept + kUnit - 1) / kUnit;
        scales.whole = static_cast<int32_t>(16 / scales.each);
        scales.rest = static_cast<int32_t>(16 % scales.each);
        scales.lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        // Dividing a number below 32 is multiplying by the inverse in 1 / 1024, rounded up.
        scales.inverse = _mm512_set1_epi32(static_cast<int>((1024 + scales.each - 1) / scales.each));
        return scales;
    }

    // Fetches the scales of rows [row, row + count).
    AVX512_INLINE void fetch(const UnitScales& scales, const Product& product, int64_t row, int64_t count) {
        const int64_t row_bytes = scales.groups * element_size(DType(product.code_scale_dtype));
        const char* at = static_cast<const char*>(product.code_scale) + row * row_bytes;
        for (int64_t byte = 0; byte < count * row_bytes; byte += 64) prefetch(at, byte);
    }

    // Writes the scales of `count` units from `unit` on, and zeros for kScalePadding more.
    AVX512_INLINE void write(const UnitScales& scales, const Product& product, int64_t row, int64_t unit, int64_t count, float* out) {
        // Of the next 16 units, the first has had `begun` units of its group before it.
        int64_t group = unit ? unit / scales.each : 0, begun = unit - group * scales.each;
        for (int64_t done = 0; done < count; done += 16) {
            const int64_t left = scales.groups - group, ends = scales.each - begun;
            const __m512 loaded = load_scales(product, row * scales.groups + group, left < 16 ? left : 16);
            const __m512i numbers = _mm512_add_epi32(scales.lanes, _mm512_set1_epi32(static_cast<int>(begun)));
            const __m512i next_group = _mm512_set1_epi32(static_cast<int>(ends < 16 ? ends : 16));
            const __m512i later = _mm512_maskz_set1_epi32(_mm512_cmpge_epi32_mask(scales.lanes, next_group), 1);
            const __m512i index = scales.each < 16 ? _mm512_srli_epi32(_mm512_mullo_epi32(numbers, scales.inverse), 10) : later;
            _mm512_storeu_ps(out + done, _mm512_permutexvar_ps(index, loaded));
            group += scales.whole;
            begun += scales.rest;
            if (begun >= scales.each) begun -= scales.each, ++group;
        }
        _mm512_storeu_ps(out + count, _mm512_setzero_ps());
    }
};

// Codes with their scales, rounded to bfloat16. What depends on the product alone is found once.
template <LevelKind kind>
struct RoundedCodes {
    Levels<kind> levels;
    UnitScales scales;
    int64_t width;

    AVX512_INLINE RoundedCodes of(const Product& product) {
        return {Levels<kind>::of(product.code_bits), UnitScales::of(product), (product.kept * product.code_bits + 7) / 8};
    }

    // Writes values [begin, end) of a row, where begin is a multiple of kUnit. Meanwhile the row `rows_ahead` further on is fetched.
    AVX512_INLINE void write(const RoundedCodes& codes, const Product& product, int64_t row, int64_t begin, int64_t end,
                             int64_t rows_ahead, uint16_t* out) {
        const uint8_t* at = product.codes + row * codes.width + begin / 8 * product.code_bits;
        const uint8_t* last_code = product.codes + (row + 1) * codes.width;
        const int64_t unit_bytes = codes.levels.unit_bytes, bytes_ahead = rows_ahead * codes.width;
        const __mmask64 whole = Levels<kind>::present(codes.levels, unit_bytes);
        alignas(64) float scales[kScaleUnits + kScalePadding];
        for (int64_t first = begin; first < end; first += kScaleUnits * kUnit) {
            const int64_t last = end - first < kScaleUnits * kUnit ? end : first + kScaleUnits * kUnit;
            UnitScales::write(codes.scales, product, row, first / kUnit, (last - first + kUnit - 1) / kUnit, scales);
            const float* scale = scales;
            int64_t i = first;
            for (; i + kUnit <= last; i += kUnit, at += unit_bytes, out += kUnit, ++scale) {
                prefetch(at, bytes_ahead);
                _mm512_storeu_si512(out, Levels<kind>::next_scaled(codes.levels, at, whole, _mm512_set1_ps(*scale)));
            }
            if (i == last) continue;
            const __mmask64 present = Levels<kind>::present(codes.levels, last_code - at);
            const __m512i values = Levels<kind>::next_scaled(codes.levels, at, present, _mm512_set1_ps(*scale));
            _mm512_mask_storeu_epi16(out, first_of_32(last - i), values);
        }
    }
};

}  // namespace
}  // namespace hf_lowrank
