// exp() and sigmoid() by sixteen, and bf16 to and from vectors: for processors with AVX-512 and its bf16 conversions,
// among them all that have AMX.
#pragma once
#include "common.h"
#include <immintrin.h>
#include <initializer_list>

// As fast_exp in common.h, sixteen at a time; a NaN stays one.
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 poly = _mm512_set1_ps(1.0f / 720.0f);
    for (float factor : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
        poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(poly, n);
}

// 1 / (1 + exp(-x)), the quotient by one of Newton's steps from 14 bits: bf16 keeps 8 of its 22 or more.
static inline __m512 sigmoid16(__m512 x) {
    __m512 exp = exp16(_mm512_min_ps(_mm512_set1_ps(80.0f), _mm512_sub_ps(_mm512_setzero_ps(), x)));
    __m512 sum = _mm512_add_ps(exp, _mm512_set1_ps(1.0f)), near = _mm512_rcp14_ps(sum);
    return _mm512_mul_ps(near, _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(2.0f)));
}

// 2^x to a tenth of a unit in the last place of fp32 before rounding; below fp32's range 0, and a NaN stays one. A
// polynomial of degree 5 fitted for the least relative error on [0, 1).
static inline __m512 exp2_16(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 poly = _mm512_set1_ps(0.00187757665f);
    for (float factor : {0.00898934016f, 0.055826318f, 0.240153617f, 0.693153073f, 0.999999925f})
        poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(poly, x);
}

static inline void store_bf16(bf16* out, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(values));
}

// Two vectors beside each other.
static inline void store_bf16(bf16* out, __m512 left, __m512 right) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

// The same past the caches; `out` begins a line of 64 bytes.
static inline void stream_bf16(bf16* out, __m512 left, __m512 right) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

static inline __m512 widen(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

static inline __m512 load_bf16(const bf16* in) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
}

static inline __m512i counting() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

// Rounded to bf16, still fp32.
static inline __m512 round_bf16(__m512 values) { return widen((__m256i)_mm512_cvtneps_pbh(values)); }
