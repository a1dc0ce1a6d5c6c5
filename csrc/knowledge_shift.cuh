// knowledge_shift for few tokens: a cluster of blocks per token and key head. No torch, no Python.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "dtype.h"

namespace unike {

// A tensor [rows, heads, columns] whose columns are contiguous; strides in elements.
struct Heads {
    const void* data;
    int64_t row, head;
    Dtype dtype;
};

// softmax(scaling q . k_i) v_i over the items of each token, mixed with h_input: what unike_kernels.reference.knowledge_shift
// computes where nothing is projected or encoded.
struct KnowledgeShift {
    Heads q;                       // [tokens, key_heads group, key_columns]
    Heads keys, values;            // [N, key_heads, key_columns] and [N, key_heads, value_columns], of one dtype
    Heads h_input;                 // [tokens, key_heads group value_columns]; its heads lie value_columns apart
    const int64_t* indices;        // [cases, items] with token_to_case, else [tokens, items]; -1: no item
    const int64_t* token_to_case;  // [tokens], -1: of no case; null: every token has items of its own
    const int64_t* case_tokens;    // [cases], the row where alpha is computed, -1: none; null: at every token
    const void* alpha;             // [cases] or [tokens]; null: cos(knowledge, h_input), with one head only
    Dtype alpha_dtype;
    bool alpha_per_case;
    void* out;    // [tokens, key_heads group value_columns], contiguous, dtype of h_input
    float* used;  // the alpha of each case (alpha_per_case) or token
    int tokens, cases, items, key_heads, group, key_columns, value_columns;
    float scaling, softcap;  // softcap 0: none
    bool input;              // alpha is the weight of h_input
    bool clamp;              // a computed alpha into [0, 1]
    bool rescale;            // the knowledge gets the norm of h_input; with one head only
};

// split: blocks of a cluster, which share the columns of a head (1, 2, 4 or 8; more than 1 needs compute capability 9.0);
// rows: query heads of a key head that a cluster takes (1, 2 or 4; 2 where alpha is computed per case).
// cudaErrorInvalidValue where they do not fit: at most 1024 columns per block, 2048 with all rows.
cudaError_t knowledge_shift(const KnowledgeShift& shift, int split, int rows, cudaStream_t stream);

}  // namespace unike
