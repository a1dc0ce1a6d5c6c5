// Products of bfloat16 queries and keys by the units that AVX-512 BF16 has for them: has_bf16() is asked before.
#include <cstring>

#include "scan.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define UNROLLED _Pragma("GCC unroll 8")  // keeps a loop's sums in registers
#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace unike {
namespace avx512bf16 {
namespace {

BF16 inline __m512bh load(const uint16_t* p, __mmask32 there) {
    const __m512i bits = _mm512_maskz_loadu_epi16(there, p);
    return (__m512bh)bits;
}

template <int ROWS, int QUERIES, bool FIRST>
BF16 inline void block(const Products& c, const void* const* queries, const uint16_t* rows, float* out) {
    __m512 sums[ROWS][QUERIES];
    UNROLLED for (int r = 0; r < ROWS; ++r) UNROLLED for (int j = 0; j < QUERIES; ++j) sums[r][j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < c.d; i += 32) {
        const __mmask32 there = c.d - i >= 32 ? 0xffffffffu : (1u << (c.d - i)) - 1;
        __m512bh key[ROWS];
        UNROLLED for (int r = 0; r < ROWS; ++r) {
            if (FIRST) __builtin_prefetch(rows + (r + ROWS) * c.stride + i);  // of the rows that come next
            key[r] = load(rows + r * c.stride + i, there);
        }
        UNROLLED for (int j = 0; j < QUERIES; ++j) {
            const __m512bh x = load(static_cast<const uint16_t*>(queries[j]) + i, there);
            UNROLLED for (int r = 0; r < ROWS; ++r) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], key[r], x);
        }
    }
    UNROLLED for (int r = 0; r < ROWS; ++r)
        UNROLLED for (int j = 0; j < QUERIES; ++j) out[j * c.width + r] = _mm512_reduce_add_ps(sums[r][j]);
}

// All queries meet a few rows before the next come.
template <int ROWS>
BF16 void some_rows(const Products& c, const uint16_t* rows, float* out) {
    int64_t j = c.count_queries < 4 ? 0 : 4;
    if (j == 4) block<ROWS, 4, true>(c, c.queries, rows, out);
    for (; j + 4 <= c.count_queries; j += 4) block<ROWS, 4, false>(c, c.queries + j, rows, out + j * c.width);
    for (; j < c.count_queries; ++j) block<ROWS, 1, true>(c, c.queries + j, rows, out + j * c.width);
}

}  // namespace

BF16 void multiply(const Products& c) {
    const uint16_t* rows = static_cast<const uint16_t*>(c.rows);
    int64_t row = 0;
    for (; row + 4 <= c.count; row += 4) some_rows<4>(c, rows + row * c.stride, c.out + row);
    for (; row < c.count; ++row) some_rows<1>(c, rows + row * c.stride, c.out + row);
}

}  // namespace avx512bf16
}  // namespace unike
#else
namespace unike {
namespace avx512bf16 {
void multiply(const Products&) {}
}  // namespace avx512bf16
}  // namespace unike
#endif
