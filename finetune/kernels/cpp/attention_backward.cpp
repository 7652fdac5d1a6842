// The backward pass of attention: attention.h says how.
#ifdef __AMX_BF16__
#include "attention.h"

namespace {

// Operands of the backward pass: transposed tiles, and both kinds of panels.
struct Packed {
    bf16 *keys, *queries_t, *grads_t, *queries, *grads;
};

// Probabilities and d(scores) / scale of sixteen queries from `query` on and a key, from their scores and
// d(probabilities).
struct Gradients {
    __m512 probability, d_score;
};
inline Gradients gradients_of(const Row& row, const float* score, const float* d_prob, __m512 lse, __m512 delta,
                              bool partial, index_t query, index_t key) {
    __m512 p = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(score), _mm512_set1_ps(row.factor()), lse));
    if (partial) p = _mm512_maskz_mov_ps(row.seen(query, key), p);
    return {p, _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(d_prob), delta), p)};
}

void query_gradients(const Row& row, const Heads& k, const Heads& v, const Packed& packed, const float* lse,
                     const float* delta, bf16* dq) {
    alignas(64) float score[PANEL], d_prob[PANEL], sums[MAX_DIM * TILE];
    alignas(64) Weights d_scores;
#pragma omp for collapse(2) schedule(dynamic)
    for (index_t head = 0; head < row.heads; ++head)
        for (index_t tile = 0; tile < row.tiles(); ++tile) {
            std::vector<index_t> list = visited(row, tile, false);
            index_t kv = row.kv_of(head), total = static_cast<index_t>(list.size()), first = tile * TILE;
            index_t own = head * row.head_size() + first * row.dim;
            for (index_t n = 0; n < total; ++n) {
                scores(row, {k.at(kv, list[n] * TILE), k.token_stride, packed.queries_t + own, score},
                       {v.at(kv, list[n] * TILE), v.token_stride, packed.grads_t + own, d_prob});
                bool partial = row.visits[tile * row.tiles() + list[n]] == 2;
                bf16* panel = d_scores + n % BLOCK * PANEL;
                for (index_t half = 0; half < 2; ++half) {
                    index_t query = first + half * 16;
                    __m512 own_lse = _mm512_loadu_ps(lse + head * row.tokens + query);
                    __m512 own_delta = _mm512_loadu_ps(delta + head * row.tokens + query);
                    for (index_t key = 0; key < TILE; key += 2) {
                        auto at = [&](index_t i) {
                            index_t offset = (key + i) * TILE + half * 16;
                            return gradients_of(row, score + offset, d_prob + offset, own_lse, own_delta, partial,
                                                query, list[n] * TILE + key + i).d_score;
                        };
                        store_pair(panel + half * (PANEL / 2) + key * 16, at(0), at(1));
                    }
                }
                index_t count = n % BLOCK + 1;
                if (count == BLOCK || n + 1 == total)
                    weigh(row, list.data() + n + 1 - count, count, packed.keys + kv * row.head_size(), d_scores, sums,
                          n + 1 > count);
            }
            __m512 scale[2] = {_mm512_set1_ps(row.scale), _mm512_set1_ps(row.scale)};
            store_transposed(row, sums, scale, dq + (first * row.heads + head) * row.dim, row.heads * row.dim);
        }
}

// sums [32, D] = or += weights, `count` tiles of [32 keys, 32 queries], times the panels in `list` of a head.
void weigh_rows(const Row& row, const index_t* list, index_t count, const bf16* weights, const bf16* panels,
                float* sums, bool accumulate) {
    for (index_t chunk = 0; chunk < row.chunks(); ++chunk) {
        load_sums(sums + chunk * TILE, row.dim, accumulate);
        for (index_t n = 0; n < count; ++n)
            add_product(weights + n * PANEL, TILE, panels + (list[n] * row.chunks() + chunk) * PANEL);
        store_sums(sums + chunk * TILE, row.dim);
    }
}

void store_rows(const Row& row, const float* sums, float factor, bf16* out, index_t stride) {
    for (index_t i = 0; i < TILE; ++i)
        for (index_t d = 0; d < row.dim; d += 16)
            store_bf16(out + i * stride + d,
                       _mm512_mul_ps(_mm512_loadu_ps(sums + i * row.dim + d), _mm512_set1_ps(factor)));
}

void key_gradients(const Row& row, const Heads& k, const Heads& v, const Packed& packed, const float* lse,
                   const float* delta, bf16* dk, bf16* dv) {
    index_t group = row.heads / row.kv_heads;
    alignas(64) float score[PANEL], d_prob[PANEL], dk_sums[MAX_DIM * TILE], dv_sums[MAX_DIM * TILE];
    alignas(64) Weights probs, d_scores;
#pragma omp for collapse(2) schedule(dynamic)
    for (index_t kv = 0; kv < row.kv_heads; ++kv)
        for (index_t tile = 0; tile < row.tiles(); ++tile) {
            std::vector<index_t> list = visited(row, tile, true);
            index_t total = static_cast<index_t>(list.size());
            for (index_t head = kv * group; head < (kv + 1) * group; ++head)
                for (index_t n = 0; n < total; ++n) {
                    index_t query = list[n] * TILE, offset = head * row.head_size() + query * row.dim;
                    scores(row, {k.at(kv, tile * TILE), k.token_stride, packed.queries_t + offset, score},
                           {v.at(kv, tile * TILE), v.token_stride, packed.grads_t + offset, d_prob});
                    bool partial = row.visits[list[n] * row.tiles() + tile] == 2;
                    index_t first = head * row.tokens + query;
                    bf16 *prob = probs + n % BLOCK * PANEL, *d_score = d_scores + n % BLOCK * PANEL;
                    for (index_t key = 0; key < TILE; ++key) {
                        auto at = [&](index_t i) {
                            return gradients_of(row, score + key * TILE + i, d_prob + key * TILE + i,
                                                _mm512_loadu_ps(lse + first + i), _mm512_loadu_ps(delta + first + i),
                                                partial, query + i, tile * TILE + key);
                        };
                        Gradients left = at(0), right = at(16);
                        store_bf16(prob + key * TILE, left.probability, right.probability);
                        store_bf16(d_score + key * TILE, left.d_score, right.d_score);
                    }
                    index_t count = n % BLOCK + 1;
                    if (count < BLOCK && n + 1 < total) continue;
                    const index_t* tiles = list.data() + n + 1 - count;
                    bool more = head > kv * group || n + 1 > count;
                    weigh_rows(row, tiles, count, probs, packed.grads + head * row.head_size(), dv_sums, more);
                    weigh_rows(row, tiles, count, d_scores, packed.queries + head * row.head_size(), dk_sums, more);
                }
            index_t at = (tile * TILE * row.kv_heads + kv) * row.dim;
            store_rows(row, dk_sums, row.scale, dk + at, row.kv_heads * row.dim);
            store_rows(row, dv_sums, 1.0f, dv + at, row.kv_heads * row.dim);
        }
}

}  // namespace

extern "C" {

// dq [T, H, D], dk and dv [T, G, D]. Scratch: `packed` of (G + 4 H) x T x D elements, `delta` [H, T].
void attention_backward(const Row* shape, const Heads* q, const Heads* k, const Heads* v, const Heads* out,
                        const Heads* grad, const float* lse, bf16* dq, bf16* dk, bf16* dv, bf16* packed, float* delta,
                        int threads) {
    const Row& row = *shape;
    index_t size = row.heads * row.head_size();
    bf16* by_query = packed + row.kv_heads * row.head_size();
    Packed to{packed, by_query, by_query + size, by_query + 2 * size, by_query + 3 * size};
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        pack_heads(*k, row, row.kv_heads, to.keys, transpose_tile);
        pack_heads(*q, row, row.heads, to.queries_t, pack_transposed);
        pack_heads(*grad, row, row.heads, to.grads_t, pack_transposed);
        pack_heads(*q, row, row.heads, to.queries, pack_straight);
        pack_heads(*grad, row, row.heads, to.grads, pack_straight);
#pragma omp for collapse(2) schedule(static)
        for (index_t head = 0; head < row.heads; ++head)
            for (index_t token = 0; token < row.tokens; ++token) {
                const bf16 *o = out->at(head, token), *g = grad->at(head, token);
                __m512 sums = _mm512_setzero_ps();
                for (index_t i = 0; i < row.dim; i += 16)
                    sums = _mm512_fmadd_ps(load_bf16(o + i), load_bf16(g + i), sums);
                delta[head * row.tokens + token] = _mm512_reduce_add_ps(sums);
            }
        query_gradients(row, *k, *v, to, lse, delta, dq);
        key_gradients(row, *k, *v, to, lse, delta, dk, dv);
        _tile_release();
    }
}
}
#endif
