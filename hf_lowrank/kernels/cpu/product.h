// The product of one compressed layer on a CPU: y = S x + Σ_b scale_out_b ⊙ (±1 · (scale_in_b ⊙ x)) + B (A x).
//
// Product is the C interface: plain data pointers, filled by the Python side. Prepared is derived from x once per
// call. Kernels are the loops over rows that each instruction set implements. Every loop adds to float32 sums.
#pragma once

#include <cstdint>

namespace hf_lowrank {

enum DType : int32_t { kNone = -1, kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum InstructionSet : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Maximum numbers of rows and tokens that one call of a loop takes. Its sums are float[kBlockTokens][kBlockRows].
constexpr int64_t kBlockRows = 64, kBlockTokens = 64;
// Maximum number of tokens that are multiplied in one pass over a few rows. More tokens take several passes, while the
// rows are in the first cache.
constexpr int64_t kGroupTokens = 4;
// With more tokens than this, AVX-512 multiplies bfloat16 x with the entries of signs and codes rounded to bfloat16: it puts
// them together once for all tokens. Where codes have a bitmap, each token takes more work until then.
constexpr int64_t kExactTokens = 8, kExactMaskedTokens = 4;
// Codes are dequantized in steps of this many.
constexpr int64_t kCodeStep = 64;
// Columns of x are padded with zeros to a multiple of this.
constexpr int64_t kUnit = 32;
// With codes in an order of their own, they are padded to a multiple of this.
constexpr int64_t kArrangedUnit = 128;
// Number of columns that share one lookup table of signed sums, and of the table's entries. AVX2 arranges the same
// memory in its own way.
constexpr int64_t kTableColumns = 4;
constexpr int64_t kTableEntries = 16;

extern "C" struct Product {
    int64_t tokens, columns, rows;
    const void* x;  // (tokens, columns)
    void* y;        // (tokens, rows), x's dtype
    // The sparse part, if values is not null: `kept` values per row, and a bitmap with ⌈columns/8⌉ bytes per row.
    const void* values;
    const uint8_t* mask;
    int64_t kept;
    // The binary part, if signs is not null.
    const uint8_t* signs;
    const void* scale_in;   // (binary_rank, columns)
    const void* scale_out;  // (rows, binary_rank)
    int64_t binary_rank;
    // The low-rank part, if lowrank_b is not null: A (rank, columns) and B (rows, rank). Without A it is a dense
    // matrix (rows, rank = columns).
    const void* lowrank_a;
    const void* lowrank_b;
    int64_t rank;
    // A pivoted low-rank part, if pivots is not null: a bitmap of those `rank` among the `outputs` values of y that
    // are A x itself. B has the others.
    const uint8_t* pivots;
    int64_t outputs;  // rows of y: `rows`, or with pivots rows + rank
    // A quantized matrix, if codes is not null: `kept` codes per row, a little-endian bit stream of whole bytes. Where
    // `mask` is null, every column has a code. Code q of b bits stands for (q − (2ᵇ − 1)/2) · scale, with one scale
    // per `group` codes.
    const uint8_t* codes;
    const void* code_scale;  // (rows, ⌈kept / group⌉)
    int64_t group;
    int32_t code_bits;
    int32_t x_dtype, values_dtype, scale_dtype, lowrank_dtype, code_scale_dtype;
    int32_t threads;
    int32_t instruction_set;
};

// x in the forms that the loops read. Only the forms that a product needs are made. Columns are padded with zeros to a
// multiple of kUnit.
struct Prepared {
    int64_t tokens, columns, padded;
    float* values;     // (tokens, padded)
    float* scaled;     // (tokens, padded): scale_in ⊙ x, for one term at a time
    float* tables;     // (binary_rank, tokens, padded / 4, 16): Σ ± scaled over a few columns, for each of their sign patterns
    uint16_t* pieces;  // (piece_count, tokens, padded) bfloat16 whose sum is x: one where x is bfloat16, up to three otherwise
    int piece_count;
    uint16_t* scale_in;     // (padded,) bfloat16, where multiplies_signs
    bool multiplies_signs;  // ± scale_in is multiplied with the piece of x, instead of looking up `tables`
    bool rounds_codes;      // entries of codes are rounded to bfloat16
};

struct Rows {
    int64_t first, count;
    int64_t first_token, token_count;
    float* sums;  // (token_count, kBlockRows)
};

struct Kernels {
    // Multiplies the sparse and the binary part.
    void (*packed)(const Product&, const Prepared&, const Rows&);
    // Multiplies a matrix (rows, prepared.columns) of the given dtype.
    void (*dense)(const void* matrix, DType dtype, const Prepared&, const Rows&);
    // Writes the signed sums of `scaled` (padded,) that `packed` looks up.
    void (*tables)(const float* scaled, int64_t padded, float* out);
    // Writes the `kept` values of one row of codes, and up to kCodeStep − 1 more.
    void (*dequantize)(const Product&, int64_t row, float* out);
    // Multiplies rows of codes whose groups are whole units: with the pieces of x where multiplies_bfloat16, otherwise without
    // a bitmap and with its values. Null where an instruction set has no such loop; so are the next two.
    void (*codes)(const Product&, const Prepared&, const Rows&);
    // Brings `padded` columns into the order in which `codes` multiplies codes without a bitmap.
    void (*arrange)(int32_t code_bits, int64_t padded, uint16_t* x);
    // Writes the `kept` values of one row of codes, rounded to bfloat16.
    void (*round)(const Product&, int64_t row, uint16_t* out);
    // Writes one row of the dense matrix S + Σ_b scale_out_b scale_in_b ⊙ (±1), of dtype product.x_dtype; scale_in is
    // (binary_rank, padded).
    void (*unpack)(const Product&, const float* scale_in, int64_t padded, int64_t row, void* out);
    bool multiplies_bfloat16;  // bfloat16 matrices are multiplied by the pieces of x
};

const Kernels& portable_kernels();
#if defined(__x86_64__) || defined(_M_X64)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// --- scalar conversions ------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bfloat16(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// Rounds to nearest, ties to even. A NaN stays a NaN.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_float16(uint16_t value) {
    uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
    uint32_t magnitude = value & 0x7fffu;
    if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
    if (magnitude < 0x400u) return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
    return from_bits(sign | ((magnitude << 13) + 0x38000000u));
}

inline uint16_t to_float16(float value) {
    uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
    uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and above; 65520..65536 carries into infinity below
    if (magnitude < 0x38800000u)                          // subnormal: adding 0.5 rounds at the last place of a float16
        return sign | static_cast<uint16_t>(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u);
    return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

inline float load_as_float(const void* data, int64_t index, DType dtype) {
    if (dtype == kFloat32) return static_cast<const float*>(data)[index];
    uint16_t value = static_cast<const uint16_t*>(data)[index];
    return dtype == kBFloat16 ? from_bfloat16(value) : from_float16(value);
}

inline void store_from_float(void* data, int64_t index, DType dtype, float value) {
    if (dtype == kFloat32) static_cast<float*>(data)[index] = value;
    else static_cast<uint16_t*>(data)[index] = dtype == kBFloat16 ? to_bfloat16(value) : to_float16(value);
}

inline int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// Returns up to four bytes of a bitmap row from byte `offset` on, with the bits past the row's end zero.
inline uint32_t load_bits(const uint8_t* row, int64_t width, int64_t offset) {
    uint32_t bits = 0;
    if (width - offset >= 4) __builtin_memcpy(&bits, row + offset, 4);
    else
        for (int64_t byte = 0; byte < width - offset; ++byte) bits |= static_cast<uint32_t>(row[offset + byte]) << 8 * byte;
    return bits;
}

// --- tokens --------------------------------------------------------------------------------------------------------------

// Calls Loop<tokens>::run(arguments..., rows) for groups of 1..kGroupTokens of the tokens of `rows`.
template <template <int> class Loop, typename... Arguments>
inline void for_token_groups(const Rows& rows, Arguments&&... arguments) {
    for (int64_t t = 0; t < rows.token_count; t += kGroupTokens) {
        int64_t count = rows.token_count - t < kGroupTokens ? rows.token_count - t : kGroupTokens;
        Rows group = {rows.first, rows.count, rows.first_token + t, count, rows.sums + t * kBlockRows};
        switch (count) {
            case 1: Loop<1>::run(arguments..., group); break;
            case 2: Loop<2>::run(arguments..., group); break;
            case 3: Loop<3>::run(arguments..., group); break;
            default: Loop<4>::run(arguments..., group); break;
        }
    }
}

}  // namespace hf_lowrank
