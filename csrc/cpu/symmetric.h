// Sums of xᵀx over tokens, and Cholesky factors, by the product of quantize_panel.h. The results do not depend on the number
// of threads.

#pragma once

#include <cstdint>

#include "isa.h"

namespace amq {

constexpr int kTile = 32;           // rows of a tile: lanes
constexpr int kMaxTiles = 4;        // tiles that share what is read of H
constexpr int kColumns = 64;        // input features whose sums are computed at once
constexpr int kDepth = 128;         // input features that are summed over at once; at least a group

// Σ of matrix[j, first + c] · matrix[j, lane + i] over the rows `from` … `to` − 1, for c < columns and i < lanes.
struct ColumnProduct {
    const float* matrix;
    int64_t stride, from, to;
    int64_t first, columns;  // at most kColumns
    int64_t lane, lanes;     // at most kTile · kMaxTiles
};

struct ProductMemory {
    float* lanes;  // [kMaxTiles][kDepth][kTile], for the work
    float* panel;  // [kDepth · kColumns], for the work
    float* sums;   // [kMaxTiles][kColumns][kTile]: the result
};

// gram [features, features] += xᵀx for x [tokens, features], on its upper triangle; below, anything may stand.
void add_gram(const Isa& isa, const float* x, int64_t tokens, int64_t features, float* gram, int threads);

// Overwrites the upper triangle of a symmetric matrix with R, matrix = Rᵀ R; false where it is not positive definite.
bool cholesky(const Isa& isa, float* matrix, int64_t size, int threads);

// Copies what is above the diagonal below it.
void mirror(float* matrix, int64_t size, int threads);

}  // namespace amq
