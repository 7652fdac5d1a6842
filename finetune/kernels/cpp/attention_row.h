// The shapes of attention over a packed row, and which of its tiles of 32 tokens see each other.
//
// `visits` [T/32, T/32] says of a tile of queries and one of keys whether no pair (0), every pair (1) or some pair (2)
// sees each other.
//
// Shapes: T tokens (a multiple of 32), H heads, G key heads, D head size (a multiple of 32, at most 256).
#pragma once
#include "common.h"
#include <algorithm>
#include <vector>

namespace {

struct Row {
    index_t tokens, heads, kv_heads, dim;
    const std::int32_t *own_start, *prefix_start, *prefix_end;  // [T]
    const std::uint8_t* visits;                                 // [T/32, T/32]
    float scale;

    index_t tiles() const { return tokens / TILE; }
    index_t chunks() const { return dim / TILE; }
    index_t head_size() const { return tokens * dim; }
    float factor() const { return scale * 1.44269504f; }  // of scores whose exponentials are powers of 2
    index_t kv_of(index_t head) const { return head / (heads / kv_heads); }
};

// [T, H, D] with its own strides; the elements of a head lie together.
struct Heads {
    const bf16* data;
    index_t token_stride, head_stride;
    const bf16* at(index_t head, index_t token) const { return data + head * head_stride + token * token_stride; }
};

constexpr index_t MAX_DIM = 256;

// The key tiles that a tile of queries sees.
std::vector<index_t> visited(const Row& row, index_t tile) {
    std::vector<index_t> list;
    for (index_t key = 0; key < row.tiles(); ++key)
        if (row.visits[tile * row.tiles() + key]) list.push_back(key);
    return list;
}

}  // namespace
