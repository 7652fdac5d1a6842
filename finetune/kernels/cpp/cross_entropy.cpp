// Cross-entropy of a frozen linear head and its gradient to the hidden states; logits are never in memory.
//
// The vocabulary is cut into blocks. A first pass over them gives each token's log-sum-exp, a second one computes
// the logits again, takes the softmax minus one-hot and multiplies it by the block's weights at once. One product
// more than with stored logits, but nothing leaves the caches, and logits are fp32 throughout. All sums have one
// order, whatever the number of threads.
//
// Shapes: N tokens (a multiple of 32; from `count` on they are padding), D hidden size (a multiple of 32), V vocabulary.
#ifdef __AMX_BF16__
#include "amx.h"
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr index_t BLOCK = 256;  // of the vocabulary
constexpr float NONE = -1e30f;

struct Head {
    const bf16* weight;  // [V, D]
    index_t vocab, dim;
    index_t blocks() const { return (vocab + BLOCK - 1) / BLOCK; }
    index_t columns(index_t block) const { return std::min(BLOCK, vocab - block * BLOCK); }
    index_t chunks() const { return dim / TILE; }
};

// Pack one tile of 32 weights of a block; rows after the vocabulary are zeros.
template <class Pack> void pack_tile(const Head& head, index_t block, index_t tile, bf16* out, Pack pack) {
    index_t first = block * BLOCK + tile * TILE, rows = std::min(TILE, head.vocab - first);
    bf16* to = out + tile * head.chunks() * PANEL;
    if (rows <= 0) return std::fill(to, to + head.chunks() * PANEL, bf16(0));
    if (rows == TILE) {
        for (index_t chunk = 0; chunk < head.chunks(); ++chunk)
            pack(head.weight + first * head.dim + chunk * TILE, head.dim, to + chunk * PANEL);
        return;
    }
    std::vector<bf16> last(TILE * head.dim, 0);
    std::copy_n(head.weight + first * head.dim, rows * head.dim, last.begin());
    for (index_t chunk = 0; chunk < head.chunks(); ++chunk)
        pack(last.data() + chunk * TILE, head.dim, to + chunk * PANEL);
}

// Logits [32, BLOCK] of a tile of tokens.
void logits_tile(const Head& head, const bf16* hidden, const bf16* packed, float* out) {
    for (index_t tile = 0; tile < BLOCK / TILE; ++tile)
        multiply(hidden, head.dim, head.chunks(),
                 [&](index_t k) { return packed + (tile * head.chunks() + k) * PANEL; }, out + tile * TILE, BLOCK,
                 false);
}

__mmask16 within(index_t columns, index_t from) {
    index_t left = columns - from;
    return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

// Maximum and sum of exp(logit - maximum) over a block's columns.
void block_sum(const float* logits, index_t columns, float* top, float* sum) {
    __m512 tops = _mm512_set1_ps(NONE), sums = _mm512_setzero_ps();
    for (index_t j = 0; j < BLOCK; j += 16)
        tops = _mm512_mask_max_ps(tops, within(columns, j), tops, _mm512_loadu_ps(logits + j));
    *top = _mm512_reduce_max_ps(tops);
    for (index_t j = 0; j < BLOCK; j += 16) {
        __m512 p = exp16(_mm512_sub_ps(_mm512_loadu_ps(logits + j), _mm512_set1_ps(*top)));
        sums = _mm512_add_ps(sums, _mm512_maskz_mov_ps(within(columns, j), p));
    }
    *sum = _mm512_reduce_add_ps(sums);
}

// Softmax minus one-hot of a row, in bf16.
void gradient_row(const float* logits, float lse, index_t columns, index_t target, bf16* out) {
    for (index_t j = 0; j < BLOCK; j += 16) {
        __m512 p = exp16(_mm512_sub_ps(_mm512_loadu_ps(logits + j), _mm512_set1_ps(lse)));
        p = _mm512_maskz_mov_ps(within(columns, j), p);
        if (j <= target && target < j + 16)
            p = _mm512_mask_sub_ps(p, static_cast<__mmask16>(1u << (target - j)), p, _mm512_set1_ps(1.0f));
        store_bf16(out + j, p);
    }
}

// Per block and token: maximum, sum and, in the block of its target, the target's logit.
void first_pass(const Head& head, const bf16* hidden, const index_t* targets, index_t tokens, index_t count,
                float* tops, float* sums, float* picked, int threads) {
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<bf16> packed(BLOCK * head.dim);
        std::vector<float> logits(TILE * BLOCK);
#pragma omp for schedule(dynamic)
        for (index_t block = 0; block < head.blocks(); ++block) {
            for (index_t tile = 0; tile < BLOCK / TILE; ++tile)
                pack_tile(head, block, tile, packed.data(), pack_transposed);
            for (index_t row = 0; row < tokens; row += TILE) {
                logits_tile(head, hidden + row * head.dim, packed.data(), logits.data());
                for (index_t i = 0; i < TILE && row + i < count; ++i) {
                    const float* line = logits.data() + i * BLOCK;
                    index_t target = targets[row + i] - block * BLOCK, at = block * tokens + row + i;
                    block_sum(line, head.columns(block), tops + at, sums + at);
                    if (target >= 0 && target < BLOCK) picked[row + i] = line[target];
                }
            }
        }
        _tile_release();
    }
}

void second_pass(const Head& head, const bf16* hidden, const index_t* targets, index_t tokens, index_t count,
                 const float* lse, float* grad, int threads) {
    std::vector<bf16> transposed(BLOCK * head.dim), straight(BLOCK * head.dim);
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<float> logits(TILE * BLOCK);
        std::vector<bf16> d_logits(TILE * BLOCK);
        for (index_t block = 0; block < head.blocks(); ++block) {
#pragma omp for schedule(static)
            for (index_t tile = 0; tile < BLOCK / TILE; ++tile) {
                pack_tile(head, block, tile, transposed.data(), pack_transposed);
                pack_tile(head, block, tile, straight.data(), pack_straight);
            }
#pragma omp for schedule(dynamic)
            for (index_t row = 0; row < tokens; row += TILE) {
                logits_tile(head, hidden + row * head.dim, transposed.data(), logits.data());
                for (index_t i = 0; i < TILE; ++i) {
                    bf16* out = d_logits.data() + i * BLOCK;
                    if (row + i < count)
                        gradient_row(logits.data() + i * BLOCK, lse[row + i], head.columns(block),
                                     targets[row + i] - block * BLOCK, out);
                    else
                        std::fill(out, out + BLOCK, bf16(0));
                }
                for (index_t chunk = 0; chunk < head.chunks(); ++chunk)
                    multiply(d_logits.data(), BLOCK, BLOCK / TILE,
                             [&](index_t k) { return straight.data() + (k * head.chunks() + chunk) * PANEL; },
                             grad + row * head.dim + chunk * TILE, head.dim, true);
            }
        }
        _tile_release();
    }
}

}  // namespace

extern "C" {

// losses [N] and grad [N, D] (fp32, zeroed by the caller): d(sum of losses) / d(hidden). `block_sums` is scratch of
// 2 x ceil(V / 256) x N floats.
void cross_entropy(const bf16* hidden, const bf16* weight, const index_t* targets, float* losses, float* grad,
                   float* block_sums, index_t tokens, index_t count, index_t vocab, index_t dim, int threads) {
    Head head{weight, vocab, dim};
    float *tops = block_sums, *sums = block_sums + head.blocks() * tokens;
    std::vector<float> lse(tokens), picked(tokens);
    first_pass(head, hidden, targets, tokens, count, tops, sums, picked.data(), threads);
    for (index_t token = 0; token < count; ++token) {
        float top = NONE, sum = 0.0f;
        for (index_t block = 0; block < head.blocks(); ++block) top = std::max(top, tops[block * tokens + token]);
        for (index_t block = 0; block < head.blocks(); ++block)
            sum += sums[block * tokens + token] * std::exp(tops[block * tokens + token] - top);
        lse[token] = top + std::log(sum);
        losses[token] = lse[token] - picked[token];
    }
    second_pass(head, hidden, targets, tokens, count, lse.data(), grad, threads);
}
}
#endif
