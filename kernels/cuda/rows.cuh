// What is computed row by row besides products: norms, activations, the end of a step, softcaps. Formulas: NormCall and those
// behind it in calls.h.
//
// Norms take pieces: a row, or one of the equal parts that it is cut into. A block takes a long piece, a warp a short one; a
// thread takes every so many-th element of it. Sums of squares are added in an order that depends on the piece's length
// alone: norm.cuh.

#pragma once

#include "activation.cuh"
#include "calls.h"
#include "device.cuh"
#include "norm.cuh"
#include "rotation.cuh"

namespace amq::rows {

constexpr int kLanes = 32;
constexpr int kThreads = 256;          // of a block whose threads do not depend on each other, or whose warps do not
constexpr int kLongPiece = 512;        // features from which on a block takes a piece
constexpr int kLongPieceThreads = 512;

// How kWarps warps, all of a block or just one of it, share out a piece.
template <int kWarps>
struct Team {
    int64_t piece;
    int thread;
    static constexpr int kSize = kWarps * kLanes;

    AMQ_DEVICE Team() {
        constexpr int kTeams = kWarps > 1 ? 1 : kThreads / kLanes;  // of a block
        piece = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / kSize;
        thread = threadIdx.x % kSize;
    }

    // The sum over the team, for each of its threads.
    AMQ_DEVICE float sum(float value, float (&partials)[kWarps]) const {
        value = warp_sum_upward(value);
        if constexpr (kWarps == 1) return value;
        if (thread % kLanes == 0) partials[thread / kLanes] = value;
        synchronize();
        return sum_upward(partials);
    }

    // What makes scale · x [features] a vector whose mean of squares is 1.
    AMQ_DEVICE float norm(const float* x, int features, float scale, float epsilon, float (&partials)[kWarps]) const {
        float squares = 0.0f;
        for (int k = thread; k < features; k += kSize) {
            const float v = scale * x[k];
            squares = fmaf(v, v, squares);
        }
        return norm_factor(sum(squares, partials), features, epsilon);
    }
};

constexpr int kLongPieceWarps = kLongPieceThreads / kLanes;

template <int kWarps>
__global__ void __launch_bounds__(kLongPieceThreads) norm_kernel(NormCall call) {
    __shared__ float partials[kWarps];
    const Team<kWarps> team;
    if (team.piece >= static_cast<int64_t>(call.rows) * call.parts) return;
    const int64_t row = team.piece / call.parts, first = team.piece % call.parts * call.features;
    const float* x = call.x + (row * call.x_stride + first);
    const int64_t to = row * call.y_stride + first;
    const float norm = call.weight ? team.norm(x, call.features, call.factor, call.epsilon, partials) : 1.0f;
    for (int k = team.thread; k < call.features; k += team.kSize) {
        const float v = call.factor * x[k] * norm;
        store_element(call.y, call.y_kind, to + k, call.weight ? call.weight[k] * v : v);
    }
}

template <int kWarps>
__global__ void __launch_bounds__(kLongPieceThreads) finish_kernel(FinishCall call) {
    __shared__ float partials[kWarps];
    const Team<kWarps> team;
    if (team.piece >= call.rows) return;
    const float* y = call.y + team.piece * call.y_stride;
    float* stream = call.stream + team.piece * call.stream_stride;
    const float norm = call.post_norm ? team.norm(y, call.features, 1.0f, call.epsilon, partials) : 1.0f;
    for (int k = team.thread; k < call.features; k += team.kSize) {
        const float v = call.post_norm ? call.post_norm[k] * (y[k] * norm) : y[k];
        stream[k] = fmaf(v, call.scale, stream[k]) * call.after;
    }
}

template <int kWarps>
__global__ void __launch_bounds__(kLongPieceThreads) per_layer_kernel(PerLayerCall call) {
    __shared__ float partials[kWarps];
    const Team<kWarps> team;
    const int64_t first = team.piece * call.width;
    if (first >= static_cast<int64_t>(call.rows) * call.columns) return;
    float* sum = call.sum + first;
    const float* token = call.token + first;
    const float norm = team.norm(sum, call.width, call.projection_scale, call.epsilon, partials);
    for (int k = team.thread; k < call.width; k += team.kSize) {
        const float v = call.norm[k] * (call.projection_scale * sum[k] * norm);
        sum[k] = call.sum_scale * fmaf(call.table_scale, token[k], v);
    }
}

// Blocks of kThreads features of a row.
AMQ_DEVICE int64_t column_of(int features, int64_t* row) {
    const int spans = (features + kThreads - 1) / kThreads;
    *row = blockIdx.x / spans;
    return static_cast<int64_t>(blockIdx.x % spans) * kThreads + threadIdx.x;
}

// 8 neighbouring threads rotate a unit.
__global__ void __launch_bounds__(kThreads) rotate_kernel(RotateCall call) {
    int64_t row;
    const int64_t k = column_of(call.features / 8, &row);
    const bool is_there = k < call.features / 8;  // of all 8 or of none; all take part in what lanes exchange
    const int j = threadIdx.x % 8;
    const int64_t first = k / 8 * kUnit + 4 * j;
    Piece piece{};
    for (int half = 0; half < 2 && is_there; ++half)
        for (int i = 0; i < 4; ++i)
            piece.v[half][i] = load_element(call.x, call.kind, row * call.x_stride + first + half * kUnit / 2 + i);
    rotate(piece, j);
    for (int half = 0; half < 2 && is_there; ++half)
        for (int i = 0; i < 4; ++i)
            store_element(call.y, call.kind, row * call.y_stride + first + half * kUnit / 2 + i, piece.v[half][i]);
}

__global__ void __launch_bounds__(kThreads) activate_kernel(ActivateCall call) {
    int64_t row;
    const int64_t k = column_of(call.features, &row);
    if (k >= call.features) return;
    const float gate = call.gate[row * call.gate_stride + k];
    const float up = call.activation == kRelu2 ? 0.0f : call.up[row * call.up_stride + k];
    store_element(call.y, call.y_kind, row * call.y_stride + k, activated(call.activation, gate, up, call.limit));
}

__global__ void __launch_bounds__(kThreads) softcap_kernel(SoftcapCall call) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < call.count) call.x[i] = call.cap * tanhf(call.x[i] / call.cap);
}

}  // namespace amq::rows
