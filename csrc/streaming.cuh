// Rows on their way through shared memory.
#pragma once

#include <device.cuh>

namespace unike {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of a block that streams

template <typename T>
__device__ __forceinline__ T zero() { return narrow<T>(0.0f); }
template <>
__device__ __forceinline__ int8_t zero<int8_t>() { return 0; }

// Columns [column, column + Columns) of Rows rows from `first` on to shared memory, by the whole block: zeros for what is past
// column d, or past row `end`.
template <int Rows, int Columns, typename T>
__device__ __forceinline__ void fetch(T* shared, int pitch, const T* rows, int64_t stride, int first, int end, int column, int d,
                                      bool aligned) {
    constexpr int most = 16 / static_cast<int>(sizeof(T)), across = Columns / most;
    static_assert(Rows * across % kThreads == 0, "");
#pragma unroll
    for (int i = 0; i < Rows * across / kThreads; ++i) {
        const int piece = i * kThreads + static_cast<int>(threadIdx.x);
        const int row = first + piece / across, at = column + piece % across * most;
        const int count = row < end ? max(0, min(most, d - at)) : 0;
        const T* from = rows + (count > 0 ? row * stride + at : 0);
        T* to = shared + piece / across * pitch + piece % across * most;
        if (aligned) {
            cp_async16(to, from, count * static_cast<int>(sizeof(T)));
        } else {
            for (int x = 0; x < most; ++x) to[x] = x < count ? from[x] : zero<T>();
        }
    }
}

// The same by one warp, from sm_90 on: Columns columns of `count` rows that lie `stride` elements apart, 16-byte aligned.
template <int Columns, typename T>
__device__ __forceinline__ void bring(T* shared, int pitch, const T* rows, int64_t stride, int count, CopyBarrier* there) {
    constexpr int bytes = Columns * static_cast<int>(sizeof(T));
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) expect_bytes(there, count * bytes);
    __syncwarp();
    for (int row = lane; row < count; row += 32) bulk_copy(shared + row * pitch, rows + row * stride, bytes, there);
}

}  // namespace unike
