// The k best of many lists, for one query by one block: the k-th largest of the lists' best bounds the k-th best of all from below,
// so that hardly more than k candidates are left to be ranked.
#pragma once

#include "candidates.cuh"
#include "cosine_topk.cuh"

namespace unike {

constexpr int kMostLists = 1024;
constexpr int kSpare = 2048;               // candidates that are ranked at a time
constexpr int kSelectionThreads = 512;

struct Lists {
    Packed* found;  // [t, lists, kList]
    Packed* best;   // [t, lists], 0 where there is none
    int* counts;    // [t, lists]
    int lists;      // at most kMostLists

    // Bytes that the three take, and where they lie in them, `from` 8-byte aligned.
    __host__ __device__ static int64_t bytes(int64_t t, int lists) { return t * lists * (8 * kList + 8 + 4); }
    static Lists at(void* from, int64_t t, int lists) {
        Packed* const found = static_cast<Packed*>(from);
        return {found, found + t * lists * kList, reinterpret_cast<int*>(found + t * lists * (kList + 1)), lists};
    }
    __device__ __forceinline__ Packed* entries(int64_t query, int list) const { return found + (query * lists + list) * kList; }
    __device__ __forceinline__ void keep(int64_t query, int list, const List& kept) const {
        best[query * lists + list] = kept.best;
        counts[query * lists + list] = kept.count;
    }
};

// How many of `others` are above x.
__device__ __forceinline__ int rank_of(Packed x, const Packed* others, int count) {
    int rank = 0;
    for (int i = 0; i < count; ++i) rank += others[i] > x;
    return rank;
}

struct Selection {
    Packed kept[kSpare], winners[kMostItems], best[kMostLists];
    int lists[kMostLists];  // those that can have one of the k best
    Packed bound;           // k candidates reach it
    int used, count;
};

// The k best of query `query` to all.winners, the best first, 0 where there are fewer; after a barrier. The whole block of
// kSelectionThreads. Moves 8 lists + 2 KiB for each list whose best is among the k largest.
__device__ __forceinline__ void select_best(Selection& all, const Lists& from, int64_t query, int k) {
    const int lists = from.lists, thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    if (thread == 0) all.bound = 1, all.used = all.count = 0;
    for (int i = thread; i < lists; i += kSelectionThreads) all.best[i] = from.best[query * lists + i];
    __syncthreads();
    for (int i = thread; i < lists; i += kSelectionThreads)
        if (all.best[i] != 0 && rank_of(all.best[i], all.best, lists) == k - 1) all.bound = all.best[i];
    __syncthreads();
    for (int i = thread; i < lists; i += kSelectionThreads)
        if (all.best[i] >= all.bound) all.lists[atomicAdd(&all.used, 1)] = i;
    __syncthreads();

    // Takes the candidates of list `i` that reach the bound, as long as there is room.
    const auto take = [&](int i) {
        const int64_t at = query * lists + all.lists[i];
        const int there = from.counts[at];
        const Packed* entries = from.found + at * kList;
#pragma unroll
        for (int first = 0; first < kList; first += 32) {
            const Packed x = first + lane < there ? entries[first + lane] : 0;
            const bool reaches = x >= all.bound;
            const uint32_t votes = __ballot_sync(kWarp, reaches);
            int place = 0;
            if (lane == 0 && votes) place = atomicAdd(&all.count, __popc(votes));
            place = __shfl_sync(kWarp, place, 0) + __popc(votes & ((1u << lane) - 1));
            if (reaches && place < kSpare) all.kept[place] = x;
        }
    };
    for (int i = warp; i < all.used; i += kSelectionThreads / 32) take(i);
    __syncthreads();
    int count = all.count;
    if (count > kSpare) {  // very many in few lists: list by list, the k best so far in front
        count = 0;
        for (int i = 0; i < all.used; ++i) {
            __syncthreads();
            if (thread == 0) all.count = count;
            __syncthreads();
            if (warp == 0) take(i);
            __syncthreads();
            count = all.count;
            if (count <= kSpare - kList && i + 1 < all.used) continue;
            for (int x = thread; x < count; x += kSelectionThreads) {
                const int rank = rank_of(all.kept[x], all.kept, count);
                if (rank < k) all.winners[rank] = all.kept[x];
            }
            __syncthreads();
            count = min(count, k);
            for (int x = thread; x < count; x += kSelectionThreads) all.kept[x] = all.winners[x];
            if (thread == 0 && count == k) all.bound = all.winners[k - 1];
        }
        __syncthreads();
    }
    for (int i = thread; i < k; i += kSelectionThreads) all.winners[i] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += kSelectionThreads) {
        const int rank = rank_of(all.kept[i], all.kept, count);
        if (rank < k) all.winners[rank] = all.kept[i];
    }
    __syncthreads();
}

// Launches the kernel that selects, for t queries. Defined in cosine_topk.cu.
cudaError_t select(const Lists& lists, int t, int k, float* scores, int64_t* indices, bool early, cudaStream_t stream);

}  // namespace unike
