// The products of products.inl for AVX512: can_scan() is asked before anything here runs.
#include <cstring>

#include "scan.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of this file alone
#endif

#include "halves.h"

#define LANES 16  // fp32 numbers in a register
#define ROWS 4  // keys that are multiplied at a time

namespace unike {
namespace avx512 {
#include "products.inl"
}  // namespace avx512
}  // namespace unike

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace unike {
namespace avx512 {
void multiply(const Products&) {}
}  // namespace avx512
}  // namespace unike
#endif
