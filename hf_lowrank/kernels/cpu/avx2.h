// What the AVX2 loops have in common.
#pragma once

#include <immintrin.h>

#include "product.h"

#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define AVX2_INLINE AVX2 __attribute__((always_inline)) static inline

namespace hf_lowrank {
namespace {

constexpr int kLanes = 8;

AVX2_INLINE float sum_of_lanes(__m256 sum) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace hf_lowrank
