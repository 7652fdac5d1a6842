// Vectors of fp32 as the pointwise kernels want them: sixteen with AVX-512 and its bf16 conversions, eight with AVX2.
// Without either VECTORS is not defined.
#pragma once
#include "common.h"

#if defined(__AVX512BF16__)
#define VECTORS
#include "avx512.h"
using Vector = __m512;
static inline Vector all(float value) { return _mm512_set1_ps(value); }
static inline Vector add_product(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
static inline Vector subtract_product(Vector a, Vector b, Vector from) { return _mm512_fnmadd_ps(a, b, from); }
static inline float total(Vector values) { return _mm512_reduce_add_ps(values); }
static inline Vector sigmoid(Vector x) { return sigmoid16(x); }
#elif defined(FMA_PRODUCTS)
#define VECTORS
#include "fma.h"
using Vector = __m256;
static inline Vector all(float value) { return _mm256_set1_ps(value); }
static inline Vector add_product(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
static inline Vector subtract_product(Vector a, Vector b, Vector from) { return _mm256_fnmadd_ps(a, b, from); }
static inline float total(Vector values) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// 1 / (1 + exp(-x)), the quotient by one of Newton's steps from 12 bits: bf16 keeps 8 of its 22 or more.
static inline Vector sigmoid(Vector x) {
    Vector sum = _mm256_add_ps(all(1.0f), exp2_8(_mm256_min_ps(all(120.0f), _mm256_mul_ps(x, all(-1.44269504f)))));
    Vector near = _mm256_rcp_ps(sum);
    return _mm256_mul_ps(near, subtract_product(sum, near, all(2.0f)));
}
#endif

#ifdef VECTORS
constexpr index_t LANES = sizeof(Vector) / sizeof(float);
#endif
