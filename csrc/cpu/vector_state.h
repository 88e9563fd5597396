// The kernels of vector.h for operators that carry a state on, once for all instruction sets: `S` is a vector of 16 lanes.
// Sums run in the order of tokens and features, whatever the number of tokens: a text in two calls is the text in one, bit
// for bit.

#pragma once

#include <cmath>
#include <cstring>

#include "unroll.h"
#include "vector.h"
#include "vector_lanes.h"

namespace amq {
namespace {

// Up to 16 values, zeros behind them.
template <class S>
AMQ_INLINE typename S::F32 load_some(const float* p, int64_t count) {
    if (count >= kWidth) return S::load_float(p);
    alignas(64) float values[kWidth] = {};
    std::memcpy(values, p, count * sizeof(float));
    return S::load_float(values);
}

template <class S>
AMQ_INLINE void store_some(float* p, typename S::F32 v, int64_t count) {
    if (count >= kWidth) return S::store(p, v);
    alignas(64) float values[kWidth];
    S::store(values, v);
    std::memcpy(p, values, count * sizeof(float));
}

template <class S>
void unit(float* x, float epsilon, float factor, int64_t count) {
    auto squares = S::splat(0.0f);
    for (int64_t k = 0; k < count; k += kWidth) {
        const auto v = load_some<S>(x + k, count - k);
        squares = S::fma(v, v, squares);
    }
    const auto scale = S::splat(factor / std::sqrt(sum_lanes<S>(squares) + epsilon));
    for (int64_t k = 0; k < count; k += kWidth)
        store_some<S>(x + k, S::mul(load_some<S>(x + k, count - k), scale), count - k);
}

template <class S>
void convolve(const ConvolveArgs& args) {
    const int64_t before = args.kernel - 1;
    for (int64_t t = 0; t < args.tokens; ++t) {
        for (int64_t c = 0; c < args.channels; c += kWidth) {
            const int64_t count = args.channels - c;
            auto sum = args.bias ? load_some<S>(args.bias + c, count) : S::splat(0.0f);
            for (int64_t j = 0; j < args.kernel; ++j) {
                const int64_t from = t + j - before;
                if (from < 0 && !args.state) continue;
                const float* x = from < 0 ? args.state + (from + before) * args.state_stride : args.x + from * args.x_stride;
                sum = S::fma(load_some<S>(args.weight + j * args.weight_stride + c, count), load_some<S>(x + c, count), sum);
            }
            if (args.silu) sum = S::mul(sum, sigmoid<S>(sum));
            store_some<S>(args.out + t * args.out_stride + c, sum, count);
        }
    }
}

// The recurrence for `tiles` vectors of columns. Sums over rows of S are kept in two halves, of even and of odd rows: twice as
// many additions are under way at a time.
template <class S, int tiles>
struct DeltaColumns {
    using F32 = typename S::F32;
    struct Sums {
        F32 of[2][tiles] = {};
        AMQ_INLINE F32 total(int i) const { return S::add(of[0][i], of[1][i]); }
    };

    const DeltaArgs& args;
    const int64_t column, tile;  // the first one; floats of S for each vector of columns
    float* const state;
    Sums remembered, out;  // Sᵀk of the token to come, before its decay; Sᵀq
    F32 decay, change[tiles];

    DeltaColumns(const DeltaArgs& given, int64_t first)
        : args(given), column(first), tile(given.key_dim * kWidth), state(given.state + first * given.key_dim) {}

    AMQ_INLINE void remember(const float* k) {
        for (int64_t r = 0; r < args.key_dim; r += 2)
            unroll<2>([&](auto half) __attribute__((always_inline)) {
                const auto key = S::splat(k[r + half]);
                const float* row = state + (r + half) * kWidth;
                unroll<tiles>([&](auto i) __attribute__((always_inline)) {
                    remembered.of[half][i] = S::fma(key, S::load_float(row + i * tile), remembered.of[half][i]);
                });
            });
    }

    // A row of S with what the token adds gives its part of the token's output, and of what the next one remembers.
    template <bool last>
    AMQ_INLINE void walk(const float* q, const float* k, const float* next) {
        for (int64_t r = 0; r < args.key_dim; r += 2)
            unroll<2>([&](auto half) __attribute__((always_inline)) {
                const auto key = S::splat(k[r + half]), query = S::splat(q[r + half]);
                float* row = state + (r + half) * kWidth;
                unroll<tiles>([&](auto i) __attribute__((always_inline)) {
                    const auto s = S::fma(key, change[i], S::mul(decay, S::load_float(row + i * tile)));
                    S::store(row + i * tile, s);
                    out.of[half][i] = S::fma(query, s, out.of[half][i]);
                    if constexpr (!last)
                        remembered.of[half][i] = S::fma(S::splat(next[r + half]), s, remembered.of[half][i]);
                });
            });
    }

    AMQ_INLINE void run() {
        remember(args.k);
        for (int64_t t = 0; t < args.tokens; ++t) {
            const float *q = args.q + t * args.stride, *k = args.k + t * args.stride;
            const float* v = args.v + t * args.stride + column;
            decay = S::splat(args.decay[t * args.stride]);
            const auto beta = S::splat(args.beta[t * args.stride]);
            unroll<tiles>([&](auto i) __attribute__((always_inline)) {
                change[i] = S::mul(beta, S::fnma(decay, remembered.total(i), S::load_float(v + i * kWidth)));
            });
            remembered = out = {};
            if (t + 1 < args.tokens) walk<false>(q, k, k + args.stride);
            else walk<true>(q, k, nullptr);
            unroll<tiles>([&](auto i) __attribute__((always_inline)) {
                S::store(args.out + t * args.stride + column + i * kWidth, out.total(i));
            });
        }
    }
};

template <class S>
void delta(const DeltaArgs& args) {
    constexpr int kTiles = S::kGemmTiles;
    int64_t column = 0;
    if (args.tokens > 1)  // one token waits for memory, which comes sooner in one stream than in several
        for (; column + kTiles * kWidth <= args.columns; column += kTiles * kWidth)
            DeltaColumns<S, kTiles>(args, column).run();
    for (; column < args.columns; column += kWidth) DeltaColumns<S, 1>(args, column).run();
}

}  // namespace
}  // namespace amq
