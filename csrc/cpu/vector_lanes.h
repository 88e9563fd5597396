// What kernels of vector_body.h and vector_state.h share: vectors of 16 lanes, and loops over them.

#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace amq {
namespace {

constexpr int64_t kWidth = 16;

template <class S>
AMQ_INLINE float sum_lanes(typename S::F32 v) {
    alignas(64) float lanes[kWidth];
    S::store(lanes, v);
    for (int width = kWidth / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <class S>
AMQ_INLINE float largest_lane(typename S::F32 v) {
    alignas(64) float lanes[kWidth];
    S::store(lanes, v);
    for (int width = kWidth / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// e^x to 2e-7 of itself, for x in [-87, 88]; beyond, the value at the end of the range. NaN stays NaN.
//
// x = n·ln 2 + r with an integer n and |r| ≤ ln 2 / 2, so e^x = 2^n · e^r: a Taylor polynomial, and n added to the exponent.
template <class S>
AMQ_INLINE typename S::F32 exponential(typename S::F32 x) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the lowest bits
    constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // the first has 15 bits: n times it is exact
    x = S::min(S::splat(88.0f), S::max(S::splat(-87.0f), x));
    const auto shifted = S::fma(x, S::splat(1.44269504f), S::splat(kRound));
    const auto n = S::sub(shifted, S::splat(kRound));
    const auto r = S::fnma(n, S::splat(kLn2Low), S::fnma(n, S::splat(kLn2High), x));
    auto sum = S::splat(1.0f / 5040);
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = S::fma(sum, r, S::splat(coefficient));
    return S::as_float(S::add_int(S::as_int(sum), S::template shift<-23>(S::as_int(shifted))));
}

// Each(values…) of 16 elements of the vectors x… at a time, into the first of them.
template <class S, class Each, class... Rest>
AMQ_INLINE void for_each_line(const Each& each, int64_t count, float* x, const Rest*... rest) {
    int64_t k = 0;
    for (; k + kWidth <= count; k += kWidth) S::store(x + k, each(S::load_float(x + k), S::load_float(rest + k)...));
    if (k == count) return;
    const auto part = [&](const float* p) __attribute__((always_inline)) {
        alignas(64) float line[kWidth] = {};
        std::memcpy(line, p + k, (count - k) * sizeof(float));
        return S::load_float(line);
    };
    alignas(64) float line[kWidth];
    S::store(line, each(part(x), part(rest)...));
    std::memcpy(x + k, line, (count - k) * sizeof(float));
}

template <class S>
AMQ_INLINE typename S::F32 sigmoid(typename S::F32 x) {
    const auto one = S::splat(1.0f);
    return S::div(one, S::add(one, exponential<S>(S::sub(S::splat(0.0f), x))));
}

// c · tanh(x / c) = c − 2c / (e^(2x / c) + 1)
template <class S>
AMQ_INLINE typename S::F32 capped(typename S::F32 x, float c) {
    const auto power = exponential<S>(S::mul(x, S::splat(2 / c)));
    return S::sub(S::splat(c), S::div(S::splat(2 * c), S::add(power, S::splat(1.0f))));
}

template <class S>
void softcap(float* x, float c, int64_t count) {
    for_each_line<S>([c](typename S::F32 v) __attribute__((always_inline)) { return capped<S>(v, c); }, count, x);
}

// What 16 elements of a cache or a weight are as float32, and back.
template <class S>
struct Float32 {
    static constexpr int64_t kBytes = 4;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_float(reinterpret_cast<const float*>(p)); }
    static AMQ_INLINE void store(uint8_t* p, typename S::F32 v) { S::store(reinterpret_cast<float*>(p), v); }
};
template <class S>
struct Half {
    static constexpr int64_t kBytes = 2;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_half(p); }
    static AMQ_INLINE void store(uint8_t* p, typename S::F32 v) { S::store_half(p, v); }
};
template <class S>
struct Bfloat {
    static constexpr int64_t kBytes = 2;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_bfloat(p); }
};

}  // namespace
}  // namespace amq
