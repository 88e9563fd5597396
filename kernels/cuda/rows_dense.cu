// amq_cuda_dense: checks of the arguments, and launches.

#include <cstdint>

#include "calls.h"
#include "checks.cuh"
#include "rows_dense.cuh"

namespace amq::rows {
namespace {

// Whether all loads of 16 bytes of W, and of 4 numbers of x, are at multiples of their size.
bool aligned(const DenseCall& call) {
    const int64_t row_bytes = static_cast<int64_t>(call.in_features) * element_bytes(call.element);
    const bool weights = at_multiple(call.weight, 16) && row_bytes % 16 == 0;  // so in_features divides by 4
    return weights && at_multiple(call.x, 16) && call.x_stride % 4 == 0;
}

template <class T, int kRows, bool kAligned>
int launch_dense(const DenseCall& call, cudaStream_t stream) {
    const int split = dense_split(call.out_features), outs = kDenseWarps / split * kOut;
    const int tiles = (call.rows - 1) / kRows + 1;
    const int64_t blocks = (static_cast<int64_t>(call.out_features) + outs - 1) / outs * tiles;
    if (blocks > INT32_MAX) return kBadSize;
    const DenseArguments arguments = {call, split, tiles};
    return launch(dense_kernel<T, kRows, kAligned>, static_cast<int>(blocks), kDenseThreads, stream, arguments);
}

template <class T>
int launch_dense(const DenseCall& call, cudaStream_t stream) {
    if (!aligned(call)) return launch_dense<T, kUnalignedX, false>(call, stream);
    if (call.rows == 1) return launch_dense<T, 1, true>(call, stream);
    if (call.rows <= 4) return launch_dense<T, 4, true>(call, stream);
    return launch_dense<T, kMostX, true>(call, stream);
}

}  // namespace
}  // namespace amq::rows

extern "C" int amq_cuda_dense(const amq::DenseCall* call, void* stream) {
    using namespace amq;
    using namespace amq::rows;
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (!is_kind(call->element) || !is_kind(call->x_kind) || !is_kind(call->y_kind)) return kBadDType;
    if (call->in_features < 1 || call->out_features < 1) return kBadSize;
    if (bad(call->weight, element_bytes(call->element)) || bad(call->x, element_bytes(call->x_kind))) return kBadSize;
    if (bad(call->y, element_bytes(call->y_kind)) || bad_if_any(call->bias)) return kBadSize;
    const auto on = static_cast<cudaStream_t>(stream);
    if (call->element == kHalf) return launch_dense<__half>(*call, on);
    if (call->element == kBfloat16) return launch_dense<__nv_bfloat16>(*call, on);
    return launch_dense<float>(*call, on);
}
