// Part of quantize_body.h: grids fitted to groups, and rounding to nearest. As amq/quantize/quantizers/grid.py, 16 rows at a
// time; what is decided per row is a plain loop over lanes, which the compiler vectorises.

#pragma once

#include <cmath>

#include "quantize.h"

namespace amq {
namespace {

constexpr float kTiny = 0x1p-20f;     // the smallest scale: a subnormal fp16 that still has five significant bits
constexpr float kLargest = 65504.0f;  // the largest number of fp16
constexpr float kMostZero = 1024.0f;  // beyond any useful zero point, and still a whole number in fp16

struct GridLanes {
    alignas(64) float scale[16];
    alignas(64) float zero[16];
};

// The nearest integer to x / scale + zero that is a code; ties to even. NaN gives 0.
template <class S>
AMQ_INLINE typename S::F32 nearest_code(typename S::F32 x, typename S::F32 scale, typename S::F32 zero,
                                        typename S::F32 top) {
    const auto round = S::splat(0x1.8p23f);  // adding it leaves no place for a fraction
    const auto code = S::max(S::add(S::div(x, scale), zero), S::splat(0.0f));
    return S::sub(S::add(S::min(code, top), round), round);
}

template <class S>
AMQ_INLINE void store_codes(uint8_t* to, typename S::F32 code) {
    alignas(64) float lanes[16];
    S::store(lanes, code);
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>(lanes[i]));
}

template <class S>
AMQ_INLINE void round_to_half(float* lanes) {
    alignas(64) uint16_t halves[16];
    S::store_half(halves, S::load_float(lanes));
    S::store(lanes, S::load_half(halves));
}

// What fp16 holds of a grid.
template <class S>
AMQ_INLINE void make_storable(GridLanes& grid) {
    for (int i = 0; i < 16; ++i) {
        const float scale = grid.scale[i] > kTiny ? grid.scale[i] : kTiny;
        grid.scale[i] = scale < kLargest ? scale : kLargest;
    }
    round_to_half<S>(grid.scale);
    round_to_half<S>(grid.zero);
}

// The grid from `low` ≤ 0 to `high` ≥ 0, both times `shrink`.
template <class S>
AMQ_INLINE void range_grid(ZeroPoints kind, const float* low, const float* high, float shrink, const float* top,
                           GridLanes& grid) {
    for (int i = 0; i < 16; ++i) {
        const float middle = std::floor((top[i] + 1) / 2), below = -low[i] * shrink, above = high[i] * shrink;
        const float left = below / middle, right = above / (top[i] - middle);
        const float even = left > right ? left : right, whole = (above + below) / top[i];
        grid.scale[i] = kind == ZeroPoints::symmetric ? even : whole;
        grid.zero[i] = middle;
    }
    make_storable<S>(grid);
    if (kind == ZeroPoints::symmetric) return;
    for (int i = 0; i < 16; ++i) {
        const float zero = -low[i] * shrink / grid.scale[i];
        grid.zero[i] = zero < top[i] ? zero : top[i];
        if (kind == ZeroPoints::integer) grid.zero[i] = grid.zero[i] + 0x1.8p23f - 0x1.8p23f;
    }
    round_to_half<S>(grid.zero);
}

// Sums over a group for 16 rows, t = code − zero: importance times what the name says.
struct GroupSums {
    alignas(64) float error[16];
    alignas(64) float t[16];
    alignas(64) float tt[16];
    alignas(64) float tw[16];
};

template <class S>
AMQ_INLINE void sum_group(const float* values, const float* importance, int64_t count, const float* top,
                          const GridLanes& grid, GroupSums& sums) {
    const auto scale = S::load_float(grid.scale), zero = S::load_float(grid.zero), largest = S::load_float(top);
    auto error = S::splat(0.0f), sum_t = error, sum_tt = error, sum_tw = error;
    for (int64_t k = 0; k < count; ++k) {
        const auto weight = S::load_float(values + k * kTile), share = S::splat(importance[k]);
        const auto t = S::sub(nearest_code<S>(weight, scale, zero, largest), zero);
        const auto off = S::sub(S::mul(t, scale), weight), weighted = S::mul(share, t);
        error = S::fma(S::mul(off, off), share, error);
        sum_t = S::add(sum_t, weighted);
        sum_tt = S::fma(weighted, t, sum_tt);
        sum_tw = S::fma(weighted, weight, sum_tw);
    }
    S::store(sums.error, error);
    S::store(sums.t, sum_t);
    S::store(sums.tt, sum_tt);
    S::store(sums.tw, sum_tw);
}

// Least squares w ≈ scale · (code − zero), for both or (not `both`) for the scale alone; a degenerate group keeps its grid.
template <class S>
AMQ_INLINE void refit_group(const GroupSums& sums, float total, const float* weights, bool both, GridLanes& grid) {
    for (int i = 0; i < 16; ++i) {
        const float mean_t = sums.t[i] / total, mean_w = weights[i] / total;
        const float variance = sums.tt[i] / total - mean_t * mean_t;
        const float fitted = (sums.tw[i] / total - mean_t * mean_w) / variance;
        const float scale = both ? fitted : sums.tw[i] / sums.tt[i];
        const float zero = both ? grid.zero[i] + mean_t - mean_w / scale : grid.zero[i];
        const bool good = (both ? variance > 1e-6f : scale <= HUGE_VALF) && scale > kTiny && std::fabs(zero) < kMostZero;
        grid.scale[i] = good ? scale : grid.scale[i];
        grid.zero[i] = good ? zero : grid.zero[i];
    }
    make_storable<S>(grid);
}

// The best grid of one group of 16 rows: see fitted_grid in grid.py.
template <class S>
AMQ_INLINE void fit_group(const RoundingProblem& p, const float* values, const float* importance, int64_t count,
                          const float* top, float* scale, float* zero) {
    auto low = S::splat(0.0f), high = low, weighted = low;
    float total = 0;
    for (int64_t k = 0; k < count; ++k) {
        const auto weight = S::load_float(values + k * kTile);
        low = S::min(weight, low);
        high = S::max(weight, high);
        weighted = S::fma(S::splat(importance[k]), weight, weighted);
        total += importance[k];
    }
    alignas(64) float lows[16], highs[16], weights[16], best[16];
    S::store(lows, low);
    S::store(highs, high);
    S::store(weights, weighted);
    for (int i = 0; i < 16; ++i) best[i] = HUGE_VALF;
    GridLanes grid;
    range_grid<S>(p.zero_points, lows, highs, 1.0f, top, grid);
    std::memcpy(scale, grid.scale, sizeof grid.scale);  // what stays where no error is a number
    std::memcpy(zero, grid.zero, sizeof grid.zero);
    GroupSums sums;
    for (int shrink = 0; shrink < p.n_shrinks; ++shrink) {
        range_grid<S>(p.zero_points, lows, highs, p.shrinks[shrink], top, grid);
        for (int step = 0;; ++step) {
            sum_group<S>(values, importance, count, top, grid, sums);
            for (int i = 0; i < 16; ++i) {
                const bool better = sums.error[i] < best[i];
                best[i] = better ? sums.error[i] : best[i];
                scale[i] = better ? grid.scale[i] : scale[i];
                zero[i] = better ? grid.zero[i] : zero[i];
            }
            if (step == p.refits) break;
            refit_group<S>(sums, total, weights, p.zero_points == ZeroPoints::fractional, grid);
        }
    }
}

template <class S>
void fit_grids(const RoundingProblem& p, const Slab& slab) {
    for (int t = 0; t < slab.tiles; ++t)
        for (int64_t g = 0; g < p.n_groups; ++g) {
            const int64_t first = g * p.group_size, left = p.in_features - first;
            for (int v = 0; v < kTile; v += 16)
                fit_group<S>(p, slab.values + (t * p.in_features + first) * kTile + v, p.importance + first,
                             left < p.group_size ? left : p.group_size, slab.top + t * kTile + v,
                             slab.scale + (t * p.n_groups + g) * kTile + v, slab.zero + (t * p.n_groups + g) * kTile + v);
        }
}

template <class S>
void nearest(const RoundingProblem& p, const Slab& slab) {
    for (int t = 0; t < slab.tiles; ++t)
        for (int64_t k = 0; k < p.in_features; ++k)
            for (int v = 0; v < kTile; v += 16) {
                const int64_t at = (t * p.in_features + k) * kTile + v;
                const int64_t group = (t * p.n_groups + k / p.group_size) * kTile + v;
                store_codes<S>(slab.codes + at,
                               nearest_code<S>(S::load_float(slab.values + at), S::load_float(slab.scale + group),
                                               S::load_float(slab.zero + group), S::load_float(slab.top + t * kTile + v)));
            }
}

}  // namespace
}  // namespace amq
