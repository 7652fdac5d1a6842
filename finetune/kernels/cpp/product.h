// Products of tall matrices with packed panels: the frozen weights of a layer and its adapter in one sum.
//
// out [T, N] = the sum over operands of rows [T, depth] times panels [depth, N], in fp32. A thread packs few panels
// (32 columns each), which stay in its second cache, and passes over all rows. Depth is cut into blocks whose operands
// fit into the first cache; sums between blocks wait in memory. Every tile of 32 x 32 is summed by one thread, in one
// order: so the result does not depend on the number of threads.
#pragma once
#include "amx.h"
#include <algorithm>
#include <omp.h>
#include <vector>

// One of the left operands: rows `stride` elements apart, `depth` columns, a multiple of 32.
struct Operand {
    const bf16* rows;
    index_t stride, depth;
};

// Measured on a Granite Rapids core: 2.3 TFLOP/s with both operands in the first cache, 1.3 in this form (oneDNN's own
// product of squares: 1.1).
constexpr index_t BLOCK_STEPS = 9;     // of 32 columns of depth
constexpr index_t BLOCK_ROWS = 128;    // whose sums wait at once
constexpr index_t STRIP_PANELS = 4;    // packed at once
constexpr index_t STRIP_BYTES = 1 << 20;

// A thread's memory for `product`, kept from call to call: fresh memory costs its page faults.
static inline bf16* scratch(index_t elements) {
    static thread_local std::vector<bf16> kept;
    if (static_cast<index_t>(kept.size()) < elements + 32) kept.resize(elements + 32);
    return reinterpret_cast<bf16*>((reinterpret_cast<std::uintptr_t>(kept.data()) + 63) / 64 * 64);
}

// Steps of one operand within a block: `left` is their first column, `panel` where their panels begin in a strip's. The
// last piece of a block ends it.
struct Piece {
    const bf16* left;
    index_t stride, steps, panel;
    bool ends;
};

static inline std::vector<Piece> pieces_of(const std::vector<Operand>& operands) {
    index_t total = 0, done = 0, block = 0;
    for (const Operand& operand : operands) total += operand.depth / TILE;
    index_t blocks = (total + BLOCK_STEPS - 1) / BLOCK_STEPS;
    std::vector<Piece> pieces;
    for (const Operand& operand : operands)
        for (index_t step = 0; step < operand.depth / TILE;) {
            index_t end = total * (block + 1) / blocks;
            index_t steps = std::min(operand.depth / TILE - step, end - done);
            pieces.push_back(
                {operand.rows + step * TILE, operand.stride, steps, done * PANEL, done + steps == end});
            step += steps;
            done += steps;
            if (done == end) ++block;
        }
    return pieces;
}

// The panels [first, last) of `out`, for all tokens. `pack(panel, operand, step, to)` writes 32 rows of depth of a
// panel; `store(panel, token, sums)` takes a finished tile, fp32 [32][32].
template <class Pack, class Store>
static inline void product(const std::vector<Operand>& operands, index_t tokens, index_t first, index_t last, Pack pack,
                           Store store) {
    const std::vector<Piece> pieces = pieces_of(operands);
    index_t depth = 0;
    for (const Operand& operand : operands) depth += operand.depth;
    index_t width = std::clamp<index_t>(STRIP_BYTES / (depth * TILE * 2), 1, STRIP_PANELS);
    constexpr index_t BLOCK_TILES = BLOCK_ROWS / TILE;
    bf16* panels = scratch(width * depth * TILE + width * BLOCK_TILES * PANEL * 2);
    float* sums = reinterpret_cast<float*>(panels + width * depth * TILE);
    for (; first < last; first += width) {
        width = std::min(width, last - first);
        for (index_t n = 0; n < width; ++n) {
            bf16* to = panels + n * depth * TILE;
            for (index_t operand = 0; operand < static_cast<index_t>(operands.size()); ++operand)
                for (index_t step = 0; step < operands[operand].depth / TILE; ++step, to += PANEL)
                    pack(first + n, operand, step, to);
        }
        for (index_t token = 0; token < tokens; token += BLOCK_ROWS) {
            index_t tiles = std::min(BLOCK_TILES, (tokens - token) / TILE);
            for (auto from = pieces.begin(), to = from; from != pieces.end(); from = to) {
                while (!to++->ends) {}
                for (index_t tile = 0; tile < tiles; ++tile)
                    for (index_t n = 0; n < width; ++n) {
                        float* sum = sums + (n * BLOCK_TILES + tile) * PANEL;
                        load_sums(sum, TILE, from != pieces.begin());
                        for (auto piece = from; piece != to; ++piece) {
                            const bf16* left = piece->left + (token + tile * TILE) * piece->stride;
                            const bf16* panel = panels + n * depth * TILE + piece->panel;
                            for (index_t step = 0; step < piece->steps; ++step)
                                add_product(left + step * TILE, piece->stride, panel + step * PANEL);
                        }
                        store_sums(sum, TILE);
                        if (to == pieces.end()) store(first + n, token + tile * TILE, sum);
                    }
            }
        }
    }
}
