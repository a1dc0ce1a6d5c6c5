// The operators of operators.inl once more, for AVX2, FMA and F16C: has_avx2() is asked before anything here runs.
#include <cmath>
#include <cstring>

#include "operators.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define UNIKE_F16C 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#else
#define UNIKE_F16C 0
#endif

#include "halves.h"

namespace unike {
namespace avx2 {
#include "operators.inl"
}  // namespace avx2
}  // namespace unike

#if UNIKE_F16C && defined(__clang__)
#pragma clang attribute pop
#endif
