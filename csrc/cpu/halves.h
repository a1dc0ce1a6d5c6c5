// The half-precision formats as the CPU kernels read and write them: through fp32, rounded to nearest even.
// Internal linkage throughout: files of different instruction sets include this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace unike {
namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
    return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline float at(const float* row, int64_t i) { return row[i]; }
inline float at(const BFloat16* row, int64_t i) { return from_bits(uint32_t(row[i].bits) << 16); }
inline float at(const Float16* row, int64_t i) { return from_half(row[i].bits); }

inline void put(float* row, int64_t i, float value) { row[i] = value; }

inline void put(BFloat16* row, int64_t i, float value) {
    const uint32_t bits = to_bits(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    row[i].bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline void put(Float16* row, int64_t i, float value) {
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
        half = 0x7c00;
    } else if (magnitude < 0x38800000u) {  // below the smallest normal number: the sum lines up the bits, and rounds
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    }
    row[i].bits = uint16_t(half | (bits >> 16 & 0x8000));
}

}  // namespace
}  // namespace unike
