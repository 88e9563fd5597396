// Part of quantize_body.h: the kernels of symmetric.h.

#pragma once

#include <cstring>

#include "quantize_panel.h"

namespace amq {
namespace {

template <class S>
void multiply_columns(const ColumnProduct& p, const ProductMemory& memory) {
    const int64_t tiles = (p.lanes + kTile - 1) / kTile;
    std::memset(memory.sums, 0, sizeof(float) * tiles * kColumns * kTile);
    for (int64_t j = p.from; j < p.to; j += kDepth) {
        const int64_t rows = p.to - j < kDepth ? p.to - j : kDepth;
        pack_panel<S>(p.matrix + j * p.stride + p.first, p.stride, rows, p.columns, memory.panel);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t lane = p.lane + t * kTile, left = p.lane + p.lanes - lane, width = left < kTile ? left : kTile;
            float* x = memory.lanes + t * kDepth * kTile;
            for (int64_t row = 0; row < rows; ++row) {
                const float* from = p.matrix + (j + row) * p.stride + lane;
                if (width == kTile)
                    std::memcpy(x + row * kTile, from, sizeof(float) * kTile);
                else
                    for (int64_t i = 0; i < kTile; ++i) x[row * kTile + i] = i < width ? from[i] : 0.0f;
            }
            multiply_panel<S>(memory.panel, rows, 0, rows, 0, strips<S>(p.columns), x,
                              memory.sums + t * kColumns * kTile);
        }
    }
}

// The rows `first` … `first` + `rows` − 1 of a factor at some lanes right of their square, which is finished: the rows above
// are subtracted already, those of the square are now, and each is divided by its pivot.
template <class S>
void finish_rows(float* factor, int64_t size, int64_t first, int64_t rows, int64_t lane, int64_t lanes) {
    for (int64_t r = 0; r < rows; ++r) {
        float* row = factor + (first + r) * size;
        const float inverse = 1.0f / row[first + r];
        for (int64_t above = 0; above < r; ++above) {
            const float* other = factor + (first + above) * size;
            const float share = other[first + r];
            int64_t i = lane;
            for (; i + 16 <= lane + lanes; i += 16)
                S::store(row + i, S::fnma(S::splat(share), S::load_float(other + i), S::load_float(row + i)));
            for (; i < lane + lanes; ++i) row[i] -= share * other[i];
        }
        for (int64_t i = lane; i < lane + lanes; ++i) row[i] *= inverse;
    }
}

}  // namespace
}  // namespace amq
