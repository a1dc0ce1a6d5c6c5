// Scores with their indices as one integer, and lists of the best of them that one warp keeps.
#pragma once

#include <device.cuh>

namespace unike {

// The score's bits, made to order as integers do, above the inverted index: the larger score is the larger number, and among equal
// scores the lower index is. 0, less than any of them, is none.
using Packed = unsigned long long;

constexpr uint32_t kWarp = 0xffffffff;  // all lanes

__device__ __forceinline__ uint32_t ordered(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 + 0.0 = 0.0
    return bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
}

__device__ __forceinline__ float unordered(uint32_t x) { return __uint_as_float(x ^ (x >> 31 ? 0x80000000 : 0xffffffff)); }

// A score that is not finite is none.
__device__ __forceinline__ Packed pack(float score, int index) {
    if (!(fabsf(score) < INFINITY)) return 0;
    return static_cast<Packed>(ordered(score)) << 32 | static_cast<uint32_t>(0x7fffffff - index);
}

__device__ __forceinline__ float score_of(Packed x) { return x ? unordered(static_cast<uint32_t>(x >> 32)) : -INFINITY; }

__device__ __forceinline__ int64_t index_of(Packed x) { return x ? 0x7fffffff - static_cast<int64_t>(x & 0x7fffffff) : -1; }

__device__ __forceinline__ Packed largest_of_warp(Packed x) {
    const uint32_t high = static_cast<uint32_t>(x >> 32), best = __reduce_max_sync(kWarp, high);
    const uint32_t low = __reduce_max_sync(kWarp, high == best ? static_cast<uint32_t>(x) : 0u);
    return static_cast<Packed>(best) << 32 | low;
}

// One warp's candidates in global memory: at most kList of them, never fewer than the k best of all that were offered.
constexpr int kList = 256;

struct List {
    Packed threshold;  // k others are as good: what is not above this is not kept
    Packed best;
    int count;
};

// Halves the list to its k best. All lanes of the warp.
__device__ __forceinline__ void prune(List& list, Packed* entries, int k, int lane) {
    Packed mine[kList / 32];
    __syncwarp();  // the others' entries are there
#pragma unroll
    for (int i = 0; i < kList / 32; ++i) mine[i] = 32 * i + lane < list.count ? entries[32 * i + lane] : 0;
    Packed kth = 0;  // bit by bit: the largest number that k entries reach
    for (int bit = 63; bit >= 0; --bit) {
        const Packed higher = kth | 1ull << bit;
        int reached = 0;
#pragma unroll
        for (int i = 0; i < kList / 32; ++i) reached += mine[i] >= higher;
        if (__reduce_add_sync(kWarp, reached) >= k) kth = higher;
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < kList / 32; ++i) {
        const bool kept = mine[i] >= kth && mine[i] != 0;
        const uint32_t votes = __ballot_sync(kWarp, kept);
        if (kept) entries[count + __popc(votes & ((1u << lane) - 1))] = mine[i];
        count += __popc(votes);
    }
    list.count = count, list.threshold = kth;
    __syncwarp();
}

// Offers one candidate of every lane (0: none). All lanes of the warp, `list` the same in all.
__device__ __forceinline__ void offer(List& list, Packed* entries, Packed candidate, int k, int lane) {
    const bool kept = candidate > list.threshold;
    const uint32_t votes = __ballot_sync(kWarp, kept);
    if (votes == 0) return;
    if (kept) entries[list.count + __popc(votes & ((1u << lane) - 1))] = candidate;
    list.count += __popc(votes);
    const Packed best = largest_of_warp(candidate);
    if (best > list.best) list.best = best;
    if (list.count > kList - 32) prune(list, entries, k, lane);
}

}  // namespace unike
