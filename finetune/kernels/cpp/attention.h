// Attention over a packed row: each query sees its own sample up to itself and, where it has one, its prefix.
//
// The row is cut into tiles of 32 tokens. `visits` [T/32, T/32] says of a tile of queries and one of keys whether
// no pair (0), every pair (1) or some pair (2) sees each other. Scores live in caches only, as [keys, queries]: what
// belongs to a query is then one lane of a vector, and exponentials come out in the layout of a right operand.
// The backward pass computes a pair of tiles once, by queries that share a key head; what several ranges of queries
// add to a key's gradients is summed in a fixed order, so the result does not depend on the number of threads.
//
// Shapes: T tokens (a multiple of 32), H heads, G key heads, D head size (a multiple of 32, at most 256).
#pragma once
#include "amx.h"
#include "attention_row.h"

namespace {

// Which of sixteen queries from `query` on see a key.
inline __mmask16 seen_lanes(const Row& row, index_t query, index_t key) {
    __m512i wanted = _mm512_set1_epi32(static_cast<int>(key));
    __m512i queries = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(query)), counting());
    return (_mm512_cmpge_epi32_mask(wanted, _mm512_loadu_si512(row.own_start + query)) &
            _mm512_cmple_epi32_mask(wanted, queries)) |
           (_mm512_cmpge_epi32_mask(wanted, _mm512_loadu_si512(row.prefix_start + query)) &
            _mm512_cmplt_epi32_mask(wanted, _mm512_loadu_si512(row.prefix_end + query)));
}

constexpr index_t BLOCK = 4;  // tiles whose scores are looked at together
using Weights = bf16[BLOCK * PANEL];

// Every tile of every head in one of the layouts of amx.h: 32 tokens by 32 columns after each other.
template <class Pack>
void pack_heads(const Heads& x, const Row& row, index_t heads, bf16* out, Pack pack) {
#pragma omp for collapse(2) schedule(static)
    for (index_t head = 0; head < heads; ++head)
        for (index_t tile = 0; tile < row.tiles(); ++tile)
            for (index_t chunk = 0; chunk < row.chunks(); ++chunk)
                pack(x.at(head, tile * TILE) + chunk * TILE, x.token_stride,
                     out + head * row.head_size() + (tile * row.chunks() + chunk) * PANEL);
}

// A tile of a head's rows, `stride` elements apart, its panels on the other side, and where the scores [32, 32] go
// (fp32).
struct Pair {
    const bf16* rows;
    index_t stride;
    const bf16* columns;
    float* out;
};

// Half of a pair's scores, 16 keys by 32 queries, into tile registers 0 and 1, or 2 and 3: their numbers are parts of
// the instructions, so each half is written out.
inline void upper_half(const Row& row, const Pair& pair) {
    _tile_zero(0);
    _tile_zero(1);
    for (index_t k = 0; k < row.chunks(); ++k) {
        _tile_loadd(4, pair.rows + k * TILE, pair.stride * 2);
        _tile_loadd(6, pair.columns + k * PANEL, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, pair.columns + k * PANEL + PANEL / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
}
inline void lower_half(const Row& row, const Pair& pair) {
    _tile_zero(2);
    _tile_zero(3);
    for (index_t k = 0; k < row.chunks(); ++k) {
        _tile_loadd(5, pair.rows + 16 * pair.stride + k * TILE, pair.stride * 2);
        _tile_loadd(6, pair.columns + k * PANEL, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, pair.columns + k * PANEL + PANEL / 2, 64);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// The scores of two pairs. So few steps of depth would wait for each other: a half is stored while the next is
// computed.
inline void scores(const Row& row, const Pair& first, const Pair& second) {
    finish_writes();
    upper_half(row, first);
    lower_half(row, first);
    _tile_stored(0, first.out, 128);
    _tile_stored(1, first.out + 16, 128);
    upper_half(row, second);
    _tile_stored(2, first.out + PANEL / 2, 128);
    _tile_stored(3, first.out + PANEL / 2 + 16, 128);
    lower_half(row, second);
    _tile_stored(0, second.out, 128);
    _tile_stored(1, second.out + 16, 128);
    _tile_stored(2, second.out + PANEL / 2, 128);
    _tile_stored(3, second.out + PANEL / 2 + 16, 128);
}

// sums [D][32] (fp32) = or += the transposed tiles [D, 32] in list[0 .. count) of a head times panels.
void weigh(const Row& row, const index_t* list, index_t count, const bf16* transposed, const bf16* panels, float* sums,
           bool accumulate) {
    for (index_t chunk = 0; chunk < row.chunks(); ++chunk) {
        load_sums(sums + chunk * PANEL, TILE, accumulate);
        for (index_t n = 0; n < count; ++n)
            add_product(transposed + (list[n] * row.chunks() + chunk) * PANEL, TILE, panels + n * PANEL);
        store_sums(sums + chunk * PANEL, TILE);
    }
}

// The rows of a tile of tokens from sums [D][32], each query's times its factor; column i of a half is the tile's
// query order(half, i).
template <class Order>
void store_transposed(const Row& row, const float* sums, const __m512 factors[2], bf16* out, index_t stride,
                      Order order) {
    for (index_t d = 0; d < row.dim; d += 16)
        for (index_t half = 0; half < 2; ++half) {
            __m512i words[16];
            for (index_t i = 0; i < 16; ++i)
                words[i] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(sums + (d + i) * TILE + half * 16), factors[half]);
            transpose_words(words);
            for (index_t i = 0; i < 16; ++i) store_bf16(out + order(half, i) * stride + d, (__m512)words[i]);
        }
}

}  // namespace
