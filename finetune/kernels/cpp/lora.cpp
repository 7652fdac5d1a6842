// Frozen linear layers that share their input, with LoRA: y_i = x W_i^T + b_i + s_i x A_i^T B_i^T, and the gradients.
//
// The ranks of all layers lie side by side, padded with zeros to 32: what an adapter adds is one more step of depth of
// the frozen product. Every tile of a result is computed by one thread in one order.
//
// Shapes: T tokens, D inputs, O outputs, all multiples of 32; R ranks of all layers, padded.
#ifdef __AMX_BF16__
#include "product.h"
#include "weight.h"

namespace {

std::vector<Weight> weights_of(const Group& group) {
    std::vector<Weight> out;
    for (index_t i = 0; i < group.count; ++i) {
        out.push_back({group.layers[i].w, group.layers[i].four_bit, group.dim});
        out.back().expand_maxima(group.layers[i].outputs);
    }
    return out;
}

using Matrix = std::vector<bf16>;

void round_rows(const float* values, bf16* out, index_t count) {
    for (index_t i = 0; i < count; i += 16) store_bf16(out + i, _mm512_loadu_ps(values + i));
}

// All A [R, D], zeros after the last rank.
Matrix all_a(const Group& group) {
    Matrix out(group.ranks() * group.dim, 0);
    bf16* to = out.data();
    for (index_t n = 0; n < group.count; to += group.layers[n++].rank * group.dim)
        round_rows(group.layers[n].a, to, group.layers[n].rank * group.dim);
    return out;
}

// scale * B of 32 outputs of a layer, [32][32]: the ranks from `from` on, of which the layer's begin at `first`.
void scaled_b(const Layer& layer, index_t first, index_t output, index_t from, bf16* out) {
    __m512 scale = _mm512_set1_ps(layer.scale), half[2];
    for (index_t o = 0; o < TILE; ++o) {
        for (index_t i = 0; i < 2; ++i) {
            index_t rank = from + 16 * i - first;
            __m512i ranks = _mm512_add_epi32(counting(), _mm512_set1_epi32(static_cast<int>(rank)));
            __mmask16 own = _mm512_cmpge_epi32_mask(ranks, _mm512_setzero_si512()) &
                            _mm512_cmplt_epi32_mask(ranks, _mm512_set1_epi32(static_cast<int>(layer.rank)));
            half[i] = _mm512_setzero_ps();  // a layer without ranks has no b
            if (own)
                half[i] = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(own, layer.b + (output + o) * layer.rank + rank));
        }
        store_bf16(out + o * TILE, half[0], half[1]);
    }
}

// out [32, R] (fp32) = or += v [32, N] times panels [N, R] for a tile of tokens, as far as there are ranks.
void reduce_tile(const bf16* v, index_t width, const bf16* panels, index_t ranks, index_t used, float* out,
                 bool accumulate) {
    for (index_t rank = 0; rank < used; rank += TILE) {
        auto panel = [&](index_t k) { return panels + k * TILE * ranks + rank * TILE; };
        if (used - rank <= 16)
            multiply<false, true>(v, width, width / TILE, panel, out + rank, ranks, accumulate);
        else
            multiply(v, width, width / TILE, panel, out + rank, ranks, accumulate);
    }
}

// Tokens whose outer products are summed in registers: between them their sums wait in memory.
constexpr index_t OUTER_ROWS = 128;

// sums [R, N] = or += uT [R, T] times v [T, N] for some tiles of tokens, at most OUTER_ROWS.
void outer_tiles(const bf16* u_t, index_t tiles, index_t used, const bf16* v, index_t width, float* sums,
                 bool accumulate) {
    alignas(64) bf16 panels[OUTER_ROWS * TILE];
    auto panel = [&](index_t tile) { return panels + tile * PANEL; };
    for (index_t column = 0; column < width; column += TILE) {
        for (index_t tile = 0; tile < tiles; ++tile)
            pack_straight(v + tile * TILE * width + column, width, panel(tile));
        for (index_t rank = 0; rank < used; rank += TILE) {
            const bf16* rows = u_t + rank * OUTER_ROWS;
            float* out = sums + rank * width + column;
            if (used - rank <= 16)
                multiply<true, false>(rows, OUTER_ROWS, tiles, panel, out, width, accumulate);
            else
                multiply(rows, OUTER_ROWS, tiles, panel, out, width, accumulate);
        }
    }
}

// uT [R, OUTER_ROWS] of some tiles of tokens u [T, R].
void transpose_ranks(const bf16* u, index_t tiles, index_t ranks, bf16* out) {
    for (index_t rank = 0; rank < ranks; rank += TILE)
        for (index_t tile = 0; tile < tiles; ++tile)
            transpose_into(u + tile * TILE * ranks + rank, ranks, out + rank * OUTER_ROWS + tile * TILE, OUTER_ROWS);
}

// `count` finished tiles beside each other to y, past the caches: what a layer puts out is more than they hold, and a
// store into them first reads the line from memory.
void store_tiles(const float* sums, index_t count, const bf16* bias, bf16* y, index_t stride) {
    for (index_t i = 0; i < TILE; ++i, y += stride)
        for (index_t n = 0; n < count; ++n) {
            const float* from = sums + n * PANEL + i * TILE;
            __m512 left = _mm512_loadu_ps(from), right = _mm512_loadu_ps(from + 16);
            if (bias) left = _mm512_add_ps(left, load_bf16(bias + n * TILE));
            if (bias) right = _mm512_add_ps(right, load_bf16(bias + n * TILE + 16));
            stream_bf16(y + n * TILE, left, right);
        }
}

// This thread's share of `count` panels.
struct Share {
    index_t first, last;
};
Share share(index_t count) {
    index_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Tokens are summed in so many parts, and the parts in order: the result does not depend on the number of threads. Of
// wide layers and high ranks there are fewer: each part has sums of its own.
index_t parts_of(index_t tiles, index_t sums) {
    constexpr index_t MOST = 8, MOST_SUMS = index_t(1) << 24;  // 64 MB of fp32
    return std::min(tiles, std::clamp<index_t>(MOST_SUMS / std::max<index_t>(sums, 1), 2, MOST));
}

// da and db from the sums of the parts: dA^T and then every layer's dB^T, [rows, width] one after the other.
void add_parts(const Group& group, const float* sums, index_t parts, index_t rows, index_t width) {
    index_t offset = rows * group.dim;
    for (index_t n = 0; n < group.count; offset += rows * group.layers[n++].outputs) {
        const Layer& layer = group.layers[n];
        index_t first = group.first_rank(n);
#pragma omp for schedule(static)
        for (index_t r = 0; r < layer.rank; ++r) {
            float* da = layer.da + r * group.dim;
            std::fill(da, da + group.dim, 0.0f);
            for (index_t part = 0; part < parts; ++part) {
                const float* from = sums + part * rows * width + (first + r) * group.dim;
                for (index_t d = 0; d < group.dim; ++d) da[d] += from[d];
            }
            for (index_t o = 0; o < layer.outputs; ++o) {
                float sum = 0.0f;
                for (index_t part = 0; part < parts; ++part)
                    sum += sums[part * rows * width + offset + (first + r) * layer.outputs + o];
                layer.db[o * layer.rank + r] = layer.scale * sum;
            }
        }
    }
}

}  // namespace

extern "C" {

// Every layer's y; xa [T, R] is kept for the backward pass.
void lora_forward(const Layer* layers, const bf16* x, bf16* xa, index_t count, index_t tokens, index_t dim,
                  int threads) {
    Group group{layers, count, dim};
    index_t ranks = group.ranks(), used = group.used();
    Matrix a = all_a(group), down(ranks * dim);
    const std::vector<Weight> weights = weights_of(group);
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<float> sums(TILE * ranks);
        alignas(64) bf16 buffer[PANEL];
#pragma omp for schedule(static)
        for (index_t column = 0; column < dim; column += TILE)
            for (index_t rank = 0; rank < ranks; rank += TILE)
                pack_transposed(a.data() + rank * dim + column, dim, down.data() + column * ranks + rank * TILE);
#pragma omp for schedule(static)
        for (index_t token = 0; token < tokens; token += TILE) {
            reduce_tile(x + token * dim, dim, down.data(), ranks, used, sums.data(), false);
            round_rows(sums.data(), xa + token * ranks, TILE * ranks);
        }
        // A weight's rows are outputs here, its columns depth.
        auto pack = [&](index_t panel, index_t panels, index_t operand, index_t step, index_t steps, bf16* to,
                        index_t stride) {
            for (index_t last = panel + panels; panel < last; ++panel, to += stride) {
                auto [n, output] = group.place_of(panel * TILE);
                for (index_t i = 0; i < steps; ++i) {
                    Weight::Tile from{buffer, TILE};
                    if (operand > 0)
                        scaled_b(layers[n], group.first_rank(n), output, (step + i) * TILE, buffer);
                    else
                        from = weights[n].tile(output, (step + i) * TILE, buffer);
                    pack_transposed(from.rows, from.stride, to + i * PANEL);
                }
            }
        };
        auto store = [&](index_t panel, index_t panels, index_t token, const float* sums) {
            for (index_t last = panel + panels, some; panel < last; panel += some, sums += some * PANEL) {
                auto [n, output] = group.place_of(panel * TILE);
                const Layer& layer = layers[n];
                some = std::min(last - panel, (layer.outputs - output) / TILE);
                store_tiles(sums, some, layer.bias ? layer.bias + output : nullptr,
                            layer.y + token * layer.outputs + output, layer.outputs);
            }
        };
        auto [first, last] = share(group.outputs() / TILE);
        product({{x, dim, dim}, {xa, ranks, ranks}}, tokens, first, last, pack, store);
        _mm_sfence();  // outputs passed the caches
        _tile_release();
    }
}

// From every layer's dy: da, db and dx [T, D] (which may be null).
void lora_backward(const Layer* layers, const bf16* x, const bf16* xa, bf16* dx, index_t count, index_t tokens,
                   index_t dim, int threads) {
    Group group{layers, count, dim};
    index_t ranks = group.ranks(), used = group.used(), width = dim;
    std::vector<Matrix> down;
    for (index_t n = 0; n < count; width += layers[n++].outputs) down.emplace_back(layers[n].outputs * ranks);
    Matrix up = all_a(group), dxa(tokens * ranks);
    const std::vector<Weight> weights = dx ? weights_of(group) : std::vector<Weight>();
    index_t rows = (used + 15) / 16 * 16, tiles = tokens / TILE, parts = parts_of(tiles, rows * width);
    static thread_local Kept kept;
    float* sums = kept.at_least<float>(parts * rows * width);
    std::vector<Operand> operands;
    for (index_t n = 0; n < count; ++n) operands.push_back({layers[n].y, layers[n].outputs, layers[n].outputs});
    operands.push_back({dxa.data(), ranks, ranks});
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<float> dxa_sums(TILE * ranks);
        Matrix xa_t(OUTER_ROWS * ranks), dxa_t(OUTER_ROWS * ranks);
        alignas(64) bf16 buffer[PANEL];
        for (index_t n = 0; n < count; ++n)
#pragma omp for schedule(static)
            for (index_t output = 0; output < layers[n].outputs; output += TILE)
                for (index_t from = 0; from < ranks; from += TILE) {
                    scaled_b(layers[n], group.first_rank(n), output, from, buffer);
                    pack_straight(buffer, TILE, down[n].data() + output * ranks + from * TILE);
                }
#pragma omp for schedule(static)
        for (index_t part = 0; part < parts; ++part) {
            index_t tile = tiles * part / parts, end = tiles * (part + 1) / parts;
            for (bool more = false; tile < end; more = true) {
                index_t some = std::min(OUTER_ROWS / TILE, end - tile), token = tile * TILE;
                for (index_t last = tile + some; tile < last; ++tile) {
                    for (index_t n = 0; n < count; ++n)
                        reduce_tile(layers[n].y + tile * TILE * layers[n].outputs, layers[n].outputs, down[n].data(),
                                    ranks, used, dxa_sums.data(), n > 0);
                    round_rows(dxa_sums.data(), dxa.data() + tile * TILE * ranks, TILE * ranks);
                }
                transpose_ranks(xa + token * ranks, some, ranks, xa_t.data());
                transpose_ranks(dxa.data() + token * ranks, some, ranks, dxa_t.data());
                float* to = sums + part * rows * width;
                outer_tiles(dxa_t.data(), some, used, x + token * dim, dim, to, more);
                to += rows * dim;
                for (index_t n = 0; n < count; to += rows * layers[n++].outputs)
                    outer_tiles(xa_t.data(), some, used, layers[n].y + token * layers[n].outputs, layers[n].outputs, to,
                                more);
            }
        }
        if (dx) {
            auto [first, last] = share(dim / TILE);
            // Its rows are depth: read along them, or each line of memory is fetched for one panel only.
            auto pack = [&](index_t panel, index_t panels, index_t operand, index_t step, index_t steps, bf16* to,
                            index_t stride) {
                for (index_t last = step + steps; step < last; ++step, to += PANEL)
                    for (index_t n = 0; n < panels; ++n) {
                        index_t output = step * TILE, column = (panel + n) * TILE;
                        Weight::Tile from{up.data() + output * dim + column, dim};
                        if (operand < count) from = weights[operand].tile(output, column, buffer);
                        pack_straight(from.rows, from.stride, to + n * stride);
                    }
            };
            auto store = [&](index_t panel, index_t panels, index_t token, const float* sums) {
                store_tiles(sums, panels, nullptr, dx + token * dim + panel * TILE, dim);
            };
            product(operands, tokens, first, last, pack, store);
        }
        add_parts(group, sums, parts, rows, width);
        _mm_sfence();  // outputs passed the caches
        _tile_release();
    }
}
}
#endif
