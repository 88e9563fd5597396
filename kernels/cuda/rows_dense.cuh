// y = scale · (W · x + bias) for weights that are not quantized, of up to 8 rows of x at once: W is read once for all of them.
//
// A block has kWarps warps, and a warp kOut output rows, whose sums for all rows of x it keeps in registers. It takes steps of
// one 16-byte load per lane and output row; the next step's loads are under way before this one's products, across barriers
// too. x is staged in shared memory as float32, a chunk of features at a time, in the order in which lanes want it:
//
//     a step is 32 · kVector features, lane l those from kVector · l on; of the chunk, quads of 4 features, first the lanes'
//     first ones, then their second ones: 32 lanes read 512 consecutive bytes
//
// Where there are few output rows, `split` warps share them and take every split-th step. A lane adds products in the order of
// features, then the lanes are summed by warp_sum, then the sharing warps in order: which depends on the shape of W alone, not
// on rows or on how many are computed at once.

#pragma once

#include <type_traits>

#include "calls.h"
#include "device.cuh"

namespace amq::rows {

constexpr int kDenseWarps = 8, kDenseThreads = kDenseWarps * 32;
constexpr int kOut = 4;              // output rows of a warp
constexpr int kMostX = 8;            // rows of x of a block; kUnalignedX where loads cannot be wide
constexpr int kUnalignedX = 4;
constexpr int kStagedQuads = 2048;   // 32 KB of x
constexpr int kDenseRegisters = 128;  // of a lane: two blocks on a multiprocessor

struct DenseArguments {
    DenseCall call;
    int split;   // warps that share their output rows: 1, 2, 4 or 8
    int tiles;   // of rows of x, blocks of which stand side by side
};

// Enough blocks for a GPU where W is large, enough warps per block for short waits where it is small.
constexpr int dense_split(int out_features) {
    return out_features >= 8192 ? 1 : out_features >= 2048 ? 2 : out_features >= 512 ? 4 : 8;
}

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of W of one load

AMQ_DEVICE void unpack(const uint4& v, __half, float (&out)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_halves(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}
AMQ_DEVICE void unpack(const uint4& v, __nv_bfloat16, float (&out)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = as_float(words[i] << 16);
        out[2 * i + 1] = as_float(words[i] & 0xffff0000u);
    }
}
AMQ_DEVICE void unpack(const uint4& v, float, float (&out)[4]) {
    out[0] = as_float(v.x);
    out[1] = as_float(v.y);
    out[2] = as_float(v.z);
    out[3] = as_float(v.w);
}

// Elements first … first + kVector − 1 of a row of `count`, zeros behind its end. kAligned: it ends at a multiple of kVector.
template <class T, bool kAligned>
AMQ_DEVICE uint4 load_weights(const T* row, int first, int count) {
    if constexpr (kAligned) {
        if (first < count) return load_once(reinterpret_cast<const uint4*>(row + first));
        return {0, 0, 0, 0};
    } else {
        using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
        uint32_t words[4] = {};
        for (int i = 0; i < kVector<T>; ++i) {
            const uint32_t bits = first + i < count ? reinterpret_cast<const Bits*>(row)[first + i] : 0;
            words[i * sizeof(T) / 4] |= bits << i * 8 * sizeof(T) % 32;
        }
        return {words[0], words[1], words[2], words[3]};
    }
}

// Features first … first + 3 of a row of x, zeros behind its end.
template <bool kAligned>
AMQ_DEVICE float4 load_quad(const DenseCall& call, int64_t row, int first) {
    const int64_t from = row * call.x_stride + first;
    if constexpr (!kAligned) {
        float quad[4];
        for (int i = 0; i < 4; ++i) quad[i] = first + i < call.in_features ? load_element(call.x, call.x_kind, from + i) : 0.0f;
        return {quad[0], quad[1], quad[2], quad[3]};
    } else {
        if (first >= call.in_features) return {0.0f, 0.0f, 0.0f, 0.0f};
        if (call.x_kind == kFloat)
            return load_shared_by_many(reinterpret_cast<const float4*>(static_cast<const float*>(call.x) + from));
        const uint2 v = load_shared_by_many(reinterpret_cast<const uint2*>(static_cast<const __half*>(call.x) + from));
        if (call.x_kind == kBfloat16)
            return {as_float(v.x << 16), as_float(v.x & 0xffff0000u), as_float(v.y << 16), as_float(v.y & 0xffff0000u)};
        const float2 low = unpack_halves(v.x), high = unpack_halves(v.y);
        return {low.x, low.y, high.x, high.y};
    }
}

template <class T, int kRows>
struct DenseSizes {
    static constexpr int kQuads = kVector<T> / 4;                     // of a lane and step
    static constexpr int kStep = 32 * kVector<T>;                     // features
    static constexpr int kSteps = kStagedQuads / kRows / (32 * kQuads);  // of a chunk
};

// A chunk of x, steps begin … end − 1, into `staged`: [rows, kSteps, kQuads, 32].
template <class T, int kRows, bool kAligned>
AMQ_DEVICE void stage(const DenseCall& call, int64_t first_row, int begin, int end, float4 (&staged)[kStagedQuads]) {
    using Sizes = DenseSizes<T, kRows>;
    const int count = (end - begin) * Sizes::kQuads * 32;
    for (int row = 0; row < kRows; ++row) {
        const bool there = first_row + row < call.rows;
        for (int i = threadIdx.x; i < count; i += kDenseThreads) {
            const int step = begin + i / (32 * Sizes::kQuads), quad = i / 32 % Sizes::kQuads;
            const int feature = step * Sizes::kStep + i % 32 * kVector<T> + 4 * quad;
            float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
            if (there) v = load_quad<kAligned>(call, first_row + row, feature);
            staged[row * (kStagedQuads / kRows) + i] = v;
        }
    }
}

// sums += this step's weights · x; `staged` is the lane's first quad of it.
template <class T, int kRows>
AMQ_DEVICE void multiply(const uint4 (&weights)[kOut], const float4* staged, float (&sums)[kOut][kRows]) {
    constexpr int kQuads = DenseSizes<T, kRows>::kQuads;
    float w[kOut][kVector<T>];
    for (int n = 0; n < kOut; ++n) unpack(weights[n], T(), w[n]);
    for (int row = 0; row < kRows; ++row)
        for (int quad = 0; quad < kQuads; ++quad) {
            const float4 x = staged[row * (kStagedQuads / kRows) + quad * 32];
            for (int n = 0; n < kOut; ++n) {
                float& sum = sums[n][row];
                sum = fmaf(w[n][4 * quad], x.x, sum);
                sum = fmaf(w[n][4 * quad + 1], x.y, sum);
                sum = fmaf(w[n][4 * quad + 2], x.z, sum);
                sum = fmaf(w[n][4 * quad + 3], x.w, sum);
            }
        }
}

template <int kRows>
using DensePartials = float[kDenseWarps][kOut][kRows];

// What the warps summed up becomes outputs.
template <int kRows>
AMQ_DEVICE void store_sums(const DenseArguments& arguments, int64_t first_row, int first_out,
                           const DensePartials<kRows>& partials) {
    const DenseCall& call = arguments.call;
    const int split = arguments.split, outs = kDenseWarps / split * kOut;
    for (int i = threadIdx.x; i < outs * kRows; i += kDenseThreads) {
        const int row = i / outs, n = i % outs, out = first_out + n;
        if (first_row + row >= call.rows || out >= call.out_features) continue;
        float sum = 0.0f;
        for (int part = 0; part < split; ++part) sum += partials[n / kOut * split + part][n % kOut][row];
        if (call.bias) sum += call.bias[out];
        store_element(call.y, call.y_kind, (first_row + row) * call.y_stride + out, call.scale * sum);
    }
}

template <class T, int kRows, bool kAligned>
__global__ void AMQ_REGISTERS(kDenseRegisters, kDenseThreads) dense_kernel(DenseArguments arguments) {
    __shared__ float4 staged[kStagedQuads];
    __shared__ DensePartials<kRows> partials;
    using Sizes = DenseSizes<T, kRows>;
    const DenseCall& call = arguments.call;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = arguments.split;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x % arguments.tiles) * kRows;
    const int first_out = static_cast<int>(blockIdx.x / arguments.tiles) * (kDenseWarps / split * kOut);
    const int steps = (call.in_features + Sizes::kStep - 1) / Sizes::kStep;

    const T* rows[kOut];  // of W; those past the last repeat it, and are dropped
    for (int n = 0; n < kOut; ++n)
        rows[n] = static_cast<const T*>(call.weight) +
                  static_cast<int64_t>(min(first_out + warp / split * kOut + n, call.out_features - 1)) * call.in_features;
    int step = warp % split;
    uint4 weights[kOut];
    const int first = step * Sizes::kStep + lane * kVector<T>;
    for (int n = 0; n < kOut; ++n) weights[n] = load_weights<T, kAligned>(rows[n], first, call.in_features);
    float sums[kOut][kRows] = {};
    for (int begin = 0; begin < steps; begin += Sizes::kSteps) {
        const int end = min(begin + Sizes::kSteps, steps);
        if (begin > 0) synchronize();
        stage<T, kRows, kAligned>(call, first_row, begin, end, staged);
        synchronize();
        for (; step < end; step += split) {
            uint4 next[kOut];
            const int from = (step + split) * Sizes::kStep + lane * kVector<T>;
            for (int n = 0; n < kOut; ++n) next[n] = load_weights<T, kAligned>(rows[n], from, call.in_features);
            multiply<T, kRows>(weights, staged + ((step - begin) * Sizes::kQuads * 32 + lane), sums);
            for (int n = 0; n < kOut; ++n) weights[n] = next[n];
        }
    }
    for (int n = 0; n < kOut; ++n)
        for (int row = 0; row < kRows; ++row) {
            const float sum = warp_sum(sums[n][row]);
            if (lane == 0) partials[warp][n][row] = sum;
        }
    synchronize();
    store_sums<kRows>(arguments, first_row, first_out, partials);
}

}  // namespace amq::rows
