// Part of quantize_body.h: the product that everything is made of. 32 lanes are multiplied by packed columns of a matrix.

#pragma once

#include <cstring>

#include "quantize.h"
#include "unroll.h"

namespace amq {
namespace {

// Panels: `rows` rows of a matrix and `columns` columns, as strips of kGemmRows columns, zeros after the last.
template <class S>
AMQ_INLINE void pack_panel(const float* matrix, int64_t stride, int64_t rows, int64_t columns, float* panel) {
    constexpr int kStrip = S::kGemmRows;
    for (int64_t c = 0; c < columns; c += kStrip, panel += rows * kStrip) {
        const int64_t width = columns - c < kStrip ? columns - c : kStrip;
        for (int64_t j = 0; j < rows; ++j) {
            const float* from = matrix + j * stride + c;
            float* to = panel + j * kStrip;
            if (width == kStrip)
                std::memcpy(to, from, sizeof(float) * kStrip);
            else
                for (int i = 0; i < kStrip; ++i) to[i] = i < width ? from[i] : 0.0f;
        }
    }
}

// sums[c] += Σ_j panel[j, c] · x[j] for the columns of the strips `begin` … `end` − 1, `panel_rows` rows in each of which
// `rows` from `skip` on are taken; sums, x: [.., kTile].
template <class S>
AMQ_INLINE void multiply_panel(const float* panel, int64_t panel_rows, int64_t skip, int64_t rows, int64_t begin,
                               int64_t end, const float* x, float* sums) {
    constexpr int kStrip = S::kGemmRows, kVectors = S::kGemmTiles;
    for (int64_t strip = begin; strip < end; ++strip) {
        const float* from = panel + (strip * panel_rows + skip) * kStrip;
        for (int v = 0; v < kTile / 16; v += kVectors) {
            float* to = sums + strip * kStrip * kTile + v * 16;
            typename S::F32 sum[kStrip][kVectors] = {};  // added at the end: long sums of short sums round less
            const float* value = x + v * 16;
            const float* factor = from;
            for (int64_t j = 0; j < rows; ++j, value += kTile, factor += kStrip) {
                typename S::F32 line[kVectors];
                unroll<kVectors>([&](auto t) __attribute__((always_inline)) { line[t] = S::load_float(value + t * 16); });
                unroll<kStrip>([&](auto c) __attribute__((always_inline)) {
                    const auto wide = S::splat(factor[c]);
                    unroll<kVectors>([&](auto t) __attribute__((always_inline)) {
                        sum[c][t] = S::fma(wide, line[t], sum[c][t]);
                    });
                });
            }
            unroll<kStrip>([&](auto c) __attribute__((always_inline)) {
                unroll<kVectors>([&](auto t) __attribute__((always_inline)) {
                    float* place = to + c * kTile + t * 16;
                    S::store(place, S::add(S::load_float(place), sum[c][t]));
                });
            });
        }
    }
}

template <class S>
AMQ_INLINE int64_t strips(int64_t columns) {
    return (columns + S::kGemmRows - 1) / S::kGemmRows;
}

AMQ_INLINE void clear_sums(const Slab& slab) {
    std::memset(slab.sums, 0, sizeof(float) * kColumns * kTile * slab.tiles);
}

// Adds to every tile's sums the product of the features `from` … `to` − 1 of x [tiles][in_features][kTile] with `columns`
// columns of `matrix` from `first` on.
template <class S>
AMQ_INLINE void add_products(const Slab& slab, int64_t in_features, const float* matrix, int64_t stride, int64_t first,
                             int64_t columns, const float* x, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j += kDepth) {
        const int64_t rows = to - j < kDepth ? to - j : kDepth;
        pack_panel<S>(matrix + j * stride + first, stride, rows, columns, slab.panel);
        for (int t = 0; t < slab.tiles; ++t)
            multiply_panel<S>(slab.panel, rows, 0, rows, 0, strips<S>(columns), x + (t * in_features + j) * kTile,
                              slab.sums + t * kColumns * kTile);
    }
}

// Features `start` … `start` + `count` − 1 of one tile, one after another; their sums are there, and the panel holds the square
// of `matrix` on its diagonal. solve(k, sum) leaves what feature k gives at given + (k − start) · kTile, [kTile], and
// matrix[k, later] times that is added to the sums of those behind it.
template <class S, class Solve>
AMQ_INLINE void solve_block(const Slab& slab, int tile, const float* matrix, int64_t stride, int64_t start, int64_t count,
                            const float* given, const Solve& solve) {
    constexpr int kStrip = S::kGemmRows;
    float* sums = slab.sums + tile * kColumns * kTile;
    for (int64_t begin = 0; begin < count; begin += kStrip) {
        const int64_t width = count - begin < kStrip ? count - begin : kStrip;
        const float* strip = given + begin * kTile;
        for (int64_t k = 0; k < width; ++k) {
            solve(start + begin + k, sums + (begin + k) * kTile);
            const float* row = matrix + (start + begin + k) * stride + start + begin;
            for (int64_t later = k + 1; later < width; ++later)
                for (int v = 0; v < kTile; v += 16) {
                    float* to = sums + (begin + later) * kTile + v;
                    S::store(to, S::fma(S::splat(row[later]), S::load_float(strip + k * kTile + v), S::load_float(to)));
                }
        }
        multiply_panel<S>(slab.panel, count, begin, width, begin / kStrip + 1, strips<S>(count), strip, sums);
    }
}

}  // namespace
}  // namespace amq
