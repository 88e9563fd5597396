// The kernels of quantize.h, once for all instruction sets: `S` is a vector of 16 lanes, a tile is two of them.

#pragma once

#include <cmath>
#include <cstring>

#include "quantize.h"
#include "quantize_grid.h"
#include "quantize_panel.h"
#include "quantize_refit.h"
#include "quantize_sweep.h"
#include "symmetric_body.h"

namespace amq {
namespace {

// Rounds the k-th feature of one tile; sum: Σ_{j<k} (w[j] − ŵ[j]) · M[j, k], [kTile].
template <class S>
AMQ_INLINE void round_feature(const RoundingProblem& p, const Slab& slab, int tile, int64_t k, const float* sum) {
    const int64_t feature = p.order[k], at = (tile * p.in_features + feature) * kTile;
    const int64_t ordered = (tile * p.in_features + k) * kTile;
    const int64_t group = (tile * p.n_groups + feature / p.group_size) * kTile;
    for (int v = 0; v < kTile; v += 16) {
        const auto weight = S::load_float(slab.values + at + v), aim = S::add(weight, S::load_float(sum + v));
        const auto scale = S::load_float(slab.scale + group + v), zero = S::load_float(slab.zero + group + v);
        const auto code = nearest_code<S>(aim, scale, zero, S::load_float(slab.top + tile * kTile + v));
        const auto rounded = S::mul(S::sub(code, zero), scale);
        const auto error = S::sub(weight, rounded);
        S::store(slab.errors + ordered + v, error);
        S::store(slab.off + at + v, error);
        S::store(slab.values + at + v, rounded);
        store_codes<S>(slab.codes + at + v, code);
    }
}

template <class S>
AMQ_INLINE void round_all(const RoundingProblem& p, const Slab& slab) {
    for (int64_t start = 0; start < p.in_features; start += kColumns) {
        const int64_t count = p.in_features - start < kColumns ? p.in_features - start : kColumns;
        clear_sums(slab);
        add_products<S>(slab, p.in_features, p.factor, p.in_features, start, count, slab.errors, 0, start);
        pack_panel<S>(p.factor + start * p.in_features + start, p.in_features, count, count, slab.panel);
        for (int t = 0; t < slab.tiles; ++t)
            solve_block<S>(slab, t, p.factor, p.in_features, start, count, slab.errors + (t * p.in_features + start) * kTile,
                           [&](int64_t k, const float* sum) __attribute__((always_inline)) {
                               round_feature<S>(p, slab, t, k, sum);
                           });
    }
}

// to += a · b, [kTile] each; b null: to += a.
template <class S>
AMQ_INLINE void add_lanes(float* to, const float* a, const float* b) {
    for (int v = 0; v < kTile; v += 16) {
        const auto sum = S::load_float(to + v), x = S::load_float(a + v);
        S::store(to + v, b ? S::fma(x, S::load_float(b + v), sum) : S::add(x, sum));
    }
}

// → push.
template <class S>
AMQ_INLINE void collect_push(const RoundingProblem& p, const Slab& slab) {
    std::memset(slab.push, 0, sizeof(float) * 2 * p.n_groups * kTile * slab.tiles);
    for (int64_t start = 0; start < p.in_features; start += kColumns) {
        const int64_t count = p.in_features - start < kColumns ? p.in_features - start : kColumns;
        clear_sums(slab);
        add_products<S>(slab, p.in_features, p.hessian, p.in_features, start, count, slab.off, 0, p.in_features);
        for (int t = 0; t < slab.tiles; ++t)
            for (int64_t c = 0; c < count; ++c) {
                const int64_t feature = start + c;
                const float* sum = slab.sums + (t * kColumns + c) * kTile;
                float* push = slab.push + (t * p.n_groups + feature / p.group_size) * 2 * kTile;
                add_lanes<S>(push, sum, slab.values + (t * p.in_features + feature) * kTile);
                add_lanes<S>(push + kTile, sum, nullptr);
            }
    }
}

// → inner: products of every two groups' rounded weights through H.
template <class S>
AMQ_INLINE void collect_inner(const RoundingProblem& p, const Slab& slab) {
    const int64_t width = p.group_size < kColumns ? p.group_size : kColumns;  // a divisor of group_size
    std::memset(slab.inner, 0, sizeof(float) * p.n_groups * p.n_groups * kTile * slab.tiles);
    for (int64_t first = 0; first < p.in_features; first += width) {
        const int64_t columns = p.in_features - first < width ? p.in_features - first : width, h = first / p.group_size;
        for (int64_t g = 0; g <= h; ++g) {
            const int64_t from = g * p.group_size;
            const int64_t to = p.in_features - from < p.group_size ? p.in_features : from + p.group_size;
            clear_sums(slab);
            add_products<S>(slab, p.in_features, p.hessian, p.in_features, first, columns, slab.values, from, to);
            for (int t = 0; t < slab.tiles; ++t)
                for (int64_t c = 0; c < columns; ++c)
                    add_lanes<S>(slab.inner + ((t * p.n_groups + g) * p.n_groups + h) * kTile,
                                 slab.sums + (t * kColumns + c) * kTile,
                                 slab.values + (t * p.in_features + first + c) * kTile);
        }
    }
}

// → mixed: products of every group's rounded weights with every group's ones.
template <class S>
AMQ_INLINE void collect_mixed(const RoundingProblem& p, const Slab& slab) {
    for (int64_t g = 0; g < p.n_groups; ++g) {
        const int64_t from = g * p.group_size;
        const int64_t to = p.in_features - from < p.group_size ? p.in_features : from + p.group_size;
        for (int64_t first = 0; first < p.n_groups; first += kColumns) {
            const int64_t columns = p.n_groups - first < kColumns ? p.n_groups - first : kColumns;
            clear_sums(slab);
            add_products<S>(slab, p.in_features, p.sums, p.n_groups, first, columns, slab.values, from, to);
            for (int t = 0; t < slab.tiles; ++t)
                std::memcpy(slab.mixed + ((t * p.n_groups + g) * p.n_groups + first) * kTile,
                            slab.sums + t * kColumns * kTile, sizeof(float) * columns * kTile);
        }
    }
}

template <class S>
void compensated(const RoundingProblem& p, const Slab& slab) {
    round_all<S>(p, slab);
    for (int sweep = 0; sweep < p.sweeps; ++sweep) sweep_all<S>(p, slab);
    collect_push<S>(p, slab);
    collect_inner<S>(p, slab);
    if (p.zero_points == ZeroPoints::fractional) collect_mixed<S>(p, slab);
    for (int t = 0; t < slab.tiles; ++t)
        for (int v = 0; v < kTile; v += 16) refit_rows<S>(p, slab, t, v);
}

template <class S>
constexpr QuantizeKernels make_quantize_kernels() {
    return {fit_grids<S>, nearest<S>, compensated<S>, multiply_columns<S>, finish_rows<S>};
}

}  // namespace
}  // namespace amq

// Defines quantize_kernels_<isa>() from the vector type S.
#define AMQ_DEFINE_QUANTIZE_KERNELS(isa)                                       \
    namespace amq {                                                            \
    const QuantizeKernels* quantize_kernels_##isa() {                          \
        static constexpr QuantizeKernels kernels = make_quantize_kernels<S>(); \
        return &kernels;                                                       \
    }                                                                          \
    }
