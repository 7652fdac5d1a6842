// Attention over a packed row (attention_row.h), forward and backward, for processors without units for bf16.
//
// Scores of a tile of keys and one of queries exist at a time, as [keys, queries]: what belongs to a query is one lane
// of a vector. Softmax block by block as in FlashAttention (Dao et al. 2022). Tiles of rows are widened to fp32 as they
// are met. The backward pass computes a pair of tiles once, by queries that share a key head; what several ranges of
// queries add to a key's gradients is summed in a fixed order (attention_plan.h), so the result does not depend on the
// number of threads.
#include "common.h"
#ifdef FMA_PRODUCTS
#include "attention_plan.h"
#include "fma.h"
#include "kept.h"
#include <cmath>

namespace {

constexpr float HIDDEN = -1e30f;  // the score of a pair that does not see each other
constexpr index_t PAIR = TILE * TILE;

// R rows of c [32, columns] = or += a [32, depth] times b [depth, columns], from row i on; a's elements are `row` and
// `step` apart, the others' rows lie one after the other.
template <index_t R>
inline void some_rows(index_t i, const float* a, index_t row, index_t step, const float* b, index_t depth,
                      index_t columns, float* c, bool accumulate) {
    for (index_t j = 0; j < columns; j += WIDTH) {
        float* out = c + i * columns + j;
        __m256 sums[R][2];
        for (index_t n = 0; n < R; ++n)
            for (index_t half = 0; half < 2; ++half)
                sums[n][half] = accumulate ? _mm256_load_ps(out + n * columns + 8 * half) : _mm256_setzero_ps();
        const float *left = a + i * row, *right = b + j;
        for (index_t k = 0; k < depth; ++k, left += step, right += columns) {
            __m256 low = _mm256_load_ps(right), high = _mm256_load_ps(right + 8);
#pragma GCC unroll 6
            for (index_t n = 0; n < R; ++n) {
                __m256 one = _mm256_broadcast_ss(left + n * row);
                sums[n][0] = _mm256_fmadd_ps(one, low, sums[n][0]);
                sums[n][1] = _mm256_fmadd_ps(one, high, sums[n][1]);
            }
        }
        for (index_t n = 0; n < R; ++n)
            for (index_t half = 0; half < 2; ++half) _mm256_store_ps(out + n * columns + 8 * half, sums[n][half]);
    }
}

// All 32 of them: six together keep both of the units busy, four nearly.
inline void block(const float* a, index_t row, index_t step, const float* b, index_t depth, index_t columns, float* c,
                  bool accumulate) {
    for (index_t i = 0; i < 24; i += 6) some_rows<6>(i, a, row, step, b, depth, columns, c, accumulate);
    for (index_t i = 24; i < TILE; i += 4) some_rows<4>(i, a, row, step, b, depth, columns, c, accumulate);
}

// c [32, columns] = or += a [32, depth] b, and aT b for a [32, 32].
inline void rows_times(const float* a, const float* b, index_t depth, index_t columns, float* c, bool accumulate) {
    block(a, depth, 1, b, depth, columns, c, accumulate);
}
inline void transposed_times(const float* a, const float* b, index_t columns, float* c) {
    block(a, 1, TILE, b, TILE, columns, c, true);
}

// A tile of a head's rows [32, D].
void widen(const Heads& x, index_t head, index_t tile, index_t dim, float* out) {
    for (index_t i = 0; i < TILE; ++i, out += dim) {
        const bf16* from = x.at(head, tile * TILE + i);
        for (index_t d = 0; d < dim; d += 8) _mm256_store_ps(out + d, load_bf16(from + d));
    }
}

// xT [D, 32] of x [32, D].
void transpose(const float* x, index_t dim, float* out) {
    for (index_t i = 0; i < TILE; i += 8)
        for (index_t d = 0; d < dim; d += 8) {
            __m256 rows[8];
            for (index_t n = 0; n < 8; ++n) rows[n] = _mm256_load_ps(x + (i + n) * dim + d);
            transpose_words(rows);
            for (index_t n = 0; n < 8; ++n) _mm256_store_ps(out + (d + n) * TILE + i, rows[n]);
        }
}

// Which of eight queries from `query` on see a key, as all bits of their lanes.
inline __m256 seen_lanes(const Row& row, index_t query, index_t key) {
    auto load = [&](const std::int32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + query));
    };
    __m256i wanted = _mm256_set1_epi32(static_cast<int>(key));
    __m256i queries = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(query)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(load(row.own_start), wanted), _mm256_cmpgt_epi32(wanted, queries));
    __m256i prefix = _mm256_andnot_si256(_mm256_cmpgt_epi32(load(row.prefix_start), wanted),
                                         _mm256_cmpgt_epi32(load(row.prefix_end), wanted));
    return _mm256_castsi256_ps(_mm256_or_si256(prefix, _mm256_xor_si256(outside, _mm256_set1_epi32(-1))));
}

bool partial(const Row& row, index_t queries, index_t keys) { return row.visits[queries * row.tiles() + keys] == 2; }

void hide(const Row& row, index_t queries, index_t keys, float* scores) {
    for (index_t key = 0; key < TILE; ++key)
        for (index_t i = 0; i < TILE; i += 8) {
            float* at = scores + key * TILE + i;
            __m256 seen = seen_lanes(row, queries * TILE + i, keys * TILE + key);
            _mm256_store_ps(at, _mm256_blendv_ps(_mm256_set1_ps(HIDDEN), _mm256_load_ps(at), seen));
        }
}

// A thread's memory, by parts of whole lines.
struct Memory {
    float* at;
    float* take(index_t count) {
        float* first = at;
        at += count;
        return first;
    }
};

// A tile of queries of one head against keys that come tile by tile.
struct Query {
    float *transposed, *out, *top, *sum;  // [D, 32], [32, D], and of each query its largest score and sum, times factor

    Query(Memory& memory, index_t dim)
        : transposed(memory.take(TILE * dim)), out(memory.take(TILE * dim)), top(memory.take(TILE)),
          sum(memory.take(TILE)) {}
    static index_t floats(index_t dim) { return 2 * TILE * dim + 2 * TILE; }

    void begin(index_t dim) {
        std::fill_n(out, TILE * dim, 0.0f);
        std::fill_n(sum, TILE, 0.0f);
        std::fill_n(top, TILE, HIDDEN);
    }

    // Scores [keys, queries] become exponentials relative to the largest so far.
    void exponentiate(float* scores, float factor, index_t dim) {
        alignas(32) float shrink[TILE];
        bool moved = false;
        for (index_t i = 0; i < TILE; i += 8) {
            __m256 most = _mm256_set1_ps(HIDDEN), scale = _mm256_set1_ps(factor), total = _mm256_setzero_ps();
            for (index_t key = 0; key < TILE; ++key) most = _mm256_max_ps(most, _mm256_load_ps(scores + key * TILE + i));
            __m256 before = _mm256_load_ps(top + i), visible = _mm256_cmp_ps(most, _mm256_set1_ps(HIDDEN / 2), _CMP_GT_OQ);
            // A query that has seen no key yet keeps its mark, and what it does not see is nothing to it.
            __m256 now = _mm256_blendv_ps(before, _mm256_max_ps(before, _mm256_mul_ps(most, scale)), visible);
            __m256 unset = _mm256_cmp_ps(now, _mm256_set1_ps(HIDDEN / 2), _CMP_LT_OQ);
            __m256 reference = _mm256_blendv_ps(now, _mm256_setzero_ps(), unset);
            moved |= _mm256_movemask_ps(_mm256_cmp_ps(now, before, _CMP_GT_OQ)) != 0;
            _mm256_store_ps(shrink + i, exp2_8(_mm256_sub_ps(before, now)));
            _mm256_store_ps(top + i, now);
            for (index_t key = 0; key < TILE; ++key) {
                float* at = scores + key * TILE + i;
                __m256 value = exp2_8(_mm256_fmsub_ps(_mm256_load_ps(at), scale, reference));
                total = _mm256_add_ps(total, value);
                _mm256_store_ps(at, value);
            }
            _mm256_store_ps(sum + i, _mm256_fmadd_ps(_mm256_load_ps(sum + i), _mm256_load_ps(shrink + i), total));
        }
        for (index_t i = 0; moved && i < TILE; ++i)
            for (index_t d = 0; d < dim; d += 8) {
                float* at = out + i * dim + d;
                _mm256_store_ps(at, _mm256_mul_ps(_mm256_load_ps(at), _mm256_set1_ps(shrink[i])));
            }
    }

    void end(index_t dim, bf16* to, index_t stride, float* lse) const {
        for (index_t i = 0; i < TILE; ++i, to += stride) {
            __m256 share = _mm256_set1_ps(1.0f / sum[i]);
            for (index_t d = 0; d < dim; d += 16) {
                const float* from = out + i * dim + d;
                store_bf16(to + d, _mm256_mul_ps(share, _mm256_load_ps(from)),
                           _mm256_mul_ps(share, _mm256_load_ps(from + 8)));
            }
            lse[i] = top[i] + std::log2(sum[i]);
        }
    }
};

// A tile of queries of one head: its rows and their gradients, also transposed, and sums.
struct Member {
    float *query, *query_t, *grad, *grad_t, *dq, *delta;

    Member(Memory& memory, index_t size)
        : query(memory.take(size)), query_t(memory.take(size)), grad(memory.take(size)), grad_t(memory.take(size)),
          dq(memory.take(size)), delta(memory.take(TILE)) {}
    static index_t floats(index_t size) { return 5 * size + TILE; }

    void begin(const Task& task, index_t head, index_t tile) {
        index_t dim = task.row.dim;
        widen(task.q, head, tile, dim, query);
        widen(task.grad, head, tile, dim, grad);
        transpose(query, dim, query_t);
        transpose(grad, dim, grad_t);
        std::fill_n(dq, task.size(), 0.0f);
        for (index_t i = 0; i < TILE; ++i) {
            const bf16* out = task.out.at(head, tile * TILE + i);
            float sum = 0.0f;
            for (index_t d = 0; d < dim; ++d) sum += to_float(out[d]) * grad[i * dim + d];
            delta[i] = sum;
        }
    }
};

// Scores become probabilities, and their gradients d(scores) / scale.
void differentiate(const Row& row, const float* lse, const float* delta, float* scores, float* d_probs) {
    __m256 factor = _mm256_set1_ps(row.factor());
    for (index_t i = 0; i < TILE; i += 8) {
        __m256 own_lse = _mm256_loadu_ps(lse + i), own_delta = _mm256_load_ps(delta + i);
        for (index_t key = 0; key < TILE; ++key) {
            float *score = scores + key * TILE + i, *d_prob = d_probs + key * TILE + i;
            __m256 prob = exp2_8(_mm256_fmsub_ps(_mm256_load_ps(score), factor, own_lse));
            _mm256_store_ps(score, prob);
            _mm256_store_ps(d_prob, _mm256_mul_ps(prob, _mm256_sub_ps(_mm256_load_ps(d_prob), own_delta)));
        }
    }
}

void store_rows(const float* sums, float factor, index_t dim, bf16* out, index_t stride) {
    __m256 scale = _mm256_set1_ps(factor);
    for (index_t i = 0; i < TILE; ++i, out += stride, sums += dim)
        for (index_t d = 0; d < dim; d += 16)
            store_bf16(out + d, _mm256_mul_ps(scale, _mm256_load_ps(sums + d)),
                       _mm256_mul_ps(scale, _mm256_load_ps(sums + d + 8)));
}

// The gradients of a window's queries of one key head, and its share of those of the keys that they see.
void window_gradients(const Task& task, index_t kv, index_t window, std::vector<Member>& members, Memory memory) {
    const Row& row = task.row;
    index_t size = task.size(), first = task.plan.cuts[window];
    float *keys = memory.take(size), *values = memory.take(size);
    float *scores = memory.take(PAIR), *d_scores = memory.take(PAIR);
    for (index_t tile = first; tile < task.plan.cuts[window + 1]; ++tile) {
        for (index_t n = 0; n < task.group(); ++n) members[n].begin(task, kv * task.group() + n, tile);
        for (index_t key : visited(row, tile)) {
            bool more = Plan::visits(row, first, tile, key);
            float* dk = task.slot(kv, task.plan.slots[window * row.tiles() + key]);
            widen(task.k, kv, key, row.dim, keys);
            widen(task.v, kv, key, row.dim, values);
            for (index_t n = 0; n < task.group(); ++n, more = true) {
                const Member& member = members[n];
                rows_times(keys, member.query_t, row.dim, TILE, scores, false);
                if (partial(row, tile, key)) hide(row, tile, key, scores);
                rows_times(values, member.grad_t, row.dim, TILE, d_scores, false);
                const float* lse = task.lse + (kv * task.group() + n) * row.tokens + tile * TILE;
                differentiate(row, lse, member.delta, scores, d_scores);
                rows_times(d_scores, member.query, TILE, row.dim, dk, more);
                rows_times(scores, member.grad, TILE, row.dim, dk + size, more);
                transposed_times(d_scores, keys, row.dim, member.dq);
            }
        }
        for (index_t n = 0; n < task.group(); ++n) {
            index_t stride = row.heads * row.dim, head = kv * task.group() + n;
            store_rows(members[n].dq, row.scale, row.dim, task.dq + tile * TILE * stride + head * row.dim, stride);
        }
    }
}

// dk and dv of a key tile: the sum of its slots in the order of windows.
void add_slots(const Task& task, index_t kv, index_t tile) {
    float* sums = nullptr;
    for (index_t window = 0; window < task.plan.windows(); ++window) {
        index_t slot = task.plan.slots[window * task.row.tiles() + tile];
        if (slot == NONE) continue;
        float* next = task.slot(kv, slot);
        for (index_t i = 0; sums && i < 2 * task.size(); ++i) sums[i] += next[i];
        if (!sums) sums = next;
    }
    index_t stride = task.row.kv_heads * task.row.dim, at = tile * TILE * stride + kv * task.row.dim;
    store_rows(sums, task.row.scale, task.row.dim, task.dk + at, stride);
    store_rows(sums + task.size(), 1.0f, task.row.dim, task.dv + at, stride);
}

}  // namespace

extern "C" {

// As in attention.cpp: out [T, H, D] and lse [H, T], of powers of 2. The scratch of packed values is not used.
void attention_forward(const Row* shape, const Heads* q, const Heads* k, const Heads* v, bf16* out, float* lse, bf16*,
                       int threads) {
    const Row& row = *shape;
    index_t group = row.heads / row.kv_heads, size = TILE * row.dim;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Kept kept;
        Memory memory{kept.at_least<float>(group * Query::floats(row.dim) + 3 * size + PAIR)};
        float *rows = memory.take(size), *keys = memory.take(size), *values = memory.take(size);
        float* scores = memory.take(PAIR);
        std::vector<Query> queries;
        for (index_t n = 0; n < group; ++n) queries.emplace_back(memory, row.dim);
#pragma omp for collapse(2) schedule(dynamic)
        for (index_t tile = 0; tile < row.tiles(); ++tile)
            for (index_t kv = 0; kv < row.kv_heads; ++kv) {
                for (index_t n = 0; n < group; ++n) {
                    widen(*q, kv * group + n, tile, row.dim, rows);
                    transpose(rows, row.dim, queries[n].transposed);
                    queries[n].begin(row.dim);
                }
                for (index_t key : visited(row, tile)) {
                    widen(*k, kv, key, row.dim, keys);
                    widen(*v, kv, key, row.dim, values);
                    for (Query& query : queries) {
                        rows_times(keys, query.transposed, row.dim, TILE, scores, false);
                        if (partial(row, tile, key)) hide(row, tile, key, scores);
                        query.exponentiate(scores, row.factor(), row.dim);
                        transposed_times(scores, values, row.dim, query.out);
                    }
                }
                for (index_t n = 0; n < group; ++n) {
                    index_t head = kv * group + n;
                    queries[n].end(row.dim, out + (tile * TILE * row.heads + head) * row.dim, row.heads * row.dim,
                                   lse + head * row.tokens + tile * TILE);
                }
            }
    }
}

// dq [T, H, D], dk and dv [T, G, D].
void attention_backward(const Row* shape, const Heads* q, const Heads* k, const Heads* v, const Heads* out,
                        const Heads* grad, const float* lse, bf16* dq, bf16* dk, bf16* dv, int threads) {
    const Row& row = *shape;
    const Plan plan(row, Plan::EVERY_KEY);
    static thread_local Kept slots;
    float* memory = slots.at_least<float>(row.kv_heads * plan.num_slots * 2 * TILE * row.dim);
    const Task task{row, plan, *q, *k, *v, *out, *grad, lse, dq, dk, dv, memory};
#pragma omp parallel num_threads(threads)
    {
        static thread_local Kept kept;
        Memory own{kept.at_least<float>(task.group() * Member::floats(task.size()) + 2 * task.size() + 2 * PAIR)};
        std::vector<Member> members;
        for (index_t n = 0; n < task.group(); ++n) members.emplace_back(own, task.size());
#pragma omp for collapse(2) schedule(dynamic)
        for (index_t window = 0; window < plan.windows(); ++window)
            for (index_t kv = 0; kv < row.kv_heads; ++kv) window_gradients(task, kv, window, members, own);
#pragma omp for collapse(2) schedule(static)
        for (index_t kv = 0; kv < row.kv_heads; ++kv)
            for (index_t tile = 0; tile < row.tiles(); ++tile) add_slots(task, kv, tile);
    }
    slots.shrink(KEPT_SLOTS);
}
}
#endif
