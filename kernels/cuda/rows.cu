// amq_cuda_norm, _rotate, _embed, _activate, _finish, _per_layer, _softcap: checks of the arguments, and launches.

#include <algorithm>
#include <cstdint>

#include "calls.h"
#include "checks.cuh"
#include "rows.cuh"
#include "rows_embed.cuh"

namespace amq::rows {
namespace {

// Launches `kernel` of so many blocks, if that many fit a grid.
template <class Call>
int launch_blocks(void (*kernel)(Call), int64_t blocks, int threads, void* stream, const Call& call) {
    if (blocks > INT32_MAX) return kBadSize;
    return launch(kernel, static_cast<int>(blocks), threads, static_cast<cudaStream_t>(stream), call);
}

// One block for each of `pieces`, or one warp where they are short.
template <class Call>
int launch_pieces(void (*of_long)(Call), void (*of_short)(Call), int64_t pieces, int features, void* stream, const Call& call) {
    if (features >= kLongPiece) return launch_blocks(of_long, pieces, kLongPieceThreads, stream, call);
    constexpr int kPieces = kThreads / kLanes;
    return launch_blocks(of_short, (pieces + kPieces - 1) / kPieces, kThreads, stream, call);
}

// A thread for each of `features` numbers of each row.
template <class Call>
int launch_columns(void (*kernel)(Call), int64_t rows, int64_t features, void* stream, const Call& call) {
    return launch_blocks(kernel, rows * ((features + kThreads - 1) / kThreads), kThreads, stream, call);
}

int check_table(const EmbedCall& call) {
    if (call.kind < 0 || call.kind > kPrepared) return kBadDType;
    if (call.kind <= kFloat) return bad(call.data, element_bytes(call.kind)) ? kBadSize : 0;
    if (call.bits < 1 || call.bits > 8) return kBadBits;
    if (call.group_size != 32 && call.group_size != 64 && call.group_size != 128) return kBadGroup;
    if (call.kind == kPrepared) return bad(call.data, 16) ? kBadSize : 0;
    const bool short_rows = call.row_bytes < (static_cast<int64_t>(call.columns) * call.bits + 7) / 8;
    return short_rows || bad(call.data, 1) || bad(call.scales, 2) || bad(call.zero_points, 2) ? kBadSize : 0;
}

}  // namespace
}  // namespace amq::rows

using namespace amq;
using namespace amq::rows;

extern "C" {

int amq_cuda_norm(const NormCall* call, void* stream) {
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (!is_kind(call->y_kind)) return kBadDType;
    if (call->features < 1 || call->parts < 1 || bad(call->x) || bad_if_any(call->weight)) return kBadSize;
    if (bad(call->y, element_bytes(call->y_kind))) return kBadSize;
    // Threads read and write their own elements: in place these have to be the same bytes.
    if (call->y == call->x && (call->y_kind != kFloat || call->y_stride != call->x_stride)) return kBadSize;
    const int64_t pieces = static_cast<int64_t>(call->rows) * call->parts;
    // A whole row is added up as by linears that norm their input, however short it is.
    const int length = call->parts == 1 ? std::max(call->features, kLongPiece) : call->features;
    return launch_pieces(norm_kernel<kLongPieceWarps>, norm_kernel<1>, pieces, length, stream, *call);
}

int amq_cuda_rotate(const RotateCall* call, void* stream) {
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (!is_kind(call->kind)) return kBadDType;
    const int bytes = element_bytes(call->kind);
    if (call->features < 1 || call->features % kUnit || bad(call->x, bytes) || bad(call->y, bytes)) return kBadSize;
    // Threads read and write their own elements: in place these have to be the same bytes.
    if (call->y == call->x && call->y_stride != call->x_stride) return kBadSize;
    return launch_columns(rotate_kernel, call->rows, call->features / 8, stream, *call);
}

int amq_cuda_embed(const EmbedCall* call, void* stream) {
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (call->columns < 1 || call->table_rows < 1 || bad(call->tokens, 4) || bad(call->y)) return kBadSize;
    if (const int status = check_table(*call)) return status;
    return launch_columns(embed_kernel, call->rows, call->columns, stream, *call);
}

int amq_cuda_activate(const ActivateCall* call, void* stream) {
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (!is_kind(call->y_kind)) return kBadDType;
    if (call->activation < kSilu || call->activation > kRelu2 || call->features < 1) return kBadSize;
    if (bad(call->gate) || (call->activation != kRelu2 && bad(call->up))) return kBadSize;
    if (bad(call->y, element_bytes(call->y_kind))) return kBadSize;
    return launch_columns(activate_kernel, call->rows, call->features, stream, *call);
}

int amq_cuda_finish(const FinishCall* call, void* stream) {
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (call->features < 1 || bad(call->stream) || bad(call->y) || bad_if_any(call->post_norm)) return kBadSize;
    return launch_pieces(finish_kernel<kLongPieceWarps>, finish_kernel<1>, call->rows, call->features, stream, *call);
}

int amq_cuda_per_layer(const PerLayerCall* call, void* stream) {
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (call->width < 1 || call->columns < 1 || call->columns % call->width) return kBadSize;
    if (bad(call->sum) || bad(call->token) || bad(call->norm)) return kBadSize;
    const int64_t pieces = static_cast<int64_t>(call->rows) * (call->columns / call->width);
    return launch_pieces(per_layer_kernel<kLongPieceWarps>, per_layer_kernel<1>, pieces, call->width, stream, *call);
}

int amq_cuda_softcap(const SoftcapCall* call, void* stream) {
    if (call->count == 0) return kOk;
    if (call->count < 0 || bad(call->x) || !(call->cap > 0.0f)) return kBadSize;
    return launch_columns(softcap_kernel, 1, call->count, stream, *call);
}

}  // extern "C"
