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

// Tokens whose left operands, `columns` fp32 each, exist at once: whole tiles. Fewer pack the weights more often: at 240,
// as 22,000 columns leave, that costs a twentieth.
static inline index_t pass_tokens(index_t tokens, index_t columns) {
    index_t most = std::clamp(PASS_BYTES / (columns * 4), 32 * ROWS, PASS_TOKENS) / ROWS;
    return std::min(most, (tokens + ROWS - 1) / ROWS) * ROWS;
}

// This thread's share of `count` panels.
struct Share {
    index_t first, last;
};
static inline Share share(index_t count) {
    index_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
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

// This thread's panels, for all tokens. `pack(panel, from, to, out)` writes a panel of the columns [from, to) of depth,
// `pack_tail(panel, out)` of its tail. `store(panel, count, tile, sums)` takes finished sums, [count][ROWS][WIDTH].
template <class TailOf, class Pack, class PackTail, class Store>
static inline void product(const Left& left, index_t depth, Share panels, TailOf tail_of, Pack pack, PackTail pack_tail,
                           Store store) {
    if (panels.first >= panels.last) return;
    index_t parts = (depth + MOST_DEPTH - 1) / MOST_DEPTH, tail = 0;
    for (index_t panel = panels.first; panel < panels.last; ++panel) tail = std::max(tail, tail_of(panel).count);
    index_t stride = ((depth + parts - 1) / parts + 8 + tail) * WIDTH;
    index_t most = std::clamp<index_t>(STRIP_BYTES / (stride * 4), 1, panels.last - panels.first);
    static thread_local Kept kept;
    float* strip = kept.at_least<float>(most * stride + (parts > 1 ? left.count() : 1) * most * BLOCK);
    float* sums = strip + most * stride;
    for (index_t panel = panels.first; panel < panels.last; panel += most) {
        index_t width = std::min(most, panels.last - panel);
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
