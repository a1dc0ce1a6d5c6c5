// Exact search by cosine for few queries: products and selection in one pass over the keys, in fp32, no torch.
#pragma once

#include <cstdint>

#include "int8_search.h"

namespace unike {

// Unit queries q [queries, d] fp32 against keys; results as in topk.h, found [queries] counts them. bf16: the same queries as
// they were given, not normalised, where they and the keys are bfloat16; else null.
struct ScanCall {
    const float* q;
    const uint16_t* bf16;
    Keys keys;
    const int64_t* ranges;  // [queries, 2], query i sees ranges[2 i] <= key < ranges[2 i + 1]; null: all
    float* scores;          // [queries, k]
    int64_t *indices, *found;
    int64_t queries, k;
    int threads;
};

// Whether the machine has instructions for it: AVX2 with FMA and F16C, or AVX-512 (level best).
bool can_scan(Level level);
void scan(const ScanCall& call, Level level);

// out [queries, width]: q[i] . row for each of `count` rows, `stride` elements apart; queries [queries] point to d numbers.
// The order of a sum depends on d and `one_by_one` alone, so equal rows score equal.
struct Products {
    const void* const* queries;
    int64_t count_queries;
    const void* rows;
    Dtype dtype;
    int64_t count, stride, d;
    float* out;
    int64_t width;
    bool one_by_one;  // rows, for up to three queries: they wait for memory
};
namespace avx2 {
void multiply(const Products& call);
}
namespace avx512 {
void multiply(const Products& call);
}
// Queries and rows in bfloat16, by the units for it: the products are exact, the sums fp32; what is subnormal counts as zero.
namespace avx512bf16 {
void multiply(const Products& call);
}

}  // namespace unike
