// What kernels/cuda/ needs of CUDA, on a CPU: the functions of device.cuh and the names that its kernels use.
//
// A launch runs on the calling thread and is done when it returns. Errors that a GPU would pass over in silence, or
// hang on, end the process with a message: misaligned loads here, divergence in block.h; the rest is the sanitizers'.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define AMQ_DEVICE inline
#define AMQ_BOTH inline
#define AMQ_SHARED_OF_LAUNCH(name, bytes) __shared__ uint4 name[(bytes) / sizeof(uint4)]
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoKernelImageForDevice = 209,
};

namespace cuda_shim {

inline uint32_t word_of(float v) {
    uint32_t word;
    std::memcpy(&word, &v, sizeof word);
    return word;
}
inline float float_of(uint32_t word) {
    float v;
    std::memcpy(&v, &word, sizeof v);
    return v;
}

// All bytes are checked, also those that the compiler drops because the kernel does not use them.
template <class T>
T load(const T* address, const char* function) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0)
        fail("misaligned %s of %zu bytes at %p, block %u, thread %u", function, sizeof(T),
             static_cast<const void*>(address), blockIdx.x, threadIdx.x);
#ifdef __SANITIZE_ADDRESS__
    void* bytes = const_cast<void*>(static_cast<const void*>(address));
    if (auto bad = static_cast<volatile const char*>(__asan_region_is_poisoned(bytes, sizeof(T)))) (void)*bad;
#endif
    return *address;
}

}  // namespace cuda_shim

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// CUDA 13.0; the driver is AMQ_SHIM_DRIVER (13000), and the kernels have code for the device unless AMQ_SHIM_NO_IMAGE is set.
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    const char* value = std::getenv("AMQ_SHIM_DRIVER");
    *version = value ? std::atoi(value) : 13000;
    return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return std::getenv("AMQ_SHIM_NO_IMAGE") ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorInsufficientDriver) return "CUDA driver version is insufficient for CUDA runtime version";
    if (error == cudaErrorNoKernelImageForDevice) return "no kernel image is available for execution on the device";
    if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
    return error == cudaSuccess ? "no error" : "invalid argument";
}

// CUDA's are in the global namespace.
using std::max;
using std::min;

namespace amq {

AMQ_DEVICE float to_float(float v) { return v; }
AMQ_DEVICE float to_float(__nv_bfloat16 v) { return cuda_shim::float_of(uint32_t{v.bits} << 16); }
AMQ_DEVICE float to_float(__half v) {
    const uint32_t sign = (v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(fraction);
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return cuda_shim::float_of(sign | wide << 23 | fraction << 13);
}

// To the nearest, ties to even; not a number becomes 0x7fff as in CUDA.
AMQ_DEVICE void from_float(float v, __nv_bfloat16* out) {
    const uint32_t word = cuda_shim::word_of(v);
    out->bits = static_cast<uint16_t>(std::isnan(v) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16);
}
AMQ_DEVICE void from_float(float v, __half* out) {
    const uint32_t word = cuda_shim::word_of(v), sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
    uint32_t half;
    if (size >= 0x47800000)  // 2^16
        half = size > 0x7f800000 ? 0x7fff : 0x7c00;
    else if (size < 0x38800000)  // 2^-14: next to 0.5 a float's last bit is a half's smallest number
        half = cuda_shim::word_of(cuda_shim::float_of(size) + 0.5f) - cuda_shim::word_of(0.5f);
    else
        half = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    out->bits = static_cast<uint16_t>(size > 0x7f800000 ? half : sign | half);
}
AMQ_DEVICE void from_float(float v, float* out) { *out = v; }
AMQ_DEVICE float round_even(float v) { return std::nearbyint(v); }

AMQ_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

AMQ_DEVICE float as_float(uint32_t bits) { return cuda_shim::float_of(bits); }

AMQ_DEVICE float2 unpack_halves(uint32_t pair) {
    return {to_float(__half{static_cast<uint16_t>(pair)}), to_float(__half{static_cast<uint16_t>(pair >> 16)})};
}

using cuda_shim::float_of;
using cuda_shim::word_of;

AMQ_DEVICE uint32_t pack_halves(float low, float high) {
    __half pair[2];
    from_float(low, &pair[0]);
    from_float(high, &pair[1]);
    return pair[0].bits | uint32_t{pair[1].bits} << 16;
}

AMQ_DEVICE void unpack_bytes(uint32_t word, uint32_t (&pairs)[2]) {
    for (int i = 0; i < 2; ++i, word >>= 16)
        pairs[i] = pack_halves(static_cast<float>(word & 255) - 128, static_cast<float>(word >> 8 & 255) - 128);
}

AMQ_DEVICE uint4 load_once(const uint4* address) {
    return cuda_shim::load(address, "load_once");
}
AMQ_DEVICE void load_once_if(bool wanted, const uint4* address, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w) {
    if (!wanted) return;
    const uint4 v = cuda_shim::load(address, "load_once_if");
    x = v.x, y = v.y, z = v.z, w = v.w;
}
AMQ_DEVICE void prefetch(const void*) {}
AMQ_DEVICE int asked_here(int flag) { return flag; }
template <class T>
AMQ_DEVICE T load_shared_by_many(const T* address) {
    return cuda_shim::load(address, "load_shared_by_many");
}

}  // namespace amq

namespace cuda_shim {

// One thread's part of an mma.
template <class Sum>
struct Fragments {
    Sum* c;
    const uint32_t* a;
    uint32_t b[2];
};

inline float widen(__half v) { return amq::to_float(v); }
inline float widen(__nv_bfloat16 v) { return amq::to_float(v); }
inline int32_t widen(uint8_t v) { return v; }
inline int32_t widen(int8_t v) { return v; }

inline void add(float& c, float dot) { c += dot; }
// Wraps around as the hardware does.
inline void add(int32_t& c, int32_t dot) {
    c = static_cast<int32_t>(static_cast<uint32_t>(c) + static_cast<uint32_t>(dot));
}

template <class T>
auto element(uint32_t word, int i) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&word) + i * sizeof(T), sizeof(T));
    return widen(value);
}

// 16 rows times 8 columns, `features` deep, by all of a warp. Lane 4 g + t has rows g and g + 8 of A, column g of B,
// and of both the features t · pack … and half the depth further; of C rows g and g + 8, columns 2 t and 2 t + 1.
// Unchecked, as it touches only what is declared here and is most of the time that a kernel takes.
template <class A, class B, class Sum>
__attribute__((no_sanitize("address", "undefined", "thread"))) void multiply(Fragments<Sum>* const (&lanes)[kWarp]) {
    constexpr int pack = 4 / sizeof(A), features = 8 * pack;
    Sum a[16][features], b[features][8];
    for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < pack; ++i) {
            const int g = lane / 4, k = lane % 4 * pack + i;
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][k + r / 2 * features / 2] = element<A>(lanes[lane]->a[r], i);
            for (int r = 0; r < 2; ++r) b[k + r * features / 2][g] = element<B>(lanes[lane]->b[r], i);
        }
    Sum dots[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < features; ++k)
            for (int column = 0; column < 8; ++column) dots[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < 4; ++i) add(lanes[lane]->c[i], dots[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

template <class T>
struct Shuffled {
    T value, result;
    int lanes;
};

template <class T>
void shuffle(Shuffled<T>* const (&lanes)[kWarp]) {
    for (int lane = 0; lane < kWarp; ++lane) {
        if (lanes[lane]->lanes != lanes[0]->lanes || lanes[lane]->lanes < 0 || lanes[lane]->lanes >= kWarp)
            fail("shuffle_xor: lane %d asks for %d, lane 0 for %d", lane, lanes[lane]->lanes, lanes[0]->lanes);
        lanes[lane]->result = lanes[lane ^ lanes[lane]->lanes]->value;
    }
}

struct Vote {
    bool says;
    uint32_t result;
};

inline void count_votes(Vote* const (&lanes)[kWarp]) {
    uint32_t word = 0;
    for (int lane = 0; lane < kWarp; ++lane) word |= static_cast<uint32_t>(lanes[lane]->says) << lane;
    for (Vote* lane : lanes) lane->result = word;
}

}  // namespace cuda_shim

namespace amq {

// The line of a call is its identity: GCC copies code as it likes, so the address of a call is not.
#define CUDA_SHIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

AMQ_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half, CUDA_SHIM_HERE) {
    cuda_shim::Fragments<float> mine{c, a, {b0, b1}};
    cuda_shim::block.with_warp({"mma f16", file, line}, mine, &cuda_shim::multiply<__half, __half, float>);
}
AMQ_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16, CUDA_SHIM_HERE) {
    using T = __nv_bfloat16;
    cuda_shim::Fragments<float> mine{c, a, {b0, b1}};
    cuda_shim::block.with_warp({"mma bf16", file, line}, mine, &cuda_shim::multiply<T, T, float>);
}
AMQ_DEVICE void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int8_t, CUDA_SHIM_HERE) {
    cuda_shim::Fragments<int32_t> mine{c, a, {b0, b1}};
    cuda_shim::block.with_warp({"mma u8 s8", file, line}, mine, &cuda_shim::multiply<uint8_t, int8_t, int32_t>);
}

AMQ_DEVICE float shuffle_xor(float value, int lanes, CUDA_SHIM_HERE) {
    cuda_shim::Shuffled<float> mine{value, 0, lanes};
    cuda_shim::block.with_warp({"shuffle_xor", file, line}, mine, &cuda_shim::shuffle<float>);
    return mine.result;
}
AMQ_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes, CUDA_SHIM_HERE) {
    cuda_shim::Shuffled<uint32_t> mine{value, 0, lanes};
    cuda_shim::block.with_warp({"shuffle_xor", file, line}, mine, &cuda_shim::shuffle<uint32_t>);
    return mine.result;
}
AMQ_DEVICE uint32_t ballot(bool says, CUDA_SHIM_HERE) {
    cuda_shim::Vote mine{says, 0};
    cuda_shim::block.with_warp({"ballot", file, line}, mine, &cuda_shim::count_votes);
    return mine.result;
}
AMQ_DEVICE int count_bits(uint32_t word) { return __builtin_popcount(word); }
AMQ_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

AMQ_DEVICE int32_t atomic_add(int32_t* address, int32_t value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
AMQ_DEVICE void memory_fence() {}
AMQ_DEVICE float load_fresh(const float* address) { return cuda_shim::load(address, "load_fresh"); }

AMQ_DEVICE void synchronize(CUDA_SHIM_HERE) { cuda_shim::block.synchronize(file, line); }

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int blocks, int threads, cudaStream_t, const Arguments& arguments,
                   int shared_bytes = 0) {
    static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) <= 4096, "as for a kernel on a GPU");
    const bool shared_fits = shared_bytes >= 0 && shared_bytes <= 48 << 10;
    if (blocks < 1 || threads < 1 || threads > 1024 || !shared_fits) return cudaErrorInvalidConfiguration;
    struct Call {
        void (*kernel)(Arguments);
        const Arguments& arguments;
    } const call{kernel, arguments};
    const auto run = [](const void* erased) {
        const Call& call = *static_cast<const Call*>(erased);
        call.kernel(call.arguments);
    };
    cuda_shim::block.run_grid(blocks, threads, run, &call);
    return cudaSuccess;
}

// AMQ_SHIM_MULTIPROCESSORS, or so few that small tests share them out.
inline cudaError_t count_multiprocessors(int* count) {
    const char* value = std::getenv("AMQ_SHIM_MULTIPROCESSORS");
    *count = value ? std::atoi(value) : 2;
    return cudaSuccess;
}

}  // namespace amq
