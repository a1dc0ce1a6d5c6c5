// The k best of many lists, for one query by one team of warps: a block, or one warp of several that take a query each. What k rows
// are known to reach leaves hardly more than k candidates to be ranked.
#pragma once

#include "candidates.cuh"
#include "cosine_topk.cuh"

namespace unike {

constexpr int kMostLists = 1024;
constexpr int kSelectionWarps = 16;  // of the kernel that selects and does nothing else

struct Lists {
    Packed* found;  // [t, lists, kList]
    Packed* best;   // [t, lists], 0 where there is none
    int* counts;    // [t, lists]
    int lists;      // at most kMostLists
    Bounds bounds;

    // Bytes that the first three take, and where they lie in them, `from` 8-byte aligned.
    __host__ __device__ static int64_t bytes(int64_t t, int lists) { return t * lists * (8 * kList + 8 + 4); }
    static Lists at(void* from, int64_t t, int lists, const Bounds& bounds) {
        Packed* const found = static_cast<Packed*>(from);
        return {found, found + t * lists * kList, reinterpret_cast<int*>(found + t * lists * (kList + 1)), lists, bounds};
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

// A team's shared memory.
template <int Warps>
struct Selection {
    static constexpr int threads = 32 * Warps, spare = Warps == 1 ? 512 : 2048;  // candidates that are ranked at a time
    static_assert(kMostItems <= spare / 2, "");
    Packed kept[spare], winners[kMostItems];
    Packed bound;         // k candidates reach it
    int ends[kMostLists]; // where a list's candidates end if all are counted, of lists that can have one of the k best
    int count;

    __device__ static __forceinline__ void sync() {
        if (Warps == 1)
            __syncwarp();
        else
            __syncthreads();
    }
};

// The k best of query `query` to all.winners, the best first, 0 where there are fewer; after a barrier of the team. Moves 12 bytes
// and the candidates of each list whose best reaches the bound, and the slots.
template <int Warps>
__device__ __forceinline__ void select_best(Selection<Warps>& all, const Lists& from, int64_t query, int k) {
    using Team = Selection<Warps>;
    const int lists = from.lists, thread = static_cast<int>(threadIdx.x) % Team::threads, lane = thread % 32, warp = thread / 32;
    if (warp == 0) {
        Packed bound = 1;
        int end = 0;
        for (int first = 0; first < lists; first += 32 * kEach) {  // all loads at once, the slots' among them
            Packed best[kEach];
            int count[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int list = first + 32 * i + lane;
                best[i] = list < lists ? from.best[query * lists + list] : 0;
                count[i] = list < lists ? from.counts[query * lists + list] : 0;
            }
            if (first == 0) {
                const Packed reached = look_up(from.bounds, query, k, lane);
                if (reached > bound) bound = reached;
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                int sum = best[i] >= bound ? count[i] : 0;
#pragma unroll
                for (int by = 1; by < 32; by *= 2) {
                    const int before = __shfl_up_sync(kWarp, sum, by);
                    if (lane >= by) sum += before;
                }
                if (first + 32 * i + lane < lists) all.ends[first + 32 * i + lane] = end + sum;
                end += __shfl_sync(kWarp, sum, 31);
            }
        }
        if (lane == 0) all.bound = bound, all.count = 0;
    }
    Team::sync();

    const auto candidate = [&](int i) {  // binary search for its list: ends[low - 1] <= i < ends[low]
        int low = 0, high = lists - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (all.ends[middle] > i)
                high = middle;
            else
                low = middle + 1;
        }
        return from.entries(query, low)[i - (low > 0 ? all.ends[low - 1] : 0)];
    };
    const auto rank_all = [&](int count) {
        for (int i = thread; i < count; i += Team::threads) {
            const int rank = rank_of(all.kept[i], all.kept, count);
            if (rank < k) all.winners[rank] = all.kept[i];
        }
        Team::sync();
    };
    constexpr int ahead = 4;  // candidates of a thread that are asked for together
    const int total = lists > 0 ? all.ends[lists - 1] : 0;
    int count = 0;
    for (int at = 0; at < total;) {
        const int until = min(total, at + Team::spare - count);
        const Packed bound = all.bound;
        for (int first = at + 32 * warp; first < until; first += Team::threads * ahead) {
            Packed x[ahead];
#pragma unroll
            for (int j = 0; j < ahead; ++j) {
                const int i = first + Team::threads * j + lane;
                x[j] = i < until ? candidate(i) : 0;
            }
#pragma unroll
            for (int j = 0; j < ahead; ++j) {
                const bool reaches = x[j] >= bound;
                const uint32_t votes = __ballot_sync(kWarp, reaches);
                int place = 0;
                if (lane == 0 && votes) place = atomicAdd(&all.count, __popc(votes));
                place = __shfl_sync(kWarp, place, 0) + __popc(votes & ((1u << lane) - 1));
                if (reaches) all.kept[place] = x[j];
            }
        }
        Team::sync();
        at = until, count = all.count;
        if (at == total) break;
        Team::sync();  // all have read the count
        if (count <= Team::spare / 2) continue;
        rank_all(count);  // very many reach the bound: only the k best stay
        count = min(count, k);
        for (int i = thread; i < count; i += Team::threads) all.kept[i] = all.winners[i];
        if (thread == 0) all.count = count, all.bound = count == k ? all.winners[k - 1] : all.bound;
        Team::sync();
    }
    for (int i = thread; i < k; i += Team::threads) all.winners[i] = 0;
    Team::sync();
    rank_all(count);
}

// As select_best, to scores and indices [t, k]; the query's bounds are zero again after it.
template <int Warps>
__device__ __forceinline__ void finish(Selection<Warps>& all, const Lists& from, int64_t query, int k, float* scores, int64_t* indices) {
    using Team = Selection<Warps>;
    select_best(all, from, query, k);
    const int thread = static_cast<int>(threadIdx.x) % Team::threads;
    for (int i = thread; i < k; i += Team::threads) {
        scores[query * k + i] = score_of(all.winners[i]);
        indices[query * k + i] = index_of(all.winners[i]);
    }
    for (int i = thread; i < from.bounds.width; i += Team::threads) from.bounds.slots[query * from.bounds.width + i] = 0;
    if (thread == 0) from.bounds.reached[query] = 0;
    Team::sync();  // the team's shared memory is free again
}

// Launches the kernel that finishes t queries, a block for each. Defined in cosine_topk.cu.
cudaError_t select(const Lists& lists, int t, int k, float* scores, int64_t* indices, bool early, cudaStream_t stream);

}  // namespace unike
