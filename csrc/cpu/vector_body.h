// The kernels of vector.h, once for all instruction sets, as linear_body.h is for linears: `S` is a vector of 16 lanes.
// A row's result depends on that row alone, never on the rows beside it or on how many there are.

#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "tiles.h"
#include "unroll.h"
#include "vector.h"
#include "vector_attention.h"
#include "vector_lanes.h"
#include "vector_state.h"

namespace amq {
namespace {

template <class S>
void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, float* out) {
    typename S::F32 squares[2] = {};
    int64_t k = 0;
    for (; k + 2 * kWidth <= count; k += 2 * kWidth)
        unroll<2>([&](auto i) __attribute__((always_inline)) {
            const auto v = S::load_float(x + k + i * kWidth);
            squares[i] = S::fma(v, v, squares[i]);
        });
    float sum = sum_lanes<S>(S::add(squares[0], squares[1]));
    for (; k < count; ++k) sum += x[k] * x[k];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + epsilon);
    for (k = 0; k + kWidth <= count; k += kWidth)
        S::store(out + k, S::mul(S::load_float(weight + k), S::mul(S::load_float(x + k), S::splat(factor))));
    for (; k < count; ++k) out[k] = weight[k] * (x[k] * factor);
}

template <class S>
void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    int64_t k = 0;
    for (; k + kWidth <= half; k += kWidth) {
        const auto a = S::load_float(x + k), b = S::load_float(x + half + k);
        const auto c = S::load_float(cos + k), s = S::load_float(sin + k);
        S::store(x + k, S::fnma(b, s, S::mul(a, c)));
        S::store(x + half + k, S::fma(a, s, S::mul(b, c)));
    }
    for (; k < half; ++k) {
        const float a = x[k], b = x[half + k];
        x[k] = a * cos[k] - b * sin[k];
        x[half + k] = b * cos[k] + a * sin[k];
    }
}

template <class S, Activation activation>
AMQ_INLINE typename S::F32 activated(typename S::F32 gate, typename S::F32 up, float limit) {
    if constexpr (activation == Activation::silu) return S::mul(S::mul(gate, sigmoid<S>(gate)), up);
    if constexpr (activation == Activation::gelu_tanh) {  // (1 + tanh(x)) / 2 = sigmoid(2x)
        constexpr float kTwice = 1.5957691216f;            // 2√(2/π)
        const auto cube = S::mul(S::mul(gate, gate), gate);
        const auto inner = S::mul(S::splat(kTwice), S::fma(cube, S::splat(0.044715f), gate));
        return S::mul(S::mul(gate, sigmoid<S>(inner)), up);
    }
    if constexpr (activation == Activation::clamped_swiglu) {
        const auto g = S::min(S::splat(limit), gate);
        const auto u = S::min(S::splat(limit), S::max(S::splat(-limit), up));
        return S::mul(S::mul(g, sigmoid<S>(S::mul(S::splat(1.702f), g))), S::add(u, S::splat(1.0f)));
    }
    const auto positive = S::max(S::splat(0.0f), gate);
    return S::mul(positive, positive);
}

template <class S, Activation activation>
void activate(float* gate, const float* up, float limit, int64_t count) {
    const auto each = [limit](typename S::F32 g, typename S::F32 u) __attribute__((always_inline)) {
        return activated<S, activation>(g, u, limit);
    };
    for_each_line<S>(each, count, gate, activation == Activation::relu2 ? gate : up);
}

template <class S>
void gate_sigmoid(float* x, const float* gate, int64_t count) {
    const auto each = [](typename S::F32 v, typename S::F32 g) __attribute__((always_inline)) { return S::mul(v, sigmoid<S>(g)); };
    for_each_line<S>(each, count, x, gate);
}

template <class S>
void gate_silu(float* x, const float* gate, int64_t count) {
    const auto each = [](typename S::F32 v, typename S::F32 g) __attribute__((always_inline)) {
        return S::mul(v, S::mul(g, sigmoid<S>(g)));
    };
    for_each_line<S>(each, count, x, gate);
}

template <class S>
void add(float* x, const float* y, float scale, int64_t count) {
    const auto each = [scale](typename S::F32 a, typename S::F32 b) __attribute__((always_inline)) {
        return S::fma(b, S::splat(scale), a);
    };
    for_each_line<S>(each, count, x, y);
}

// Four weight rows times one row of x at a time; sums over lanes at the end.
template <class S, class E>
void dense(const void* w, int64_t in_features, int64_t begin, int64_t end, const float* x, int64_t x_stride, int64_t rows,
           float* y, int64_t y_stride) {
    const int64_t whole = in_features / kWidth * kWidth, row_bytes = in_features * E::kBytes;
    for (int64_t n = begin; n < end; ++n) {
        const uint8_t* row = static_cast<const uint8_t*>(w) + n * row_bytes;
        alignas(64) float rest[kWidth] = {};
        if (whole < in_features) {
            alignas(64) uint8_t line[kWidth * E::kBytes] = {};
            std::memcpy(line, row + whole * E::kBytes, (in_features - whole) * E::kBytes);
            S::store(rest, E::load(line));
        }
        for (int64_t m = 0; m < rows; ++m) {
            const float* values = x + m * x_stride;
            typename S::F32 sum[4] = {};
            int64_t k = 0;
            for (; k + 4 * kWidth <= in_features; k += 4 * kWidth)
                unroll<4>([&](auto i) __attribute__((always_inline)) {
                    S::prefetch(row + k * E::kBytes + i * kWidth * E::kBytes + 2048);
                    sum[i] = S::fma(E::load(row + (k + i * kWidth) * E::kBytes), S::load_float(values + k + i * kWidth),
                                    sum[i]);
                });
            for (; k < whole; k += kWidth) sum[0] = S::fma(E::load(row + k * E::kBytes), S::load_float(values + k), sum[0]);
            float total = sum_lanes<S>(S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3])));
            for (int64_t i = whole; i < in_features; ++i) total += rest[i - whole] * values[i];
            y[m * y_stride + n] = total;
        }
    }
}

template <class S, class E>
void widen(const void* w, int64_t count, float* out) {
    const uint8_t* p = static_cast<const uint8_t*>(w);
    int64_t k = 0;
    for (; k + kWidth <= count; k += kWidth) S::store(out + k, E::load(p + k * E::kBytes));
    if (k == count) return;
    alignas(64) uint8_t line[kWidth * E::kBytes] = {};
    alignas(64) float rest[kWidth];
    std::memcpy(line, p + k * E::kBytes, (count - k) * E::kBytes);
    S::store(rest, E::load(line));
    std::memcpy(out + k, rest, (count - k) * sizeof(float));
}

// A function for each row of kCaches.
#define AMQ_OF_CACHES(name)                                                         \
    name<S, Float32Cache<S>, Float32Cache<S>>, name<S, HalfCache<S>, HalfCache<S>>, \
        name<S, ByteCache<S>, ByteCache<S>>, name<S, ByteCache<S>, NibbleCache<S>>, \
        name<S, NibbleCache<S, true>, NibbleCache<S>>

template <class S>
constexpr VectorKernels make_vector_kernels() {
    return {rms_norm<S>,
            rotate<S>,
            {activate<S, Activation::silu>, activate<S, Activation::gelu_tanh>, activate<S, Activation::clamped_swiglu>,
             activate<S, Activation::relu2>},
            add<S>,
            gate_sigmoid<S>,
            gate_silu<S>,
            softcap<S>,
            unit<S>,
            convolve<S>,
            delta<S>,
            {AMQ_OF_CACHES(store_position)},
            {AMQ_OF_CACHES(round_page)},
            {AMQ_OF_CACHES(attend)},
            S::kGemmRows,
            merge<S>,
            finish<S>,
            {dense<S, Float32<S>>, dense<S, Half<S>>, dense<S, Bfloat<S>>},
            {widen<S, Float32<S>>, widen<S, Half<S>>, widen<S, Bfloat<S>>}};
}

#undef AMQ_OF_CACHES

}  // namespace
}  // namespace amq

// Defines vector_kernels_<isa>() from the vector type S.
#define AMQ_DEFINE_VECTOR_KERNELS(isa)                                 \
    namespace amq {                                                    \
    const VectorKernels* vector_kernels_##isa() {                      \
        static constexpr VectorKernels kernels = make_vector_kernels<S>(); \
        return &kernels;                                               \
    }                                                                  \
    }
