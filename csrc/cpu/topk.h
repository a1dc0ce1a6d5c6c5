// The best of a tile of products, for the search on a CPU: torch multiplies, this divides, hides and keeps. No torch.
#pragma once

#include <cstdint>

namespace unike {

// Products of unit queries with keys `first` to `first` + n. scores, indices [queries, k] hold the best of the tiles before,
// found [queries] of them: largest first, among equal scores the lowest index. Tiles come in the order of their keys.
struct TopkTile {
    const float *products, *key_norm;  // [queries, n], [n]; a key of norm 0 has cosine 0
    const int64_t* ranges;             // [queries, 2], query i sees ranges[2 i] <= key < ranges[2 i + 1]; null: all
    float* scores;
    int64_t *indices, *found;
    int64_t queries, n, first, k;
};

// Scores that are not finite are none. Reads each product once.
void keep_best(const TopkTile& tile);

// Adds a descending list of `count` to one of at most k, whose indices are lower.
void add_best(const float* scores, const int64_t* indices, int64_t count, float* best, int64_t* of, int64_t* found, int64_t k);

}  // namespace unike
