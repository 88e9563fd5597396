// What the kernels need from the device, each in one line of PTX or one intrinsic. tests/cuda_shim/ has the same functions
// for a CPU, where threads are fibers, and is included instead when AMQ_CUDA_SHIM is defined.

#pragma once

#include <cstdint>

#include "calls.h"

// A lane's registers at most. nvcc has __maxnreg__ from CUDA 12.4 on; an older one is told the largest block instead and
// takes what registers it likes, so that fewer blocks may fit a multiprocessor. The kernels compute the same.
#ifndef AMQ_HAS_MAXNREG
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1204
#define AMQ_HAS_MAXNREG 0
#else
#define AMQ_HAS_MAXNREG 1
#endif
#endif
#if AMQ_HAS_MAXNREG
#define AMQ_REGISTERS(registers, threads) __maxnreg__(registers)
#else
#define AMQ_REGISTERS(registers, threads) __launch_bounds__(threads)
#endif

#ifdef AMQ_CUDA_SHIM
#include "cuda_shim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace amq {

#define AMQ_DEVICE __device__ __forceinline__
#define AMQ_BOTH __host__ __device__ __forceinline__

// Shared memory of which a launch says how much of it there is, `bytes` at most.
#define AMQ_SHARED_OF_LAUNCH(name, bytes) extern __shared__ uint4 name[]

// 16 bytes that are read once: past L1, which is for the activations.
AMQ_DEVICE uint4 load_once(const uint4* address) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// load_once into v, or v as it was.
AMQ_DEVICE void load_once_if(bool wanted, const uint4* address, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
    asm("{ .reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(x), "+r"(y), "+r"(z), "+r"(w) : "l"(address), "r"(static_cast<int>(wanted)));
}

// The same flag, but what depends on it is decided where this stands: the compiler does not decide it once before a loop and
// then hold the answer in a register that the loop needs.
AMQ_DEVICE int asked_here(int flag) {
    asm volatile("" : "+r"(flag));
    return flag;
}

// What other lanes or warps read too.
template <class T>
AMQ_DEVICE T load_shared_by_many(const T* address) {
    return __ldg(address);
}

// c += A · B for 16 rows × 16 features × 8 columns; fragments as in the PTX manual, "mma.m16n8k16 .f16".
AMQ_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
AMQ_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// 16 rows × 32 features × 8 columns, unsigned codes times signed activations; "mma.m16n8k32 .u8 .s8".
AMQ_DEVICE void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int8_t) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// word & mask | bits: one instruction, which the compiler finds only where not both are constants.
AMQ_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(word), "r"(mask), "r"(bits));
    return v;
}

AMQ_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// The fp16 numbers in the low and high half of a word.
AMQ_DEVICE float2 unpack_halves(uint32_t pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

// The bits of a number, and back.
AMQ_DEVICE uint32_t word_of(float v) { return __float_as_uint(v); }
AMQ_DEVICE float float_of(uint32_t word) { return __uint_as_float(word); }
// The inverse of unpack_halves, each number rounded to the nearest.
AMQ_DEVICE uint32_t pack_halves(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
// The bytes of a word, each less 128, as fp16: bytes 0 and 1 in the first pair. Behind 0x64, the exponent of 1024, a byte is
// 1024 + itself.
AMQ_DEVICE void unpack_bytes(uint32_t word, uint32_t (&pairs)[2]) {
    const uint32_t above = 0x64806480;  // 1152 twice
    for (int i = 0; i < 2; ++i) {
        const uint32_t raised = __byte_perm(word, 0x64646464, i == 0 ? 0x4140 : 0x4342);
        const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&raised), *reinterpret_cast<const __half2*>(&above));
        pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
}

// The float32 of these bits.
AMQ_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

AMQ_DEVICE float to_float(float v) { return v; }
AMQ_DEVICE float to_float(__half v) { return __half2float(v); }
AMQ_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
AMQ_DEVICE void from_float(float v, float* out) { *out = v; }
AMQ_DEVICE void from_float(float v, __half* out) { *out = __float2half_rn(v); }
AMQ_DEVICE void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
AMQ_DEVICE float round_even(float v) { return rintf(v); }

AMQ_DEVICE void synchronize() { __syncthreads(); }

// Adds, and returns what was there before.
AMQ_DEVICE int32_t atomic_add(int32_t* address, int32_t value) { return atomicAdd(address, value); }

// What this thread wrote before is seen by whoever sees what it writes (or adds) after.
AMQ_DEVICE void memory_fence() { __threadfence(); }

// What other blocks of the same launch have written: past L1, which may hold what was there before.
AMQ_DEVICE float load_fresh(const float* address) { return __ldcg(address); }

AMQ_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// Bit i: what lane i says.
AMQ_DEVICE uint32_t ballot(bool says) { return __ballot_sync(0xffffffffu, says); }

AMQ_DEVICE int count_bits(uint32_t word) { return __popc(word); }

// The upper 64 bits of a product.
AMQ_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

// Asks memory for the 128 bytes around an address, so that a load of them finds them in L2.
AMQ_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int blocks, int threads, cudaStream_t stream, const Arguments& arguments,
                   int shared_bytes = 0) {
    kernel<<<blocks, threads, shared_bytes, stream>>>(arguments);
    return cudaGetLastError();
}

// Of the current device.
inline cudaError_t count_multiprocessors(int* count) {
    int device;
    const cudaError_t status = cudaGetDevice(&device);
    return status ? status : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace amq

#endif  // AMQ_CUDA_SHIM

namespace amq {

AMQ_DEVICE float warp_sum(float v) {
    for (int lanes = 16; lanes > 0; lanes /= 2) v += shuffle_xor(v, lanes);
    return v;
}

AMQ_DEVICE float warp_max(float v) {
    for (int lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, shuffle_xor(v, lanes));
    return v;
}

// Two 16-bit numbers of a Kind.
AMQ_DEVICE float2 unpack(uint32_t pair, int kind) {
    if (kind == kHalf) return unpack_halves(pair);
    const auto* two = reinterpret_cast<const __nv_bfloat16*>(&pair);
    return {to_float(two[0]), to_float(two[1])};
}

// An element of an array of some Kind.
AMQ_DEVICE float load_element(const void* from, int kind, int64_t index) {
    if (kind == kHalf) return to_float(static_cast<const __half*>(from)[index]);
    if (kind == kBfloat16) return to_float(static_cast<const __nv_bfloat16*>(from)[index]);
    return static_cast<const float*>(from)[index];
}

AMQ_DEVICE void store_element(void* to, int kind, int64_t index, float value) {
    if (kind == kHalf) return from_float(value, static_cast<__half*>(to) + index);
    if (kind == kBfloat16) return from_float(value, static_cast<__nv_bfloat16*>(to) + index);
    static_cast<float*>(to)[index] = value;
}

}  // namespace amq
