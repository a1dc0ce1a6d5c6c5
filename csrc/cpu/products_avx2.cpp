// The products of products.inl for AVX2: can_scan() is asked before anything here runs.
#include <cstring>

#include "scan.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of this file alone
#endif

#include "halves.h"

#define LANES 8  // fp32 numbers in a register
#define ROWS 2  // keys that are multiplied at a time

namespace unike {
namespace avx2 {
#include "products.inl"
}  // namespace avx2
}  // namespace unike

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace unike {
namespace avx2 {
void multiply(const Products&) {}
}  // namespace avx2
}  // namespace unike
#endif
