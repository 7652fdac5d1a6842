// The forward pass of attention: attention.h says how. Softmax block by block as in FlashAttention (Dao et al. 2022).
#ifdef __AMX_BF16__
#include "attention.h"
#include <cmath>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr float HIDDEN = -1e30f;  // the score of a pair that does not see each other
constexpr float MARGIN = 10.0f;   // 2^10 is far from what fp32 and bf16 can hold
constexpr float UNSET = 1e30f;    // the reference of a query that has seen no key yet: 2^(score - it) is 0

// What is known of 32 queries after some blocks of keys, by sixteen: sums are relative to the reference, which moves
// only when a score exceeds it by far.
struct Softmax {
    __m512 reference[2], sum[2];
};

// Scores [keys][32] of `count` tiles become panels of exponentials; what was summed before follows the reference.
void exponentials(const Row& row, index_t tile, const index_t* list, index_t count, float* score, Softmax& known,
                  float* sums, bool first, bf16* weights) {
    __m512 factor = _mm512_set1_ps(row.factor()), hidden = _mm512_set1_ps(HIDDEN);
    for (index_t half = 0; half < 2; ++half) {
        float* column = score + half * 16;
        __m512 top = hidden;
        for (index_t n = 0; n < count; ++n) {
            bool partial = row.visits[tile * row.tiles() + list[n]] == 2;
            for (index_t key = 0; key < TILE; ++key) {
                float* at = column + (n * TILE + key) * TILE;
                __m512 values = _mm512_loadu_ps(at);
                if (partial) {
                    __mmask16 seen = seen_lanes(row, tile * TILE + half * 16, list[n] * TILE + key);
                    values = _mm512_mask_mov_ps(hidden, seen, values);
                    _mm512_storeu_ps(at, values);
                }
                top = _mm512_max_ps(top, values);
            }
        }
        __m512 &reference = known.reference[half], &sum = known.sum[half];
        __mmask16 visible = _mm512_cmp_ps_mask(top, _mm512_set1_ps(HIDDEN / 2), _CMP_GT_OQ);
        __mmask16 set = _mm512_cmp_ps_mask(reference, _mm512_set1_ps(UNSET), _CMP_NEQ_UQ);
        top = _mm512_mul_ps(top, factor);
        __mmask16 exceeds = _mm512_cmp_ps_mask(top, _mm512_add_ps(reference, _mm512_set1_ps(MARGIN)), _CMP_GT_OQ);
        if (__mmask16 moves = visible & (exceeds | static_cast<__mmask16>(~set))) {
            __m512 next = _mm512_mask_mov_ps(reference, moves, top);
            __m512 shrink = _mm512_maskz_mov_ps(set, exp2_16(_mm512_sub_ps(reference, next)));
            sum = _mm512_mul_ps(sum, shrink);
            for (index_t d = 0; !first && d < row.dim; ++d) {
                float* at = sums + d * TILE + half * 16;
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
            }
            reference = next;
        }
        for (index_t n = 0; n < count; ++n)
            for (index_t key = 0; key < TILE; key += 2) {
                const float* at = column + (n * TILE + key) * TILE;
                __m512 even = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(at), factor, reference));
                __m512 odd = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(at + TILE), factor, reference));
                sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
                store_pair(weights + n * PANEL + half * (PANEL / 2) + key * 16, even, odd);
            }
    }
}

}  // namespace

extern "C" {

// Ask Linux for the tile registers; 0 if this process has them.
int request_amx() {
    const long request_permission = 0x1023, tile_data = 18;
    return static_cast<int>(syscall(SYS_arch_prctl, request_permission, tile_data));
}

// out [T, H, D] and lse [H, T], of powers of 2; `packed` holds G x T x D elements of scratch.
void attention_forward(const Row* shape, const Heads* q, const Heads* k, const Heads* v, bf16* out, float* lse,
                       bf16* packed, int threads) {
    const Row& row = *shape;
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        pack_heads(*v, row, row.kv_heads, packed, transpose_tile);
        alignas(64) float score[BLOCK * PANEL], sums[MAX_DIM * TILE];
        alignas(64) bf16 queries[MAX_DIM * TILE];
        alignas(64) Weights weights;
#pragma omp for collapse(2) schedule(dynamic)
        for (index_t tile = 0; tile < row.tiles(); ++tile)
            for (index_t head = 0; head < row.heads; ++head) {  // next to each other in memory
                std::vector<index_t> list = visited(row, tile);
                index_t kv = row.kv_of(head), total = static_cast<index_t>(list.size());
                for (index_t chunk = 0; chunk < row.chunks(); ++chunk)
                    pack_transposed(q->at(head, tile * TILE) + chunk * TILE, q->token_stride, queries + chunk * PANEL);
                __m512 unset = _mm512_set1_ps(UNSET), zero = _mm512_setzero_ps();
                Softmax known{{unset, unset}, {zero, zero}};
                for (index_t from = 0; from < total; from += BLOCK) {
                    index_t count = std::min(BLOCK, total - from);
                    const index_t* tiles = list.data() + from;
                    for (index_t n = 0; n < count; n += 2) {
                        index_t next = std::min(n + 1, count - 1);
                        scores(row, {k->at(kv, tiles[n] * TILE), k->token_stride, queries, score + n * PANEL},
                               {k->at(kv, tiles[next] * TILE), k->token_stride, queries, score + next * PANEL});
                    }
                    exponentials(row, tile, tiles, count, score, known, sums, from == 0, weights);
                    weigh(row, tiles, count, packed + kv * row.head_size(), weights, sums, from > 0);
                }
                __m512 one = _mm512_set1_ps(1.0f);
                __m512 inverse[2] = {_mm512_div_ps(one, known.sum[0]), _mm512_div_ps(one, known.sum[1])};
                store_transposed(row, sums, inverse, out + (tile * TILE * row.heads + head) * row.dim,
                                 row.heads * row.dim, [](index_t half, index_t i) { return half * 16 + i; });
                for (index_t half = 0; half < 2; ++half) {
                    float* to = lse + head * row.tokens + tile * TILE + half * 16;
                    _mm512_storeu_ps(to, known.sum[half]);
                    for (index_t i = 0; i < 16; ++i) to[i] = std::log2(to[i]);
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), known.reference[half]));
                }
            }
        _tile_release();
    }
}
}
#endif
