// Products of tall matrices with packed panels: the frozen weights of a layer and its adapter in one sum.
//
// out [T, N] = the sum over operands of rows [T, depth] times panels [depth, N], in fp32. A thread packs a strip of
// panels (32 columns each), which stays in its second cache, and passes over all rows: a tile of 32 rows, or a block of
// its depth, stays in the first cache while the strip streams past it. Sums between blocks of depth wait in memory.
// Every tile of 32 x 32 is summed by one thread, in one order: so the result does not depend on the number of threads.
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

// Measured on a Granite Rapids core: 3.2 TFLOP/s without loads, 2.2 with rows in the first cache and panels in the
// second; with operands from memory 0.8 to 1.1 (oneDNN's own product of squares: 1.1).
constexpr index_t BLOCK_STEPS = 20;  // of 32 columns of depth
constexpr index_t STORE_PANELS = 4;  // stored together: longer pieces of a row
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

// The panels [first, last) of `out`, for all tokens. `pack(first, count, operand, strip, stride)` writes an operand's
// share of a strip: panels `stride` elements apart, of each a PANEL for every 32 rows of depth. `store(first, count,
// token, sums)` takes some finished tiles, fp32 [count][32][32].
template <class Pack, class Store>
static inline void product(const std::vector<Operand>& operands, index_t tokens, index_t first, index_t last, Pack pack,
                           Store store) {
    if (first >= last) return;
    const std::vector<Piece> pieces = pieces_of(operands);
    index_t depth = 0;
    for (const Operand& operand : operands) depth += operand.depth;
    index_t stride = depth * TILE, most = std::max<index_t>(STRIP_BYTES / (stride * 2), 1);
    index_t strips = (last - first + most - 1) / most, width = (last - first + strips - 1) / strips;
    bf16* strip = scratch(width * stride + width * PANEL * 2);
    float* sums = reinterpret_cast<float*>(strip + width * stride);
    for (; first < last; first += width) {
        width = std::min(width, last - first);
        bf16* to = strip;
        for (index_t n = 0; n < static_cast<index_t>(operands.size()); to += operands[n++].depth * TILE)
            pack(first, width, n, to, stride);
        for (index_t token = 0; token < tokens; token += TILE)
            for (auto from = pieces.begin(), end = from; from != pieces.end(); from = end) {
                while (!end++->ends) {}
                for (index_t n = 0; n < width; ++n) {
                    float* sum = sums + n * PANEL;
                    load_sums(sum, TILE, from != pieces.begin());
                    for (auto piece = from; piece != end; ++piece)
                        for (index_t step = 0; step < piece->steps; ++step)
                            add_product(piece->left + token * piece->stride + step * TILE, piece->stride,
                                        strip + n * stride + piece->panel + step * PANEL);
                    store_sums(sum, TILE);
                    index_t done = n % STORE_PANELS + 1;
                    if (end == pieces.end() && (done == STORE_PANELS || n + 1 == width))
                        store(first + n + 1 - done, done, token, sum + (1 - done) * PANEL);
                }
            }
    }
}
