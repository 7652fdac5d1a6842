// RMSNorm, SwiGLU and rotary embedding over rows of bf16, one pass over memory each.
#include "vectors.h"
#include <cmath>

// The unit in which threads share long arrays.
constexpr index_t BLOCK = 4096;

#ifdef VECTORS
// What is left over after the last two vectors is for the loops of other processors.
constexpr index_t LINE = 2 * LANES;

// The sum of a(i) * b(i).
template <class A, class B> static inline float dot_lines(index_t count, A a, B b) {
    Vector left = all(0.0f), right = left;
    for (index_t i = 0; i < count; i += LINE) {
        left = add_product(a(i), b(i), left);
        right = add_product(a(i + LANES), b(i + LANES), right);
    }
    return total(left + right);
}

// out = values(i). Not past the caches: what reads it comes soon.
template <class Values> static inline void store_lines(bf16* out, index_t count, Values values) {
    for (index_t i = 0; i < count; i += LINE) store_bf16(out + i, values(i), values(i + LANES));
}
#endif

// out = bf16(a + b); out may be one of them.
static inline void add_row(const bf16* a, const bf16* b, bf16* out, index_t count) {
    index_t lines = 0;
#ifdef VECTORS
    lines = count / LINE * LINE;
    store_lines(out, lines, [&](index_t i) { return load_bf16(a + i) + load_bf16(b + i); });
#endif
#pragma omp simd
    for (index_t i = lines; i < count; ++i) out[i] = to_bf16(to_float(a[i]) + to_float(b[i]));
}

extern "C" {

// y = bf16(h * rstd) * weight, rstd = 1 / sqrt(mean(h^2) + eps) kept for the backward pass. h is x or, where there is
// something to add, bf16(x + added), which is written to sum: that may be where `added` is.
void rms_norm_forward(const bf16* x, const bf16* added, const bf16* weight, bf16* sum, bf16* y, float* rstd,
                      index_t rows, index_t dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (index_t row = 0; row < rows; ++row) {
        const bf16* in = x + row * dim;
        if (added) {
            add_row(in, added + row * dim, sum + row * dim, dim);
            in = sum + row * dim;
        }
        bf16* out = y + row * dim;
        float squares = 0.0f;
        index_t lines = 0;
#ifdef VECTORS
        lines = dim / LINE * LINE;
        auto values = [&](index_t i) { return load_bf16(in + i); };
        squares = dot_lines(lines, values, values);
#endif
#pragma omp simd reduction(+ : squares)
        for (index_t i = lines; i < dim; ++i) squares += to_float(in[i]) * to_float(in[i]);
        float scale = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
        rstd[row] = scale;
#ifdef VECTORS
        store_lines(out, lines, [&](index_t i) {
            return round_bf16(values(i) * all(scale)) * load_bf16(weight + i);
        });
#endif
#pragma omp simd
        for (index_t i = lines; i < dim; ++i)
            out[i] = to_bf16(to_float(to_bf16(to_float(in[i]) * scale)) * to_float(weight[i]));
    }
}

// dx, to which `added` is added if it is there: the gradient that passes the norm by.
void rms_norm_backward(const bf16* dy, const bf16* x, const bf16* added, const bf16* weight, const float* rstd,
                       bf16* dx, index_t rows, index_t dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (index_t row = 0; row < rows; ++row) {
        const bf16 *grad = dy + row * dim, *in = x + row * dim, *past = added ? added + row * dim : nullptr;
        bf16* out = dx + row * dim;
        float scale = rstd[row], dot = 0.0f;
        index_t lines = 0;
#ifdef VECTORS
        lines = dim / LINE * LINE;
        auto values = [&](index_t i) { return load_bf16(in + i); };
        auto scaled = [&](index_t i) { return load_bf16(grad + i) * load_bf16(weight + i); };
        dot = dot_lines(lines, scaled, values);
#endif
#pragma omp simd reduction(+ : dot)
        for (index_t i = lines; i < dim; ++i) dot += to_float(grad[i]) * to_float(weight[i]) * to_float(in[i]);
        float mean = dot * scale * scale / static_cast<float>(dim);
#ifdef VECTORS
        auto through = [&](index_t i) { return all(scale) * subtract_product(values(i), all(mean), scaled(i)); };
        if (past)
            store_lines(out, lines, [&](index_t i) { return load_bf16(past + i) + through(i); });
        else
            store_lines(out, lines, through);
#endif
#pragma omp simd
        for (index_t i = lines; i < dim; ++i) {
            float through = scale * (to_float(grad[i]) * to_float(weight[i]) - to_float(in[i]) * mean);
            out[i] = to_bf16(past ? to_float(past[i]) + through : through);
        }
    }
}

void silu_mul_forward(const bf16* gate, const bf16* up, bf16* y, index_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (index_t start = 0; start < count; start += BLOCK) {
        index_t stop = start + BLOCK < count ? start + BLOCK : count, lines = 0;
#ifdef VECTORS
        lines = (stop - start) / LINE * LINE;
        store_lines(y + start, lines, [&](index_t i) {
            Vector g = load_bf16(gate + start + i);
            return g * load_bf16(up + start + i) * sigmoid(g);
        });
#endif
#pragma omp simd
        for (index_t i = start + lines; i < stop; ++i) {
            float g = to_float(gate[i]);
            y[i] = to_bf16(g * to_float(up[i]) * sigmoid(g));
        }
    }
}

void silu_mul_backward(const bf16* dy, const bf16* gate, const bf16* up, bf16* d_gate, bf16* d_up, index_t count,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (index_t start = 0; start < count; start += BLOCK) {
        index_t stop = start + BLOCK < count ? start + BLOCK : count, lines = 0;
#ifdef VECTORS
        lines = (stop - start) / LINE * LINE;
        Vector one = all(1.0f);
        for (index_t i = start; i < start + lines; i += LINE) {
            Vector dg[2], du[2];
            for (index_t half = 0; half < 2; ++half) {
                index_t at = i + LANES * half;
                Vector g = load_bf16(gate + at), s = sigmoid(g), scaled = load_bf16(dy + at) * s;
                Vector slope = add_product(g, one - s, one);
                dg[half] = scaled * load_bf16(up + at) * slope;
                du[half] = scaled * g;
            }
            store_bf16(d_gate + i, dg[0], dg[1]);
            store_bf16(d_up + i, du[0], du[1]);
        }
#endif
#pragma omp simd
        for (index_t i = start + lines; i < stop; ++i) {
            float g = to_float(gate[i]), d = to_float(dy[i]), s = sigmoid(g);
            d_gate[i] = to_bf16(d * to_float(up[i]) * s * (1.0f + g * (1.0f - s)));
            d_up[i] = to_bf16(d * g * s);
        }
    }
}

// y = x * cos + rotate_half(x) * sin for x [rows, heads, dim] with its own strides; y is dense. cos and sin are
// [rows, dim]. sign -1 gives the transposed rotation: the backward pass.
void rotate(const bf16* x, const bf16* cos, const bf16* sin, bf16* y, index_t rows, index_t heads, index_t dim,
            index_t row_stride, index_t head_stride, index_t backward, int threads) {
    index_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (index_t row = 0; row < rows; ++row) {
        const bf16 *c = cos + row * dim, *s = sin + row * dim;
        for (index_t head = 0; head < heads; ++head) {
            const bf16* in = x + row * row_stride + head * head_stride;
            bf16* out = y + (row * heads + head) * dim;
            index_t lines = 0;
#ifdef VECTORS
            lines = half / LINE * LINE;
            // x[i] * cos[i] + sign * x[j] * sin[k]
            auto turned = [&](index_t i, index_t j, index_t k, float sign) {
                Vector across = all(sign) * (load_bf16(in + j) * load_bf16(s + k));
                return add_product(load_bf16(in + i), load_bf16(c + i), across);
            };
            store_lines(out, lines, [&](index_t i) {
                return backward ? turned(i, i + half, i + half, 1.0f) : turned(i, i + half, i, -1.0f);
            });
            store_lines(out + half, lines, [&](index_t i) {
                return backward ? turned(i + half, i, i, -1.0f) : turned(i + half, i, i + half, 1.0f);
            });
#endif
#pragma omp simd
            for (index_t i = lines; i < half; ++i) {
                float a = to_float(in[i]), b = to_float(in[i + half]);
                float first_sin = to_float(s[i]), second_sin = to_float(s[i + half]);
                float low = backward ? b * second_sin : -b * first_sin;
                float high = backward ? -a * first_sin : a * second_sin;
                out[i] = to_bf16(a * to_float(c[i]) + low);
                out[i + half] = to_bf16(b * to_float(c[i + half]) + high);
            }
        }
    }
}
}
