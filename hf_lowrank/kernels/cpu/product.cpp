// The product of one compressed layer and a few tokens: x is prepared, then blocks of rows are multiplied in parallel.
#include "product.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "scratch.h"
#include "threads.h"

namespace hf_lowrank {
namespace {

InstructionSet best_instruction_set() {
#if defined(__x86_64__) || defined(_M_X64)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("avx512bf16"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kPortable;
}

const Kernels& kernels_of(int32_t instruction_set) {
#if defined(__x86_64__) || defined(_M_X64)
    if (instruction_set == kAvx512) return avx512_kernels();
    if (instruction_set == kAvx2) return avx2_kernels();
#endif
    return portable_kernels();
}

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Returns how many bfloat16 pieces are needed to make any value of the dtype as their sum.
int exact_pieces(DType dtype) { return dtype == kBFloat16 ? 1 : dtype == kFloat16 ? 2 : 3; }

// Returns whether each unit of the codes of a row has one scale.
bool has_whole_units(const Product& product) { return product.group % kUnit == 0 || product.group >= product.kept; }

// The forms of x that a product's loops read, and where they lie in memory of the calling thread.
struct Forms {
    int64_t tokens, columns, padded, terms = 0;
    int pieces = 0;
    bool floats = false, multiplies_signs = false, multiplies_codes = false, rounds_codes = false;
    int32_t arranged_bits = 0;  // of the codes in whose order the pieces are arranged

    // Many tokens lie one unit further apart: with a power of two in between, they would share few lines of the first cache.
    Forms(int64_t tokens, int64_t columns)
        : tokens(tokens), columns(columns), padded(round_up(columns, kUnit) + (tokens > kExactTokens ? kUnit : 0)) {}

    void add_matrix(DType dtype, const Kernels& kernels, int piece_count) {
        if (kernels.multiplies_bfloat16 && dtype == kBFloat16) pieces = piece_count;
        else floats = true;
    }

    void add_codes(const Product& product, const Kernels& kernels) {
        const bool alone = !product.values && !product.signs && !product.lowrank_b;
        multiplies_codes = kernels.codes && alone && has_whole_units(product) && (kernels.multiplies_bfloat16 || !product.mask);
        if (!multiplies_codes || !kernels.multiplies_bfloat16) {
            floats = true;
            return;
        }
        pieces = exact_pieces(DType(product.x_dtype));
        rounds_codes = pieces == 1 && tokens > (product.mask ? kExactMaskedTokens : kExactTokens);
        if (product.mask || rounds_codes) return;
        arranged_bits = product.code_bits;
        padded = round_up(columns, kArrangedUnit);
    }

    void add_signs(const Product& product, const Kernels& kernels) {
        multiplies_signs = kernels.multiplies_bfloat16 && product.x_dtype == kBFloat16 && product.scale_dtype == kBFloat16 &&
                           product.values && product.values_dtype == kBFloat16 && product.binary_rank == 1;
        if (!multiplies_signs) terms = product.binary_rank;
    }

    bool makes_floats(DType dtype) const { return floats || terms || dtype != kBFloat16; }
    int64_t table_size() const { return padded / kTableColumns * kTableEntries; }
    size_t bytes() const { return (tokens * (padded * 2 + terms * table_size()) * 4 + (pieces * tokens + 1) * padded * 2); }

    Prepared in(char* memory) const {
        float* values = reinterpret_cast<float*>(memory);
        float* scaled = values + tokens * padded;
        float* tables = scaled + tokens * padded;
        uint16_t* parts = reinterpret_cast<uint16_t*>(tables + terms * tokens * table_size());
        return {tokens, columns, padded, values, scaled, tables, parts, pieces, parts + pieces * tokens * padded, multiplies_signs, rounds_codes};
    }
};

// Copies one token of bfloat16, with zeros after the last column; false if a value is not finite.
bool copy(const uint16_t* from, int64_t count, int64_t padded, uint16_t* out) {
    uint16_t not_finite = 0;
    for (int64_t j = 0; j < count; ++j) {
        out[j] = from[j];
        not_finite |= (from[j] & 0x7f80u) == 0x7f80u;
    }
    std::fill(out + count, out + padded, uint16_t{0});
    return !not_finite;
}

// Copies one token of any dtype to float32, in the same way.
bool convert(const void* x, DType dtype, int64_t token, const Prepared& prepared) {
    float* out = prepared.values + token * prepared.padded;
    int64_t start = token * prepared.columns;
    if (dtype == kFloat32) {
        std::copy_n(static_cast<const float*>(x) + start, prepared.columns, out);
    } else if (dtype == kBFloat16) {
        const uint16_t* from = static_cast<const uint16_t*>(x) + start;
        for (int64_t j = 0; j < prepared.columns; ++j) out[j] = from_bfloat16(from[j]);
    } else {
        for (int64_t j = 0; j < prepared.columns; ++j) out[j] = load_as_float(x, start + j, dtype);
    }
    std::fill(out + prepared.columns, out + prepared.padded, 0.0f);
    uint32_t not_finite = 0;
    for (int64_t j = 0; j < prepared.columns; ++j) not_finite |= (to_bits(out[j]) & 0x7f800000u) == 0x7f800000u;
    return !not_finite;
}

// Splits finite values into bfloat16 pieces. Each piece is what the ones before it leave, rounded.
void split(int64_t token, const Prepared& prepared) {
    for (int piece = 0; piece < prepared.piece_count; ++piece) {
        const float* values = prepared.values + token * prepared.padded;
        uint16_t* out = prepared.pieces + (piece * prepared.tokens + token) * prepared.padded;
        for (int64_t j = 0; j < prepared.padded; ++j) {
            float rest = values[j];
            for (int before = 0; before < piece; ++before)
                rest -= from_bfloat16(prepared.pieces[(before * prepared.tokens + token) * prepared.padded + j]);
            uint32_t bits = to_bits(rest);
            out[j] = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
        }
    }
}

bool prepare(const void* x, DType dtype, const Product& product, const Kernels& kernels, const Forms& forms, const Prepared& prepared) {
    std::atomic<bool> finite{true};
    auto prepare_token = [&](int64_t token) {
        bool fine = true;
        if (dtype == kBFloat16 && forms.pieces) {
            const uint16_t* from = static_cast<const uint16_t*>(x) + token * forms.columns;
            fine = copy(from, forms.columns, forms.padded, prepared.pieces + token * forms.padded);
        }
        if (fine && forms.makes_floats(dtype)) {
            fine = convert(x, dtype, token, prepared);
            if (fine && dtype != kBFloat16) split(token, prepared);
        }
        if (!fine) {
            finite = false;
            return;
        }
        if (forms.arranged_bits)
            for (int piece = 0; piece < forms.pieces; ++piece)
                kernels.arrange(forms.arranged_bits, forms.padded, prepared.pieces + (piece * forms.tokens + token) * forms.padded);
        const float* values = prepared.values + token * forms.padded;
        float* scaled = prepared.scaled + token * forms.padded;
        for (int64_t term = 0; term < forms.terms; ++term) {
            for (int64_t j = 0; j < forms.columns; ++j)
                scaled[j] = values[j] * load_as_float(product.scale_in, term * forms.columns + j, DType(product.scale_dtype));
            std::fill(scaled + forms.columns, scaled + forms.padded, 0.0f);
            kernels.tables(scaled, forms.padded, prepared.tables + (term * forms.tokens + token) * forms.table_size());
        }
    };
    if (forms.multiplies_signs) copy(static_cast<const uint16_t*>(product.scale_in), forms.columns, forms.padded, prepared.scale_in);
    parallel_for(forms.terms || forms.tokens > kExactTokens ? product.threads : 1, forms.tokens, prepare_token);
    return finite;
}

// Stores `count` sums side by side. Each dtype has a loop of its own, which a compiler can vectorize.
void store_row(void* y, int64_t first, DType dtype, const float* sums, int64_t count) {
    if (dtype == kFloat32) {
        std::copy_n(sums, count, static_cast<float*>(y) + first);
    } else if (dtype == kBFloat16) {
        uint16_t* out = static_cast<uint16_t*>(y) + first;
        for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(sums[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) store_from_float(y, first + i, dtype, sums[i]);
    }
}

// Calls step(rows) for every block of rows and group of tokens, with float32 sums that start at zero, and stores them.
template <class Step, class Store>
void for_each_block(const Product& product, int64_t row_count, const Step& step, const Store& store) {
    int64_t groups = (product.tokens + kBlockTokens - 1) / kBlockTokens;
    auto block = [&](int64_t index) {
        alignas(64) float sums[kBlockTokens * kBlockRows];
        for (int64_t group = 0; group < groups; ++group) {
            int64_t first = product.tokens * group / groups, last = product.tokens * (group + 1) / groups;
            Rows rows = {index * kBlockRows, std::min(kBlockRows, row_count - index * kBlockRows), first, last - first, sums};
            std::fill_n(sums, rows.token_count * kBlockRows, 0.0f);
            step(rows);
            for (int64_t t = 0; t < rows.token_count; ++t) store(first + t, rows.first, rows.count, sums + t * kBlockRows);
        }
    };
    parallel_for(product.threads, (row_count + kBlockRows - 1) / kBlockRows, block);
}

// Returns rows [first, first + count) of codes as a product of its own. Its values are float32 in memory of the
// calling thread.
Product dequantized(const Product& product, const Kernels& kernels, int64_t first, int64_t count) {
    thread_local Scratch scratch;
    float* values = reinterpret_cast<float*>(scratch.at_least((count * product.kept + kCodeStep) * 4));
    for (int64_t i = 0; i < count; ++i) kernels.dequantize(product, first + i, values + i * product.kept);
    Product rows = product;
    rows.rows = count;
    rows.values = values;
    rows.values_dtype = kFloat32;
    if (product.mask) rows.mask = product.mask + first * ((product.columns + 7) / 8);
    return rows;
}

// Returns one row of codes as a product of its own, with its values rounded to bfloat16.
Product rounded(const Product& product, const Kernels& kernels, int64_t index) {
    thread_local Scratch scratch;
    uint16_t* values = reinterpret_cast<uint16_t*>(scratch.at_least(product.kept * 2 + 1));
    kernels.round(product, index, values);
    Product row = product;
    row.rows = 1;
    row.values = values;
    row.values_dtype = kBFloat16;
    row.mask = product.mask + index * ((product.columns + 7) / 8);
    return row;
}

// Dequantizes a few rows at a time, and multiplies them while they are in the cache.
void multiply_codes(const Product& product, const Kernels& kernels, const Prepared& x, const Rows& rows) {
    constexpr int64_t step = 4;
    for (int64_t first = 0; first < rows.count; first += step) {
        const int64_t count = std::min(step, rows.count - first);
        const Product values = dequantized(product, kernels, rows.first + first, count);
        const Rows few = {0, count, rows.first_token, rows.token_count, rows.sums + first};
        if (product.mask) kernels.packed(values, x, few);
        else kernels.dense(values.values, kFloat32, x, few);
    }
}

// Returns the places in y of the values of A x, then of those of B (A x). It is empty if the pivots are not as many as
// the rank.
std::vector<int64_t> output_order(const Product& product) {
    std::vector<int64_t> pivots, others;
    for (int64_t row = 0; product.pivots && row < product.outputs; ++row)
        (product.pivots[row / 8] >> row % 8 & 1 ? pivots : others).push_back(row);
    if (static_cast<int64_t>(pivots.size()) != product.rank) return {};
    pivots.insert(pivots.end(), others.begin(), others.end());
    return pivots;
}

}  // namespace
}  // namespace hf_lowrank

using namespace hf_lowrank;

extern "C" __attribute__((visibility("default"))) int32_t hf_lowrank_instruction_set() {
    static const InstructionSet best = best_instruction_set();
    return best;
}

// Computes product.y. Returns 0 when done, and 1 where that is left to the caller: x (or A x) has a value that is not
// finite, the pivots are not as many as the rank, or there is no memory. In the dense product zeros turn an infinity
// into a NaN; here zeros are not stored.
extern "C" __attribute__((visibility("default"))) int32_t hf_lowrank_multiply(const Product* argument) {
    const Product& product = *argument;
    const Kernels& kernels = kernels_of(std::min(product.instruction_set, hf_lowrank_instruction_set()));
    const DType dtype = DType(product.x_dtype), lowrank_dtype = DType(product.lowrank_dtype);
    // A x is rounded to 16 significant bits where the result has 8 or 11 of them.
    const bool chained = product.lowrank_a;
    Forms forms(product.tokens, product.columns), inner_forms(product.tokens, chained ? product.rank : 0);
    if (product.values) forms.add_matrix(DType(product.values_dtype), kernels, exact_pieces(dtype));
    if (product.codes) forms.add_codes(product, kernels);
    if (product.lowrank_b) forms.add_matrix(lowrank_dtype, kernels, exact_pieces(dtype));
    if (product.signs) forms.add_signs(product, kernels);
    if (chained) inner_forms.add_matrix(lowrank_dtype, kernels, dtype == kFloat32 ? 3 : 2);
    thread_local Scratch scratch;
    char* memory = scratch.at_least(forms.bytes() + inner_forms.bytes() + round_up(product.tokens * inner_forms.columns * 4, 64));
    if (!memory) return 1;
    Prepared x = forms.in(memory);
    if (!prepare(product.x, dtype, product, kernels, forms, x)) return 1;
    std::vector<int64_t> order = output_order(product);
    if (product.pivots && order.empty()) return 1;
    auto store = [&](int64_t token, int64_t first, int64_t count, const float* sums) {
        const int64_t start = token * product.outputs;
        if (product.pivots)
            for (int64_t i = 0; i < count; ++i) store_from_float(product.y, start + order[first + i], dtype, sums[i]);
        else
            store_row(product.y, start + first, dtype, sums, count);
    };

    Prepared inner = chained ? inner_forms.in(memory + forms.bytes()) : x;
    if (chained) {
        float* ax = reinterpret_cast<float*>(memory + forms.bytes() + inner_forms.bytes());
        for_each_block(
            product, product.rank, [&](const Rows& rows) { kernels.dense(product.lowrank_a, lowrank_dtype, x, rows); },
            [&](int64_t token, int64_t first, int64_t count, const float* sums) {
                std::copy_n(sums, count, ax + token * product.rank + first);
                if (product.pivots) store(token, first, count, sums);
            });
        if (!prepare(ax, kFloat32, product, kernels, inner_forms, inner)) return 1;
    }
    for_each_block(
        product, product.rows,
        [&](const Rows& rows) {
            if (product.signs || product.values) kernels.packed(product, x, rows);
            if (forms.multiplies_codes) kernels.codes(product, x, rows);
            else if (product.codes) multiply_codes(product, kernels, x, rows);
            if (product.lowrank_b) kernels.dense(product.lowrank_b, lowrank_dtype, inner, rows);
        },
        [&](int64_t token, int64_t first, int64_t count, const float* sums) {
            store(token, product.pivots ? product.rank + first : first, count, sums);
        });
    return 0;
}

// Writes rows [first_row, first_row + row_count) of the dense matrix of the sparse, binary or quantized part to
// product.y, (row_count, columns) of dtype x_dtype.
extern "C" __attribute__((visibility("default"))) void hf_lowrank_unpack(const Product* argument, int64_t first_row, int64_t row_count) {
    const Product& product = *argument;
    const Kernels& kernels = kernels_of(std::min(product.instruction_set, hf_lowrank_instruction_set()));
    int64_t padded = round_up(product.columns, kUnit), terms = product.signs ? product.binary_rank : 0;
    thread_local Scratch scratch;
    float* scale_in = reinterpret_cast<float*>(scratch.at_least(terms * padded * 4));
    for (int64_t term = 0; term < terms; ++term)
        for (int64_t j = 0; j < padded; ++j)
            scale_in[term * padded + j] =
                j < product.columns ? load_as_float(product.scale_in, term * product.columns + j, DType(product.scale_dtype)) : 0.0f;
    const std::vector<uint8_t> all((product.columns + 7) / 8, 0xff);
    int64_t row_bytes = product.columns * element_size(DType(product.x_dtype));
    auto unpack = [&](int64_t index) {
        const int64_t row = first_row + index;
        char* out = static_cast<char*>(product.y) + index * row_bytes;
        if (!product.codes) return kernels.unpack(product, scale_in, padded, row, out);
        const bool rounds = kernels.round && product.x_dtype == kBFloat16 && has_whole_units(product);
        if (rounds && !product.mask) return kernels.round(product, row, reinterpret_cast<uint16_t*>(out));
        Product values = rounds ? rounded(product, kernels, row) : dequantized(product, kernels, row, 1);
        if (!product.mask) values.mask = all.data();
        kernels.unpack(values, scale_in, padded, 0, out);
    };
    parallel_for(product.threads, row_count, unpack);
}
