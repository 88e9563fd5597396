// Part of quantize_body.h: codes changed one by one where that lowers their row's output error, features in the model's order.
//
// With e = w − ŵ, changing e[k] alone is best where (e H)[k] = 0, so the best code of a feature is the one nearest to
// ŵ[k] + (e H)[k] / H[k, k]: what rounding in order could only do for features after the current one. Each step lowers the
// error or leaves it.

#pragma once

#include "quantize_grid.h"
#include "quantize_panel.h"

namespace amq {
namespace {

// The best code of one feature of one tile; sum: (e H)[feature], [kTile]. moves: what it adds to e, [kTile].
template <class S>
AMQ_INLINE void sweep_feature(const RoundingProblem& p, const Slab& slab, int tile, int64_t feature, const float* sum,
                              float* moves) {
    const int64_t at = (tile * p.in_features + feature) * kTile;
    const int64_t group = (tile * p.n_groups + feature / p.group_size) * kTile;
    const auto curvature = S::splat(p.hessian[feature * p.in_features + feature]);
    for (int v = 0; v < kTile; v += 16) {
        const auto scale = S::load_float(slab.scale + group + v), zero = S::load_float(slab.zero + group + v);
        const auto before = S::load_float(slab.values + at + v);
        const auto aim = S::add(before, S::div(S::load_float(sum + v), curvature));
        const auto code = nearest_code<S>(aim, scale, zero, S::load_float(slab.top + tile * kTile + v));
        const auto now = S::mul(S::sub(code, zero), scale), move = S::sub(before, now);
        S::store(moves + v, move);
        S::store(slab.off + at + v, S::add(S::load_float(slab.off + at + v), move));
        S::store(slab.values + at + v, now);
        store_codes<S>(slab.codes + at + v, code);
    }
}

template <class S>
AMQ_INLINE void sweep_all(const RoundingProblem& p, const Slab& slab) {
    for (int64_t start = 0; start < p.in_features; start += kColumns) {
        const int64_t count = p.in_features - start < kColumns ? p.in_features - start : kColumns;
        clear_sums(slab);
        add_products<S>(slab, p.in_features, p.hessian, p.in_features, start, count, slab.off, 0, p.in_features);
        pack_panel<S>(p.hessian + start * p.in_features + start, p.in_features, count, count, slab.panel);
        alignas(64) float moves[kColumns * kTile];
        for (int t = 0; t < slab.tiles; ++t)
            solve_block<S>(slab, t, p.hessian, p.in_features, start, count, moves,
                           [&](int64_t k, const float* sum) __attribute__((always_inline)) {
                               sweep_feature<S>(p, slab, t, k, sum, moves + (k - start) * kTile);
                           });
    }
}

}  // namespace
}  // namespace amq
