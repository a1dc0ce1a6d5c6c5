// Small kernels, right and wrong ones, that show what the emulator does: see tests/test_emulator.py.
#include <device.cuh>

namespace unike {
namespace {

// out [16, 8] = a [16, k] b[8, k]^T through shared memory, cp.async, ldmatrix and mma. One warp, k a multiple of 32.
template <typename T>
__global__ void product(const T* a, const T* b, float* out, int k, bool forget_to_wait) {
    T* rows = reinterpret_cast<T*>(shared_memory());  // [24, k + 8]
    const int lane = static_cast<int>(threadIdx.x), pitch = k + 8;
    for (int i = lane; i < 24 * k / 8; i += 32) {
        const int row = i / (k / 8), column = i % (k / 8) * 8;
        cp_async16(rows + row * pitch + column, row < 16 ? a + row * k + column : b + (row - 16) * k + column);
    }
    cp_async_commit();
    if (!forget_to_wait) cp_async_wait<0>();
    __syncwarp();
    float d[4] = {};
    for (int at = 0; at < k; at += 32) {
        uint32_t left[2][4], right[4];
        for (int half = 0; half < 2; ++half)
            ldmatrix(left[half], rows + (lane % 16) * pitch + at + 16 * half + lane / 16 * 8);
        ldmatrix(right, rows + (16 + lane % 8) * pitch + at + lane / 8 * 8);
        for (int half = 0; half < 2; ++half) {
            const uint32_t b_half[2] = {right[2 * half], right[2 * half + 1]};
            mma_m16n8k16<T>(d, left[half], b_half);
        }
    }
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// out [16, 8] = a [16, 32] b[8, 32]^T in int8. One warp.
__global__ void product_int8(const uint32_t* a, const uint32_t* b, int32_t* out) {
    const int lane = static_cast<int>(threadIdx.x), g = lane / 4, p = lane % 4;
    const uint32_t left[4] = {a[g * 8 + p], a[(g + 8) * 8 + p], a[g * 8 + p + 4], a[(g + 8) * 8 + p + 4]};
    const uint32_t right[2] = {b[g * 8 + p], b[g * 8 + p + 4]};
    int32_t d[4] = {};
    mma_m16n8k32(d, left, right);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + p * 2 + i % 2] = d[i];
}

// out [stages * rounds, 32] = in, brought by the copy engine, 128 bytes at a time, two stages taking turns. One warp.
// forget: 1, to wait for the bytes; 2, that all have read a stage before it is filled again; 3, the parity of later rounds.
__global__ void brought(const float* in, float* out, int rounds, int forget) {
    float* stages = reinterpret_cast<float*>(shared_memory());  // [2, 32]
    CopyBarrier* there = reinterpret_cast<CopyBarrier*>(stages + 64);
    const int lane = static_cast<int>(threadIdx.x);
    if (lane < 2) start_barrier(there + lane);
    __syncthreads();
    const auto ask = [&](int i) {
        if (lane != 0 || i >= 2 * rounds) return;
        expect_bytes(there + i % 2, 128);
        bulk_copy(stages + i % 2 * 32, in + i * 32, 128, there + i % 2);
    };
    ask(0), ask(1);
    for (int i = 0; i < 2 * rounds; ++i) {
        if (forget != 1) wait_for_bytes(there + i % 2, forget == 3 ? 0 : i / 2 % 2);
        out[i * 32 + lane] = stages[i % 2 * 32 + lane];
        if (forget != 2) __syncthreads();
        ask(i + 2);
    }
}

// out[0] = sum of in [blocks * threads]: the last block adds what the others left. total: zero before, zero after.
__global__ void sum(const int* in, int* parts, uint32_t* arrived, int* out, bool forget_barrier) {
    int* of_warp = reinterpret_cast<int*>(shared_memory());
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int x = __reduce_add_sync(0xffffffff, in[blockIdx.x * threads + thread]);
    if (thread % 32 == 0) of_warp[thread / 32] = x;
    if (!forget_barrier) __syncthreads();
    if (thread != 0) return;
    int all = 0;
    for (int i = 0; i < threads / 32; ++i) all += of_warp[i];
    parts[blockIdx.x] = all;
    if (count_arrival(arrived) != gridDim.x - 1) return;
    int total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
    *out = total;
    *arrived = 0;
}

// out[0] = sum of in [blocks * 32]: every lane leaves its own element in `parts`, and lane 0 tells that the block has come.
__global__ void sum_of_lanes(const int* in, int* parts, uint32_t* arrived, int* out, bool forget_barrier) {
    const int at = static_cast<int>(blockIdx.x) * 32 + static_cast<int>(threadIdx.x);
    parts[at] = in[at];
    if (!forget_barrier) __syncthreads();
    if (threadIdx.x != 0 || count_arrival(arrived) != gridDim.x - 1) return;
    int total = 0;
    for (unsigned i = 0; i < 32 * gridDim.x; ++i) total += parts[i];
    *out = total;
    *arrived = 0;
}

// out [blocks, size]: each rank of a cluster of `size` reads what every rank wrote to its own shared memory.
__global__ void exchange(int* out, int size, bool forget_barrier) {
    int* mine = reinterpret_cast<int*>(shared_memory());
    const int block = static_cast<int>(blockIdx.x);
    *mine = 10 * (block % size) + block;
    if (!forget_barrier) cluster_sync();
    for (int rank = 0; rank < size; ++rank) out[block * size + rank] = *cluster_ptr(mine, rank);
    cluster_sync();
}

__global__ void wrong(int which) {
    unsigned char* shared = shared_memory();
    if (which == 0) shared[64] = 1;
    if (which == 1 && threadIdx.x < 40) __syncthreads();
    if (which == 2 && threadIdx.x < 16) __syncwarp();
    if (which == 3) cp_async16(shared + 4, shared);
    CopyBarrier* there = reinterpret_cast<CopyBarrier*>(shared);
    if (which > 4 && threadIdx.x == 0) {
        if (which != 5) start_barrier(there);
        if (which < 8) expect_bytes(there, 16);
        if (which == 7) bulk_copy(shared + 8, shared + 32, 16, there);
        if (which == 6) wait_for_bytes(there, 0);
    }
    if (which == 4) {
        if (threadIdx.x < 16)
            __shfl_sync(0xffffffff, 1, 0);
        else
            __ballot_sync(0xffffffff, true);
    }
}

cudaError_t start(void (*kernel)(int), int which) {
    Launch how;
    how.block = 64, how.shared_bytes = 64;
    return launch(kernel, how, which);
}

}  // namespace
}  // namespace unike

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace unike;

EXPORT const char* last_error() { return cudaGetErrorString(cudaErrorLaunchFailure); }

EXPORT int run_product(const void* a, const void* b, float* out, int k, int half, int forget) {
    Launch how;
    how.block = 32, how.shared_bytes = 24 * (k + 8) * 2;
    if (half == 16)
        return launch(product<fp16>, how, static_cast<const fp16*>(a), static_cast<const fp16*>(b), out, k, forget);
    return launch(product<bf16>, how, static_cast<const bf16*>(a), static_cast<const bf16*>(b), out, k, forget);
}
EXPORT int run_product_int8(const uint32_t* a, const uint32_t* b, int32_t* out) {
    Launch how;
    how.block = 32;
    return launch(product_int8, how, a, b, out);
}
EXPORT int run_brought(const float* in, float* out, int rounds, int forget) {
    Launch how;
    how.block = 32, how.shared_bytes = 64 * 4 + 16;
    return launch(brought, how, in, out, rounds, forget);
}
EXPORT int run_sum(const int* in, int* parts, uint32_t* arrived, int* out, int blocks, int threads, int forget) {
    Launch how;
    how.grid = blocks, how.block = threads, how.shared_bytes = threads / 32 * 4;
    return launch(sum, how, in, parts, arrived, out, forget);
}
EXPORT int run_sum_of_lanes(const int* in, int* parts, uint32_t* arrived, int* out, int blocks, int forget) {
    Launch how;
    how.grid = blocks, how.block = 32;
    return launch(sum_of_lanes, how, in, parts, arrived, out, forget);
}
EXPORT int run_exchange(int* out, int blocks, int cluster, int forget) {
    Launch how;
    how.grid = blocks, how.cluster = cluster, how.shared_bytes = 4;
    return launch(exchange, how, out, cluster, forget);
}
EXPORT int run_wrong(int which) { return start(wrong, which); }
