#include "topk.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace unike {
namespace {

constexpr int64_t kChunk = 256;  // scores that are compared with the worst kept one before any is looked at

// A descending list of at most k, with room for them.
struct List {
    float* scores;
    int64_t* indices;
    int64_t found, k;

    float worst() const { return found == k ? scores[k - 1] : -std::numeric_limits<float>::infinity(); }

    // Behind its equals, whose indices are lower.
    void insert(float score, int64_t index) {
        const int64_t at = std::upper_bound(scores, scores + found, score, [](float a, float b) { return a > b; }) - scores;
        const int64_t last = found == k ? k - 1 : found++;
        std::copy_backward(scores + at, scores + last, scores + last + 1);
        std::copy_backward(indices + at, indices + last, indices + last + 1);
        scores[at] = score, indices[at] = index;
    }
};

}  // namespace

void keep_best(const TopkTile& tile) {
    if (tile.k == 0) return;
    float scores[kChunk];
    for (int64_t query = 0; query < tile.queries; ++query) {
        List best{tile.scores + query * tile.k, tile.indices + query * tile.k, tile.found[query], tile.k};
        const float* products = tile.products + query * tile.n;
        int64_t begin = 0, end = tile.n;
        if (tile.ranges != nullptr) {
            begin = std::clamp(tile.ranges[2 * query], tile.first, tile.first + tile.n) - tile.first;
            end = std::clamp(tile.ranges[2 * query + 1], tile.first, tile.first + tile.n) - tile.first;
        }
        for (int64_t at = begin; at < end; at += kChunk) {
            const int64_t count = std::min(kChunk, end - at);
            const float worst = best.worst();
            bool any = false;
            for (int64_t i = 0; i < count; ++i) {
                const float norm = tile.key_norm[at + i];
                scores[i] = products[at + i] / (norm == 0 ? std::numeric_limits<float>::infinity() : norm) + 0.0f;  // no -0.0
                any |= scores[i] > worst;
            }
            if (!any) continue;
            for (int64_t i = 0; i < count; ++i)
                if (scores[i] > best.worst() && std::isfinite(scores[i])) best.insert(scores[i], tile.first + at + i);
        }
        tile.found[query] = best.found;
    }
}

void add_best(const float* scores, const int64_t* indices, int64_t count, float* best, int64_t* of, int64_t* found, int64_t k) {
    List list{best, of, *found, k};
    for (int64_t i = 0; i < count && scores[i] > list.worst(); ++i) list.insert(scores[i], indices[i]);
    *found = list.found;
}

}  // namespace unike
