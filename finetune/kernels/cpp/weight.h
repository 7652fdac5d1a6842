// A frozen weight [O, D], in bf16 or in bitsandbytes' 4 bits, of which a tile at a time becomes bf16; the values are the
// same to the bit as bitsandbytes' own.
#pragma once
#include "amx.h"
#include "layers.h"
#include <vector>

struct Weight {
    const bf16* dense;
    FourBit four_bit;
    index_t dim;
    std::vector<float> maxima = {};

    void expand_maxima(index_t outputs) { maxima = ::expand_maxima(four_bit, outputs * dim); }
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
