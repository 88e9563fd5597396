// x into shared memory, in the order in which fragments want it, with what else depends on x alone: its norm and its rotation,
// Σx of each group, and for int8 activations the rounding.
//
// x is cut into ranges of kRange features. A range of some rows is
//
//     sums    float [groups of the range, kMaxRows]: Σx / kFinal of its 16-bit numbers, or Σ codes
//     scales  float [groups of the range, kMaxRows], int8 only: a
//     x       [rows], kPitch bytes apart: 16-bit numbers in their order; or byte codes, word [unit, column], whose byte h + 2·p
//             is feature 64·unit + 32·h + 2·column + p
//
// and what x lacks is 0. Int8: a = max|x| / 127 of the row and group, and x becomes a · round(x / a), ties to even, as
// quantize_activations in amq/kernels/backends.py says. A group with a NaN or an infinity gets a = NaN, one whose magnitudes
// are all below 2^-100 gets a = 0.
//
// Every sum is in an order that neither the rows nor the block decide.

#pragma once

#include <type_traits>

#include "elements.cuh"
#include "norm.cuh"
#include "rotation.cuh"
#include "rounding.cuh"

namespace amq {

constexpr int kWarps = 4;                 // of a block: each multiplies one slab of a range
constexpr int kThreads = kWarps * kWarp;
constexpr int kRange = kWarps * kSlab;
constexpr int kStageBytes = 36 << 10;     // of ranges of x in a block at most; 48 KiB are shared memory without asking

template <class Element>
constexpr bool kIsInt8 = std::is_same_v<Element, Int8Element>;

template <class Element, int kGroup>
struct Range {
    static constexpr int kGroups = kRange / kGroup;
    static constexpr int kPerGroup = kGroups * kMaxRows;           // numbers that a range has for each group and row
    static constexpr int kBytes = sizeof(typename Element::Type);  // of an element of x
    static constexpr int kPitch = kRange * kBytes + 64;            // neighbouring rows are in other banks
    static constexpr int kHead = (kIsInt8<Element> ? 2 : 1) * kPerGroup * sizeof(float);

    AMQ_BOTH static constexpr int bytes(int rows) { return kHead + rows * kPitch; }
};

// Where x is, and which of its rows a block multiplies.
struct Source {
    const void* x;
    int64_t stride;
    int kind, in_features;
    const float* norm;  // or null
    int normed_kind;    // 16 bits that a normed row has before it is rotated or rounded to 8, as where it comes from memory
    float epsilon;
    int rotated;        // whether features are rotated, kUnit at a time, behind the norm
    int rows;
    const int32_t* which;                // [rows]
    float (*squares)[kWarps];            // [rows]: Σx² of each warp's part
};

AMQ_DEVICE void load_floats(const float* from, float (&v)[4]) {
    const float4 four = load_shared_by_many(reinterpret_cast<const float4*>(from));
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

// Features k … k + 3 of a row of x; k divides by 4.
AMQ_DEVICE void load_features(const Source& source, int row, int k, float (&v)[4]) {
    const int64_t from = source.which[row] * source.stride + k;
    if (k + 4 > source.in_features) {
        for (int i = 0; i < 4; ++i) v[i] = k + i < source.in_features ? load_element(source.x, source.kind, from + i) : 0.0f;
    } else if (source.kind == kFloat) {
        load_floats(static_cast<const float*>(source.x) + from, v);
    } else {
        const uint2 four = load_shared_by_many(reinterpret_cast<const uint2*>(static_cast<const __half*>(source.x) + from));
        const float2 low = unpack(four.x, source.kind), high = unpack(four.y, source.kind);
        v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
    }
}

// Those of a normed row.
AMQ_DEVICE void norm_features(const Source& source, float factor, int k, float (&v)[4]) {
    float weight[4];
    if (k + 4 <= source.in_features) {
        load_floats(source.norm + k, weight);
    } else {
        for (int i = 0; i < 4; ++i) weight[i] = k + i < source.in_features ? source.norm[k + i] : 0.0f;
    }
    for (int i = 0; i < 4; ++i) v[i] = weight[i] * (v[i] * factor);
}

// Σx² of whole rows, to source.squares, in the order of norm.cuh. By the whole block.
AMQ_DEVICE void sum_squares(const Source& source) {
    const int warp = threadIdx.x / kWarp;
    for (int row = 0; row < source.rows; ++row) {
        float sums[4] = {};
        for (int k = 4 * threadIdx.x; k < source.in_features; k += 4 * kThreads) {
            float v[4];
            load_features(source, row, k, v);
            for (int i = 0; i < 4; ++i) sums[i] = fmaf(v[i], v[i], sums[i]);
        }
        const float sum = warp_sum_upward(sum_upward(sums));
        if (threadIdx.x % kWarp == 0) source.squares[row][warp] = sum;
    }
    synchronize();
}

// x of a row is multiplied with it before the norm's weight.
AMQ_DEVICE float norm_factor(const Source& source, int row) {
    return norm_factor(sum_upward(source.squares[row]), source.in_features, source.epsilon);
}

// `combine` of what the lanes of a group have for each half.
template <int kGroup, class Combine>
AMQ_DEVICE void over_group(float (&half)[2], Combine combine) {
    for (int lanes = 1; lanes < 8; lanes *= 2)
        for (float& value : half) value = combine(value, shuffle_xor(value, lanes));
    if (kGroup >= kUnit) half[0] = half[1] = combine(half[0], half[1]);
    if (kGroup > kUnit) half[0] = half[1] = combine(half[0], shuffle_xor(half[0], 8));
}

AMQ_DEVICE float add(float a, float b) { return a + b; }

template <class T>
AMQ_DEVICE void round_to(Piece& piece) {
    for (auto& half : piece.v)
        for (float& value : half) {
            T rounded;
            from_float(value, &rounded);
            value = to_float(rounded);
        }
}

// The scales of the two halves of a unit; v becomes codes.
template <int kGroup>
AMQ_DEVICE void round_to_codes(Piece& piece, float (&scales)[2]) {
    float largest[2] = {0.0f, 0.0f};
    for (int half = 0; half < 2; ++half)
        for (const float value : piece.v[half]) {
            const float magnitude = fabsf(value);
            largest[half] = magnitude <= FLT_MAX ? fmaxf(largest[half], magnitude) : INFINITY;
        }
    over_group<kGroup>(largest, [](float a, float b) { return fmaxf(a, b); });
    for (int half = 0; half < 2; ++half) {
        const float factor = scale_of(largest[half], &scales[half]);
        for (float& value : piece.v[half]) value = factor == 0.0f ? 0.0f : round_even(value * factor);
    }
}

// Stores a piece at `to`, which is the unit's, and returns what products will read of it.
AMQ_DEVICE void store_piece(Piece& piece, char* to, int j, Int8Element) {
    uint32_t words[2] = {};
    for (int i = 0; i < 8; ++i)
        words[i / 2 % 2] |= (static_cast<uint32_t>(static_cast<int>(piece.v[i / 4][i % 4])) & 0xffu) << 8 * (i / 4 + 2 * (i % 2));
    *reinterpret_cast<uint2*>(to + 8 * j) = {words[0], words[1]};
}
template <class Element>
AMQ_DEVICE void store_piece(Piece& piece, char* to, int j, Element) {
    using Type = typename Element::Type;
    for (int half = 0; half < 2; ++half) {
        alignas(8) Type v[4];
        for (int i = 0; i < 4; ++i) {
            from_float(piece.v[half][i], v + i);
            piece.v[half][i] = to_float(v[i]);
        }
        *reinterpret_cast<uint2*>(to + half * kUnit / 2 * sizeof(Type) + 8 * j) = *reinterpret_cast<const uint2*>(v);
    }
}

// Four units of a row, one per 8 lanes of a warp, from `unit` of the range on.
template <class Element, int kGroup>
AMQ_DEVICE void stage_units(const Source& source, int range, int row, int unit, float factor, char* to) {
    using Sizes = Range<Element, kGroup>;
    const int lane = threadIdx.x % kWarp, j = lane % 8;
    unit += lane / 8;
    Piece piece;
    for (int half = 0; half < 2; ++half) {
        const int k = range * kRange + unit * kUnit + half * kUnit / 2 + 4 * j;
        load_features(source, row, k, piece.v[half]);
        if (source.norm) norm_features(source, factor, k, piece.v[half]);
    }
    float scales[2];
    const int rotated = asked_here(source.rotated);
    if (source.norm && (kIsInt8<Element> || rotated)) {
        if (source.normed_kind == kHalf) round_to<__half>(piece);
        if (source.normed_kind == kBfloat16) round_to<__nv_bfloat16>(piece);
    }
    if (rotated) rotate(piece, j);
    if constexpr (kIsInt8<Element>) round_to_codes<kGroup>(piece, scales);
    store_piece(piece, to + Sizes::kHead + row * Sizes::kPitch + unit * kUnit * Sizes::kBytes, j, Element());
    float sums[2];
    for (int half = 0; half < 2; ++half) {
        const auto& v = piece.v[half];
        sums[half] = ((v[0] + v[1]) + (v[2] + v[3])) * (1.0f / Element::kFinal);
    }
    over_group<kGroup>(sums, add);
    for (int half = 0; half < 2; ++half) {
        const int k = unit * kUnit + half * kUnit / 2;
        if (j != 0 || k % kGroup != 0) continue;
        float* of_group = reinterpret_cast<float*>(to) + k / kGroup * kMaxRows + row;
        of_group[0] = sums[half];
        if constexpr (kIsInt8<Element>) of_group[Sizes::kPerGroup] = scales[half];
    }
}

// One range of all rows to `to`, by the whole block; slabs past the end of x are left out. Where there is a norm, sum_squares
// came before. Who reads x synchronizes first.
template <class Element, int kGroup>
AMQ_DEVICE void stage(const Source& source, int range, char* to) {
    using Sizes = Range<Element, kGroup>;
    constexpr int kParts = kRange / (4 * kUnit);
    const int slabs = (source.in_features - range * kRange + kSlab - 1) / kSlab, parts = min(kParts, slabs * kParts / kWarps);
    for (int row = 0; row < source.rows; ++row) {
        const float factor = source.norm ? norm_factor(source, row) : 1.0f;
        for (int part = threadIdx.x / kWarp; part < parts; part += kWarps)
            stage_units<Element, kGroup>(source, range, row, 4 * part, factor, to);
    }
    // Columns of a product past the last row repeat it, and are dropped; but they are numbers.
    const int heads = (kIsInt8<Element> ? 2 : 1) * Sizes::kGroups, rest = kMaxRows - source.rows;
    for (int i = threadIdx.x; i < heads * rest; i += kThreads)
        reinterpret_cast<float*>(to)[i / rest * kMaxRows + source.rows + i % rest] = 0.0f;
}

}  // namespace amq
