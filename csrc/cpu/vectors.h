// Dot products for the search: AVX-512 with VNNI or AVX2 where the machine has it, plain C++ elsewhere. Chosen at run time.
#pragma once

#include <cstdint>

#include "int8_search.h"

namespace unike {

struct Vectors {
    // a [n] int16 times each row of b [rows, n] int8, 64-byte aligned, n a multiple of 64. The caller keeps 127 * sum |a|
    // below 2^31.
    void (*dots_int8)(const int16_t* a, const int8_t* b, int64_t n, int64_t rows, int32_t* out);
    // a [n] fp32 times b [n], one for each Dtype. The order of the sum depends on n alone, so equal rows score equal.
    float (*dot[3])(const float* a, const void* b, int64_t n);
    void (*widen[3])(const void* row, int64_t n, float* out);
};

bool has_avx2();
bool has_avx512();
bool has_bf16();
bool has_vnni();
const Vectors& vectors(Level level);

}  // namespace unike
