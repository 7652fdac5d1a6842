// A frozen weight [O, D], in bf16 or in bitsandbytes' 4 bits, of which a tile at a time becomes bf16.
//
// 4 bits: two codes a byte, the earlier one in the high half; a code stands for a level times the absolute maximum of
// its block of consecutive elements. With "double quantization" the maxima are codes of 8 bits themselves. Source:
// bitsandbytes 0.50, functional.quantize_4bit and dequantize_4bit; the values are the same to the bit.
#pragma once
#include "amx.h"
#include <vector>

struct FourBit {
    const std::uint8_t* codes;         // [O * D / 2]; null for bf16
    const float *levels, *absmax;      // [16], [blocks]
    const std::uint8_t* absmax_codes;  // [blocks], or null; then of these:
    const float *absmax_levels, *absmax_absmax, *absmax_offset;  // [256], [blocks of blocks], [1]
    index_t block, absmax_block;       // multiples of 32; elements of each
};

struct Weight {
    const bf16* dense;
    FourBit four_bit;
    index_t dim;
    std::vector<float> maxima = {};

    // Not a multiplication and addition in one rounding, which would give other bits.
    __attribute__((noinline, optimize("fp-contract=off"))) void expand_maxima(index_t outputs) {
        if (!four_bit.codes || !four_bit.absmax_codes) return;
        maxima.resize(outputs * dim / four_bit.block);
        for (index_t i = 0; i < static_cast<index_t>(maxima.size()); ++i)
            maxima[i] = four_bit.absmax_levels[four_bit.absmax_codes[i]] *
                            four_bit.absmax_absmax[i / four_bit.absmax_block] + *four_bit.absmax_offset;
        four_bit.absmax = maxima.data();
    }

    struct Tile {
        const bf16* rows;
        index_t stride;
    };
    // 32 x 32 elements from (output, column) on; `buffer` [32][32] may hold them.
    Tile tile(index_t output, index_t column, bf16* buffer) const {
        if (!four_bit.codes) return {dense + output * dim + column, dim};
        __m512 levels = _mm512_loadu_ps(four_bit.levels);
        for (index_t row = 0; row < TILE; ++row) {
            index_t at = (output + row) * dim + column;
            __m512 most = _mm512_set1_ps(four_bit.absmax[at / four_bit.block]);
            __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(four_bit.codes + at / 2)));
            __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), levels);
            __m512 odd = _mm512_permutexvar_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), levels);
            store_pair(buffer + row * TILE, _mm512_mul_ps(even, most), _mm512_mul_ps(odd, most));
        }
        return {buffer, TILE};
    }
};
