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

// What the blocks of a search tell each other about a query while they run. Everything is zero when a search starts.
struct Bounds {
    Packed* reached;  // [t]: k rows reach it, so what does not is not among the k best
    Packed* slots;    // [t, width]: slot i has the best row that was kept of rows i, i + width, ...: rows of different slots differ
    int width;        // width_for(k)

    // With twice as many slots as k, the k-th largest of them is on average as good as the 1.4 k-th best row, and better with more.
    __host__ __device__ static int width_for(int k) {
        int width = 32;
        while (width < 2 * k) width *= 2;
        return width;
    }
    static int64_t bytes(int64_t t, int k) { return 8 * t * (1 + width_for(k)); }
    static Bounds at(void* from, int64_t t, int k) {  // 8-byte aligned
        Packed* const reached = static_cast<Packed*>(from);
        return {reached, reached + t, width_for(k)};
    }
};

constexpr int kMostSlots = 256;  // of a query
constexpr int kEach = 8;         // numbers of every lane: all slots, or a whole list

// A number that k of the warp's reach and more do not, or 0: at most the k-th largest of them, bit by bit.
__device__ __forceinline__ Packed reached_by(const Packed (&mine)[kEach], int k) {
    int present = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) present += mine[i] != 0;
    if (__reduce_add_sync(kWarp, present) < k) return 0;  // which all 64 steps would find, in 1.7 us (computed)
    Packed least = 0;
    for (int bit = 63; bit >= 0; --bit) {
        const Packed higher = least | 1ull << bit;
        int reached = 0;
#pragma unroll
        for (int i = 0; i < kEach; ++i) reached += mine[i] >= higher;
        reached = __reduce_add_sync(kWarp, reached);
        if (reached >= k) least = higher;
        if (reached == k) break;
    }
    return least;
}

// What k rows reach, from the slots as they are now. All lanes of a warp.
__device__ __forceinline__ Packed look_up(const Bounds& of, int64_t query, int k, int lane) {
    static_assert(kMostSlots == 32 * kEach, "");
    Packed mine[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
        mine[i] = 32 * i < of.width ? load_relaxed(of.slots + query * of.width + 32 * i + lane) : 0;
    return reached_by(mine, k);
}

// Tells the others. It only rises, and holds whatever they have done meanwhile.
__device__ __forceinline__ void raise(const Bounds& of, int64_t query, int k, int lane) {
    const Packed reached = look_up(of, query, k, lane);
    if (lane == 0 && reached != 0) atomicMax(of.reached + query, reached);
}

// One warp's candidates in global memory: at most kList of them, never fewer than the k best of all that were offered, or than
// those of them that reach a bound which k rows reach somewhere.
constexpr int kList = 32 * kEach;

struct List {
    Packed threshold;  // k others reach it: what is not above it is not kept
    Packed best;
    int count;
};

// Takes what k rows reach elsewhere into account.
__device__ __forceinline__ void heed(List& list, Packed reached) {
    if (reached > list.threshold) list.threshold = reached;
}

// Halves the list to its k best, or, given a bound, leaves what reaches it. All lanes of the warp.
__device__ __forceinline__ void prune(List& list, Packed* entries, int k, Packed bound, int lane) {
    Packed mine[kEach];
    __syncwarp();  // the others' entries are there
#pragma unroll
    for (int i = 0; i < kEach; ++i) mine[i] = 32 * i + lane < list.count ? entries[32 * i + lane] : 0;
    if (bound == 0) bound = reached_by(mine, k);
    __syncwarp();  // all have read what is overwritten now
    int count = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const bool kept = mine[i] >= bound && mine[i] != 0;
        const uint32_t votes = __ballot_sync(kWarp, kept);
        if (kept) entries[count + __popc(votes & ((1u << lane) - 1))] = mine[i];
        count += __popc(votes);
    }
    list.count = count;
    heed(list, bound);
    __syncwarp();
}

// Offers one candidate of every lane (0: none), different rows. All lanes of the warp, `list` the same in all.
__device__ __forceinline__ void offer(List& list, Packed* entries, Packed candidate, const Bounds& to, int64_t query, int k, int lane) {
    const bool kept = candidate > list.threshold;
    const uint32_t votes = __ballot_sync(kWarp, kept);
    if (votes == 0) return;
    if (kept) {
        entries[list.count + __popc(votes & ((1u << lane) - 1))] = candidate;
        atomicMax(to.slots + query * to.width + (index_of(candidate) & (to.width - 1)), candidate);
    }
    list.count += __popc(votes);
    const Packed best = largest_of_warp(candidate);
    if (best > list.best) list.best = best;
    if (list.count > kList - 32) prune(list, entries, k, 0, lane);
}

}  // namespace unike
