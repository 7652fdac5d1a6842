// Products of tall matrices with packed weights in fp32: kernels for processors without units for bf16.
//
// The left operand lies in memory as tiles of six tokens, [depth][ROWS] each. A thread packs a strip of panels (sixteen
// columns each), or a part of their depth, which stays in its second cache, and passes over all tiles; a tile stays in
// the first. Sums between parts wait in memory. Each is formed by one thread in one order: so the result does not depend
// on the number of threads.
#pragma once
#include "fma.h"
#include "kept.h"
#include <algorithm>
#include <omp.h>

constexpr index_t PASS_TOKENS = 1152;          // whose left operands exist at once, if their bytes allow
constexpr index_t PASS_BYTES = 32 << 20;
constexpr index_t MOST_DEPTH = 640;            // of a part: a tile of 15 KB, a panel of 40
constexpr index_t STRIP_BYTES = 256 << 10;     // half of a small second cache
constexpr index_t BLOCK = ROWS * WIDTH;        // sums of a tile and a panel

// Tokens whose left operands, `columns` fp32 each, exist at once: whole tiles. Fewer pack the weights more often: 240 at
// a time cost 0 to 5 % of a product of 960.
static inline index_t pass_tokens(index_t tokens, index_t columns) {
    index_t most = std::clamp(PASS_BYTES / (columns * 4), 32 * ROWS, PASS_TOKENS) / ROWS;
    return std::min(most, (tokens + ROWS - 1) / ROWS) * ROWS;
}

// Columns of the left operand, after `depth`, that a panel is multiplied with too.
struct Tail {
    index_t first, count;
};

// Tiles of `tokens` tokens with `columns` columns each.
struct Left {
    float* tiles;
    index_t tokens, columns;
    index_t count() const { return (tokens + ROWS - 1) / ROWS; }
    index_t rows(index_t tile) const { return std::min(ROWS, tokens - tile * ROWS); }
    float* tile(index_t index) const { return tiles + index * columns * ROWS; }
};

// All panels, for all tokens, a strip at a time by whichever thread is free: called by all threads of a parallel region,
// which wait for each other at the end. `pack(panel, from, to, out)` writes a panel of the columns [from, to) of depth,
// `pack_tail(panel, out)` of its tail. `store(panel, count, tile, sums)` takes finished sums, [count][ROWS][WIDTH].
template <class TailOf, class Pack, class PackTail, class Store>
static inline void product(const Left& left, index_t depth, index_t panels, TailOf tail_of, Pack pack,
                           PackTail pack_tail, Store store) {
    index_t parts = (depth + MOST_DEPTH - 1) / MOST_DEPTH, tail = 0;
    for (index_t panel = 0; panel < panels; ++panel) tail = std::max(tail, tail_of(panel).count);
    index_t stride = ((depth + parts - 1) / parts + 8 + tail) * WIDTH;
    // Strips of one size, as many for every thread.
    index_t threads = omp_get_num_threads(), fitting = threads * std::max<index_t>(STRIP_BYTES / (stride * 4), 1);
    index_t strips = std::min((panels + fitting - 1) / fitting * threads, panels), most = (panels + strips - 1) / strips;
    static thread_local Kept kept;
    float* strip = kept.at_least<float>(most * stride + (parts > 1 ? left.count() : 1) * most * BLOCK);
    float* sums = strip + most * stride;
#pragma omp for schedule(dynamic)
    for (index_t panel = 0; panel < panels; panel += most) {
        index_t width = std::min(most, panels - panel);
        for (index_t part = 0; part < parts; ++part) {
            index_t from = depth / 8 * part / parts * 8, to = depth / 8 * (part + 1) / parts * 8;
            bool last = part + 1 == parts;
            for (index_t n = 0; n < width; ++n) {
                pack(panel + n, from, to, strip + n * stride);
                if (last) pack_tail(panel + n, strip + n * stride + (to - from) * WIDTH);
            }
            for (index_t tile = 0; tile < left.count(); ++tile) {
                float* own = sums + (parts > 1 ? tile : 0) * most * BLOCK;
                const float* columns = left.tile(tile);
                for (index_t n = 0; n < width; ++n) {
                    const float* packed = strip + n * stride;
                    multiply(columns + from * ROWS, packed, to - from, own + n * BLOCK, WIDTH, part > 0);
                    auto [first, count] = tail_of(panel + n);
                    if (last && count)
                        multiply(columns + first * ROWS, packed + (to - from) * WIDTH, count, own + n * BLOCK, WIDTH,
                                 true);
                }
                if (last) store(panel, width, tile, own);
            }
        }
    }
}
