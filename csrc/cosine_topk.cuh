// The exact search for few queries: the k keys of largest cosine, one pass over the keys. No torch, no Python.
#pragma once

#include <cuda_runtime_api.h>

#include "dtype.h"

namespace unike {

constexpr int kMostItems = 128;    // k
constexpr int kMostQueries = 64;  // of one call
constexpr int kMostColumns = 1 << 20;  // d
constexpr int64_t kMostKeys = (int64_t{1} << 31) - (1 << 20);  // n: a row's number is an int, also where steps go beyond the last row

struct Search {
    const void* q;          // [t, d], rows q_stride elements apart
    const void* keys;       // [n, d], rows key_stride elements apart
    const float* key_norm;  // [n], what to divide the rows by, or null: their norms, computed on the way
    const int64_t* ranges;  // [t, 2]: query i sees rows ranges[i][0] <= row < ranges[i][1]; null: all
    Dtype q_dtype, key_dtype;  // equal, or q is float32
    int64_t n, q_stride, key_stride;
    int t, d, k;
};

// Bytes that cosine_topk needs beside its arguments, on the current device; they need not be set to anything.
cudaError_t cosine_topk_workspace(const Search& search, int64_t& bytes);

// Bytes that have to be zeros before a search, and are again after it. 8-byte aligned; no two searches may use the same at a time.
int64_t cosine_topk_zeros(int t, int k);

// scores, indices [t, k]: largest first, among equal scores the lowest index; -inf and -1 where there is none. alone: one launch, whose
// last block chooses the best for all queries; otherwise two (one where n is 0), the second with a block for each query. bulk: the copy
// engine brings the keys where it can (sm_90, up to 16 queries of half precision, d a multiple of 512, aligned rows). Products of
// half precision on tensor cores, their sums in float32, in an order that depends on t and d alone: equal rows score equally, and the
// result does not depend on which block runs when.
cudaError_t cosine_topk(const Search& search, void* workspace, void* zeros, bool alone, bool bulk, float* scores,
                        int64_t* indices, cudaStream_t stream);

}  // namespace unike
