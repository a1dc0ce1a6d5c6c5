// The device primitives of the kernels: everything that is inline assembly, an intrinsic of one architecture, or a launch.
// Kernel files use these and plain CUDA C++ and nothing else, so that tests/emulator can stand in for the device: they
// include <device.cuh> in angle brackets, declare no __shared__ variable (see shared_memory) and write no <<<>>>.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace unike {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(fp16 x) { return __half2float(x); }

// The two elements of a register of 16-bit ones, the lower first.
template <typename T>
__device__ __forceinline__ float2 widen_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 widen_pair<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}
template <>
__device__ __forceinline__ float2 widen_pair<fp16>(uint32_t pair) {
    return make_float2(__half2float(__ushort_as_half(pair & 0xffff)), __half2float(__ushort_as_half(pair >> 16)));
}

// Four elements that follow each other, aligned to all of them.
__device__ __forceinline__ float4 widen_four(const float* x) { return *reinterpret_cast<const float4*>(x); }
template <typename T>
__device__ __forceinline__ float4 widen_four(const T* x) {
    const uint2 four = *reinterpret_cast<const uint2*>(x);
    const float2 low = widen_pair<T>(four.x), high = widen_pair<T>(four.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

// To the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) { return __float2half_rn(x); }

// ------------------------------------------------------------------------------------------------- shared memory

// The block's shared memory, all of it: as many bytes as `launch` was given, 128-byte aligned, not initialised.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char unike_shared_memory[];
    return unike_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of the first `bytes` (0 to 16) from global memory; the rest of the 16 bytes in shared memory become zeros. Both
// 16-byte aligned. It is there after cp_async_wait in the same thread, and after a barrier behind that in the others.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

// Ends a group of copies. A group may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Groups` of this thread's newest groups are still under way.
template <int Groups>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// From sm_90 on, the copy engine brings whole rows: one thread asks, and a barrier in shared memory counts the bytes. Code for less
// does nothing here: `built_for_hopper` tells the host.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define UNIKE_HOPPER 1
#endif

// In shared memory. One thread starts it, and then all meet at a barrier; it opens, phase after phase, when one thread has named the
// bytes of the phase and all of them are there.
struct alignas(8) CopyBarrier {
    unsigned long long state;
};

__device__ __forceinline__ void start_barrier(CopyBarrier* barrier) {
#ifdef UNIKE_HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::"r"(
                     shared_address(barrier))
                 : "memory");
#endif
}

// Names the bytes of the phase that begins: by one thread, before any of its copies.
__device__ __forceinline__ void expect_bytes(CopyBarrier* barrier, int bytes) {
#ifdef UNIKE_HOPPER
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

// Starts a copy of `bytes` from global memory; both addresses 16-byte aligned, bytes a multiple of 16.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes, CopyBarrier* barrier) {
#ifdef UNIKE_HOPPER
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
#endif
}

// Waits until the phase of this parity (0 for the first, then 1, 0, ...) is over: its bytes are there for this thread.
__device__ __forceinline__ void wait_for_bytes(CopyBarrier* barrier, uint32_t parity) {
#ifdef UNIKE_HOPPER
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------- global memory

// A counter in global memory: adds and tells what was there before. All that this thread wrote, or saw written by others of its
// block before a barrier, is seen by whoever then reads the sum by such an addition. The usual end of a kernel:
//   __syncthreads(); if (threadIdx.x == 0) last = count_arrival(counter) == blocks - 1; __syncthreads();
__device__ __forceinline__ uint32_t count_arrival(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// What others may be writing at the same time: some value that was there, past the first-level cache.
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* global) {
    unsigned long long x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(global) : "memory");
    return x;
}

// Waits until the kernel before it in the stream has ended and its writes are seen; needed only after launch(..., early = true).
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Says that the kernel behind it, if launched early, may be brought onto the device from now on.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------------- matrix products

// Fragments are as in the PTX ISA. With g = lane / 4, p = lane % 4, two 16-bit elements (four of 8 bits) in a register:
//   A [16, 16]: a0 = A[g][2p..], a1 = A[g + 8][2p..], a2 = A[g][2p + 8..], a3 = A[g + 8][2p + 8..]
//   B [16, 8]:  b0 = B[2p..][g], b1 = B[2p + 8..][g]
//   D [16, 8]:  d0, d1 = D[g][2p], D[g][2p + 1]; d2, d3 = D[g + 8][2p], D[g + 8][2p + 1]
// and with 8-bit elements the same with 4p for 2p and 16 for 8 in the long dimension of A [16, 32] and B [32, 8].

// d += A B, T = bf16 or fp16.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += A B of int8, sums in int32.
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address (16-byte aligned, shared) of row l % 8 of matrix l / 8, and
// gets elements 2p, 2p + 1 of row g of matrix i in out[i]. The A fragment above is the matrices (rows 0-7, 8-15) of columns
// 0-7, then of columns 8-15; two B fragments of row-major queries are rows 0-7, columns 0-7, 8-15, 16-23, 24-31.
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ------------------------------------------------------------------------------------------------- clusters

// Thread-block clusters are there from sm_90 on. Elsewhere a cluster is one block, and nothing larger can be launched.

// Barrier of all threads of the cluster's blocks; what they wrote before it, to shared memory too, is seen after it. A block must
// not end while others still read its shared memory: one more before the end.
__device__ __forceinline__ void cluster_sync() {
#ifdef UNIKE_HOPPER
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Where the same variable stands in the shared memory of the cluster's block `rank`; for loads, stores and atomics.
template <typename T>
__device__ __forceinline__ T* cluster_ptr(T* shared, uint32_t rank) {
#ifdef UNIKE_HOPPER
    uint64_t x;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(x) : "l"(shared), "r"(rank));
    return reinterpret_cast<T*>(x);
#else
    return shared;
#endif
}

// ------------------------------------------------------------------------------------------------- launches (host)

struct Launch {
    dim3 grid, block;
    int cluster = 1;          // blocks along x that share a cluster; grid.x is a multiple of it
    int shared_bytes = 0;     // beyond 48 KB too, as far as the device goes
    cudaStream_t stream = nullptr;
    bool early = false;       // may start while the kernel before it ends: it calls wait_for_previous_kernel
};

// Whether the code of a kernel that the current device runs was made for sm_90 or more.
template <typename... Parameters>
cudaError_t built_for_hopper(void (*kernel)(Parameters...), bool& hopper) {
    cudaFuncAttributes code = {};
    const cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    hopper = error == cudaSuccess && code.ptxVersion >= 90;
    return error;
}

// Starts a kernel. Nothing waits; the error is that of the launch itself. Code for less than sm_90, which newer devices may run
// from PTX, has neither clusters (refused) nor early starts (not early then).
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
    if (how.shared_bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
        if (error != cudaSuccess) return error;
    }
    bool hopper = false;
    if (how.cluster > 1 || how.early) {
        const cudaError_t error = built_for_hopper(kernel, hopper);
        if (error != cudaSuccess) return error;
    }
    if (how.cluster > 1 && !hopper) return cudaErrorNotSupported;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid, config.blockDim = how.block;
    config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes), config.stream = how.stream;
    config.attrs = attributes;
    if (how.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
    }
    if (how.early && hopper) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// What the current device can do.
struct Device {
    int multiprocessors;  // SMs
    int shared_bytes;     // that a block may have
    int major;            // compute capability; clusters and early launches from 9 on
};

inline cudaError_t current_device(Device& device) {
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    const auto read = [&](int& value, cudaDeviceAttr attribute) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
    };
    read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
    read(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    read(device.major, cudaDevAttrComputeCapabilityMajor);
    return error;
}

}  // namespace unike
