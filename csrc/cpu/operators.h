// extra_neurons and knowledge_shift for few tokens, one thread, no torch: plain pointers to contiguous arrays.
//
// What they compute stands in unike_kernels/reference.py. Every sum is taken in fp32, in an order that depends on the sizes
// alone, and rounded once, when it is stored. The code is compiled twice from the same text, for AVX2 (with FMA and F16C) and
// without, and chosen at run time.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace unike {

// A contiguous array of the caller; data null: not given.
struct Array {
    const void* data = nullptr;
    Dtype dtype = Dtype::float32;
};

enum class Act { relu, gelu, gelu_tanh, silu, identity };

struct NeuronCall {
    void* y;         // [tokens, d_out]: written, or, with `add`, added to where a neuron acts
    Dtype y_dtype;
    bool add;
    Array x, keys, key_bias, values, up, up_bias, zeta, route;  // as in ops/extra_neurons.py
    bool zeta_of_group;                                         // zeta [groups, d_out], otherwise [d_out]
    const int64_t *group_ptr, *token_to_case, *selected;        // null: not given
    int64_t tokens, d, n, d_out, groups, rows, slots;           // rows: of route and of selected [rows, slots]
    float beta;
    Act act;
};

struct ShiftCall {
    void* out;        // [tokens, heads hv], the dtype of h_input
    float* used;      // the alpha used, of the shape of alpha, computed: [tokens]; null: not wanted
    Array h_input;    // [tokens, heads hv]
    Array q;          // [tokens, heads, hd]
    Array keys;       // [items, kv_heads, hd]
    Array values;     // [items, kv_heads, hv]
    Array alpha;      // [tokens] or, with `alpha_of_case`, [cases]; null: cos(h_know, h_input) of every token
    const int64_t *indices, *token_to_case;  // [cases, slots]; [tokens] or null: token t is case t
    int64_t tokens, cases, items, heads, kv_heads, hd, hv, slots;
    float scaling, softcap;  // softcap 0: none
    bool alpha_of_case, alpha_of_input, rescale, clamp;  // clamp: a computed alpha to [0, 1]
};

// Null, or what is out of range: then nothing has been written. portable: without AVX2, for tests.
const char* extra_neurons(const NeuronCall& call, bool portable);
const char* knowledge_shift(const ShiftCall& call, bool portable);

// The two instruction levels of the same text (operators.inl); `work`: room for so many floats.
int64_t work_of(const NeuronCall& call);
int64_t work_of(const ShiftCall& call);
namespace portable {
void run(const NeuronCall& call, float* work);
void run(const ShiftCall& call, float* work);
}  // namespace portable
namespace avx2 {
void run(const NeuronCall& call, float* work);
void run(const ShiftCall& call, float* work);
}  // namespace avx2

}  // namespace unike
