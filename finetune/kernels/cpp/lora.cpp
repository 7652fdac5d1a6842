// What LoRA adds to frozen linear layers that share their input: y_i += s_i x A_i^T B_i^T, and its gradients.
//
// The ranks of all layers lie side by side, padded with zeros to 32, so that a group of layers is one pass over x.
// The frozen products themselves are oneDNN's. Every tile of a result is computed by one thread in one order.
//
// Shapes: T tokens, D inputs, O outputs, all multiples of 32; R ranks of all layers, padded.
#ifdef __AMX_BF16__
#include "amx.h"
#include <algorithm>
#include <vector>

namespace {

struct Layer {
    const float *a, *b;  // [rank, D], [O, rank]
    bf16* y;             // [T, O]: the output to add to; in the backward pass its gradient
    float *da, *db;      // as a and b
    index_t rank, outputs;
    float scale;
};

struct Group {
    const Layer* layers;
    index_t count, tokens, dim;
    index_t ranks() const {
        index_t sum = 0;
        for (index_t i = 0; i < count; ++i) sum += layers[i].rank;
        return (sum + TILE - 1) / TILE * TILE;
    }
};

using Matrix = std::vector<bf16>;

// All A [R, D], zeros after the last rank.
Matrix all_a(const Group& group) {
    Matrix out(group.ranks() * group.dim, 0);
    bf16* to = out.data();
    for (index_t n = 0; n < group.count; ++n)
        for (index_t i = 0; i < group.layers[n].rank * group.dim; ++i) *to++ = to_bf16(group.layers[n].a[i]);
    return out;
}

// scale * B [O, R] of one layer, zeros at the others' ranks.
Matrix scaled_b(const Layer& layer, index_t first, index_t ranks) {
    Matrix out(layer.outputs * ranks, 0);
    for (index_t o = 0; o < layer.outputs; ++o)
        for (index_t r = 0; r < layer.rank; ++r)
            out[o * ranks + first + r] = to_bf16(layer.scale * layer.b[o * layer.rank + r]);
    return out;
}

// Panels of a matrix [rows, columns], by tiles of 32 rows and then of 32 columns.
Matrix packed(const Matrix& matrix, index_t rows, index_t columns) {
    Matrix out(rows * columns);
    for (index_t row = 0; row < rows; row += TILE)
        for (index_t column = 0; column < columns; column += TILE)
            pack_straight(matrix.data() + row * columns + column, columns,
                          out.data() + row * columns + column * TILE);
    return out;
}

// The same of its transpose, [columns, rows].
Matrix packed_transpose(const Matrix& matrix, index_t rows, index_t columns) {
    Matrix out(rows * columns);
    for (index_t row = 0; row < rows; row += TILE)
        for (index_t column = 0; column < columns; column += TILE)
            pack_transposed(matrix.data() + row * columns + column, columns,
                            out.data() + column * rows + row * TILE);
    return out;
}

// out [32, R] += v [32, N] times panels [N, R] for a tile of tokens; fp32. Ranks from `used` on stay as they are.
void reduce_tile(const bf16* v, index_t width, const Matrix& panels, index_t ranks, index_t used, float* out,
                 bool accumulate) {
    for (index_t rank = 0; rank < used; rank += TILE) {
        auto panel = [&](index_t k) { return panels.data() + k * TILE * ranks + rank * TILE; };
        if (used - rank <= 16)
            multiply<false, true>(v, width, width / TILE, panel, out + rank, ranks, accumulate);
        else
            multiply(v, width, width / TILE, panel, out + rank, ranks, accumulate);
    }
}

void round_rows(const float* values, bf16* out, index_t count) {
    for (index_t i = 0; i < count; i += 16) store_bf16(out + i, _mm512_loadu_ps(values + i));
}

// y [32, N] += u [32, R] times panels [R, N] for a tile of tokens.
void expand_tile(const bf16* u, index_t ranks, const Matrix& panels, index_t width, bf16* y) {
    alignas(64) float sums[PANEL];
    for (index_t column = 0; column < width; column += TILE) {
        multiply(u, ranks, ranks / TILE,
                 [&](index_t k) { return panels.data() + k * TILE * width + column * TILE; }, sums, TILE, false);
        for (index_t i = 0; i < TILE; ++i)
            for (index_t j = 0; j < TILE; j += 16) {
                bf16* at = y + i * width + column + j;
                store_bf16(at, _mm512_add_ps(load_bf16(at), _mm512_loadu_ps(sums + i * TILE + j)));
            }
    }
}

// sums [R, N] += uT [R, 32] times v [32, N] for a tile of tokens.
void outer_tile(const bf16* u_t, index_t used, const bf16* v, index_t width, float* sums) {
    alignas(64) bf16 panel[PANEL];
    auto only = [&](index_t) { return panel; };
    for (index_t column = 0; column < width; column += TILE) {
        pack_straight(v + column, width, panel);
        for (index_t rank = 0; rank < used; rank += TILE) {
            float* out = sums + rank * width + column;
            if (used - rank <= 16)
                multiply<true, false>(u_t + rank * TILE, TILE, 1, only, out, width, true);
            else
                multiply(u_t + rank * TILE, TILE, 1, only, out, width, true);
        }
    }
}

// uT [R, 32] of a tile of tokens u [32, R].
void transpose_tile(const bf16* u, index_t ranks, bf16* out) {
    for (index_t token = 0; token < TILE; ++token)
        for (index_t rank = 0; rank < ranks; ++rank) out[rank * TILE + token] = u[token * ranks + rank];
}

// Tokens are summed in this many parts, and the parts in order: so the result does not depend on threads.
constexpr index_t PARTS = 8;

}  // namespace

extern "C" {

// Adds to every layer's y; xa [T, R] is kept for the backward pass.
void lora_forward(const Layer* layers, const bf16* x, bf16* xa, index_t count, index_t tokens, index_t dim,
                  int threads) {
    Group group{layers, count, tokens, dim};
    index_t ranks = group.ranks(), used = 0;
    Matrix down = packed_transpose(all_a(group), ranks, dim);
    std::vector<Matrix> up;
    for (index_t n = 0; n < count; used += layers[n++].rank)
        up.push_back(packed_transpose(scaled_b(layers[n], used, ranks), layers[n].outputs, ranks));
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<float> sums(TILE * ranks);
#pragma omp for schedule(static)
        for (index_t token = 0; token < tokens; token += TILE) {
            reduce_tile(x + token * dim, dim, down, ranks, used, sums.data(), false);
            round_rows(sums.data(), xa + token * ranks, TILE * ranks);
            for (index_t n = 0; n < count; ++n)
                expand_tile(xa + token * ranks, ranks, up[n], layers[n].outputs,
                            layers[n].y + token * layers[n].outputs);
        }
        _tile_release();
    }
}

// From every layer's dy: da and db, and what it adds to dx [T, D] (which may be null).
void lora_backward(const Layer* layers, const bf16* x, const bf16* xa, bf16* dx, index_t count, index_t tokens,
                   index_t dim, int threads) {
    Group group{layers, count, tokens, dim};
    index_t ranks = group.ranks(), used = 0, width = dim;
    std::vector<Matrix> down;
    for (index_t n = 0; n < count; used += layers[n].rank, width += layers[n++].outputs)
        down.push_back(packed(scaled_b(layers[n], used, ranks), layers[n].outputs, ranks));
    Matrix up = packed(all_a(group), ranks, dim);
    index_t part_tiles = (tokens / TILE + PARTS - 1) / PARTS, parts = (tokens / TILE + part_tiles - 1) / part_tiles;
    // Each part's dA^T and then every layer's dB^T, [rows, width] one after the other. Kept from call to call: fresh
    // memory costs its page faults, as long as the sums themselves.
    static thread_local std::vector<float> kept;
    index_t rows = (used + 15) / 16 * 16;
    if (static_cast<index_t>(kept.size()) < parts * rows * width) kept.resize(parts * rows * width);
    float* sums = kept.data();
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
        std::vector<float> dxa_sums(TILE * ranks);
        Matrix dxa(TILE * ranks), xa_t(TILE * ranks), dxa_t(TILE * ranks);
#pragma omp for schedule(static)
        for (index_t part = 0; part < parts; ++part) {
            std::fill(sums + part * rows * width, sums + (part + 1) * rows * width, 0.0f);
            for (index_t tile = part * part_tiles; tile < (part + 1) * part_tiles && tile < tokens / TILE; ++tile) {
                index_t token = tile * TILE;
                for (index_t n = 0; n < count; ++n)
                    reduce_tile(layers[n].y + token * layers[n].outputs, layers[n].outputs, down[n], ranks, used,
                                dxa_sums.data(), n > 0);
                round_rows(dxa_sums.data(), dxa.data(), TILE * ranks);
                if (dx) expand_tile(dxa.data(), ranks, up, dim, dx + token * dim);
                transpose_tile(xa + token * ranks, ranks, xa_t.data());
                transpose_tile(dxa.data(), ranks, dxa_t.data());
                float* to = sums + part * rows * width;
                outer_tile(dxa_t.data(), used, x + token * dim, dim, to);
                to += rows * dim;
                for (index_t n = 0; n < count; to += rows * layers[n++].outputs)
                    outer_tile(xa_t.data(), used, layers[n].y + token * layers[n].outputs, layers[n].outputs, to);
            }
        }
        _tile_release();
    }
    index_t first = 0, offset = rows * dim;
    for (index_t n = 0; n < count; first += layers[n].rank, offset += rows * layers[n++].outputs) {
        const Layer& layer = layers[n];
        for (index_t r = 0; r < layer.rank; ++r) {
            float* da = layer.da + r * dim;
            std::fill(da, da + dim, 0.0f);
            for (index_t part = 0; part < parts; ++part) {
                const float* from = sums + part * rows * width + (first + r) * dim;
                for (index_t d = 0; d < dim; ++d) da[d] += from[d];
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
}
#endif
