// Products of tall matrices with packed panels: the frozen weights of a layer and its adapter in one sum.
//
// out [T, N] = the sum over operands of rows [T, depth] times panels [depth, N], in fp32. A thread packs a strip of
// panels (32 columns each), or a part of their depth, which stays in its second cache, and passes over all rows: a tile
// of 32 rows, or a block of its depth, stays in the first cache while the strip streams past it. Sums between parts and
// blocks wait in memory. Every tile of 32 x 32 is summed by one thread, in one order: so the result does not depend on
// the number of threads.
#pragma once
#include "amx.h"
#include "kept.h"
#include <algorithm>
#include <omp.h>
#include <vector>

// One of the left operands: rows `stride` elements apart, `depth` columns, a multiple of 32.
struct Operand {
    const bf16* rows;
    index_t stride, depth;
};

// Measured on a Granite Rapids core: 3.2 TFLOP/s without loads, 2.2 with rows in the first cache and panels in the
// second; with operands from memory 0.8 to 1.1 (oneDNN's own product of squares: 1.1).
constexpr index_t BLOCK_STEPS = 20;    // of 32 columns of depth
constexpr index_t STORE_PANELS = 4;    // stored together: longer pieces of a row
constexpr index_t STRIP_BYTES = 1 << 20;
constexpr index_t PASS_TOKENS = 1024;  // whose sums may wait at once

// A thread's memory for `product` and the like.
static inline bf16* scratch(index_t elements) {
    static thread_local Kept kept;
    return kept.at_least<bf16>(elements);
}

// How a thread's panels are cut: strips of `width` panels, each in `parts` of depth.
struct Cut {
    index_t parts, width;
};

// The cut that moves least to and from memory, for each row: every strip reads it, every part but one stores and loads
// its sums, whose bytes cost 1.5 times as much (measured for depths of 576 to 8,192: parts help from about 3,000 on).
static inline Cut best_cut(index_t steps, index_t panels) {
    Cut best{1, 1};
    index_t least = 0;
    for (index_t parts = 1; parts <= std::max<index_t>(steps / 8, 1); ++parts) {
        index_t deep = (steps + parts - 1) / parts;
        index_t width = std::clamp<index_t>(STRIP_BYTES / (deep * PANEL * 2), 1, panels);
        index_t strips = (panels + width - 1) / width;
        index_t moved = strips * steps * TILE * 2 + (parts - 1) * panels * TILE * 12;
        if (parts == 1 || moved < least) best = {parts, (panels + strips - 1) / strips}, least = moved;
    }
    return best;
}

// Consecutive steps of one operand; `panel` is where theirs begin in a strip's. The last piece of a block ends it.
struct Piece {
    index_t operand, step, steps, panel;
    bool ends;
};

// The steps [first, last) of all operands' depth in blocks.
static inline std::vector<Piece> pieces_of(const std::vector<Operand>& operands, index_t first, index_t last) {
    index_t blocks = (last - first + BLOCK_STEPS - 1) / BLOCK_STEPS, block = 0, begin = 0, at = first;
    std::vector<Piece> pieces;
    for (index_t n = 0; n < static_cast<index_t>(operands.size()); begin += operands[n++].depth / TILE)
        while (at < std::min(begin + operands[n].depth / TILE, last)) {
            index_t end = first + (last - first) * (block + 1) / blocks;
            index_t steps = std::min(begin + operands[n].depth / TILE, end) - at;
            pieces.push_back({n, at - begin, steps, (at - first) * PANEL, at + steps == end});
            at += steps;
            if (at == end) ++block;
        }
    return pieces;
}

// sums [width][32][32] of a tile of tokens = or += its products with a part of a strip, panels `stride` elements apart.
static inline void sum_tile(const std::vector<Operand>& operands, const std::vector<Piece>& pieces, index_t token,
                            const bf16* strip, index_t stride, index_t width, float* sums, bool more) {
    for (auto from = pieces.begin(), end = from; from != pieces.end(); from = end, more = true) {
        while (!end++->ends) {}
        for (index_t n = 0; n < width; ++n) {
            load_sums(sums + n * PANEL, TILE, more);
            for (auto piece = from; piece != end; ++piece) {
                const Operand& operand = operands[piece->operand];
                const bf16* left = operand.rows + token * operand.stride + piece->step * TILE;
                for (index_t step = 0; step < piece->steps; ++step)
                    add_product(left + step * TILE, operand.stride, strip + n * stride + piece->panel + step * PANEL);
            }
            store_sums(sums + n * PANEL, TILE);
        }
    }
}

// The panels [first, last) of `out`, for all tokens. `pack(first, count, operand, step, steps, to, stride)` writes a
// part of an operand's share of a strip: panels `stride` elements apart, of each a PANEL for every step, 32 rows of
// depth. `store(first, count, token, sums)` takes some finished tiles, fp32 [count][32][32].
template <class Pack, class Store>
static inline void product(const std::vector<Operand>& operands, index_t tokens, index_t first, index_t last, Pack pack,
                           Store store) {
    if (first >= last) return;
    index_t steps = 0;
    for (const Operand& operand : operands) steps += operand.depth / TILE;
    const auto [parts, most] = best_cut(steps, last - first);
    index_t stride = (steps + parts - 1) / parts * PANEL, pass = parts > 1 ? PASS_TOKENS : tokens;
    index_t waiting = parts > 1 ? std::min(tokens, pass) : TILE;  // tokens whose sums wait at once
    bf16* strip = scratch(most * stride + waiting * most * TILE * 2);
    float* sums = reinterpret_cast<float*>(strip + most * stride);
    for (index_t begin = 0; begin < tokens; begin += pass)
        for (index_t panel = first; panel < last; panel += most)
            for (index_t part = 0; part < parts; ++part) {
                index_t width = std::min(most, last - panel);
                const auto pieces = pieces_of(operands, steps * part / parts, steps * (part + 1) / parts);
                for (const Piece& piece : pieces)
                    pack(panel, width, piece.operand, piece.step, piece.steps, strip + piece.panel, stride);
                for (index_t token = begin; token < std::min(begin + pass, tokens); token += TILE) {
                    float* own = sums + (token - begin) % waiting * most * TILE;
                    sum_tile(operands, pieces, token, strip, stride, width, own, part > 0);
                    for (index_t n = 0; part + 1 == parts && n < width; n += STORE_PANELS)
                        store(panel + n, std::min(STORE_PANELS, width - n), token, own + n * PANEL);
                }
            }
}
