// The backward pass of attention: attention.h says how, attention_plan.h who computes what.
#ifdef __AMX_BF16__
#include "attention.h"
#include "attention_plan.h"
#include "kept.h"

namespace {

constexpr index_t BATCH = 8;    // key tiles whose d(scores) are kept for dq
constexpr index_t FETCHED = 2;  // tokens asked for in each half of a pair

// Of a pair of tiles, [32 keys, 32 queries].
struct Scores {
    float score[PANEL], d_prob[PANEL];
};

// What a thread holds of a span; a place is a tile of queries of one head.
struct Held {
    Scores* scores;                               // 2
    float* sums;                                  // dk and dv of a key tile without a slot: [2][32, D]
    float* dq;                                    // [places][D, 32], with queries in `interleaved` order
    float* delta;                                 // [places][32]
    bf16 *queries_t, *grads_t, *queries, *grads;  // [places]: panels of the transposed rows, and of the rows
    bf16 *probs, *d_scores;                       // [places][32 keys, 32 queries] of one key tile
    bf16* panels;                                 // [places][BATCH]: d(scores) with interleaved queries
    bf16* keys_t;                                 // [BATCH][D, 32]

    Held(const Task& task, Kept& memory) {
        index_t places = task.plan.span * task.group(), size = task.size();
        index_t floats = 2 * 2 * PANEL + 2 * size + places * (size + TILE);
        index_t halves = places * (4 * size + (2 + BATCH) * PANEL) + BATCH * size;
        float* at = memory.at_least<float>(floats + halves / 2);
        scores = reinterpret_cast<Scores*>(take(at, 4 * PANEL));
        sums = take(at, 2 * size);
        dq = take(at, places * size);
        delta = take(at, places * TILE);
        bf16* half = reinterpret_cast<bf16*>(at);
        for (bf16** operand : {&queries_t, &grads_t, &queries, &grads}) *operand = take(half, places * size);
        probs = take(half, places * PANEL);
        d_scores = take(half, places * PANEL);
        panels = take(half, places * BATCH * PANEL);
        keys_t = take(half, BATCH * size);
    }
    template <class T> static T* take(T*& at, index_t count) {
        T* first = at;
        at += count;
        return first;
    }
};

// A place against the key tile at hand.
struct Job {
    index_t place, head, tile;
    bool partial;
};

// What unpacking the halves of two rows of 32 queries makes of their order.
inline index_t interleaved(index_t half, index_t i) { return half * 4 + i / 4 * 8 + i % 4; }

// The sums over a head's columns of out x grad, for the 32 queries of a tile.
void sum_deltas(const Task& task, index_t head, index_t tile, float* delta) {
    for (index_t half = 0; half < 2; ++half) {
        __m512i words[16];
        for (index_t i = 0; i < 16; ++i) {
            index_t token = tile * TILE + half * 16 + i;
            const bf16 *o = task.out.at(head, token), *g = task.grad.at(head, token);
            __m512 sums = _mm512_setzero_ps();
            for (index_t d = 0; d < task.row.dim; d += 16)
                sums = _mm512_fmadd_ps(load_bf16(o + d), load_bf16(g + d), sums);
            words[i] = (__m512i)sums;
        }
        transpose_words(words);
        __m512 total = _mm512_setzero_ps();
        for (__m512i word : words) total = _mm512_add_ps(total, (__m512)word);
        _mm512_store_ps(delta + half * 16, total);
    }
}

void pack_span(const Task& task, index_t kv, index_t from, index_t to, const Held& held) {
    index_t group = task.group();
    for (index_t tile = from; tile < to; ++tile)
        for (index_t member = 0; member < group; ++member) {
            index_t head = kv * group + member, place = (tile - from) * group + member;
            for (index_t chunk = 0; chunk < task.row.chunks(); ++chunk) {
                index_t at = place * task.size() + chunk * PANEL;
                const bf16* query = task.q.at(head, tile * TILE) + chunk * TILE;
                const bf16* grad = task.grad.at(head, tile * TILE) + chunk * TILE;
                pack_transposed(query, task.q.token_stride, held.queries_t + at);
                pack_straight(query, task.q.token_stride, held.queries + at);
                pack_transposed(grad, task.grad.token_stride, held.grads_t + at);
                pack_straight(grad, task.grad.token_stride, held.grads + at);
            }
            sum_deltas(task, head, tile, held.delta + place * TILE);
        }
}

// The rows that this thread packs next, asked for while it multiplies: packing would only wait for them, for a third
// of the time where they lie in memory.
struct Ahead {
    index_t kv = 0, token = 0, end = 0;

    void fetch(const Task& task, index_t tokens) {
        for (; tokens > 0 && token < end; --tokens, ++token) {
            for (index_t head = kv * task.group(); head < (kv + 1) * task.group(); ++head)
                for (const Heads* x : {&task.q, &task.grad, &task.out}) ask(task, x->at(head, token));
            ask(task, task.k.at(kv, token));
            ask(task, task.v.at(kv, token));
        }
    }
    static void ask(const Task& task, const bf16* row) {
        for (index_t d = 0; d < task.row.dim; d += TILE) _mm_prefetch(row + d, _MM_HINT_T1);
    }
};

// After a span its window's next, or what comes next if all threads take turns.
Ahead ahead_of(const Task& task, index_t kv, index_t window, index_t from, int threads) {
    const Plan& plan = task.plan;
    index_t next = plan.end(window, from);
    if (next == plan.cuts[window + 1]) {
        index_t unit = window * task.row.kv_heads + kv + threads;
        kv = unit % task.row.kv_heads;
        window = unit / task.row.kv_heads;
        if (window >= plan.windows()) return {};
        next = plan.cuts[window];
    }
    return {kv, next * TILE, plan.end(window, next) * TILE};
}

// A tile of rows times panels of depth D, into the tile registers.
inline void multiply_tile(const Row& row, const bf16* rows, index_t stride, const bf16* panels) {
    load_sums(nullptr, 0, false);
    for (index_t chunk = 0; chunk < row.chunks(); ++chunk)
        add_product(rows + chunk * TILE, stride, panels + chunk * PANEL);
}

// Probabilities and d(scores) / scale of a pair, sixteen keys from `first` on.
template <bool PARTIAL>
inline void differentiate(const Row& row, const Scores& pair, const float* lse, const float* delta, index_t query,
                          index_t key, index_t first, bf16* prob, bf16* d_score, bf16* panel) {
    __m512 own_lse[2] = {_mm512_loadu_ps(lse), _mm512_loadu_ps(lse + 16)};
    __m512 own_delta[2] = {_mm512_load_ps(delta), _mm512_load_ps(delta + 16)};
    __m512 factor = _mm512_set1_ps(row.factor());
    for (index_t i = first; i < first + 16; i += 2) {
        __m512 p[4], d[4];  // two keys by two halves of the queries
        for (index_t n = 0; n < 4; ++n) {
            index_t at = i * TILE + n * 16;
            p[n] = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(pair.score + at), factor, own_lse[n % 2]));
            if (PARTIAL) p[n] = _mm512_maskz_mov_ps(seen_lanes(row, query + n % 2 * 16, key + i + n / 2), p[n]);
            d[n] = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(pair.d_prob + at), own_delta[n % 2]), p[n]);
        }
        store_bf16(prob + i * TILE, p[0], p[1]);
        store_bf16(prob + i * TILE + TILE, p[2], p[3]);
        __m512i even = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]), odd = (__m512i)_mm512_cvtne2ps_pbh(d[3], d[2]);
        _mm512_store_si512(d_score + i * TILE, even);
        _mm512_store_si512(d_score + i * TILE + TILE, odd);
        _mm512_store_si512(panel + i * 16, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(panel + PANEL / 2 + i * 16, _mm512_unpackhi_epi16(even, odd));
    }
}

// sums [32, D] = or += the jobs' weights [32 keys, 32 queries] times their places' panels.
void weigh_rows(const Row& row, const std::vector<Job>& jobs, const bf16* weights, const bf16* panels, float* sums,
                bool accumulate) {
    for (index_t chunk = 0; chunk < row.chunks(); ++chunk) {
        load_sums(sums + chunk * TILE, row.dim, accumulate);
        const bf16* weight = weights;
        for (const Job& job : jobs) {
            add_product(weight, TILE, panels + (job.place * row.chunks() + chunk) * PANEL);
            weight += PANEL;
        }
        store_sums(sums + chunk * TILE, row.dim);
    }
}

// dk and dv of a key tile from all jobs: first what belongs to a pair, then each product in one go, so that its sums
// stay in the tile registers. Job n's panel of d(scores) goes to panel_of(n).
template <class PanelOf>
void visit(const Task& task, const Held& held, const std::vector<Job>& jobs, index_t kv, index_t key, float* dk,
           bool accumulate, Ahead& ahead, PanelOf panel_of) {
    const Row& row = task.row;
    const bf16 *keys = task.k.at(kv, key * TILE), *values = task.v.at(kv, key * TILE);
    index_t size = task.size(), num = static_cast<index_t>(jobs.size());
    for (index_t n = -1; n < num; ++n) {  // the next pair's products before this one's exponentials
        Scores &here = held.scores[n & 1], &next = held.scores[(n + 1) & 1];
        bool more = n + 1 < num;
        index_t place = more ? jobs[n + 1].place : 0;
        auto half = [&](index_t first) {
            const Job& job = jobs[n];
            index_t query = job.tile * TILE;
            const float *lse = task.lse + job.head * row.tokens + query, *delta = held.delta + job.place * TILE;
            (job.partial ? differentiate<true> : differentiate<false>)(row, here, lse, delta, query, key * TILE, first,
                                                                       held.probs + n * PANEL,
                                                                       held.d_scores + n * PANEL, panel_of(n));
        };
        if (more) multiply_tile(row, keys, task.k.token_stride, held.queries_t + place * size);
        ahead.fetch(task, FETCHED);
        if (n >= 0) half(0);
        if (more) store_sums(next.score, TILE);
        if (more) multiply_tile(row, values, task.v.token_stride, held.grads_t + place * size);
        ahead.fetch(task, FETCHED);
        if (n >= 0) half(16);
        if (more) store_sums(next.d_prob, TILE);
    }
    weigh_rows(row, jobs, held.d_scores, held.queries, dk, accumulate);
    weigh_rows(row, jobs, held.probs, held.grads, dk + size, accumulate);
}

void store_rows(const Row& row, const float* sums, float factor, bf16* out, index_t stride) {
    __m512 scale = _mm512_set1_ps(factor);
    for (index_t i = 0; i < TILE; ++i)
        for (index_t d = 0; d < row.dim; d += 32) {
            const float* at = sums + i * row.dim + d;
            store_bf16(out + i * stride + d, _mm512_mul_ps(_mm512_load_ps(at), scale),
                       _mm512_mul_ps(_mm512_load_ps(at + 16), scale));
        }
}

void store_keys(const Task& task, index_t kv, index_t tile, const float* sums) {
    index_t stride = task.row.kv_heads * task.row.dim, at = tile * TILE * stride + kv * task.row.dim;
    store_rows(task.row, sums, task.row.scale, task.dk + at, stride);
    store_rows(task.row, sums + task.size(), 1.0f, task.dv + at, stride);
}

// The gradients of a span of a window's queries, and its share of those of the keys that it sees.
void span_gradients(const Task& task, index_t kv, index_t window, index_t from, Ahead ahead, const Held& held) {
    const Row& row = task.row;
    index_t group = task.group(), to = task.plan.end(window, from), places = (to - from) * group, size = task.size();
    pack_span(task, kv, from, to, held);
    std::vector<index_t> keys, list(places * BATCH), count(places);
    std::vector<bool> started(places);
    for (index_t key = 0; key < row.tiles(); ++key)
        if (Plan::visits(row, from, to, key)) keys.push_back(key);
    index_t total = static_cast<index_t>(keys.size());
    std::vector<Job> jobs;
    for (index_t first = 0; first < total; first += BATCH) {
        std::fill(count.begin(), count.end(), 0);
        for (index_t n = first; n < std::min(first + BATCH, total); ++n) {
            index_t key = keys[n], slot = task.plan.slots[window * row.tiles() + key];
            for (index_t chunk = 0; chunk < row.chunks(); ++chunk)
                transpose_tile(task.k.at(kv, key * TILE) + chunk * TILE, task.k.token_stride,
                               held.keys_t + (n - first) * size + chunk * PANEL);
            jobs.clear();
            for (index_t place = 0; place < places; ++place) {
                index_t tile = from + place / group;
                std::uint8_t seen = row.visits[tile * row.tiles() + key];
                if (!seen) continue;
                jobs.push_back({place, kv * group + place % group, tile, seen == 2});
                list[place * BATCH + count[place]++] = n - first;
            }
            float* sums = slot == NONE ? held.sums : task.slot(kv, slot);
            bool accumulate = Plan::visits(row, task.plan.cuts[window], from, key);
            visit(task, held, jobs, kv, key, sums, accumulate, ahead, [&](index_t job) {
                index_t place = jobs[job].place;
                return held.panels + (place * BATCH + count[place] - 1) * PANEL;
            });
            if (slot == NONE) store_keys(task, kv, key, sums);
        }
        for (index_t place = 0; place < places; ++place) {
            if (!count[place]) continue;
            weigh(row, list.data() + place * BATCH, count[place], held.keys_t, held.panels + place * BATCH * PANEL,
                  held.dq + place * size, started[place]);
            started[place] = true;
        }
    }
    __m512 scale[2] = {_mm512_set1_ps(row.scale), _mm512_set1_ps(row.scale)};
    for (index_t place = 0; place < places; ++place) {
        index_t token = (from + place / group) * TILE, head = kv * group + place % group;
        store_transposed(row, held.dq + place * size, scale, task.dq + (token * row.heads + head) * row.dim,
                         row.heads * row.dim, interleaved);
    }
}

// dk and dv of a key tile that has slots: their sum in the order of windows.
void add_slots(const Task& task, index_t kv, index_t tile) {
    float* sums = nullptr;
    for (index_t window = 0; window < task.plan.windows(); ++window) {
        index_t slot = task.plan.slots[window * task.row.tiles() + tile];
        if (slot == NONE) continue;
        float* next = task.slot(kv, slot);
        for (index_t i = 0; sums && i < 2 * task.size(); i += 16)
            _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(next + i)));
        if (!sums) sums = next;
    }
    if (sums) store_keys(task, kv, tile, sums);
}

}  // namespace

extern "C" {

// dq [T, H, D], dk and dv [T, G, D].
void attention_backward(const Row* shape, const Heads* q, const Heads* k, const Heads* v, const Heads* out,
                        const Heads* grad, const float* lse, bf16* dq, bf16* dk, bf16* dv, int threads) {
    const Row& row = *shape;
    const Plan plan(row);
    static thread_local Kept slots;
    float* memory = slots.at_least<float>(row.kv_heads * plan.num_slots * 2 * TILE * row.dim);
    const Task task{row, plan, *q, *k, *v, *out, *grad, lse, dq, dk, dv, memory};
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        static thread_local Kept own;
        const Held held(task, own);
#pragma omp for collapse(2) schedule(dynamic)
        for (index_t window = 0; window < plan.windows(); ++window)
            for (index_t kv = 0; kv < row.kv_heads; ++kv)
                for (index_t from = plan.cuts[window]; from < plan.cuts[window + 1]; from = plan.end(window, from))
                    span_gradients(task, kv, window, from, ahead_of(task, kv, window, from, threads), held);
#pragma omp for collapse(2) schedule(static)
        for (index_t kv = 0; kv < row.kv_heads; ++kv)
            for (index_t tile = 0; tile < row.tiles(); ++tile) add_slots(task, kv, tile);
        _tile_release();
    }
    slots.shrink(KEPT_SLOTS);
}
}
#endif
