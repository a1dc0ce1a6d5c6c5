#include "vectors.h"

#include "halves.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define UNIKE_X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
#endif

namespace unike {
namespace {

void portable_dots_int8(const int16_t* a, const int8_t* b, int64_t n, int64_t rows, int32_t* out) {
    for (int64_t row = 0; row < rows; ++row, b += n) {
        int32_t sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += int32_t(a[i]) * b[i];
        out[row] = sum;
    }
}

template <typename T>
float portable_dot(const float* a, const void* b, int64_t n) {
    const T* row = static_cast<const T*>(b);
    float lanes[32] = {};  // as many partial sums as below, so that the rounding error has the same bound
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int lane = 0; lane < 32; ++lane) lanes[lane] += a[i + lane] * at(row, i + lane);
    for (; i < n; ++i) lanes[i % 32] += a[i] * at(row, i);
    double sum = 0;
    for (float lane : lanes) sum += lane;
    return float(sum);
}

template <typename T>
void widen_row(const void* row, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = at(static_cast<const T*>(row), i);
}

#ifdef UNIKE_X86
constexpr int64_t kAhead = 6144;  // bytes of codes that are asked for before their turn

AVX2 int32_t avx2_dot_int8(const int16_t* a, const int8_t* b, int64_t n) {
    __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t i = 0; i < n; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(b + i + kAhead), _MM_HINT_T0);
        for (int part = 0; part < 4; ++part) {
            const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(b + i + 16 * part));
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i + 16 * part));
            sums[part] = _mm256_add_epi32(sums[part], _mm256_madd_epi16(words, _mm256_cvtepi8_epi16(bytes)));
        }
    }
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
    __m128i low = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    low = _mm_add_epi32(low, _mm_shuffle_epi32(low, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(low, _mm_shuffle_epi32(low, 0xb1)));
}

AVX2 void avx2_dots_int8(const int16_t* a, const int8_t* b, int64_t n, int64_t rows, int32_t* out) {
    for (int64_t row = 0; row < rows; ++row) out[row] = avx2_dot_int8(a, b + row * n, n);
}

VNNI inline __m512i words_of(const int8_t* b) {
    return _mm512_cvtepi8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(b)));
}

// One row after the other: four at a time share the query's loads, but are four streams, and slower from memory.
VNNI void vnni_dots_int8(const int16_t* a, const int8_t* b, int64_t n, int64_t rows, int32_t* out) {
    for (int64_t row = 0; row < rows; ++row, b += n) {
        __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
        for (int64_t i = 0; i < n; i += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(b + i + kAhead), _MM_HINT_T0);
            even = _mm512_dpwssd_epi32(even, _mm512_loadu_si512(a + i), words_of(b + i));
            odd = _mm512_dpwssd_epi32(odd, _mm512_loadu_si512(a + i + 32), words_of(b + i + 32));
        }
        out[row] = _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd));
    }
}

AVX2 inline __m256 load8(const float* row) { return _mm256_loadu_ps(row); }
AVX2 inline __m256 load8(const BFloat16* row) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
AVX2 inline __m256 load8(const Float16* row) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
}

template <typename T>
AVX2 float avx2_dot(const float* a, const void* b, int64_t n) {
    const T* row = static_cast<const T*>(b);
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int part = 0; part < 4; ++part)
            sums[part] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * part), load8(row + i + 8 * part), sums[part]);
    float lanes[32];
    for (int part = 0; part < 4; ++part) _mm256_storeu_ps(lanes + 8 * part, sums[part]);
    for (; i < n; ++i) lanes[i % 32] += a[i] * at(row, i);
    double sum = 0;
    for (float lane : lanes) sum += lane;
    return float(sum);
}
#endif

}  // namespace

bool has_avx2() {
#ifdef UNIKE_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool has_avx512() {
#ifdef UNIKE_X86
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

bool has_bf16() {
#ifdef UNIKE_X86
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool has_vnni() {
#ifdef UNIKE_X86
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

const Vectors& vectors(Level level) {
    static const Vectors plain = {portable_dots_int8,
                                  {portable_dot<float>, portable_dot<BFloat16>, portable_dot<Float16>},
                                  {widen_row<float>, widen_row<BFloat16>, widen_row<Float16>}};
#ifdef UNIKE_X86
    static const Vectors avx2 = {avx2_dots_int8, {avx2_dot<float>, avx2_dot<BFloat16>, avx2_dot<Float16>},
                                 {widen_row<float>, widen_row<BFloat16>, widen_row<Float16>}};
    static const Vectors vnni = {vnni_dots_int8, {avx2_dot<float>, avx2_dot<BFloat16>, avx2_dot<Float16>},
                                 {widen_row<float>, widen_row<BFloat16>, widen_row<Float16>}};
    static const bool usable = has_avx2(), best = has_vnni();
    if (best && level == Level::best) return vnni;
    if (usable && level != Level::portable) return avx2;
#else
    (void)level;
#endif
    return plain;
}

}  // namespace unike
