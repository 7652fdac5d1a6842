// Linear layers that share their input, as Python hands them over: kernels/lora.py has the same structures.
#pragma once
#include "common.h"
#include <vector>

// A weight [O, D] in bitsandbytes' 4 bits: two codes a byte, the earlier one in the high half; a code stands for a level
// times the absolute maximum of its block of consecutive elements. With "double quantization" the maxima are codes of 8
// bits themselves. Source: bitsandbytes 0.50, functional.quantize_4bit and dequantize_4bit.
struct FourBit {
    const std::uint8_t* codes;         // [O * D / 2]; null for bf16
    const float *levels, *absmax;      // [16], [blocks]
    const std::uint8_t* absmax_codes;  // [blocks], or null; then of these:
    const float *absmax_levels, *absmax_absmax, *absmax_offset;  // [256], [blocks of blocks], [1]
    index_t block, absmax_block;       // powers of two from 32; elements of each
};

// The maxima of `count` elements where they are quantized themselves, which the weight then reads; it reads them while
// the returned memory lives. Not a multiplication and addition in one rounding, which would give other bits.
__attribute__((noinline, optimize("fp-contract=off"))) static std::vector<float> expand_maxima(FourBit& weight,
                                                                                                index_t count) {
    if (!weight.codes || !weight.absmax_codes) return {};
    std::vector<float> maxima(count / weight.block);
    for (index_t i = 0; i < static_cast<index_t>(maxima.size()); ++i)
        maxima[i] = weight.absmax_levels[weight.absmax_codes[i]] * weight.absmax_absmax[i / weight.absmax_block] +
                    *weight.absmax_offset;
    weight.absmax = maxima.data();
    return maxima;
}

struct Layer {
    const bf16 *w, *bias;  // [O, D] or null; [O] or null
    FourBit four_bit;      // where w is null
    const float *a, *b;    // [rank, D], [O, rank]
    bf16* y;               // [T, O]: the output; in the backward pass its gradient
    float *da, *db;        // as a and b
    index_t rank, outputs;
    float scale;
};

struct Group {
    const Layer* layers;
    index_t count, dim;
    // Where a layer's ranks begin, and after the last layer how many there are.
    index_t first_rank(index_t layer) const {
        index_t sum = 0;
        for (index_t i = 0; i < layer; ++i) sum += layers[i].rank;
        return sum;
    }
    index_t used() const { return first_rank(count); }
    index_t ranks() const { return (used() + TILE - 1) / TILE * TILE; }
    // Outputs of all layers, one layer's after the other's, and where one of them lies.
    index_t outputs() const {
        index_t sum = 0;
        for (index_t i = 0; i < count; ++i) sum += layers[i].outputs;
        return sum;
    }
    struct Place {
        index_t layer, output;
    };
    Place place_of(index_t output) const {
        index_t layer = 0;
        for (; output >= layers[layer].outputs; ++layer) output -= layers[layer].outputs;
        return {layer, output};
    }
};
