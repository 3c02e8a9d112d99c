// Plain C++ loops, for every other processor.
#include "dequantize.h"
#include "product.h"

namespace hf_lowrank {
namespace {

template <DType dtype>
struct For {
    template <int T>
    struct SparseLoop;
    template <int T>
    struct DenseLoop;
};

template <DType dtype>
template <int T>
struct For<dtype>::SparseLoop {
    static void run(const Product& product, const Prepared& x, const Rows& rows) {
        int64_t width = (x.columns + 7) / 8;
        for (int64_t i = 0; i < rows.count; ++i) {
            const uint8_t* mask = product.mask + (rows.first + i) * width;
            int64_t position = (rows.first + i) * product.kept, end = position + product.kept;
            float sums[T] = {};
            for (int64_t column = 0; column < x.columns; column += kUnit) {
                uint32_t bits = load_bits(mask, width, column >> 3);
                for (; bits && position < end; bits &= bits - 1, ++position) {
                    float value = load_as_float(product.values, position, dtype);
                    const float* at = x.values + rows.first_token * x.padded + column + __builtin_ctz(bits);
                    for (int t = 0; t < T; ++t) sums[t] += value * at[t * x.padded];
                }
            }
            for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + i] += sums[t];
        }
    }
};

template <DType dtype>
template <int T>
struct For<dtype>::DenseLoop {
    static void run(const void* matrix, const Prepared& x, const Rows& rows) {
        for (int64_t i = 0; i < rows.count; ++i) {
            // There are eight sums, each over every eighth column, which a compiler can keep in a vector register.
            float sums[T][8] = {};
            for (int64_t first = 0; first < x.columns; first += 8) {
                float values[8] = {};
                for (int64_t j = 0; j < 8 && first + j < x.columns; ++j)
                    values[j] = load_as_float(matrix, (rows.first + i) * x.columns + first + j, dtype);
                const float* at = x.values + rows.first_token * x.padded + first;
                for (int t = 0; t < T; ++t)
                    for (int j = 0; j < 8; ++j) sums[t][j] += values[j] * at[t * x.padded + j];
            }
            for (int t = 0; t < T; ++t)
                for (float sum : sums[t]) rows.sums[t * kBlockRows + i] += sum;
        }
    }
};

// Four sign bits select one of the 16 signed sums of four scaled inputs.
template <int T>
struct BinaryLoop {
    static void run(const Product& product, const Prepared& x, const Rows& rows) {
        int64_t width = (x.columns + 7) / 8, table_size = x.padded / kTableColumns * kTableEntries;
        for (int64_t term = 0; term < product.binary_rank; ++term) {
            const float* tables = x.tables + (term * x.tokens + rows.first_token) * table_size;
            for (int64_t i = 0; i < rows.count; ++i) {
                const uint8_t* signs = product.signs + (rows.first + i) * width;
                float low[T] = {}, high[T] = {};
                for (int64_t byte = 0; byte < width; ++byte) {
                    const float* table = tables + byte * 2 * kTableEntries;
                    for (int t = 0; t < T; ++t) {
                        low[t] += table[t * table_size + (signs[byte] & 15)];
                        high[t] += table[t * table_size + kTableEntries + (signs[byte] >> 4)];
                    }
                }
                float scale = load_as_float(product.scale_out, (rows.first + i) * product.binary_rank + term, DType(product.scale_dtype));
                for (int t = 0; t < T; ++t) rows.sums[t * kBlockRows + i] += scale * (low[t] + high[t]);
            }
        }
    }
};

void sparse_rows(const Product& product, const Prepared& x, const Rows& rows) {
    switch (product.values_dtype) {
        case kFloat32: for_token_groups<For<kFloat32>::SparseLoop>(rows, product, x); break;
        case kFloat16: for_token_groups<For<kFloat16>::SparseLoop>(rows, product, x); break;
        default: for_token_groups<For<kBFloat16>::SparseLoop>(rows, product, x);
    }
}

void packed_rows(const Product& product, const Prepared& x, const Rows& rows) {
    if (product.signs) for_token_groups<BinaryLoop>(rows, product, x);
    if (product.values) sparse_rows(product, x, rows);
}

void dense_rows(const void* matrix, DType dtype, const Prepared& x, const Rows& rows) {
    switch (dtype) {
        case kFloat32: for_token_groups<For<kFloat32>::DenseLoop>(rows, matrix, x); break;
        case kFloat16: for_token_groups<For<kFloat16>::DenseLoop>(rows, matrix, x); break;
        default: for_token_groups<For<kBFloat16>::DenseLoop>(rows, matrix, x);
    }
}

void fill_tables(const float* scaled, int64_t padded, float* out) {
    for (int64_t column = 0; column < padded; column += kTableColumns, out += kTableEntries) {
        for (int entry = 0; entry < kTableEntries; ++entry) {
            float sum = 0.0f;
            for (int j = 0; j < kTableColumns; ++j) sum += entry >> j & 1 ? scaled[column + j] : -scaled[column + j];
            out[entry] = sum;
        }
    }
}

template <DType dtype>
void unpack_row(const Product& product, const float* scale_in, int64_t padded, int64_t row, void* out) {
    int64_t width = (product.columns + 7) / 8, position = row * product.kept, end = position + product.kept;
    for (int64_t column = 0; column < product.columns; column += kUnit) {
        int64_t count = product.columns - column < kUnit ? product.columns - column : kUnit;
        float sums[kUnit] = {};
        for (int64_t term = 0; product.signs && term < product.binary_rank; ++term) {
            float scale = load_as_float(product.scale_out, row * product.binary_rank + term, DType(product.scale_dtype));
            for (int64_t j = 0; j < kUnit; ++j) sums[j] += scale * scale_in[term * padded + column + j];
        }
        if (product.signs) {
            uint32_t bits = load_bits(product.signs + row * width, width, column >> 3);
            for (int64_t j = 0; j < kUnit; ++j) sums[j] = bits >> j & 1 ? sums[j] : -sums[j];
        }
        if (product.values) {
            uint32_t bits = load_bits(product.mask + row * width, width, column >> 3);
            for (; bits && position < end; bits &= bits - 1, ++position) sums[__builtin_ctz(bits)] += load_as_float(product.values, position, dtype);
        }
        for (int64_t j = 0; j < count; ++j) store_from_float(out, column + j, DType(product.x_dtype), sums[j]);
    }
}

void unpack(const Product& product, const float* scale_in, int64_t padded, int64_t row, void* out) {
    switch (product.values_dtype) {
        case kFloat32: unpack_row<kFloat32>(product, scale_in, padded, row, out); break;
        case kFloat16: unpack_row<kFloat16>(product, scale_in, padded, row, out); break;
        default: unpack_row<kBFloat16>(product, scale_in, padded, row, out);
    }
}

}  // namespace

const Kernels& portable_kernels() {
    static const Kernels kernels = {packed_rows, dense_rows, fill_tables, dequantize_row, nullptr, nullptr, nullptr, unpack, false};
    return kernels;
}

}  // namespace hf_lowrank
