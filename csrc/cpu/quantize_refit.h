// Part of quantize_body.h: scale and zero point of all groups of a row for the least output error at fixed codes.
//
// Unknowns are a step along every group's rounded weights ŵ_g and, where zero points are free, along its ones: α_g and β_g
// make of (c − z)·s the grid s' = s·(1 + α), z' = z − β / s'. The normal equations (Φᵀ H Φ) δ = Φᵀ H (w − ŵ) are solved in
// float64 by Cholesky, 16 rows side by side, with the diagonal scaled to one and a ridge of a millionth. An unknown that
// depends on those before it (ones and ŵ_g of a group of equal codes) does not move. A row takes its new grid where all of
// it can be stored and, as stored, lowers the error; groups of a row were solved together, so it takes all or none.

#pragma once

#include <cmath>

#include "quantize_grid.h"

namespace amq {
namespace {

constexpr double kRidge = 1e-6;
constexpr double kDependent = 1e-5;  // of a pivot, as a share of its diagonal: float32 sums say nothing below it

AMQ_INLINE int64_t triangle(int64_t row) { return row * (row + 1) / 2; }

// The lower triangle of Φᵀ H Φ for 16 lanes of a tile; unknown `each`·g is ŵ_g, and the next one (each == 2) its ones.
AMQ_INLINE void fill_normal(const RoundingProblem& p, const Slab& slab, int tile, int lane, int each) {
    const int64_t groups = p.n_groups, base = tile * groups * groups;
    for (int64_t h = 0; h < groups; ++h)
        for (int64_t g = 0; g <= h; ++g) {
            const float* inner = slab.inner + (base + g * groups + h) * kTile + lane;
            double* row = slab.normal + (triangle(each * h) + each * g) * 16;
            for (int i = 0; i < 16; ++i) row[i] = inner[i];
            if (each == 1) continue;
            const float* with_ones = slab.mixed + (base + h * groups + g) * kTile + lane;
            const float* ones_with = slab.mixed + (base + g * groups + h) * kTile + lane;
            if (g < h)
                for (int i = 0; i < 16; ++i) row[16 + i] = with_ones[i];
            double* next = slab.normal + (triangle(2 * h + 1) + 2 * g) * 16;
            for (int i = 0; i < 16; ++i) next[i] = ones_with[i];
            for (int i = 0; i < 16; ++i) next[16 + i] = p.totals[g * groups + h];
        }
}

// One entry of the factor: row[column] − Σ_{k<column} row[k] · other[k], for 16 lanes.
AMQ_INLINE void reduce_entry(const double* row, const double* other, int64_t column, double* sum) {
    for (int i = 0; i < 16; ++i) sum[i] = row[column * 16 + i];
    for (int64_t k = 0; k < column; ++k)
        for (int i = 0; i < 16; ++i) sum[i] -= row[k * 16 + i] * other[k * 16 + i];
}

// Overwrites the lower triangle of `a` with its Cholesky factor, scaled; inverse: 1 / pivots, 0 of dependent unknowns;
// size: 1 / √diagonal.
AMQ_INLINE void factorize(double* a, int64_t n, double* size, double* inverse) {
    for (int64_t r = 0; r < n; ++r)
        for (int i = 0; i < 16; ++i) {
            const double d = a[(triangle(r) + r) * 16 + i];
            size[r * 16 + i] = d > 0 ? 1 / std::sqrt(d) : 0;
        }
    for (int64_t r = 0; r < n; ++r) {
        double* row = a + triangle(r) * 16;
        for (int64_t c = 0; c < r; ++c)
            for (int i = 0; i < 16; ++i) row[c * 16 + i] *= size[r * 16 + i] * size[c * 16 + i];
        for (int i = 0; i < 16; ++i) row[r * 16 + i] = 1 + kRidge;
        alignas(64) double sum[16];
        for (int64_t c = 0; c < r; ++c) {
            reduce_entry(row, a + triangle(c) * 16, c, sum);
            for (int i = 0; i < 16; ++i) row[c * 16 + i] = sum[i] * inverse[c * 16 + i];
        }
        reduce_entry(row, row, r, sum);
        for (int i = 0; i < 16; ++i) inverse[r * 16 + i] = sum[i] > kDependent ? 1 / std::sqrt(sum[i]) : 0;
    }
}

// x ← the solution for the right side x, [n][16].
AMQ_INLINE void substitute(const double* a, int64_t n, const double* size, const double* inverse, double* x) {
    for (int64_t r = 0; r < n; ++r) {
        for (int i = 0; i < 16; ++i) x[r * 16 + i] *= size[r * 16 + i];
        for (int64_t k = 0; k < r; ++k)
            for (int i = 0; i < 16; ++i) x[r * 16 + i] -= a[(triangle(r) + k) * 16 + i] * x[k * 16 + i];
        for (int i = 0; i < 16; ++i) x[r * 16 + i] *= inverse[r * 16 + i];
    }
    for (int64_t r = n; r-- > 0;) {
        for (int i = 0; i < 16; ++i) x[r * 16 + i] *= inverse[r * 16 + i];
        for (int64_t k = 0; k < r; ++k)
            for (int i = 0; i < 16; ++i) x[k * 16 + i] -= a[(triangle(r) + k) * 16 + i] * x[r * 16 + i];
        for (int i = 0; i < 16; ++i) x[r * 16 + i] *= size[r * 16 + i];
    }
}

// change ← −2 δᵀ push + δᵀ N δ of 16 lanes.
AMQ_INLINE void error_change(const double* normal, int64_t n, const double* push, const double* delta, double* change) {
    for (int i = 0; i < 16; ++i) change[i] = 0;
    for (int64_t r = 0; r < n; ++r) {
        alignas(64) double sum[16];
        const double* row = normal + triangle(r) * 16;
        for (int i = 0; i < 16; ++i) sum[i] = row[r * 16 + i] * delta[r * 16 + i] - 2 * push[r * 16 + i];
        for (int64_t k = 0; k < r; ++k)
            for (int i = 0; i < 16; ++i) sum[i] += 2 * row[k * 16 + i] * delta[k * 16 + i];
        for (int i = 0; i < 16; ++i) change[i] += sum[i] * delta[r * 16 + i];
    }
}

// The grid that a step makes, as it is stored, into `grids`; `delta` becomes the step that this is, `good` whether every group
// of a row can be stored.
template <class S>
AMQ_INLINE void take_step(const RoundingProblem& p, const float* scale, const float* zero, int each, double* delta,
                          GridLanes* grids, bool* good) {
    for (int i = 0; i < 16; ++i) good[i] = true;
    for (int64_t g = 0; g < p.n_groups; ++g) {
        GridLanes& grid = grids[g];
        double* alpha = delta + each * g * 16;
        for (int i = 0; i < 16; ++i) {
            const float old = scale[g * kTile + i], before = zero[g * kTile + i];
            const double wanted = old * (1 + alpha[i]), moved = each == 2 ? before - alpha[16 + i] / wanted : before;
            const bool fits = wanted > kTiny && wanted <= kLargest && std::fabs(moved) < kMostZero;
            good[i] = good[i] && fits;
            grid.scale[i] = fits ? static_cast<float>(wanted) : old;
            grid.zero[i] = fits ? static_cast<float>(moved) : before;
        }
        make_storable<S>(grid);
        for (int i = 0; i < 16; ++i) {
            const double old = scale[g * kTile + i], now = grid.scale[i];
            alpha[i] = now / old - 1;
            if (each == 2) alpha[16 + i] = now * (static_cast<double>(zero[g * kTile + i]) - grid.zero[i]);
        }
    }
}

template <class S>
AMQ_INLINE void refit_rows(const RoundingProblem& p, const Slab& slab, int tile, int lane) {
    const int each = p.zero_points == ZeroPoints::fractional ? 2 : 1;
    const int64_t n = each * p.n_groups;
    double *delta = slab.step, *push = delta + n * 16, *size = push + n * 16, *inverse = size + n * 16;
    for (int64_t r = 0; r < n; ++r) {
        const float* from = slab.push + (tile * p.n_groups * 2 + r * (3 - each)) * kTile + lane;
        for (int i = 0; i < 16; ++i) push[r * 16 + i] = delta[r * 16 + i] = from[i];
    }
    fill_normal(p, slab, tile, lane, each);
    factorize(slab.normal, n, size, inverse);
    substitute(slab.normal, n, size, inverse, delta);
    float* scale = slab.scale + tile * p.n_groups * kTile + lane;
    float* zero = slab.zero + tile * p.n_groups * kTile + lane;
    GridLanes* grids = reinterpret_cast<GridLanes*>(size);  // 2 · 16 floats a group, where n · 16 doubles were
    bool good[16];
    take_step<S>(p, scale, zero, each, delta, grids, good);
    fill_normal(p, slab, tile, lane, each);
    alignas(64) double change[16];
    error_change(slab.normal, n, push, delta, change);
    for (int64_t g = 0; g < p.n_groups; ++g)
        for (int i = 0; i < 16; ++i) {
            const bool better = good[i] && change[i] < 0;
            scale[g * kTile + i] = better ? grids[g].scale[i] : scale[g * kTile + i];
            zero[g * kTile + i] = better ? grids[g].zero[i] : zero[g * kTile + i];
        }
}

}  // namespace
}  // namespace amq
