// Products in fp32 of matrices in bf16, for processors without units for bf16: vectors of eight, two multiplications
// and additions a cycle. Sums stay in twelve registers: six rows of sixteen columns.
#pragma once
#include "common.h"
#include <immintrin.h>
#include <initializer_list>

constexpr index_t ROWS = 6;    // of a packed left operand, [depth][ROWS]
constexpr index_t WIDTH = 16;  // of a packed right operand, [depth][WIDTH]

static inline __m256 load_bf16(const bf16* in) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// The upper halves of eight words, rounded to nearest even; a NaN stays one.
static inline __m256i rounded_words(__m256 values) {
    __m256i bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 broken = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(broken));
    return _mm256_srli_epi32(rounded, 16);
}

// Rounded to bf16, still fp32.
static inline __m256 round_bf16(__m256 values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(rounded_words(values), 16));
}

static inline void store_bf16(bf16* out, __m256 left, __m256 right) {
    __m256i words = _mm256_packus_epi32(rounded_words(left), rounded_words(right));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(words, 0xd8));
}

// 2^x as exp2_16 in avx512.h has it; 0 below fp32's normal range, and a NaN stays one.
static inline __m256 exp2_8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);
    __m256 whole = _mm256_floor_ps(x), r = _mm256_sub_ps(x, whole);
    __m256 poly = _mm256_set1_ps(0.00187757665f);
    for (float factor : {0.00898934016f, 0.055826318f, 0.240153617f, 0.693153073f, 0.999999925f})
        poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(factor));
    __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(poly, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}

// c [R][WIDTH] = or += a [depth][R] times a packed right operand.
template <index_t R = ROWS>
static inline void multiply(const float* a, const float* b, index_t depth, float* c, index_t stride, bool accumulate) {
    __m256 sums[R][2];
    for (index_t i = 0; i < R; ++i)
        for (index_t j = 0; j < 2; ++j)
            sums[i][j] = accumulate ? _mm256_loadu_ps(c + i * stride + 8 * j) : _mm256_setzero_ps();
    for (index_t k = 0; k < depth; ++k, a += R, b += WIDTH) {
        __m256 left = _mm256_load_ps(b), right = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
        for (index_t i = 0; i < R; ++i) {
            __m256 one = _mm256_broadcast_ss(a + i);
            sums[i][0] = _mm256_fmadd_ps(one, left, sums[i][0]);
            sums[i][1] = _mm256_fmadd_ps(one, right, sums[i][1]);
        }
    }
    for (index_t i = 0; i < R; ++i)
        for (index_t j = 0; j < 2; ++j) _mm256_storeu_ps(c + i * stride + 8 * j, sums[i][j]);
}

// `count` rows of x, `depth` columns, as a packed left operand; rows after them are zeros.
static inline void pack_rows(const bf16* x, index_t stride, index_t count, index_t depth, float* out) {
    for (index_t i = 0; i < ROWS; ++i)
        for (index_t k = 0; k < depth; ++k) out[k * ROWS + i] = i < count ? to_float(x[i * stride + k]) : 0.0f;
}

// x [depth][WIDTH] as a packed right operand.
static inline void pack_straight(const bf16* x, index_t stride, index_t depth, float* out) {
    for (index_t k = 0; k < depth; ++k, x += stride, out += WIDTH) {
        _mm256_store_ps(out, load_bf16(x));
        _mm256_store_ps(out + 8, load_bf16(x + 8));
    }
}

// Transpose 8 x 8 words.
static inline void transpose_words(__m256 rows[8]) {
    __m256 next[8];
    for (int i = 0; i < 8; i += 2) {
        next[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        next[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm256_shuffle_ps(next[i + j], next[i + j + 2], 0x44);
            rows[i + 2 * j + 1] = _mm256_shuffle_ps(next[i + j], next[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        next[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
        next[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) rows[i] = next[i];
}
