// Linear layers with LoRA as in lora.cpp, for processors without units for bf16: y_i = x W_i^T + b_i + s_i x A_i^T B_i^T,
// and the gradients. Weights are widened to fp32 as they are packed; what goes in and out is bf16.
//
// Shapes: T tokens, D inputs, O outputs, all multiples of 32; R ranks of all layers, side by side, padded in `xa`.
#include "common.h"
#ifdef FMA_PRODUCTS
#include "layers.h"
#include "product_fma.h"

namespace {

// Eight elements at a time, the same to the bit as bitsandbytes' own where they are stored in 4 bits.
struct Weight {
    const bf16* dense;
    FourBit four_bit;
    index_t dim;
    int block_bits = 0;  // a block has 2^block_bits elements
    std::vector<float> maxima = {};

    __m256 eight(index_t output, index_t column) const {
        index_t at = output * dim + column;
        if (!four_bit.codes) return load_bf16(dense + at);
        std::int32_t word;
        std::memcpy(&word, four_bit.codes + at / 2, 4);
        const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);  // the three lowest bits choose
        __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(four_bit.levels), codes);
        __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(four_bit.levels + 8), codes);
        __m256 level = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
        return round_bf16(_mm256_mul_ps(level, _mm256_set1_ps(four_bit.absmax[at >> block_bits])));
    }
};

std::vector<Weight> weights_of(const Group& group) {
    std::vector<Weight> out(group.count);
    for (index_t n = 0; n < group.count; ++n) {
        out[n] = {group.layers[n].w, group.layers[n].four_bit, group.dim};
        if (out[n].four_bit.codes) out[n].block_bits = __builtin_ctzll(out[n].four_bit.block);
        out[n].maxima = expand_maxima(out[n].four_bit, group.layers[n].outputs * group.dim);
    }
    return out;
}

index_t panels_of(index_t columns) { return (columns + WIDTH - 1) / WIDTH; }

// bf16 values, [rows][stride], of sums [rows][width], and the same as columns of a tile; zeros after `used`.
void round_ranks(const float* sums, index_t width, index_t used, index_t rows, bf16* out, index_t stride,
                 index_t columns, float* tile) {
    for (index_t i = 0; i < ROWS; ++i)
        for (index_t r = 0; r < columns; ++r) {
            bf16 value = r < used ? to_bf16(sums[i * width + r]) : 0;
            if (i < rows) out[i * stride + r] = value;
            if (r < used) tile[r * ROWS + i] = to_float(value);
        }
}

// Packed panels [depth][WIDTH] of a matrix [depth][columns] given by its elements; zeros after the last column.
template <class Element>
void pack_elements(index_t depth, index_t columns, float* out, Element element) {
    for (index_t panel = 0; panel < panels_of(columns); ++panel)
        for (index_t k = 0; k < depth; ++k)
            for (index_t j = 0; j < WIDTH; ++j) {
                index_t column = panel * WIDTH + j;
                *out++ = column < columns ? element(k, column) : 0.0f;
            }
}

// A rank's row of A.
const float* a_row(const Group& group, index_t rank) {
    index_t n = 0;
    for (; rank >= group.layers[n].rank; ++n) rank -= group.layers[n].rank;
    return group.layers[n].a + rank * group.dim;
}

constexpr index_t RANKS = 4;           // summed together: 8, 16 and 32 are multiples of it
constexpr index_t OUTER_TOKENS = 128;  // packed at once
constexpr index_t OUTER_WIDTH = 2 * WIDTH;  // a line of memory

// Ranks [first, first + count) of u [T, stride] as tiles [T][RANKS].
void pack_tokens(const bf16* u, index_t stride, index_t first, index_t count, index_t tokens, float* out) {
    for (index_t rank = 0; rank < count; rank += RANKS)
        for (index_t token = 0; token < tokens; ++token)
            for (index_t i = 0; i < RANKS; ++i)
                *out++ = rank + i < count ? to_float(u[token * stride + first + rank + i]) : 0.0f;
}

// sums [ranks][OUTER_WIDTH] = uT v for some columns of v [T, width], u as `pack_tokens` leaves it.
void outer(const float* u, index_t ranks, const bf16* v, index_t width, index_t tokens, float* sums) {
    alignas(32) float panels[2][OUTER_TOKENS * WIDTH];
    for (index_t token = 0; token < tokens; token += OUTER_TOKENS) {
        index_t some = std::min(OUTER_TOKENS, tokens - token);
        for (index_t half = 0; half < 2; ++half)
            pack_straight(v + token * width + half * WIDTH, width, some, panels[half]);
        for (index_t rank = 0; rank < ranks; rank += RANKS)
            for (index_t half = 0; half < 2; ++half)
                multiply<RANKS>(u + rank * tokens + token * RANKS, panels[half], some,
                                sums + rank * OUTER_WIDTH + half * WIDTH, OUTER_WIDTH, token > 0);
    }
}

// What the passes work in, of the thread that calls.
thread_local Kept kept;

index_t padded(index_t ranks) { return (ranks + RANKS - 1) / RANKS * RANKS; }

// da and db of all layers, some columns at a time: within a parallel region, by all threads.
void adapter_gradients(const Group& group, const bf16* x, const bf16* xa, const bf16* dxa, index_t tokens, float* u) {
    index_t ranks = group.ranks(), used = group.used();
    if (!used) return;
    std::vector<float> sums(padded(used) * OUTER_WIDTH);
#pragma omp single
    {
        pack_tokens(dxa, ranks, 0, used, tokens, u);
        float* to = u + padded(used) * tokens;
        for (index_t n = 0; n < group.count; to += padded(group.layers[n++].rank) * tokens)
            pack_tokens(xa, ranks, group.first_rank(n), group.layers[n].rank, tokens, to);
    }
#pragma omp for schedule(dynamic)
    for (index_t column = 0; column < group.dim; column += OUTER_WIDTH) {
        outer(u, used, x + column, group.dim, tokens, sums.data());
        const float* from = sums.data();
        for (index_t n = 0; n < group.count; ++n)
            for (index_t r = 0; r < group.layers[n].rank; ++r, from += OUTER_WIDTH)
                std::copy_n(from, OUTER_WIDTH, group.layers[n].da + r * group.dim + column);
    }
    u += padded(used) * tokens;
    for (index_t n = 0; n < group.count; u += padded(group.layers[n++].rank) * tokens) {
        const Layer& layer = group.layers[n];
#pragma omp for schedule(dynamic) nowait
        for (index_t column = 0; column < layer.outputs; column += OUTER_WIDTH) {
            outer(u, layer.rank, layer.y + column, layer.outputs, tokens, sums.data());
            for (index_t j = 0; j < OUTER_WIDTH; ++j)
                for (index_t r = 0; r < layer.rank; ++r)
                    layer.db[(column + j) * layer.rank + r] = layer.scale * sums[r * OUTER_WIDTH + j];
        }
    }
}

}  // namespace

extern "C" {

// Bytes that stay allocated after a call whose left operand has so many columns, ranks included; adapters' are few.
index_t lora_scratch(index_t tokens, index_t columns) { return pass_tokens(tokens, columns) * columns * 4; }

// Every layer's y; xa [T, R] is kept for the backward pass.
void lora_forward(const Layer* layers, const bf16* x, bf16* xa, index_t count, index_t tokens, index_t dim,
                  int threads) {
    Group group{layers, count, dim};
    index_t ranks = group.ranks(), used = group.used(), width = panels_of(used) * WIDTH;
    const std::vector<Weight> weights = weights_of(group);
    const index_t some = pass_tokens(tokens, dim + used);
    float* down = kept.at_least<float>(some * (dim + used) + width * dim);
    float* tiles = down + width * dim;
    pack_elements(dim, used, down, [&](index_t d, index_t rank) { return a_row(group, rank)[d]; });
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums(ROWS * width);
        auto tail_of = [&](index_t panel) {
            index_t n = group.place_of(panel * WIDTH).layer;
            return Tail{dim + group.first_rank(n), layers[n].rank};
        };
        auto pack = [&](index_t panel, index_t from, index_t to, float* out) {
            auto [n, output] = group.place_of(panel * WIDTH);
            for (; from < to; from += 8, out += 8 * WIDTH)
                for (index_t half = 0; half < WIDTH; half += 8) {
                    __m256 rows[8];
                    for (index_t i = 0; i < 8; ++i) rows[i] = weights[n].eight(output + half + i, from);
                    transpose_words(rows);
                    for (index_t i = 0; i < 8; ++i) _mm256_store_ps(out + i * WIDTH + half, rows[i]);
                }
        };
        auto pack_tail = [&](index_t panel, float* out) {
            auto [n, output] = group.place_of(panel * WIDTH);
            for (index_t r = 0; r < layers[n].rank; ++r)
                for (index_t j = 0; j < WIDTH; ++j)
                    *out++ = layers[n].scale * layers[n].b[(output + j) * layers[n].rank + r];
        };
        for (index_t begin = 0; begin < tokens; begin += some) {
            const Left left{tiles, std::min(some, tokens - begin), dim + used};
#pragma omp for schedule(static)
            for (index_t tile = 0; tile < left.count(); ++tile) {
                index_t token = begin + tile * ROWS;
                float* columns = left.tile(tile);
                pack_rows(x + token * dim, dim, left.rows(tile), dim, columns);
                for (index_t n = 0; n < panels_of(used); ++n)
                    multiply(columns, down + n * dim * WIDTH, dim, sums.data() + n * WIDTH, width, false);
                round_ranks(sums.data(), width, used, left.rows(tile), xa + token * ranks, ranks, ranks,
                            columns + dim * ROWS);
            }
            product(left, dim, group.outputs() / WIDTH, tail_of, pack, pack_tail,
                    [&](index_t panel, index_t panels, index_t tile, const float* sums) {
                        for (index_t last = panel + panels; panel < last; ++panel, sums += BLOCK) {
                            auto [n, output] = group.place_of(panel * WIDTH);
                            const Layer& layer = layers[n];
                            bf16* y = layer.y + (begin + tile * ROWS) * layer.outputs + output;
                            for (index_t i = 0; i < left.rows(tile); ++i, y += layer.outputs) {
                                __m256 low = _mm256_loadu_ps(sums + i * WIDTH);
                                __m256 high = _mm256_loadu_ps(sums + i * WIDTH + 8);
                                if (layer.bias) low = _mm256_add_ps(low, load_bf16(layer.bias + output));
                                if (layer.bias) high = _mm256_add_ps(high, load_bf16(layer.bias + output + 8));
                                store_bf16(y, low, high);
                            }
                        }
                    });
        }
    }
}

// From every layer's dy: da, db and dx [T, D] (which may be null).
void lora_backward(const Layer* layers, const bf16* x, const bf16* xa, bf16* dx, index_t count, index_t tokens,
                   index_t dim, int threads) {
    Group group{layers, count, dim};
    index_t ranks = group.ranks(), used = group.used(), depth = group.outputs(), width = 0, ups = 0, own = padded(used);
    for (index_t n = 0; n < count; ++n) {
        width = std::max(width, panels_of(layers[n].rank) * WIDTH);
        ups += panels_of(layers[n].rank) * WIDTH * layers[n].outputs;
        own += padded(layers[n].rank);
    }
    const std::vector<Weight> weights = dx ? weights_of(group) : std::vector<Weight>();
    std::vector<bf16> dxa(tokens * ranks);
    const index_t some = pass_tokens(tokens, depth + used);
    float* up = kept.at_least<float>(std::max(some * (depth + used), own * tokens) + ups);
    float *tiles = up + ups, *to = up;
    for (index_t n = 0; n < count; to += panels_of(layers[n].rank) * WIDTH * layers[n].outputs, ++n)
        pack_elements(layers[n].outputs, layers[n].rank, to,
                      [&](index_t o, index_t r) { return layers[n].scale * layers[n].b[o * layers[n].rank + r]; });
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums(ROWS * width);
        // Its rows are depth: panels of a weight's columns, read as they lie.
        auto pack = [&](index_t panel, index_t from, index_t to, float* out) {
            for (; from < to; ++from, out += WIDTH) {
                auto [n, output] = group.place_of(from);
                _mm256_store_ps(out, weights[n].eight(output, panel * WIDTH));
                _mm256_store_ps(out + 8, weights[n].eight(output, panel * WIDTH + 8));
            }
        };
        auto pack_tail = [&](index_t panel, float* out) {
            for (index_t rank = 0; rank < used; ++rank, out += WIDTH)
                std::copy_n(a_row(group, rank) + panel * WIDTH, WIDTH, out);
        };
        for (index_t begin = 0; begin < tokens; begin += some) {
            const Left left{tiles, std::min(some, tokens - begin), depth + used};
#pragma omp for schedule(static)
            for (index_t tile = 0; tile < left.count(); ++tile) {
                index_t token = begin + tile * ROWS, first = 0, rank = 0;
                const float* panels = up;
                for (index_t n = 0; n < count; first += layers[n].outputs, rank += layers[n++].rank) {
                    float* columns = left.tile(tile) + first * ROWS;
                    pack_rows(layers[n].y + token * layers[n].outputs, layers[n].outputs, left.rows(tile),
                              layers[n].outputs, columns);
                    for (index_t p = 0; p < panels_of(layers[n].rank); ++p, panels += layers[n].outputs * WIDTH)
                        multiply(columns, panels, layers[n].outputs, sums.data() + p * WIDTH, width, false);
                    round_ranks(sums.data(), width, layers[n].rank, left.rows(tile), dxa.data() + token * ranks + rank,
                                ranks, layers[n].rank, left.tile(tile) + (depth + rank) * ROWS);
                }
            }
            if (dx)
                product(left, depth, dim / WIDTH, [&](index_t) { return Tail{depth, used}; }, pack, pack_tail,
                        [&](index_t panel, index_t panels, index_t tile, const float* sums) {
                            bf16* to = dx + (begin + tile * ROWS) * dim + panel * WIDTH;
                            for (index_t i = 0; i < left.rows(tile); ++i, to += dim)
                                for (index_t n = 0; n < panels; ++n) {
                                    const float* from = sums + n * BLOCK + i * WIDTH;
                                    store_bf16(to + n * WIDTH, _mm256_loadu_ps(from), _mm256_loadu_ps(from + 8));
                                }
                        });
        }
        adapter_gradients(group, x, xa, dxa.data(), tokens, tiles);
    }
}
}
#endif
