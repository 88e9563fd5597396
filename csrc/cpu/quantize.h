// Quantizing weights: grids fitted to every group, rounding, and packing, for a few rows that stay in one core's cache.
//
// Two ways to round. To nearest: each group's grid, then its codes. Error-compensated (GPTQ; the specification is
// amq/quantize/quantizers/gptq.py): with the symmetric H [in_features, in_features] and its features in the order in which they
// are rounded, H = M D Mᵀ, M upper triangular with ones on its diagonal and D diagonal. Then
//
//     (w − ŵ) H (w − ŵ)ᵀ = Σ_k D[k] · (aim[k] − ŵ[k])²,     aim[k] = w[k] + Σ_{j<k} (w[j] − ŵ[j]) · M[j, k]
//
// so that rounding `aim` feature by feature is what the reference does with the factor of H⁻¹, without the inverse. After it,
// codes change one by one where that lowers the error (quantize_sweep.h), and scale and zero point of all groups of a row are
// solved again. In the basis of a group's rounded weights ŵ_g and of ones, Φ, a step δ of the grid changes the error by
// −2 δᵀ Φᵀ H (w − ŵ) + δᵀ (Φᵀ H Φ) δ, which is never the difference of two large numbers.
//
// 32 rows lie side by side (a *tile*), feature after feature, so that every step is a loop over lanes: no row sees another,
// and the result depends neither on the rows beside it nor on the number of threads.

#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "symmetric.h"
#include "vector.h"

namespace amq {

enum class ZeroPoints { fractional, integer, symmetric };

struct CodeLayout {
    int levels, unit_codes, unit_bytes;  // amq/formats.py
};

// Where the codes of one weight in one format go; fp16 bits.
struct PackedRows {
    uint8_t* qweight;      // [rows, row_bytes]
    uint16_t* scale;       // [rows, n_groups]
    uint16_t* zero_point;  // [rows, n_groups]
};

struct WeightRows {
    const void* weight;  // [rows, in_features]
    Element element;
    int64_t rows;
    std::vector<PackedRows> results;  // one per format
};

// What all rows have in common.
struct RoundingProblem {
    int64_t in_features, group_size, n_groups;
    ZeroPoints zero_points;
    const float* importance;  // [in_features], at least 0: a fitted grid has the least Σ importance · (w − ŵ)²
    const float* shrinks;     // [n_shrinks]: what a group's range is tried at
    int n_shrinks, refits;    // and how often each is refitted

    // Null for rounding to nearest.
    int sweeps;               // after rounding: how often every code is looked at again
    const float* hessian;     // [in_features, in_features]
    const float* factor;      // [in_features, in_features], in order: M, on and above its diagonal
    const int64_t* order;     // [in_features]: which feature comes k-th
    const float* sums;        // [in_features, n_groups]: Σ of H's columns of each group
    const double* totals;     // [n_groups, n_groups]: Σ of `sums` over rows of each group
};

// Some tiles at work. Everything but `codes` is [tiles][…][kTile].
struct Slab {
    int tiles;
    float* values;   // [in_features]: weights, then rounded weights
    float* errors;   // [in_features], in order: w − ŵ
    float* off;      // [in_features]: w − ŵ
    uint8_t* codes;  // [in_features]
    float* scale;    // [n_groups]
    float* zero;     // [n_groups]
    float* top;      // [1]: the largest code
    float* sums;     // [kColumns]
    float* panel;    // kDepth · kColumns elements of H or its factor, in strips
    float* inner;    // [n_groups, n_groups]: ŵ_gᵀ H ŵ_h for g ≤ h
    float* mixed;    // [n_groups, n_groups]: ŵ_gᵀ H 1_h
    float* push;     // [2 · n_groups]: ŵ_gᵀ H (w − ŵ) and 1_gᵀ H (w − ŵ)
    double* normal;  // the lower triangle of a matrix of 2 · n_groups unknowns, 16 lanes
    double* step;    // [4 · 2 · n_groups][16]
};

struct QuantizeKernels {
    // `values`, `top` → `scale`, `zero`.
    void (*fit)(const RoundingProblem& problem, const Slab& slab);
    // → `codes`, to nearest.
    void (*nearest)(const RoundingProblem& problem, const Slab& slab);
    // → `codes`, error-compensated, and then a better `scale` and `zero` where there is one.
    void (*compensated)(const RoundingProblem& problem, const Slab& slab);
    // For symmetric.h.
    void (*multiply)(const ColumnProduct& product, const ProductMemory& memory);
    void (*finish)(float* factor, int64_t size, int64_t first, int64_t rows, int64_t lane, int64_t lanes);
};

// Quantizes all rows of all weights in every format on at most `threads` threads. Throws std::bad_alloc.
void quantize(const Isa& isa, const RoundingProblem& problem, const std::vector<WeightRows>& weights,
              const std::vector<CodeLayout>& formats, int threads);

// Bytes of one packed row.
int64_t packed_bytes(const CodeLayout& layout, int64_t in_features);

}  // namespace amq
