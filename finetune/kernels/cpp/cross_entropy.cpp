// Cross-entropy of a frozen linear head and its gradient to the hidden states; logits are never in memory.
//
// One pass over blocks of the vocabulary, as FlashAttention's over keys (Dao et al. 2022): a block's exponentials,
// relative to a reference that moves only when a logit exceeds it by far, are multiplied by the block's weights at
// once and divided by their sum at the end. The target's own part is added then, in fp32: rounding a probability near 1
// to bf16 would be most of the gradient. Logits are fp32 throughout. All sums have one order, whatever
// the number of threads.
//
// Shapes: N tokens (from `count` on they are padding) and D hidden size, both multiples of 32; V vocabulary.
#ifdef __AMX_BF16__
#include "amx.h"
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr index_t BLOCK = 256;  // of the vocabulary
constexpr float NONE = -1e30f;
constexpr float MARGIN = 8.0f;  // exp(8) is far from what fp32 and bf16 can hold

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

float block_top(const float* logits, index_t columns) {
    __m512 tops = _mm512_set1_ps(NONE);
    for (index_t j = 0; j < BLOCK; j += 16)
        tops = _mm512_mask_max_ps(tops, within(columns, j), tops, _mm512_loadu_ps(logits + j));
    return _mm512_reduce_max_ps(tops);
}

// exp(logit - reference) of a block's columns but the target's, in bf16, and their sum.
float exponentials(const float* logits, float reference, index_t columns, index_t target, bf16* out) {
    __m512 sums = _mm512_setzero_ps();
    for (index_t j = 0; j < BLOCK; j += 16) {
        __m512 p = exp16(_mm512_sub_ps(_mm512_loadu_ps(logits + j), _mm512_set1_ps(reference)));
        __mmask16 counted = within(columns, j);
        if (j <= target && target < j + 16) counted &= static_cast<__mmask16>(~(1u << (target - j)));
        p = _mm512_maskz_mov_ps(counted, p);
        sums = _mm512_add_ps(sums, p);
        store_bf16(out + j, p);
    }
    return _mm512_reduce_add_ps(sums);
}

void scale_row(float* row, float factor, index_t count) {
    for (index_t i = 0; i < count; i += 16)
        _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(factor)));
}

// What is known of a token after some blocks: the target's logit and, relative to the reference, the others' sum.
struct Token {
    float reference = NONE, others = 0.0f, picked = 0.0f;
    float own() const { return std::exp(picked - reference); }
    float loss() const {
        float lead = reference - picked;
        return lead < 20.0f ? std::log1p(others * std::exp(lead)) : lead + std::log(others + own());
    }
};

// A tile's exponentials [32, BLOCK] of one block; its tokens and, where there is one, its gradient follow.
void visit(const Head& head, index_t block, const float* logits, const index_t* targets, index_t count, Token* tokens,
           float* grad, bf16* out) {
    for (index_t i = 0; i < TILE; ++i, out += BLOCK) {
        if (i >= count) {
            std::fill(out, out + BLOCK, bf16(0));
            continue;
        }
        Token& token = tokens[i];
        const float* line = logits + i * BLOCK;
        index_t target = targets[i] - block * BLOCK;
        float top = block_top(line, head.columns(block));
        if (top > token.reference + MARGIN) {
            float factor = std::exp(token.reference - top);
            token.others *= factor;
            if (grad) scale_row(grad + i * head.dim, factor, head.dim);
            token.reference = top;
        }
        token.others += exponentials(line, token.reference, head.columns(block), target, out);
        if (target >= 0 && target < BLOCK) token.picked = line[target];
    }
}

}  // namespace

extern "C" {

// losses [N] and grad [N, D] (fp32, zeroed by the caller; or null): d(sum of losses) / d(hidden).
void cross_entropy(const bf16* hidden, const bf16* weight, const index_t* targets, float* losses, float* grad,
                   index_t tokens, index_t count, index_t vocab, index_t dim, int threads) {
    Head head{weight, vocab, dim};
    std::vector<Token> known(tokens);
    std::vector<bf16> transposed(BLOCK * dim), straight(grad ? BLOCK * dim : 0);
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<float> logits(TILE * BLOCK);
        std::vector<bf16> weights(TILE * BLOCK);
        for (index_t block = 0; block < head.blocks(); ++block) {
#pragma omp for schedule(static)
            for (index_t tile = 0; tile < BLOCK / TILE; ++tile) {
                pack_tile(head, block, tile, transposed.data(), pack_transposed);
                if (grad) pack_tile(head, block, tile, straight.data(), pack_straight);
            }
#pragma omp for schedule(dynamic)
            for (index_t row = 0; row < tokens; row += TILE) {
                float* to = grad ? grad + row * dim : nullptr;
                logits_tile(head, hidden + row * dim, transposed.data(), logits.data());
                visit(head, block, logits.data(), targets + row, count - row, known.data() + row, to, weights.data());
                for (index_t chunk = 0; grad && chunk < head.chunks(); ++chunk)
                    multiply(weights.data(), BLOCK, BLOCK / TILE,
                             [&](index_t k) { return straight.data() + (k * head.chunks() + chunk) * PANEL; },
                             to + chunk * TILE, dim, true);
            }
        }
#pragma omp for schedule(static)
        for (index_t token = 0; token < count; ++token) {
            losses[token] = known[token].loss();
            if (!grad) continue;
            float sum = known[token].others + known[token].own();
            __m512 factor = _mm512_set1_ps(1.0f / sum), target = _mm512_set1_ps(-known[token].others / sum);
            for (index_t i = 0; i < dim; i += 16) {
                float* to = grad + token * dim + i;
                __m512 own = _mm512_mul_ps(target, load_bf16(weight + targets[token] * dim + i));
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), factor, own));
            }
        }
        _tile_release();
    }
}
}
#endif
