// Attention over a packed row: each query sees its own sample up to itself and, where it has one, its prefix.
//
// The row is cut into tiles of 32 tokens. `visits` [T/32, T/32] says of a tile of queries and one of keys whether
// no pair (0), every pair (1) or some pair (2) sees each other. Scores live in caches only. The backward pass
// computes them twice, once for dq by queries and once for dk and dv by keys: so every tile of a gradient is
// written by one thread, in one order, and the result does not depend on the number of threads.
//
// Shapes: T tokens (a multiple of 32), H heads, G key heads, D head size (a multiple of 32).
#ifdef __AMX_BF16__
#include "amx.h"
#include <cmath>
#include <cstdlib>
#include <vector>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Row {
    index_t tokens, heads, kv_heads, dim;
    const std::int32_t *own_start, *prefix_start, *prefix_end;  // [T]
    const std::uint8_t* visits;                                 // [T/32, T/32]
    float scale;

    index_t tiles() const { return tokens / TILE; }
    index_t chunks() const { return dim / TILE; }
    index_t head_panels() const { return tokens * dim; }  // elements of one packed head
    index_t kv_of(index_t head) const { return head / (heads / kv_heads); }
    // Which of sixteen keys from `key` on a query sees.
    __mmask16 sees(index_t query, index_t key) const {
        __m512i keys = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(key)), counting());
        return (_mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(own_start[query])) &
                _mm512_cmple_epi32_mask(keys, _mm512_set1_epi32(static_cast<int>(query)))) |
               (_mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(prefix_start[query])) &
                _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(prefix_end[query])));
    }
    // Which of sixteen queries from `query` on see a key.
    __mmask16 seen(index_t query, index_t key) const {
        __m512i wanted = _mm512_set1_epi32(static_cast<int>(key));
        __m512i queries = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(query)), counting());
        return (_mm512_cmpge_epi32_mask(wanted, _mm512_loadu_si512(own_start + query)) &
                _mm512_cmple_epi32_mask(wanted, queries)) |
               (_mm512_cmpge_epi32_mask(wanted, _mm512_loadu_si512(prefix_start + query)) &
                _mm512_cmplt_epi32_mask(wanted, _mm512_loadu_si512(prefix_end + query)));
    }
    static __m512i counting() {
        return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    }
};

// [T, H, D] with its own strides; the elements of a head lie together.
struct Heads {
    const bf16* data;
    index_t token_stride, head_stride;
    const bf16* at(index_t head, index_t token) const { return data + head * head_stride + token * token_stride; }
};

struct Buffer {
    std::size_t size = 0;
    void* data = nullptr;
    template <class T> T* get(std::size_t count) {
        if (count * sizeof(T) > size) {
            std::free(data);
            size = count * sizeof(T);
            data = std::aligned_alloc(64, (size + 63) / 64 * 64);
        }
        return static_cast<T*>(data);
    }
    ~Buffer() { std::free(data); }
};

template <class Pack>
void pack_heads(const Heads& x, const Row& row, index_t heads, bf16* out, Pack pack, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (index_t head = 0; head < heads; ++head)
        for (index_t tile = 0; tile < row.tiles(); ++tile)
            for (index_t chunk = 0; chunk < row.chunks(); ++chunk)
                pack(x.at(head, tile * TILE) + chunk * TILE, x.token_stride,
                     out + head * row.head_panels() + (tile * row.chunks() + chunk) * PANEL);
}

// scores [32, 32] of one tile of a against one tile of b, packed transposed.
void scores(const Row& row, const bf16* a, index_t a_stride, const bf16* packed, index_t tile, float* out,
            index_t out_stride) {
    const bf16* first = packed + tile * row.chunks() * PANEL;
    multiply(a, a_stride, row.chunks(), [&](index_t k) { return first + k * PANEL; }, out, out_stride, false);
}

// out [32, D] = or += weights [32, 32 n] times the tiles in `list` of a head, packed straight.
void weigh(const Row& row, const bf16* weights, const std::vector<index_t>& list, const bf16* packed, float* out,
           bool accumulate) {
    index_t width = static_cast<index_t>(list.size()) * TILE;
    for (index_t chunk = 0; chunk < row.chunks(); ++chunk)
        multiply(weights, width, static_cast<index_t>(list.size()),
                 [&](index_t k) { return packed + (list[k] * row.chunks() + chunk) * PANEL; }, out + chunk * TILE,
                 row.dim, accumulate);
}

void store(const float* values, float factor, bf16* out, index_t count) {
    for (index_t i = 0; i < count; i += 16)
        store_bf16(out + i, _mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(factor)));
}

const float HIDDEN = -1e30f;  // the score of a pair that does not see each other

// Softmax over the scores [32, width] of a tile of queries, unnormalized in bf16; 1 / its sum and its log-sum-exp.
void softmax_tile(const Row& row, index_t tile, const std::vector<index_t>& list, float* score, bf16* weights,
                  float* inverse, float* lse) {
    index_t width = static_cast<index_t>(list.size()) * TILE;
    __m512 hidden = _mm512_set1_ps(HIDDEN), scale = _mm512_set1_ps(row.scale);
    for (index_t i = 0; i < TILE; ++i) {
        index_t query = tile * TILE + i;
        float* line = score + i * width;
        __m512 tops = hidden, sums = _mm512_setzero_ps();
        for (std::size_t n = 0; n < list.size(); ++n) {
            bool partial = row.visits[tile * row.tiles() + list[n]] == 2;
            for (index_t j = 0; j < TILE; j += 16) {
                __m512 values = _mm512_loadu_ps(line + n * TILE + j);
                if (partial) {
                    values = _mm512_mask_mov_ps(hidden, row.sees(query, list[n] * TILE + j), values);
                    _mm512_storeu_ps(line + n * TILE + j, values);
                }
                tops = _mm512_max_ps(tops, values);
            }
        }
        float top = _mm512_reduce_max_ps(tops);
        for (index_t j = 0; j < width; j += 16) {
            __m512 values = _mm512_loadu_ps(line + j);
            // Of a NaN this comparison is true: it goes on into the sum.
            __mmask16 visible = _mm512_cmp_ps_mask(values, hidden, _CMP_NEQ_UQ);
            __m512 shifted = _mm512_mul_ps(_mm512_sub_ps(values, _mm512_set1_ps(top)), scale);
            __m512 p = _mm512_maskz_mov_ps(visible, exp16(shifted));
            sums = _mm512_add_ps(sums, p);
            store_bf16(weights + i * width + j, p);
        }
        float sum = _mm512_reduce_add_ps(sums);
        inverse[i] = 1.0f / sum;
        lse[query] = top * row.scale + std::log(sum);
    }
}

std::vector<index_t> visited(const Row& row, index_t tile, bool by_keys) {
    std::vector<index_t> list;
    for (index_t other = 0; other < row.tiles(); ++other)
        if (row.visits[by_keys ? other * row.tiles() + tile : tile * row.tiles() + other]) list.push_back(other);
    return list;
}

}  // namespace

extern "C" {

// Ask Linux for the tile registers; 0 if this process has them.
int request_amx() {
    const long request_permission = 0x1023, tile_data = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, request_permission, tile_data));
}

// out [T, H, D] and lse [H, T]; `packed` holds 2 x G x T x D elements of scratch.
void attention_forward(const Row* shape, const Heads* q, const Heads* k, const Heads* v, bf16* out, float* lse,
                       bf16* packed, int threads) {
    const Row& row = *shape;
    bf16 *keys = packed, *values = packed + row.kv_heads * row.head_panels();
    pack_heads(*k, row, row.kv_heads, keys, pack_transposed, threads);
    pack_heads(*v, row, row.kv_heads, values, pack_straight, threads);
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        Buffer score_buffer, weight_buffer, out_buffer;
        float inverse[TILE];
#pragma omp for collapse(2) schedule(dynamic)
        for (index_t head = 0; head < row.heads; ++head)
            for (index_t tile = 0; tile < row.tiles(); ++tile) {
                std::vector<index_t> list = visited(row, tile, false);
                index_t width = static_cast<index_t>(list.size()) * TILE, kv = row.kv_of(head);
                float* score = score_buffer.get<float>(TILE * width);
                bf16* weights = weight_buffer.get<bf16>(TILE * width);
                float* sums = out_buffer.get<float>(TILE * row.dim);
                for (std::size_t n = 0; n < list.size(); ++n)
                    scores(row, q->at(head, tile * TILE), q->token_stride, keys + kv * row.head_panels(), list[n],
                           score + n * TILE, width);
                softmax_tile(row, tile, list, score, weights, inverse, lse + head * row.tokens);
                weigh(row, weights, list, values + kv * row.head_panels(), sums, false);
                for (index_t i = 0; i < TILE; ++i)
                    store(sums + i * row.dim, inverse[i],
                          out + ((tile * TILE + i) * row.heads + head) * row.dim, row.dim);
            }
        _tile_release();
    }
}
}

namespace {

// Packed operands of the backward pass.
struct Packed {
    bf16 *keys_t, *keys, *values_t, *queries_t, *queries, *grads_t, *grads;
};

// From scores and d(probabilities) [32, 32]: probabilities and d(scores) in bf16, with stride `width`. Rows are
// queries, or keys where `by_keys`.
void gradient_tile(const Row& row, const float* score, const float* d_prob, index_t row_tile, index_t column_tile,
                   bool by_keys, const float* lse, const float* delta, bf16* prob, bf16* d_score, index_t width) {
    index_t q_tile = by_keys ? column_tile : row_tile, k_tile = by_keys ? row_tile : column_tile;
    bool partial = row.visits[q_tile * row.tiles() + k_tile] == 2;
    __m512 scale = _mm512_set1_ps(row.scale);
    for (index_t i = 0; i < TILE; ++i)
        for (index_t j = 0; j < TILE; j += 16) {
            index_t query = q_tile * TILE + (by_keys ? j : i), key = k_tile * TILE + (by_keys ? i : j);
            __m512 own_lse = by_keys ? _mm512_loadu_ps(lse + query) : _mm512_set1_ps(lse[query]);
            __m512 own_delta = by_keys ? _mm512_loadu_ps(delta + query) : _mm512_set1_ps(delta[query]);
            __m512 p = exp16(_mm512_fmsub_ps(_mm512_loadu_ps(score + i * TILE + j), scale, own_lse));
            if (partial) p = _mm512_maskz_mov_ps(by_keys ? row.seen(query, key) : row.sees(query, key), p);
            __m512 ds = _mm512_sub_ps(_mm512_loadu_ps(d_prob + i * TILE + j), own_delta);
            if (by_keys) store_bf16(prob + i * width + j, p);
            store_bf16(d_score + i * width + j, _mm512_mul_ps(_mm512_mul_ps(ds, p), scale));
        }
}

void query_gradients(const Row& row, const Heads& q, const Heads& grad, const Packed& packed, const float* lse,
                     const float* delta, bf16* dq, int threads) {
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        Buffer buffer, out_buffer;
        alignas(64) float score[PANEL], d_prob[PANEL];
#pragma omp for collapse(2) schedule(dynamic)
        for (index_t head = 0; head < row.heads; ++head)
            for (index_t tile = 0; tile < row.tiles(); ++tile) {
                std::vector<index_t> list = visited(row, tile, false);
                index_t width = static_cast<index_t>(list.size()) * TILE;
                index_t offset = row.kv_of(head) * row.head_panels();
                bf16* d_score = buffer.get<bf16>(TILE * width);
                float* sums = out_buffer.get<float>(TILE * row.dim);
                for (std::size_t n = 0; n < list.size(); ++n) {
                    scores(row, q.at(head, tile * TILE), q.token_stride, packed.keys_t + offset, list[n], score, TILE);
                    scores(row, grad.at(head, tile * TILE), grad.token_stride, packed.values_t + offset, list[n],
                           d_prob, TILE);
                    gradient_tile(row, score, d_prob, tile, list[n], false, lse + head * row.tokens,
                                  delta + head * row.tokens, nullptr, d_score + n * TILE, width);
                }
                weigh(row, d_score, list, packed.keys + offset, sums, false);
                for (index_t i = 0; i < TILE; ++i)
                    store(sums + i * row.dim, 1.0f, dq + ((tile * TILE + i) * row.heads + head) * row.dim, row.dim);
            }
        _tile_release();
    }
}

void key_gradients(const Row& row, const Heads& k, const Heads& v, const Packed& packed, const float* lse,
                   const float* delta, bf16* dk, bf16* dv, int threads) {
    index_t group = row.heads / row.kv_heads;
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        Buffer prob_buffer, d_score_buffer, dk_buffer, dv_buffer;
        alignas(64) float score[PANEL], d_prob[PANEL];
#pragma omp for collapse(2) schedule(dynamic)
        for (index_t kv = 0; kv < row.kv_heads; ++kv)
            for (index_t tile = 0; tile < row.tiles(); ++tile) {
                std::vector<index_t> list = visited(row, tile, true);
                index_t width = static_cast<index_t>(list.size()) * TILE;
                bf16* prob = prob_buffer.get<bf16>(TILE * width);
                bf16* d_score = d_score_buffer.get<bf16>(TILE * width);
                float* dk_sums = dk_buffer.get<float>(TILE * row.dim);
                float* dv_sums = dv_buffer.get<float>(TILE * row.dim);
                for (index_t head = kv * group; head < (kv + 1) * group; ++head) {
                    index_t offset = head * row.head_panels();
                    for (std::size_t n = 0; n < list.size(); ++n) {
                        scores(row, k.at(kv, tile * TILE), k.token_stride, packed.queries_t + offset, list[n], score,
                               TILE);
                        scores(row, v.at(kv, tile * TILE), v.token_stride, packed.grads_t + offset, list[n], d_prob,
                               TILE);
                        gradient_tile(row, score, d_prob, tile, list[n], true, lse + head * row.tokens,
                                      delta + head * row.tokens, prob + n * TILE, d_score + n * TILE, width);
                    }
                    bool first = head == kv * group;
                    weigh(row, prob, list, packed.grads + offset, dv_sums, !first);
                    weigh(row, d_score, list, packed.queries + offset, dk_sums, !first);
                }
                for (index_t i = 0; i < TILE; ++i) {
                    index_t at = ((tile * TILE + i) * row.kv_heads + kv) * row.dim;
                    store(dk_sums + i * row.dim, 1.0f, dk + at, row.dim);
                    store(dv_sums + i * row.dim, 1.0f, dv + at, row.dim);
                }
            }
        _tile_release();
    }
}

}  // namespace

extern "C" {

// dq [T, H, D], dk and dv [T, G, D]. Scratch: `packed` of (3 G + 4 H) x T x D elements, `delta` [H, T].
void attention_backward(const Row* shape, const Heads* q, const Heads* k, const Heads* v, const Heads* out,
                        const Heads* grad, const float* lse, bf16* dq, bf16* dk, bf16* dv, bf16* packed, float* delta,
                        int threads) {
    const Row& row = *shape;
    index_t kv_size = row.kv_heads * row.head_panels(), size = row.heads * row.head_panels();
    bf16* by_query = packed + 3 * kv_size;
    Packed to{packed,   packed + kv_size, packed + 2 * kv_size, by_query, by_query + size, by_query + 2 * size,
              by_query + 3 * size};
    pack_heads(*k, row, row.kv_heads, to.keys_t, pack_transposed, threads);
    pack_heads(*k, row, row.kv_heads, to.keys, pack_straight, threads);
    pack_heads(*v, row, row.kv_heads, to.values_t, pack_transposed, threads);
    pack_heads(*q, row, row.heads, to.queries_t, pack_transposed, threads);
    pack_heads(*q, row, row.heads, to.queries, pack_straight, threads);
    pack_heads(*grad, row, row.heads, to.grads_t, pack_transposed, threads);
    pack_heads(*grad, row, row.heads, to.grads, pack_straight, threads);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (index_t head = 0; head < row.heads; ++head)
        for (index_t token = 0; token < row.tokens; ++token) {
            const bf16 *o = out->at(head, token), *g = grad->at(head, token);
            __m512 sums = _mm512_setzero_ps();
            for (index_t i = 0; i < row.dim; i += 16)
                sums = _mm512_fmadd_ps(load_bf16(o + i), load_bf16(g + i), sums);
            delta[head * row.tokens + token] = _mm512_reduce_add_ps(sums);
        }
    query_gradients(row, *q, *grad, to, lse, delta, dq, threads);
    key_gradients(row, *k, *v, to, lse, delta, dk, dv, threads);
}
}
#endif
