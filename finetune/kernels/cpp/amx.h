// Products of 32 x 32 blocks on Intel's AMX units, the layouts that their right operands need, and exp() by sixteen:
// whoever has AMX has AVX-512 with bf16.
#pragma once
#include "common.h"
#include <immintrin.h>
#include <initializer_list>

constexpr index_t TILE = 32;          // rows and columns of a block: 2 x 2 tile registers
constexpr index_t PANEL = TILE * TILE;  // elements of a packed operand of depth 32 and width 32

// Every tile register 16 rows of 64 bytes. A thread sets this before its first product and calls _tile_release after.
static inline void configure_tiles() {
    struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

// c [32, 32] (fp32) = or += a [32, 32 * depth] times `depth` packed panels. Strides are in elements.
template <class Panel>
static inline void multiply(const bf16* a, index_t a_stride, index_t depth, Panel panel, float* c, index_t c_stride,
                            bool accumulate) {
    index_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
    if (accumulate) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
        _tile_loadd(2, c + 16 * c_stride, c_bytes);
        _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (index_t k = 0; k < depth; ++k) {
        const bf16* b = panel(k);
        _tile_loadd(4, a + k * TILE, a_bytes);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + PANEL / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * a_stride + k * TILE, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * c_stride, c_bytes);
    _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
}

// Panel of xT for 32 rows of x and 32 of its columns: [2 x 16 rows of x][16 pairs of columns][16 rows][2].
static inline void pack_transposed(const bf16* x, index_t stride, bf16* panel) {
    for (index_t row = 0; row < TILE; ++row) {
        const bf16* in = x + row * stride;
        bf16* out = panel + (row / 16) * (PANEL / 2) + (row % 16) * 2;
        for (index_t pair = 0; pair < 16; ++pair) std::memcpy(out + pair * 32, in + 2 * pair, 4);
    }
}

// Panel of x itself for 32 rows (the depth) and 32 columns: [2 x 16 columns][16 pairs of rows][16 columns][2].
static inline void pack_straight(const bf16* x, index_t stride, bf16* panel) {
    for (index_t pair = 0; pair < 16; ++pair) {
        const bf16 *even = x + 2 * pair * stride, *odd = even + stride;
        for (index_t half = 0; half < 2; ++half) {
            bf16* out = panel + half * (PANEL / 2) + pair * 32;
            for (index_t column = 0; column < 16; ++column) {
                out[2 * column] = even[half * 16 + column];
                out[2 * column + 1] = odd[half * 16 + column];
            }
        }
    }
}

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

static inline void store_bf16(bf16* out, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(values));
}

static inline __m512 load_bf16(const bf16* in) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
