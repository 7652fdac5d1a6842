// Products of 32 x 32 blocks on Intel's AMX units and the layouts that their right operands need.
#pragma once
#include "avx512.h"

// A block of TILE rows and columns is 2 x 2 tile registers.
constexpr index_t PANEL = TILE * TILE;  // elements of a packed operand of depth 32 and width 32

// Every tile register 16 rows of 64 bytes. A thread sets this before its first product and calls _tile_release after.
static inline void configure_tiles() {
    // Static: gcc tells its optimizer that the instruction reads eight bytes, so of a local one it may drop the rest.
    static const struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

// Before the first load of a product: gcc does not know that loads of tiles read memory, and may move what writes it
// behind them. (It knows that stores of tiles write it.)
static inline void finish_writes() { __asm__ volatile("" ::: "memory"); }

// The sums of a block, c [32, 32] (fp32), into tile registers 0 to 3, or zeros, and back. Strides are in elements.
// `TOP` is only the first 16 rows, `LEFT` only the first 16 columns.
template <bool TOP = false, bool LEFT = false>
static inline void load_sums(const float* c, index_t stride, bool accumulate) {
    const float* below = c + 16 * stride;
    finish_writes();
    if (accumulate) {
        _tile_loadd(0, c, stride * 4);
        if (!LEFT) _tile_loadd(1, c + 16, stride * 4);
        if (!TOP) _tile_loadd(2, below, stride * 4);
        if (!TOP && !LEFT) _tile_loadd(3, below + 16, stride * 4);
    } else {
        _tile_zero(0);
        if (!LEFT) _tile_zero(1);
        if (!TOP) _tile_zero(2);
        if (!TOP && !LEFT) _tile_zero(3);
    }
}

template <bool TOP = false, bool LEFT = false> static inline void store_sums(float* c, index_t stride) {
    float* below = c + 16 * stride;
    _tile_stored(0, c, stride * 4);
    if (!LEFT) _tile_stored(1, c + 16, stride * 4);
    if (!TOP) _tile_stored(2, below, stride * 4);
    if (!TOP && !LEFT) _tile_stored(3, below + 16, stride * 4);
}

// The sums += a [32, 32] times a packed panel, whose loads are marked as not to be kept: what streams past then leaves
// `a` in the first cache (2.2 instead of 1.8 TFLOP/s where both together exceed it).
template <bool TOP = false, bool LEFT = false>
static inline void add_product(const bf16* a, index_t stride, const bf16* panel) {
    _tile_loadd(4, a, stride * 2);
    _tile_stream_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (!LEFT) {
        _tile_stream_loadd(7, panel + PANEL / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    if (!TOP) {
        _tile_loadd(5, a + 16 * stride, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (!LEFT) _tile_dpbf16ps(3, 5, 7);
    }
}

// c [32, 32] = or += a [32, 32 * depth] times `depth` packed panels.
template <bool TOP = false, bool LEFT = false, class Panel>
static inline void multiply(const bf16* a, index_t a_stride, index_t depth, Panel panel, float* c, index_t c_stride,
                            bool accumulate) {
    load_sums<TOP, LEFT>(c, c_stride, accumulate);
    for (index_t k = 0; k < depth; ++k) add_product<TOP, LEFT>(a + k * TILE, a_stride, panel(k));
    store_sums<TOP, LEFT>(c, c_stride);
}

// Transpose 16 x 16 words of 32 bits: by words, pairs, quarters and halves.
static inline void transpose_words(__m512i rows[16]) {
    __m512i next[16];
    for (int i = 0; i < 16; i += 2) {
        next[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        next[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(next[i + j], next[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(next[i + j], next[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            next[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
            next[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        rows[j] = _mm512_shuffle_i32x4(next[j], next[j + 8], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(next[j], next[j + 8], 0xdd);
    }
}

// Panel of xT for 32 rows of x and 32 of its columns: [2 x 16 rows of x][16 pairs of columns][16 rows][2].
static inline void pack_transposed(const bf16* x, index_t stride, bf16* panel) {
    for (index_t half = 0; half < 2; ++half, x += 16 * stride, panel += PANEL / 2) {
        __m512i rows[16];  // a pair of columns is one word
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(x + i * stride);
        transpose_words(rows);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + 32 * i, rows[i]);
    }
}

// Panel of x itself for 32 rows (the depth) and 32 columns: [2 x 16 columns][16 pairs of rows][16 columns][2].
static inline void pack_straight(const bf16* x, index_t stride, bf16* panel) {
    alignas(64) std::uint16_t low[32], high[32];
    for (std::uint16_t i = 0; i < 16; ++i) {
        low[2 * i] = i;
        low[2 * i + 1] = i + 32;
        high[2 * i] = i + 16;
        high[2 * i + 1] = i + 48;
    }
    __m512i left = _mm512_load_si512(low), right = _mm512_load_si512(high);
    for (index_t pair = 0; pair < 16; ++pair) {
        __m512i even = _mm512_loadu_si512(x + 2 * pair * stride), odd = _mm512_loadu_si512(x + (2 * pair + 1) * stride);
        _mm512_storeu_si512(panel + pair * 32, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_storeu_si512(panel + PANEL / 2 + pair * 32, _mm512_permutex2var_epi16(even, right, odd));
    }
}

// xT [32, 32] of 32 rows of x and 32 of its columns: a left operand.
static inline void transpose_into(const bf16* x, index_t stride, bf16* out, index_t out_stride) {
    alignas(64) bf16 panel[PANEL];
    pack_transposed(x, stride, panel);
    alignas(64) std::uint16_t index[32];
    for (std::uint16_t i = 0; i < 32; ++i) index[i] = 2 * i;
    __m512i evens = _mm512_load_si512(index);
    for (index_t pair = 0; pair < 16; ++pair) {
        __m512i first = _mm512_load_si512(panel + pair * TILE);
        __m512i second = _mm512_load_si512(panel + PANEL / 2 + pair * TILE);
        _mm512_storeu_si512(out + 2 * pair * out_stride, _mm512_permutex2var_epi16(first, evens, second));
        _mm512_storeu_si512(out + (2 * pair + 1) * out_stride,
                            _mm512_permutex2var_epi16(first, _mm512_add_epi16(evens, _mm512_set1_epi16(1)), second));
    }
}

static inline void transpose_tile(const bf16* x, index_t stride, bf16* out) { transpose_into(x, stride, out, TILE); }

// A row of a panel: sixteen columns of two rows of depth, each column's two side by side.
static inline void store_pair(bf16* out, __m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}
