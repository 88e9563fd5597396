// amq_cuda_linear_call, and amq_cuda_linear for linears of their own (amq/kernels/cuda.py): checks, and how the work is cut into
// blocks.

#include <algorithm>

#include "checks.cuh"
#include "linear.cuh"

namespace amq {
namespace {

int check_weights(const LinearCall& call) {
    if (call.n_weights < 1 || call.n_weights > kMaxWeights) return kBadWeights;
    for (int i = 0; i < call.n_weights; ++i) {
        const LinearWeight& weight = call.weights[i];
        if (weight.rows < 1 || weight.first_row < 0 || weight.first_row % kTileRows) return kBadSize;
        if (weight.rows > weight.all_rows - weight.first_row) return kBadSize;
        if (call.n_experts > 0) continue;
        if (weight.bits < 1 || weight.bits > kMaxBits || !is_compiled(weight.bits)) return kBadBits;
        if (bad(weight.data, 16)) return kBadSize;
    }
    return kOk;
}

int check_experts(const LinearCall& call) {
    if (call.n_experts < 0) return kBadSize;
    if (call.n_experts == 0) return kOk;
    return call.experts && call.groups && call.n_groups && call.most_groups > 0 && call.x_share > 0 ? kOk : kBadSize;
}

int check(const LinearCall& call) {
    if (call.rows < 0 || call.rows > kMaxRows) return kBadRows;
    if (const int status = check_weights(call)) return status;
    if (const int status = check_experts(call)) return status;
    if (call.group_size != 32 && call.group_size != 64 && call.group_size != 128) return kBadGroup;
    if (call.dtype != kHalf && call.dtype != kBfloat16) return kBadDType;
    if (call.x_kind != call.dtype && call.x_kind != kFloat) return kBadDType;
    if (!is_kind(call.y_kind) || (call.norm && call.x_kind != kFloat)) return kBadDType;
    const int per_line = call.x_kind == kFloat ? 4 : 8;  // elements in 16 bytes
    if (call.in_features < 1 || bad(call.x, 16) || call.x_stride % per_line || !at_multiple(call.norm, 16)) return kBadSize;
    if (call.rotated && call.in_features % kUnit) return kBadSize;
    if (!call.y || !at_multiple(call.partials, 16) || call.epilogue < kStore || call.epilogue > kActivate) return kBadSize;
    if (call.epilogue == kAdd && (call.n_weights != 1 || call.y_kind != kFloat)) return kBadWeights;
    if (call.epilogue != kActivate) return kOk;
    if (call.activation < kSilu || call.activation > kRelu2) return kBadSize;
    if (call.n_weights != (call.activation == kRelu2 ? 1 : 2)) return kBadWeights;
    return call.n_weights == 1 || call.weights[0].rows == call.weights[1].rows ? kOk : kBadSize;
}

int divide_up(int a, int b) { return (a + b - 1) / b; }

// Items of each weight.
void count_items(LinearArguments& arguments) {
    const LinearCall& call = arguments.call;
    arguments.sides = call.epilogue == kActivate ? call.n_weights : 1;
    int most = 0;
    for (int i = 0; i < call.n_weights; ++i)
        most = std::max(most, call.n_experts > 0 ? kMostRows : kPairRows * pairs_of(call.weights[i].bits));
    if (call.n_experts > 0 || arguments.sides == 2) arguments.item_rows = most;
    for (int i = 0; i < call.n_weights; ++i) {
        const int rows = arguments.item_rows ? arguments.item_rows : kPairRows * pairs_of(call.weights[i].bits);
        const bool counted = arguments.sides == 2 && i > 0;
        arguments.first_item[i + 1] = arguments.first_item[i] + (counted ? 0 : divide_up(call.weights[i].rows, rows));
    }
}

int items_of(const LinearArguments& arguments) { return arguments.first_item[arguments.call.n_weights]; }

// What a launch of `call` takes but for what depends on the device.
LinearArguments plan(const LinearCall& call, int bias_kind) {
    LinearArguments arguments{};
    arguments.call = call;
    arguments.bias_kind = bias_kind;
    arguments.slabs = divide_up(call.in_features, kSlab);
    arguments.ranges = divide_up(call.in_features, kRange);
    count_items(arguments);
    return arguments;
}

bool can_split(const LinearArguments& arguments) {
    return arguments.call.n_experts == 0 && arguments.ranges > 1 && items_of(arguments) <= kCounters;
}

// Cuts ranges and items among blocks: ranges only where x would not fit, or not every multiprocessor would have a block.
void share_out(LinearArguments& arguments, int range_bytes, int multiprocessors) {
    const int items = items_of(arguments), fit = kStageBytes / range_bytes, ranges = arguments.ranges;
    arguments.span = ranges;
    if (arguments.call.partials && can_split(arguments)) {
        const int splits = std::max(divide_up(ranges, fit), divide_up(multiprocessors, items));
        arguments.span = divide_up(ranges, std::min(splits, ranges));
    }
    arguments.splits = divide_up(ranges, arguments.span);
    arguments.resident = arguments.span <= fit;
    arguments.blocks = std::min(items, std::max(1, multiprocessors * kBlocksOfMultiprocessor / arguments.splits));
}

template <class Element, int kGroup>
int launch_linear(LinearArguments arguments, cudaStream_t stream) {
    int multiprocessors;
    if (const cudaError_t status = count_multiprocessors(&multiprocessors)) return status;
    const LinearCall& call = arguments.call;
    const int range_bytes = Range<Element, kGroup>::bytes(call.n_experts > 0 ? kMaxRows : call.rows);
    share_out(arguments, range_bytes, multiprocessors);
    const int blocks = arguments.blocks * arguments.splits * (call.n_experts > 0 ? call.most_groups : 1);
    const int shared_bytes = range_bytes * (arguments.resident ? arguments.span : 1);
    return launch(linear_kernel<Element, kGroup>, blocks, kThreads, stream, arguments, shared_bytes);
}

template <class Element>
int launch_linear(const LinearArguments& arguments, cudaStream_t stream) {
    switch (arguments.call.group_size) {
        case 32: return launch_linear<Element, 32>(arguments, stream);
        case 64: return launch_linear<Element, 64>(arguments, stream);
        default: return launch_linear<Element, 128>(arguments, stream);
    }
}

int run(const LinearCall& call, int bias_kind, void* stream) {
    if (const int status = check(call)) return status;
    if (call.rows == 0) return kOk;
    const LinearArguments arguments = plan(call, bias_kind);
    const auto on = static_cast<cudaStream_t>(stream);
    if (call.int8) return launch_linear<Int8Element>(arguments, on);
    return call.dtype == kHalf ? launch_linear<HalfElement>(arguments, on) : launch_linear<Bfloat16Element>(arguments, on);
}

}  // namespace
}  // namespace amq

extern "C" {

// Whether the kernels can run on the current device: 0 or a cudaError_t. runtime, driver: the version of CUDA that this
// library was built with, and the newest that the driver knows (0 without one), each as 1000 · major + 10 · minor. A driver
// runs any minor version of its own major one, and the kernels' code is loaded to see whether it has some for this device.
AMQ_EXPORT int amq_cuda_check(int* runtime, int* driver) {
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

// Rows of x that one call takes at most.
AMQ_EXPORT int amq_cuda_max_rows() { return amq::kMaxRows; }

int amq_cuda_linear_call(const amq::LinearCall* call, void* stream) { return amq::run(*call, amq::kFloat, stream); }

int64_t amq_cuda_linear_scratch(const amq::LinearCall* call) {
    using namespace amq;
    if (check(*call) || call->rows == 0) return 0;
    const LinearArguments arguments = plan(*call, kFloat);
    if (!can_split(arguments)) return 0;
    const int64_t sums = static_cast<int64_t>(items_of(arguments)) * arguments.ranges * arguments.sides * kOutputs;
    return sizeof(float) * (kCounters + sums);
}

// y = x · Wᵀ (+ bias).
//   weights     [n_weights] addresses of prepared weights (16-byte aligned), [n_weights] bits of their codes and output features
//   x           [rows, in_features] of dtype (0 fp16, 1 bf16), rows x_stride elements apart and at multiples of 16 bytes
//   bias        [all output features] of dtype, or null
//   y           [rows, all output features] of dtype, rows y_stride elements apart
//   int8        whether x is rounded to 8 bits per row and group first
AMQ_EXPORT int amq_cuda_linear(int n_weights, const int64_t* weights, const int64_t* bits, const int64_t* out_features, int rows,
                               int in_features, int group_size, int dtype, const void* x, int64_t x_stride, const void* bias,
                               void* y, int64_t y_stride, int int8, void* stream) {
    using namespace amq;
    if (rows < 1) return kBadRows;
    if (n_weights < 1 || n_weights > kMaxWeights) return kBadWeights;
    LinearCall call{};
    int64_t column = 0;
    for (int i = 0; i < n_weights; ++i) {
        if (bits[i] < 1 || bits[i] > kMaxBits) return kBadBits;
        if (out_features[i] < 1 || out_features[i] > INT32_MAX) return kBadSize;
        const int of_weight = static_cast<int>(out_features[i]);
        // Of `dtype`, which LinearArguments::bias_kind says.
        const auto* of_bias = bias ? reinterpret_cast<const float*>(static_cast<const char*>(bias) + 2 * column) : nullptr;
        const auto* data = reinterpret_cast<const void*>(weights[i]);
        call.weights[i] = {data, of_bias, static_cast<int>(bits[i]), of_weight, 0, of_weight};
        column += of_weight;
    }
    call.n_weights = n_weights;
    call.rows = rows;
    call.in_features = in_features;
    call.group_size = group_size;
    call.dtype = call.x_kind = call.y_kind = dtype;
    call.int8 = int8;
    call.x = x;
    call.x_stride = x_stride;
    call.scale = 1.0f;
    call.y = y;
    call.y_stride = y_stride;
    return run(call, dtype, stream);
}

}  // extern "C"
