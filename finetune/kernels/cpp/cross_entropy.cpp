// Cross-entropy of a frozen linear head and its gradient to the hidden states; logits are never in memory.
//
// One pass over blocks of the vocabulary, as FlashAttention's over keys (Dao et al. 2022): a block's exponentials,
// relative to a reference that moves only when a logit exceeds it by far, are multiplied by the block's weights at
// once and divided by their sum at the end. The target's own part is added then: rounding a probability near 1 to bf16
// would be most of the gradient. Logits are fp32 throughout. A token is computed by one thread, in one order, whatever
// the number of threads.
//
// Both products stand on their sides, tokens to the right: the weights stream past as left operands, and what belongs
// to a tile of tokens, its hidden states or its exponentials, stays in the first cache. References are whole powers of
// two: moving one rounds nothing.
//
// Shapes: N tokens; D hidden size, a multiple of 32; V vocabulary.
#ifdef __AMX_BF16__
#include "product.h"
#include <cmath>

namespace {

constexpr index_t BLOCK = 512;  // of the vocabulary: a tile's exponentials then fill two thirds of the first cache
constexpr index_t STRIPS = BLOCK / TILE;
constexpr index_t CACHED_BYTES = 1 << 20;  // of weights: half the second cache
constexpr float NONE = -1e30f;
constexpr float MARGIN = 12.0f;  // 2^12 is far from what fp32 and bf16 can hold
constexpr float LOG2_E = 1.44269504f;

// What is known of a tile of tokens after some of the vocabulary. An exponential is 2^(logit * LOG2_E - reference);
// sums are of all but the targets', `block` of this block, and `factor` is what the earlier blocks' gradient lacks.
struct alignas(64) Tokens {
    float reference[TILE], others[TILE], block[TILE], factor[TILE], picked[TILE];
    std::int32_t target[TILE];
    float margin;  // of an exponent above its reference; the first strip sets all references
    bool moved;
    void begin_block() {
        for (index_t i = 0; i < TILE; ++i) others[i] += block[i], block[i] = 0.0f, factor[i] = 1.0f;
        moved = false;
    }
};

// sums [32, 32] = or += `steps` tiles [32, 32] of `left`, which stream past, times as many panels. `beside(step)` runs
// on the units that wait meanwhile, `then()` before the sums are stored.
template <class Beside, class Then>
void multiply_past(const bf16* left, const bf16* panels, index_t steps, float* sums, bool accumulate, Beside beside,
                   Then then) {
    load_sums(sums, TILE, accumulate);
    for (index_t k = 0; k < steps; ++k, left += PANEL, panels += PANEL) {
        _tile_loadd(6, panels, 64);
        _tile_stream_loadd(4, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panels + PANEL / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, left + PANEL / 2, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        beside(k);
    }
    then();
    store_sums(sums, TILE);
}

// From logits [32 of the vocabulary, 32 tokens]: their exponentials as a panel, and of each token the sum and the
// largest exponent.
struct Strip {
    const float* logits;
    bf16* panel;
    __m512 reference[2], sums[2], top[2];

    Strip(const Tokens& tokens, const float* logits, bf16* panel) : logits(logits), panel(panel) {
        for (int half = 0; half < 2; ++half) {
            reference[half] = _mm512_load_ps(tokens.reference + 16 * half);
            sums[half] = _mm512_setzero_ps();
            top[half] = _mm512_set1_ps(NONE);
        }
    }
    // Two rows of the vocabulary.
    void add(index_t pair) {
        for (int half = 0; half < 2; ++half) {
            __m512 p[2];
            for (int i = 0; i < 2; ++i) {
                __m512 logit = _mm512_load_ps(logits + (2 * pair + i) * TILE + 16 * half);
                __m512 exponent = _mm512_fmsub_ps(logit, _mm512_set1_ps(LOG2_E), reference[half]);
                top[half] = _mm512_max_ps(exponent, top[half]);
                p[i] = exp2_16(exponent);
                sums[half] = _mm512_add_ps(sums[half], p[i]);
            }
            store_pair(panel + half * (PANEL / 2) + pair * TILE, p[0], p[1]);
        }
    }
    __mmask16 above(int half, float margin) const {
        return _mm512_cmp_ps_mask(top[half], _mm512_set1_ps(margin), _CMP_GT_OQ);
    }
};

// The references of tokens whose exponents were too large, and what is relative to them: the block's first panels too.
void move(Tokens& tokens, const Strip& strip, bf16* panels, index_t count) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    tokens.moved = true;
    for (int half = 0; half < 2; ++half) {
        __mmask16 above = strip.above(half, tokens.margin);
        __m512 by = _mm512_maskz_roundscale_ps(above, strip.top[half], _MM_FROUND_TO_NEAREST_INT);
        // Down only the first time, from 0, where all sums are still 0.
        __m512 factor = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_sub_ps(_mm512_setzero_ps(), by));
        factor = _mm512_min_ps(factor, _mm512_set1_ps(1.0f));
        _mm512_store_ps(tokens.reference + 16 * half, _mm512_add_ps(strip.reference[half], by));
        for (float* values : {tokens.others, tokens.block, tokens.factor}) {
            float* to = values + 16 * half;
            _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), factor));
        }
        __m512 left = _mm512_permutexvar_ps(twice, factor);
        __m512 right = _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8)), factor);
        for (index_t n = 0; n < count; ++n)
            for (index_t row = 0; row < TILE / 2; ++row) {
                bf16* p = panels + n * PANEL + half * (PANEL / 2) + row * TILE;
                store_bf16(p, _mm512_mul_ps(load_bf16(p), left), _mm512_mul_ps(load_bf16(p + 16), right));
            }
    }
}

// The sums of a strip, the block's `index`-th, to the tokens'.
void finish(Strip& strip, Tokens& tokens, bf16* panels, index_t index) {
    if (strip.above(0, tokens.margin) | strip.above(1, tokens.margin)) {
        move(tokens, strip, panels, index);
        tokens.margin = MARGIN;
        strip = Strip(tokens, strip.logits, strip.panel);
        for (index_t pair = 0; pair < TILE / 2; ++pair) strip.add(pair);
    }
    for (int half = 0; half < 2; ++half) {
        float* to = tokens.block + 16 * half;
        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), strip.sums[half]));
    }
}

// Out of the way of a strip's others: what is after the vocabulary, and the logits of targets.
void take_out(Tokens& tokens, float* logits, index_t first, index_t rows) {
    for (index_t row = rows; row < TILE; ++row) std::fill_n(logits + row * TILE, TILE, NONE);
    for (index_t half = 0; half < TILE; half += 16) {
        __m512i place = _mm512_sub_epi32(_mm512_load_si512(tokens.target + half), _mm512_set1_epi32(first));
        for (__mmask16 here = _mm512_cmplt_epu32_mask(place, _mm512_set1_epi32(TILE)); here; here &= here - 1) {
            index_t token = half + __builtin_ctz(here);
            float& logit = logits[(tokens.target[token] - first) * TILE + token];
            tokens.picked[token] = logit;
            logit = NONE;
        }
    }
}

// One call: its arguments and its memory, in tiles and panels of 32 x 32.
struct Pass {
    const bf16 *hidden, *weight;  // [N, D] and [V, D]
    const index_t* targets;       // [N]
    index_t count, vocab, dim;
    float* sums;  // [tiles of tokens][D][32], or null: the gradient before it is divided
    index_t depth = dim / TILE, tiles = (count + TILE - 1) / TILE;
    index_t strips_cached = std::clamp<index_t>(CACHED_BYTES / (dim * TILE * 2), 1, STRIPS);
    index_t steps_cached = std::clamp<index_t>(CACHED_BYTES / (BLOCK * TILE * 2), 1, depth);
    bf16* panels = scratch((tiles * (depth + STRIPS) + (depth + steps_cached) * STRIPS) * PANEL);  // [tiles][D / 32]
    bf16* exponentials = panels + tiles * depth * PANEL;  // [tiles][STRIPS]
    bf16* weights = exponentials + tiles * STRIPS * PANEL;  // [STRIPS][D / 32], of one block
    bf16* transposed = weights + STRIPS * depth * PANEL;    // [steps_cached][STRIPS], of some of its columns
    std::vector<Tokens> tokens = std::vector<Tokens>(tiles);

    index_t strips(index_t first) const { return std::min(STRIPS, (vocab - first + TILE - 1) / TILE); }

    void begin(index_t tile) {
        index_t first = tile * TILE, rows = std::min(TILE, count - first);
        std::vector<bf16> last(rows < TILE ? TILE * dim : 0, 0);
        if (rows < TILE) std::copy_n(hidden + first * dim, rows * dim, last.begin());
        const bf16* from = rows < TILE ? last.data() : hidden + first * dim;
        for (index_t k = 0; k < depth; ++k) pack_transposed(from + k * TILE, dim, panels + (tile * depth + k) * PANEL);
        Tokens& t = tokens[tile] = {};
        t.margin = NONE;
        std::fill_n(t.target, TILE, -1);
        std::copy_n(targets + first, rows, t.target);
    }

    // A strip of the block's weights, in memory's order; rows after the vocabulary are zeros.
    void copy(index_t first, index_t n) {
        for (index_t row = 0; row < TILE; ++row)
            for (index_t k = 0; k < depth; ++k) {
                index_t from = first + n * TILE + row;
                __m512i line = _mm512_setzero_si512();
                if (from < vocab) line = _mm512_loadu_si512(weight + from * dim + k * TILE);
                _mm512_store_si512(weights + (n * depth + k) * PANEL + row * TILE, line);
            }
    }

    // The exponentials of a tile for the strips [from, to) of a block: those of a strip while the next is multiplied.
    // Of a deep head a part of the depth at a time, which stays in the first cache.
    void exponentiate(index_t tile, index_t first, index_t from, index_t to, float* logits) {
        Tokens& t = tokens[tile];
        if (from == 0) t.begin_block();
        bf16* out = exponentials + tile * STRIPS * PANEL;
        index_t parts = (depth + BLOCK_STEPS - 1) / BLOCK_STEPS;
        auto logits_of = [&](index_t n) { return parts > 1 ? logits + (n - from) * PANEL : logits; };
        for (index_t part = 0; part < parts; ++part) {
            index_t step = depth * part / parts, steps = depth * (part + 1) / parts - step;
            index_t pairs = (TILE / 2 + steps - 1) / steps;
            for (index_t n = from; n < to; ++n) {
                auto multiply = [&](auto beside, auto then) {
                    multiply_past(weights + (n * depth + step) * PANEL, panels + (tile * depth + step) * PANEL, steps,
                                  logits_of(n), part > 0, beside, then);
                };
                if (part + 1 < parts || n == from) {
                    multiply([](index_t) {}, [] {});
                } else {
                    Strip strip(t, logits_of(n - 1), out + (n - 1) * PANEL);
                    multiply(
                        [&](index_t k) {
                            for (index_t pair = k * pairs; pair < std::min((k + 1) * pairs, TILE / 2); ++pair)
                                strip.add(pair);
                        },
                        [&] { finish(strip, t, out, n - 1); });
                }
                if (part + 1 == parts) take_out(t, logits_of(n), first + n * TILE, vocab - first - n * TILE);
            }
        }
        Strip strip(t, logits_of(to - 1), out + (to - 1) * PANEL);
        for (index_t pair = 0; pair < TILE / 2; ++pair) strip.add(pair);
        finish(strip, t, out, to - 1);
    }

    void transpose(index_t n, index_t from, index_t to) {
        for (index_t k = from; k < to; ++k)
            transpose_tile(weights + (n * depth + k) * PANEL, TILE, transposed + ((k - from) * STRIPS + n) * PANEL);
    }

    // A block's part of a tile's gradient, columns [from, to) in steps of 32.
    void differentiate(index_t tile, index_t first, index_t from, index_t to) {
        const Tokens& t = tokens[tile];
        index_t steps = strips(first);
        for (index_t k = from; k < to; ++k) {
            float* out = sums + (tile * depth + k) * PANEL;
            for (index_t i = 0; t.moved && first > 0 && i < PANEL; i += 16)
                _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_load_ps(out + i), _mm512_load_ps(t.factor + i % TILE)));
            // The next sums would be waited for; the processor's own prefetching is behind.
            auto fetch = [&](index_t step) {
                const float* next = out + PANEL + step * (PANEL / STRIPS);
                for (index_t i = 0; i < PANEL / STRIPS; i += 16) _mm_prefetch(next + i, _MM_HINT_T0);
            };
            multiply_past(transposed + (k - from) * BLOCK * TILE, exponentials + tile * STRIPS * PANEL, steps, out,
                          first > 0, fetch, [] {});
        }
    }

    // The losses of a tile and the finished gradient [N, D].
    void end(index_t tile, float* losses, bf16* grad) {
        Tokens& t = tokens[tile];
        t.begin_block();
        float factor[TILE], own[TILE];
        index_t rows = std::min(TILE, count - tile * TILE);
        for (index_t i = 0; i < rows; ++i) {
            double lead = t.reference[i] - double(t.picked[i]) * double(LOG2_E), others = t.others[i];
            double sum = others + std::exp2(-lead);
            losses[tile * TILE + i] = static_cast<float>(lead < 1000.0 ? std::log1p(others * std::exp2(lead))
                                                                       : lead / double(LOG2_E) + std::log(others));
            factor[i] = static_cast<float>(1.0 / sum);
            own[i] = static_cast<float>(-others / sum);
        }
        for (index_t d = 0; sums && d < dim; d += 16)
            for (index_t first = 0; first < rows; first += 16) {
                __m512i values[16];
                for (index_t i = 0; i < 16; ++i)
                    values[i] = _mm512_load_si512(sums + (tile * dim + d + i) * TILE + first);
                transpose_words(values);
                for (index_t i = first; i < std::min(first + 16, rows); ++i) {
                    __m512 target = _mm512_mul_ps(_mm512_set1_ps(own[i]), load_bf16(weight + t.target[i] * dim + d));
                    __m512 others = _mm512_castsi512_ps(values[i - first]);
                    store_bf16(grad + (tile * TILE + i) * dim + d,
                               _mm512_fmadd_ps(others, _mm512_set1_ps(factor[i]), target));
                }
            }
    }
};

}  // namespace

extern "C" {

// losses [N], and grad [N, D]: d(sum of losses) / d(hidden). sums: memory for fp32 [N rounded up to 32, D]. Both may
// be null.
void cross_entropy(const bf16* hidden, const bf16* weight, const index_t* targets, float* losses, bf16* grad,
                   float* sums, index_t count, index_t vocab, index_t dim, int threads) {
    Pass pass{hidden, weight, targets, count, vocab, dim, sums};
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        alignas(64) float logits[STRIPS * PANEL];
#pragma omp for schedule(static)
        for (index_t tile = 0; tile < pass.tiles; ++tile) pass.begin(tile);
        for (index_t first = 0; first < vocab; first += BLOCK) {
            index_t strips = pass.strips(first);
#pragma omp for schedule(static)
            for (index_t n = 0; n < strips; ++n) pass.copy(first, n);
            for (index_t from = 0; from < strips; from += pass.strips_cached) {
                index_t to = std::min(from + pass.strips_cached, strips);
#pragma omp for schedule(static)
                for (index_t tile = 0; tile < pass.tiles; ++tile) pass.exponentiate(tile, first, from, to, logits);
            }
            for (index_t from = 0; sums && from < pass.depth; from += pass.steps_cached) {
                index_t to = std::min(from + pass.steps_cached, pass.depth);
#pragma omp for schedule(static)
                for (index_t n = 0; n < strips; ++n) pass.transpose(n, from, to);
#pragma omp for schedule(static)
                for (index_t tile = 0; tile < pass.tiles; ++tile) pass.differentiate(tile, first, from, to);
            }
        }
#pragma omp for schedule(static)
        for (index_t tile = 0; tile < pass.tiles; ++tile) pass.end(tile, losses, grad);
        _tile_release();
    }
}
}
#endif
