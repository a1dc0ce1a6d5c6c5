// Exact search by cosine over an int8 copy of the keys: the mathematics of cpu/int8_search.h on a GPU. No torch, no Python.
//
// The int8 scores only decide which rows are scored exactly. With u_i = key_i / key_norm_i, centre c, rotation R and unit query q:
//
//   q . u_i = q . c + (R q) . v_i,  v_i = R (u_i - c) = scale_i z_i + e_i,  z_i int8,  |e_i| <= residual_i
//
// so s_i = q . c + (R q) . (scale_i z_i) is off by at most |q| residual_i. The k best by s_i are scored exactly; the worst of them,
// L, bounds the k-th best score from below; every row with s_i + |q| residual_i >= L is scored exactly too.
#pragma once

#include <cuda_runtime_api.h>

#include "dtype.h"

namespace unike {

constexpr int kMostInt8Queries = 16;

// What the searches of one copy have found, on the device, zeros in the beginning: where keys lie too close together for int8, the
// codes only cost their own reading, and are left out for a while.
struct Int8Habit {
    unsigned long long rows, scored;  // of the last search that used the codes: seen, and scored exactly behind the bound
    int wasted;                       // searches in a row that scored more than a third
    int left;                         // searches to come that do without the codes
};

struct Int8Keys {
    const int8_t* codes;     // z [n, padded], contiguous; padded: d rounded up to a multiple of 64
    const float* scale;      // [n]
    const float* residual;   // [n], rounding in float32 included; infinity: the row is always scored
    const float* centre;     // [padded]
    const float* signs;      // [2, padded], 1 or -1: R is two of random signs and a Hadamard transform of `window` elements, the
    int padded, window;      // first and then the last; one where window is padded
    const void* keys;        // [n, d], rows key_stride elements apart
    const float* key_norm;   // [n]
    Dtype key_dtype;
    int64_t n, key_stride;
    int d;
    Int8Habit* habit;
};

cudaError_t int8_search_workspace(const Int8Keys& keys, int t, int k, int64_t& bytes);

// As cosine_topk for q [t, d] in float32, contiguous; reranked [t]: how many rows were scored exactly for each query, those behind
// L apart. Each of them is read once for all queries. Where the bound keeps more than a third of the rows, the next searches do not
// read the codes and score every row: a fallback costs one read of the keys, and one in 3 to 65 that of the codes too. Five launches.
cudaError_t int8_search(const Int8Keys& keys, const float* q, const int64_t* ranges, int t, int k, void* workspace, float* scores,
                        int64_t* indices, int* reranked, cudaStream_t stream);

}  // namespace unike
