// How the backward pass of attention is cut, from the row alone: so results do not depend on the number of threads.
//
// A window is a range of query tiles; a thread computes a window of one key head and its query heads, a span of few
// tiles at a time. A key tile that more than one span visits has a slot of memory in each window that visits it,
// where its gradients' sums gather; the windows' slots are added up in their order at the end.
#pragma once
#include "attention_row.h"
#include <cstddef>

namespace {

constexpr index_t WINDOWS = 24;        // of all key heads, about: enough for 16 threads, few enough for the slots
constexpr index_t SHORTEST = 3;        // tiles: in less, slots take as long as products
constexpr index_t SPAN_ELEMENTS = 48 * TILE * TILE;  // of one operand: with all it is, 0.8 MB of a second cache
constexpr index_t NONE = -1;

struct Plan {
    index_t span;                // tiles
    index_t num_slots = 0;       // of a key head
    std::vector<index_t> cuts;   // where windows begin, and the end of the last
    std::vector<index_t> slots;  // [windows, T/32]: a key tile's in a window, or NONE

    // Which key tiles have slots: those that several spans visit, or all, where a window is computed in one go.
    enum Slots { OF_SEVERAL_SPANS = 1, EVERY_KEY = 0 };

    explicit Plan(const Row& row, Slots which = OF_SEVERAL_SPANS) {
        index_t group = row.heads / row.kv_heads;
        span = std::max<index_t>(1, SPAN_ELEMENTS / (TILE * row.dim * group));
        cut(row);
        slots.assign(windows() * row.tiles(), NONE);
        for (index_t key = 0; key < row.tiles(); ++key) {
            index_t spans = 0;
            for (index_t w = 0; w < windows(); ++w)
                for (index_t from = cuts[w]; from < cuts[w + 1]; from = end(w, from))
                    spans += visits(row, from, end(w, from), key);
            for (index_t w = 0; spans > which && w < windows(); ++w)
                if (visits(row, cuts[w], cuts[w + 1], key)) slots[w * row.tiles() + key] = num_slots++;
        }
    }

    index_t windows() const { return static_cast<index_t>(cuts.size()) - 1; }
    index_t end(index_t window, index_t from) const { return std::min(from + span, cuts[window + 1]); }

    // Whether any of a range of query tiles sees a key tile.
    static bool visits(const Row& row, index_t from, index_t to, index_t key) {
        for (index_t tile = from; tile < to; ++tile)
            if (row.visits[tile * row.tiles() + key]) return true;
        return false;
    }

   private:
    // Windows of about the same number of pairs, cut between samples where that can be.
    void cut(const Row& row) {
        std::vector<index_t> pairs(row.tiles());
        index_t total = 0, sum = 0;
        for (index_t tile = 0; tile < row.tiles(); ++tile) {
            pairs[tile] = static_cast<index_t>(visited(row, tile).size());
            total += pairs[tile];
        }
        double share = static_cast<double>(total * row.kv_heads) / WINDOWS;
        cuts.push_back(0);
        for (index_t next = 1; next < row.tiles(); ++next) {
            sum += pairs[next - 1];
            if (next - cuts.back() < SHORTEST || sum < 0.75 * share) continue;
            index_t shared = 0;
            for (index_t key = 0; key < next; ++key) shared += row.visits[next * row.tiles() + key] != 0;
            if (shared > 1 && sum < 1.25 * share) continue;
            cuts.push_back(next);
            sum = 0;
        }
        cuts.push_back(row.tiles());
    }
};

// The rows of the backward pass, and where its gradients go.
struct Task {
    const Row& row;
    const Plan& plan;
    const Heads &q, &k, &v, &out, &grad;
    const float* lse;
    bf16 *dq, *dk, *dv;
    float* slots;  // [G, slots of a key head][dk and dv: 2][32, D]

    index_t group() const { return row.heads / row.kv_heads; }
    index_t size() const { return TILE * row.dim; }
    float* slot(index_t kv, index_t index) const { return slots + (kv * plan.num_slots + index) * 2 * size(); }
};

constexpr std::size_t KEPT_SLOTS = 8 << 20;  // bytes: where there are more, products take far longer than new pages

}  // namespace
