// Cross-entropy of a frozen head and its gradient in one pass over the vocabulary, for processors without units for bf16.
//
// Logits of a block of the vocabulary and a panel of sixteen tokens exist at a time, as [vocabulary, tokens]: what
// belongs to a token is one lane of a vector, and exponentials come out as the right operand of the gradient's product.
// They are relative to the token's largest logit so far; where that grows, what was summed before is scaled. A target
// is left out of the sums and added at the end: next to probability 1 the others' share is what matters.
//
// Shapes: N tokens, V vocabulary, D hidden size (a multiple of 8).
#include "common.h"
#ifdef FMA_PRODUCTS
#include "fma.h"
#include "kept.h"
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr index_t ENTRIES = 192;  // of the vocabulary: logits of 12 KB
constexpr float NONE = -1e30f;
constexpr float LOG2_E = 1.44269504f;

// What is known of sixteen tokens after some of the vocabulary; logits are times LOG2_E here.
struct alignas(64) Tokens {
    float top[WIDTH], others[WIDTH], picked[WIDTH];
    index_t target[WIDTH];
};

// One call: its arguments and its memory.
struct Pass {
    const bf16 *hidden, *weight;  // [N, D] and [V, D]
    const index_t* targets;       // [N]
    index_t count, vocab, dim;
    float* sums;  // [panels][D][WIDTH], or null: the gradient before it is divided
    index_t panels = (count + WIDTH - 1) / WIDTH, columns = (dim + ROWS - 1) / ROWS * ROWS;
    // The hidden states as [panels][D][WIDTH], and a block of the vocabulary for both products.
    float *right = nullptr, *entries = nullptr, *weights = nullptr;
    std::vector<Tokens> tokens = std::vector<Tokens>(panels);

    index_t floats() const { return panels * dim * WIDTH + ENTRIES * (dim + columns); }

    void allot(Kept& memory) {
        right = memory.at_least<float>(floats());
        entries = right + panels * dim * WIDTH;  // [ENTRIES / ROWS][D][ROWS]
        weights = entries + ENTRIES * dim;       // [columns / ROWS][ENTRIES][ROWS]
    }

    void begin(index_t panel) {
        Tokens& t = tokens[panel];
        float* out = right + panel * dim * WIDTH;
        for (index_t j = 0; j < WIDTH; ++j) {
            index_t token = panel * WIDTH + j;
            t.top[j] = NONE, t.others[j] = 0.0f, t.picked[j] = 0.0f;
            t.target[j] = token < count ? targets[token] : -1;
            for (index_t d = 0; d < dim; ++d)
                out[d * WIDTH + j] = token < count ? to_float(hidden[token * dim + d]) : 0.0f;
        }
        if (sums) std::fill_n(sums + panel * dim * WIDTH, dim * WIDTH, 0.0f);
    }

    // Six rows of the block's weights, for both products; rows after the vocabulary are zeros.
    void pack(index_t first, index_t tile) {
        index_t row = first + tile * ROWS, rows = std::clamp<index_t>(vocab - row, 0, ROWS);
        float* out = entries + tile * dim * ROWS;
        pack_rows(weight + row * dim, dim, rows, dim, out);
        for (index_t d = 0; sums && d < columns; d += ROWS)
            for (index_t i = 0; i < ROWS; ++i)
                for (index_t j = 0; j < ROWS; ++j)
                    weights[(d * ENTRIES / ROWS + tile * ROWS + i) * ROWS + j] =
                        d + j < dim ? out[(d + j) * ROWS + i] : 0.0f;
    }

    // Out of the way of a block's others: what is after the vocabulary, and the logits of targets.
    void take_out(Tokens& t, index_t first, float* logits) const {
        for (index_t row = vocab - first; row < ENTRIES; ++row) std::fill_n(logits + row * WIDTH, WIDTH, NONE);
        for (index_t j = 0; j < WIDTH; ++j) {
            index_t row = t.target[j] - first;
            if (t.target[j] < 0 || row < 0 || row >= ENTRIES) continue;
            t.picked[j] = logits[row * WIDTH + j] * LOG2_E;
            logits[row * WIDTH + j] = NONE;
        }
    }

    // Logits become exponentials; what was summed before follows the largest logit.
    void exponentiate(Tokens& t, float* logits, float* gradient) const {
        for (index_t half = 0; half < WIDTH; half += 8) {
            __m256 scale = _mm256_set1_ps(LOG2_E), top = _mm256_set1_ps(NONE), sum = _mm256_setzero_ps();
            for (index_t row = 0; row < ENTRIES; ++row)
                top = _mm256_max_ps(top, _mm256_load_ps(logits + row * WIDTH + half));
            __m256 before = _mm256_load_ps(t.top + half), now = _mm256_max_ps(before, _mm256_mul_ps(top, scale));
            __m256 shrink = exp2_8(_mm256_sub_ps(before, now));
            if (_mm256_movemask_ps(_mm256_cmp_ps(now, before, _CMP_GT_OQ))) {
                for (index_t d = 0; gradient && d < dim; ++d) {
                    float* at = gradient + d * WIDTH + half;
                    _mm256_store_ps(at, _mm256_mul_ps(_mm256_load_ps(at), shrink));
                }
                _mm256_store_ps(t.top + half, now);
            }
            for (index_t row = 0; row < ENTRIES; ++row) {
                float* at = logits + row * WIDTH + half;
                __m256 value = exp2_8(_mm256_fmsub_ps(_mm256_load_ps(at), scale, now));
                sum = _mm256_add_ps(sum, value);
                _mm256_store_ps(at, value);
            }
            __m256 others = _mm256_fmadd_ps(_mm256_load_ps(t.others + half), shrink, sum);
            _mm256_store_ps(t.others + half, others);
        }
    }

    void visit(index_t panel, index_t first, float* logits) {
        Tokens& t = tokens[panel];
        const float* states = right + panel * dim * WIDTH;
        float* gradient = sums ? sums + panel * dim * WIDTH : nullptr;
        for (index_t tile = 0; tile < ENTRIES / ROWS; ++tile)
            multiply(entries + tile * dim * ROWS, states, dim, logits + tile * ROWS * WIDTH, WIDTH, false);
        take_out(t, first, logits);
        exponentiate(t, logits, gradient);
        for (index_t d = 0; gradient && d < dim; d += ROWS) {
            alignas(32) float last[ROWS * WIDTH];
            float *at = gradient + d * WIDTH, *to = d + ROWS <= dim ? at : last;
            if (to == last) std::copy_n(at, (dim - d) * WIDTH, last);
            multiply(weights + d * ENTRIES, logits, ENTRIES, to, WIDTH, true);
            if (to == last) std::copy_n(last, (dim - d) * WIDTH, at);
        }
    }

    // The losses of a panel and its finished gradient [N, D].
    void end(index_t panel, float* losses, bf16* grad) const {
        const Tokens& t = tokens[panel];
        const float* gradient = sums + panel * dim * WIDTH;
        for (index_t j = 0; j < std::min(WIDTH, count - panel * WIDTH); ++j) {
            index_t token = panel * WIDTH + j;
            double lead = double(t.top[j]) - t.picked[j], others = t.others[j], sum = others + std::exp2(-lead);
            losses[token] = static_cast<float>(lead < 1000.0 ? std::log1p(others * std::exp2(lead))
                                                             : lead / double(LOG2_E) + std::log(others));
            float factor = static_cast<float>(1.0 / sum), own = static_cast<float>(-others / sum);
            const bf16* target = weight + t.target[j] * dim;
            for (index_t d = 0; sums && d < dim; ++d)
                grad[token * dim + d] = to_bf16(gradient[d * WIDTH + j] * factor + own * to_float(target[d]));
        }
    }
};

}  // namespace

extern "C" {

// Bytes that stay allocated after a call.
index_t cross_entropy_scratch(index_t count, index_t dim) {
    return Pass{nullptr, nullptr, nullptr, count, 0, dim, nullptr}.floats() * 4;
}

// As in cross_entropy.cpp: losses [N], and grad [N, D]: d(sum of losses) / d(hidden). sums: memory for fp32 [N rounded up
// to 32, D]. Both may be null.
void cross_entropy(const bf16* hidden, const bf16* weight, const index_t* targets, float* losses, bf16* grad,
                   float* sums, index_t count, index_t vocab, index_t dim, int threads) {
    Pass pass{hidden, weight, targets, count, vocab, dim, sums};
    static thread_local Kept kept;
    pass.allot(kept);
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float logits[ENTRIES * WIDTH];
#pragma omp for schedule(static)
        for (index_t panel = 0; panel < pass.panels; ++panel) pass.begin(panel);
        for (index_t first = 0; first < vocab; first += ENTRIES) {
#pragma omp for schedule(static)
            for (index_t tile = 0; tile < ENTRIES / ROWS; ++tile) pass.pack(first, tile);
#pragma omp for schedule(static)
            for (index_t panel = 0; panel < pass.panels; ++panel) pass.visit(panel, first, logits);
        }
#pragma omp for schedule(static)
        for (index_t panel = 0; panel < pass.panels; ++panel) pass.end(panel, losses, grad);
    }
}
}
#endif
