// The layout of prepared weights, as amq/kernels/gpu_layout.py writes it: tiles of 8 output rows, slabs of 512 input features, planes
// of 8 × 16 words. Lane 4·row + column/4 of a warp reads a plane with one 16-byte load, and holds 4 columns of its row.

#pragma once

#include "device.cuh"

namespace amq {

constexpr int kTileRows = 8;
constexpr int kColumns = 16;
constexpr int kSlab = 512;
constexpr int kUnits = 8;             // units of 64 features in a slab: all codes of one field of one byte word
constexpr int kUnit = kSlab / kUnits;
constexpr int kWarp = 32;
constexpr int kMaxRows = 8;           // rows of x that one launch multiplies: the columns of a tensor-core product
constexpr int kMaxWeights = 4;

// A format's fields and byte words, derived from its bits; `Format` is one of int2.cuh and its neighbours.
template <class Format>
struct Fields {
    static constexpr int kBits = Format::kBits;
    static constexpr int kPerByte = 8 / kBits;
    static constexpr uint32_t kMask = (1u << kBits) - 1;
};

enum DType : int { kHalf = 0, kBfloat16 = 1 };

// One weight of a launch.
struct Weight {
    const uint4* codes;      // [tiles, planes, 32]
    const uint32_t* scales;  // [tiles, slabs, 8, groups of a slab]: scale below, zero point above, both fp16
    int format;              // index in AMQ_CUDA_FORMATS
    int out_features;
    int planes;              // of one tile
    int first_block;
    int64_t column;          // of y where its outputs begin
};

struct LinearArguments {
    Weight weights[kMaxWeights];
    int n_weights;
    int rows;                // of x and y, 1 to kMaxRows
    int in_features;
    int slabs;
    int dtype;               // of x, bias and y
    const void* x;           // [rows, in_features, then zeros up to a multiple of 2 * kUnit], rows at multiples of 16 bytes
    int64_t x_stride;
    const void* bias;        // [all out_features] or null
    void* y;                 // [rows, all out_features]
    int64_t y_stride;
    const uint4* x_codes;    // int8 activations: [rows, slabs, kUnits, 4], see quantize.cuh
    const float* x_scales;   // int8 activations: [groups, kMaxRows]
};

}  // namespace amq
