// The C ABI of the kernels: addresses, sizes and a stream in, a status out. No torch, no CUDA call before amq_cuda_check or a
// launch, so the library loads on a machine without a driver.
//
// Status: 0, or a cudaError_t, or one of Status in calls.h. amq/kernels/cuda.py turns it into an error that names the linear.

#include <algorithm>
#include <type_traits>

#include "calls.h"
#include "gemv.cuh"
#include "quantize.cuh"

namespace amq {

// `call` with the group size as a constant.
template <class Call>
cudaError_t with_group(int group_size, Call call) {
    switch (group_size) {
        case 32: return call(std::integral_constant<int, 32>());
        case 64: return call(std::integral_constant<int, 64>());
        default: return call(std::integral_constant<int, 128>());
    }
}

int slabs_of(int in_features) { return (in_features + kSlab - 1) / kSlab; }

// Words of scratch that the codes of int8 activations take; their scales follow.
int64_t x_code_words(int rows, int slabs) { return static_cast<int64_t>(rows) * slabs * kUnits * kColumns; }

// Planes of a tile, as amq/kernels/gpu_layout.py counts them: a last slab of fewer features keeps those that hold some.
int planes_of(int bits, int in_features) {
    const int features_per_word = kUnit * (8 / bits), rest = in_features % kSlab;
    return in_features / kSlab * bits + std::min(bits, (rest + features_per_word - 1) / features_per_word);
}

// Divides the grid among the weights and launches: `arguments` with everything but blocks, columns, planes and scales.
template <class Element>
cudaError_t launch_weights(int group_size, int threads, cudaStream_t stream, LinearArguments arguments) {
    int blocks = 0;
    int64_t column = 0;
    for (int i = 0; i < arguments.n_weights; ++i) {
        Weight& weight = arguments.weights[i];
        const int block_rows = 2 * kTileRows * pairs_of(weight.bits);
        const int64_t tiles = (weight.out_features + kTileRows - 1) / kTileRows;
        weight.planes = planes_of(weight.bits, arguments.in_features);
        weight.scales = reinterpret_cast<const uint32_t*>(weight.codes + tiles * weight.planes * kWarp);
        weight.first_block = blocks;
        weight.column = column;
        blocks += (weight.out_features + block_rows - 1) / block_rows;
        column += weight.out_features;
    }
    return with_group(group_size, [&](auto group) {
        return launch(linear_kernel<Element, group()>, blocks, threads, stream, arguments);
    });
}

bool unaligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 != 0; }

}  // namespace amq

extern "C" {

// Whether codes of so many bits are compiled in.
__attribute__((visibility("default"))) int amq_cuda_has_bits(int bits) { return amq::is_compiled(bits); }

// The text of a cudaError_t.
__attribute__((visibility("default"))) const char* amq_cuda_error(int status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// Whether the kernels can run on the current device: 0 or a cudaError_t. runtime, driver: the version of CUDA that this
// library was built with, and the newest that the driver knows (0 without one), each as 1000 · major + 10 · minor. A driver
// runs any minor version of its own major one, and the kernels' code is loaded to see whether it has some for this device.
__attribute__((visibility("default"))) int amq_cuda_check(int* runtime, int* driver) {
    *runtime = *driver = 0;
    cudaError_t status = cudaRuntimeGetVersion(runtime);
    if (status == cudaSuccess) status = cudaDriverGetVersion(driver);
    if (status == cudaSuccess && *driver / 1000 < *runtime / 1000) status = cudaErrorInsufficientDriver;
    if (status != cudaSuccess) return status;
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, amq::linear_kernel<amq::HalfElement, 128>);
    cudaGetLastError();  // else the next launch would report it as its own
    return status;
}

// Bytes of the index-th struct of AMQ_CALLS, 0 past the last: whether library and Python agree.
int64_t amq_cuda_struct_bytes(int index) {
#define AMQ_BYTES(name) sizeof(amq::name),
    constexpr int64_t bytes[] = {AMQ_CALLS(AMQ_BYTES)};
#undef AMQ_BYTES
    return index >= 0 && index < static_cast<int>(sizeof bytes / sizeof *bytes) ? bytes[index] : 0;
}

// Rows of x that one call takes at most.
__attribute__((visibility("default"))) int amq_cuda_max_rows() { return amq::kMaxRows; }

// y = x · Wᵀ (+ bias), see gemv.cuh.
//   weights     [n_weights] addresses of prepared weights (16-byte aligned), [n_weights] bits of their codes and output features
//   x           [rows, in_features and zeros up to a multiple of 128] of dtype (0 fp16, 1 bf16), rows x_stride elements apart and
//               at multiples of 16 bytes
//   y           [rows, all output features], rows y_stride elements apart
//   scratch     null for exact products; else 16-byte aligned memory of amq_cuda_scratch_bytes, for int8 activations
//   warps       of a block, 1 to 8
__attribute__((visibility("default"))) int amq_cuda_linear(
    int n_weights, const int64_t* weights, const int64_t* bits, const int64_t* out_features, int rows, int in_features,
    int group_size, int dtype, const void* x, int64_t x_stride, const void* bias, void* y, int64_t y_stride, void* scratch,
    int warps, void* stream) {
    using namespace amq;
    if (rows < 1 || rows > kMaxRows) return kBadRows;
    if (n_weights < 1 || n_weights > kMaxWeights) return kBadWeights;
    if (group_size != 32 && group_size != 64 && group_size != 128) return kBadGroup;
    if (dtype != kHalf && dtype != kBfloat16) return kBadDType;
    if (in_features < 1 || !x || unaligned(x) || x_stride % 8 || !y || unaligned(scratch)) return kBadSize;
    if (warps < 1 || warps > kMaxWarps) return kBadSize;

    LinearArguments arguments{};
    for (int i = 0; i < n_weights; ++i) {
        Weight& weight = arguments.weights[i];
        if (bits[i] < 1 || bits[i] > kMaxBits || !is_compiled(static_cast<int>(bits[i]))) return kBadBits;
        if (out_features[i] < 1 || out_features[i] > INT32_MAX || !weights[i]) return kBadSize;
        weight.codes = reinterpret_cast<const uint4*>(weights[i]);
        if (unaligned(weight.codes)) return kBadSize;
        weight.bits = static_cast<int>(bits[i]);
        weight.out_features = static_cast<int>(out_features[i]);
    }
    arguments.n_weights = n_weights;
    arguments.rows = rows;
    arguments.in_features = in_features;
    arguments.slabs = slabs_of(in_features);
    arguments.dtype = dtype;
    arguments.x = x;
    arguments.x_stride = x_stride;
    arguments.bias = bias;
    arguments.y = y;
    arguments.y_stride = y_stride;
    const auto on = static_cast<cudaStream_t>(stream);
    const int threads = warps * kWarp;
    if (!scratch) {
        if (dtype == kHalf) return launch_weights<HalfElement>(group_size, threads, on, arguments);
        return launch_weights<Bfloat16Element>(group_size, threads, on, arguments);
    }
    uint32_t* x_codes = static_cast<uint32_t*>(scratch);
    float* x_scales = reinterpret_cast<float*>(x_codes + x_code_words(rows, arguments.slabs));
    const QuantizeArguments quantize = {x, x_stride, rows, in_features, arguments.slabs, dtype, x_codes, x_scales};
    const cudaError_t status = with_group(group_size, [&](auto group) {
        return launch(quantize_kernel<group()>, rows * arguments.slabs, kWarp, on, quantize);
    });
    if (status) return status;
    arguments.x_codes = reinterpret_cast<const uint4*>(x_codes);
    arguments.x_scales = x_scales;
    return launch_weights<Int8Element>(group_size, threads, on, arguments);
}

// Bytes of scratch that int8 activations take.
__attribute__((visibility("default"))) int64_t amq_cuda_scratch_bytes(int rows, int in_features, int group_size) {
    using namespace amq;
    const int slabs = slabs_of(in_features);
    return 4 * (x_code_words(rows, slabs) + static_cast<int64_t>(slabs) * (kSlab / group_size) * kMaxRows);
}

}  // extern "C"
