// Random products through the C interface, for a run under the address and undefined-behaviour sanitizers (with
// -fsanitize=thread instead, under the thread sanitizer):
//
//   g++ -std=c++17 -O1 -g -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all -Ihf_lowrank/kernels/cpu
//       hf_lowrank/kernels/cpu/*.cpp tests/kernels/sanitized_products.cpp -pthread -ldl -o sanitized_products && ./sanitized_products
//
// A number after it is another seed.
//
// Every tensor has its exact size on the heap, so that a read or write past an end is found; masks may keep more or fewer values
// than are stored, as in a damaged file.
#include "product.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace hf_lowrank;

extern "C" int32_t hf_lowrank_instruction_set();
extern "C" int32_t hf_lowrank_multiply(const Product*);
extern "C" void hf_lowrank_unpack(const Product*, int64_t first_row, int64_t row_count);

int main(int count, char** arguments) {
    std::mt19937 random(count > 1 ? std::atoi(arguments[1]) : 0);
    auto between = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
    auto tensor = [&](int64_t elements, DType dtype) {
        std::vector<char> data(static_cast<size_t>(elements * element_size(dtype)));
        for (int64_t i = 0; i < elements; ++i) store_from_float(data.data(), i, dtype, std::normal_distribution<float>()(random));
        return data;
    };
    auto bits = [&](int64_t count) {
        std::vector<uint8_t> data(static_cast<size_t>(count));
        for (auto& byte : data) byte = static_cast<uint8_t>(between(0, 255));
        return data;
    };
    int products = 0;
    for (int round = 0; round < 400; ++round) {
        for (int32_t instruction_set = 0; instruction_set <= hf_lowrank_instruction_set(); ++instruction_set) {
            DType dtype = DType(between(0, 2)), x_dtype = between(0, 1) ? dtype : DType(between(0, 2));
            int64_t rows = between(1, 150), columns = between(1, between(0, 3) ? 400 : 1200), tokens = between(1, between(0, 3) ? 20 : 70);
            int64_t kept = between(0, columns), terms = between(0, 1) ? 1 : between(2, 3), rank = between(1, 40), width = (columns + 7) / 8;
            auto x = tensor(tokens * columns, x_dtype), y = tensor(tokens * (rows + rank), x_dtype), values = tensor(rows * kept, dtype);
            auto mask = bits(rows * width), signs = bits(rows * width);
            auto scale_in = tensor(terms * columns, dtype), scale_out = tensor(rows * terms, dtype);
            auto a = tensor(rank * columns, dtype), b = tensor(rows * rank, dtype), tile = tensor(rows * columns, x_dtype);
            Product product = {};
            product.tokens = tokens, product.columns = columns, product.rows = rows;
            product.x = x.data(), product.y = y.data();
            product.x_dtype = x_dtype, product.values_dtype = product.scale_dtype = product.lowrank_dtype = product.code_scale_dtype = dtype;
            if (between(0, 1)) product.values = values.data(), product.mask = mask.data(), product.kept = kept;
            if (between(0, 1)) product.signs = signs.data(), product.scale_in = scale_in.data(), product.scale_out = scale_out.data();
            product.binary_rank = product.signs ? terms : 0;
            if (between(0, 1)) product.lowrank_a = a.data(), product.lowrank_b = b.data(), product.rank = rank;
            product.outputs = rows;
            std::vector<uint8_t> pivots((rows + rank + 7) / 8);
            if (product.lowrank_b && between(0, 1)) {
                // Now and then one too many.
                for (int64_t left = rank + (between(0, 9) == 0); left > 0;) {
                    int64_t row = between(0, rows + rank - 1);
                    left -= !(pivots[row / 8] >> row % 8 & 1);
                    pivots[row / 8] |= 1 << row % 8;
                }
                product.pivots = pivots.data(), product.outputs = rows + rank;
            }
            int32_t code_bits = static_cast<int32_t>(between(2, 8));
            bool masked = product.mask || between(0, 1);
            int64_t coded = masked ? kept : columns, group = between(0, 1) ? between(1, 100) : 32 * between(1, 20);
            auto codes = bits(rows * ((coded * code_bits + 7) / 8));
            auto code_scale = tensor(rows * ((coded + group - 1) / group), dtype);
            if (!product.values && !product.signs && between(0, 1)) {
                product.codes = codes.data(), product.code_scale = code_scale.data(), product.code_bits = code_bits, product.group = group;
                product.kept = coded, product.mask = masked ? mask.data() : nullptr;
            }
            product.threads = static_cast<int32_t>(between(1, 3));
            product.instruction_set = instruction_set;
            products += hf_lowrank_multiply(&product) == 0;
            product.y = tile.data();
            hf_lowrank_unpack(&product, 0, rows);
        }
    }
    std::printf("%d products, no error found\n", products);
    return products ? 0 : 1;
}
