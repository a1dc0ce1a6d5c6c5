// Stands in for csrc/device.cuh (and CUDA's own headers) when a kernel is compiled as C++: the same names, run by emulator.cpp.
// See README.md for what it does differently from a device, on purpose.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ------------------------------------------------------------------------------------------------- what the runtime gives

namespace emulator {

struct Fiber;

struct Place {  // of the thread that runs
    dim3 thread, block;
    uint32_t lane;
    unsigned char* shared;
};
extern const Place* place;
extern dim3 block_size, grid_size;
extern uint32_t blocks_of_cluster;

[[noreturn]] void fail(const char* what);
void sync_block();
void sync_cluster();
void yield(bool always);  // another thread may run now
unsigned char* shared_of(uint32_t rank);
bool in_shared(const void* address, size_t bytes);

// The lanes of `mask` meet: each leaves `bytes` and gets what all left, 64 bytes apart by lane. Valid until the second meeting
// after this one. `what` must be the same for all.
const unsigned char* meet(uint32_t mask, const char* what, const void* left, size_t bytes);

void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int groups);

struct alignas(8) CopyBarrier {
    int32_t bytes;           // on their way, or (below zero) there before they were named
    uint16_t named, phase;   // whether this phase's bytes were named; its parity, and a mark that it was started
};
void start_barrier(CopyBarrier* barrier);
void expect_bytes(CopyBarrier* barrier, int bytes);
void bulk_copy(void* shared, const void* global, int bytes, CopyBarrier* barrier);
void wait_for_bytes(CopyBarrier* barrier, uint32_t parity);

cudaError_t run(const dim3& grid, const dim3& block, int cluster, int shared_bytes, const std::function<void()>& kernel);

template <typename T>
T from_lane(const unsigned char* met, uint32_t lane) {
    T x;
    std::memcpy(&x, met + 64 * lane, sizeof(T));
    return x;
}

}  // namespace emulator

#define threadIdx (emulator::place->thread)
#define blockIdx (emulator::place->block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

// ------------------------------------------------------------------------------------------------- CUDA C++

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

template <typename To, typename From>
inline To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline uint32_t __float_as_uint(float x) { return emulator_bits<uint32_t>(x); }
inline int32_t __float_as_int(float x) { return emulator_bits<int32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulator_bits<float>(x); }
inline float __int_as_float(int32_t x) { return emulator_bits<float>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::isfinite;
template <typename T>
inline T __ldg(const T* p) { return *p; }

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline float max(float a, float b) { return std::fmax(a, b); }

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(uint32_t mask = 0xffffffff) { emulator::meet(mask, "__syncwarp", nullptr, 0); }
inline void __threadfence() { emulator::yield(false); }

template <typename T>
inline T __shfl_sync(uint32_t mask, T x, int source, int width = 32) {
    const unsigned char* met = emulator::meet(mask, "__shfl_sync", &x, sizeof(T));
    const uint32_t lane = emulator::place->lane;
    return emulator::from_lane<T>(met, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T x, int lanes, int width = 32) {
    const unsigned char* met = emulator::meet(mask, "__shfl_xor_sync", &x, sizeof(T));
    const uint32_t lane = emulator::place->lane, other = lane ^ lanes;
    return emulator::from_lane<T>(met, other / width == lane / width ? other : lane);
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T x, unsigned by, int width = 32) {
    const unsigned char* met = emulator::meet(mask, "__shfl_down_sync", &x, sizeof(T));
    const uint32_t lane = emulator::place->lane;
    return emulator::from_lane<T>(met, lane % width + by < unsigned(width) ? lane + by : lane);
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T x, unsigned by, int width = 32) {
    const unsigned char* met = emulator::meet(mask, "__shfl_up_sync", &x, sizeof(T));
    const uint32_t lane = emulator::place->lane;
    return emulator::from_lane<T>(met, lane % width >= by ? lane - by : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, bool holds) {
    const unsigned char* met = emulator::meet(mask, "a vote", &holds, sizeof(holds));
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) votes |= uint32_t(emulator::from_lane<bool>(met, lane)) << lane;
    return votes;
}
inline bool __any_sync(uint32_t mask, bool holds) { return __ballot_sync(mask, holds) != 0; }
inline bool __all_sync(uint32_t mask, bool holds) { return __ballot_sync(mask, holds) == mask; }

template <typename T, typename Reduce>
inline T emulator_reduce(uint32_t mask, T x, Reduce reduce) {
    const unsigned char* met = emulator::meet(mask, "a reduction", &x, sizeof(T));
    bool first = true;
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
            const T other = emulator::from_lane<T>(met, lane);
            x = first ? other : reduce(x, other);
            first = false;
        }
    return x;
}
template <typename T>
inline T __reduce_add_sync(uint32_t mask, T x) { return emulator_reduce(mask, x, [](T a, T b) { return T(a + b); }); }
template <typename T>
inline T __reduce_max_sync(uint32_t mask, T x) { return emulator_reduce(mask, x, [](T a, T b) { return a > b ? a : b; }); }
template <typename T>
inline T __reduce_min_sync(uint32_t mask, T x) { return emulator_reduce(mask, x, [](T a, T b) { return a < b ? a : b; }); }
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t x) {
    return emulator_reduce(mask, x, [](uint32_t a, uint32_t b) { return a | b; });
}

template <typename T, typename Change>
inline T emulator_atomic(T* at, Change change) {
    emulator::yield(false);
    const T before = *at;
    *at = change(before);
    emulator::yield(false);
    return before;
}
template <typename T>
inline T atomicAdd(T* at, T x) { return emulator_atomic(at, [x](T old) { return T(old + x); }); }
template <typename T>
inline T atomicMax(T* at, T x) { return emulator_atomic(at, [x](T old) { return old > x ? old : x; }); }
template <typename T>
inline T atomicMin(T* at, T x) { return emulator_atomic(at, [x](T old) { return old < x ? old : x; }); }
template <typename T>
inline T atomicOr(T* at, T x) { return emulator_atomic(at, [x](T old) { return T(old | x); }); }
template <typename T>
inline T atomicExch(T* at, T x) { return emulator_atomic(at, [x](T) { return x; }); }
template <typename T>
inline T atomicCAS(T* at, T expected, T x) { return emulator_atomic(at, [=](T old) { return old == expected ? x : old; }); }

// ------------------------------------------------------------------------------------------------- csrc/device.cuh

namespace unike {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float widen(fp16 x) {
    static const auto table = [] {  // the conversion in software would take most of a test's time
        auto* values = new float[65536];
        for (uint32_t i = 0; i < 65536; ++i) values[i] = float(emulator_bits<_Float16>(uint16_t(i)));
        return values;
    }();
    return table[x.bits];
}

template <typename T>
inline float2 widen_pair(uint32_t pair) { return {widen(T{uint16_t(pair)}), widen(T{uint16_t(pair >> 16)})}; }
inline float4 widen_four(const float* x) { return *reinterpret_cast<const float4*>(x); }
template <typename T>
inline float4 widen_four(const T* x) { return {widen(x[0]), widen(x[1]), widen(x[2]), widen(x[3])}; }

template <typename T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline bf16 narrow<bf16>(float x) {
    if (std::isnan(x)) return {0x7fff};
    const uint32_t bits = __float_as_uint(x);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 narrow<fp16>(float x) { return {emulator_bits<uint16_t>(static_cast<_Float16>(x))}; }

inline unsigned char* shared_memory() { return emulator::place->shared; }

inline void cp_async16(void* shared, const void* global, int bytes = 16) { emulator::copy_async(shared, global, bytes); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int Groups>
inline void cp_async_wait() { emulator::wait_copies(Groups); }

using emulator::bulk_copy;
using emulator::CopyBarrier;
using emulator::expect_bytes;
using emulator::start_barrier;
using emulator::wait_for_bytes;

inline uint32_t count_arrival(uint32_t* counter) { return atomicAdd(counter, 1u); }
inline unsigned long long load_relaxed(const unsigned long long* global) {
    emulator::yield(false);
    return *global;
}
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

namespace emulated {

// As tensor cores do: the products and their sum are exact to far below fp32, the result is cut off, not rounded.
inline float cut(double x) {
    const float rounded = static_cast<float>(x);
    return std::fabs(double(rounded)) > std::fabs(x) && std::isfinite(rounded) ? std::nextafter(rounded, 0.0f) : rounded;
}

template <typename D>
struct Fragments {
    uint32_t a[4], b[2];
    D d[4];
};

// One lane's four elements of D: `product(x, y)` is that of the elements in two registers.
template <typename D, typename Sum, typename Product>
inline void mma(const char* what, D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Product product) {
    Fragments<D> mine;
    std::memcpy(mine.a, a, sizeof(a)), std::memcpy(mine.b, b, sizeof(b)), std::memcpy(mine.d, d, sizeof(d));
    const unsigned char* met = emulator::meet(0xffffffff, what, &mine, sizeof(mine));
    const uint32_t g = emulator::place->lane / 4, p = emulator::place->lane % 4;
    const auto at = [met](uint32_t lane) { return reinterpret_cast<const Fragments<D>*>(met + 64 * lane); };
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t column = 2 * p + i % 2;  // row g, or g + 8 from the second pair on
        Sum sum = d[i];
        for (uint32_t half = 0; half < 2; ++half)
            for (uint32_t pair = 0; pair < 4; ++pair)
                sum += product(at(4 * g + pair)->a[2 * half + i / 2], at(4 * column + pair)->b[half]);
        if constexpr (std::is_same_v<D, float>)
            d[i] = cut(sum);
        else
            d[i] = sum;
    }
}

}  // namespace emulated

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated::mma<float, double>("mma_m16n8k16", d, a, b, [](uint32_t x, uint32_t y) {
        const T x0{uint16_t(x)}, x1{uint16_t(x >> 16)}, y0{uint16_t(y)}, y1{uint16_t(y >> 16)};
        return double(widen(x0)) * widen(y0) + double(widen(x1)) * widen(y1);
    });
}

inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated::mma<int32_t, int32_t>("mma_m16n8k32", d, a, b, [](uint32_t x, uint32_t y) {
        int32_t sum = 0;
        for (int shift = 0; shift < 32; shift += 8) sum += int32_t(int8_t(x >> shift)) * int8_t(y >> shift);
        return sum;
    });
}

inline void ldmatrix(uint32_t (&out)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 || !emulator::in_shared(row, 16))
        emulator::fail("ldmatrix: a row is not 16 aligned bytes of shared memory");
    const unsigned char* met = emulator::meet(0xffffffff, "ldmatrix", &row, sizeof(row));
    const uint32_t g = emulator::place->lane / 4, p = emulator::place->lane % 4;
    for (uint32_t i = 0; i < 4; ++i)
        std::memcpy(&out[i], emulator::from_lane<const unsigned char*>(met, 8 * i + g) + 4 * p, 4);
    __syncwarp();  // no lane changes what another still reads
}

inline void cluster_sync() { emulator::sync_cluster(); }

template <typename T>
inline T* cluster_ptr(T* shared, uint32_t rank) {
    if (!emulator::in_shared(shared, sizeof(T))) emulator::fail("cluster_ptr: the address is not in the block's shared memory");
    if (rank >= emulator::blocks_of_cluster) emulator::fail("cluster_ptr: the cluster has no such rank");
    const size_t offset = reinterpret_cast<const unsigned char*>(shared) - emulator::place->shared;
    return reinterpret_cast<T*>(emulator::shared_of(rank) + offset);
}

struct Launch {
    dim3 grid, block;
    int cluster = 1;
    int shared_bytes = 0;
    cudaStream_t stream = nullptr;
    bool early = false;
};

template <typename... Parameters>
cudaError_t built_for_hopper(void (*)(Parameters...), bool& hopper) {
    hopper = true;
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
    const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    return emulator::run(how.grid, how.block, how.cluster, how.shared_bytes, [&] { std::apply(kernel, values); });
}

struct Device {
    int multiprocessors, shared_bytes, major;
};
cudaError_t current_device(Device& device);

}  // namespace unike
