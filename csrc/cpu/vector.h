// What a decoder block computes besides its linears, on vectors of float32: norms, rotary embedding, attention over the
// KV cache, the gate of the MLP; and products with weights that are not quantized.
//
// The cache holds pages of kPage positions. In a page each KV head has its keys, a row of kPage positions per feature, and then
// its values, a row of head_dim features per position. So scores of neighbouring positions come out side by side without
// sums across a vector, weighted sums of values are plain sums of rows, and both are one small product over rows that
// lie one after another in memory (vector_body.h). Elements are fp16 or float32.

#pragma once

#include <cstdint>

#include "isa.h"

namespace amq {

constexpr int kPage = 64;       // positions of a page
constexpr int kSpan = 128;      // positions whose softmax is computed at once
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueryRows = 8;

enum class Element { float32, half, bfloat };

// A sequence's keys and values in one block of the model and one KV head: page i is at base + pages[i] · page_bytes.
struct CacheView {
    uint8_t* base;
    const int32_t* pages;
    int64_t page_bytes;

    AMQ_INLINE uint8_t* page(int64_t position) const { return base + pages[position / kPage] * page_bytes; }
};

// One query row: a head of a token. It attends to positions first … last.
struct QueryRow {
    const float* q;  // [head_dim], scaled
    int64_t first, last;
};

// Softmax-weighted sums of values over part of the positions, not yet divided by `sum`.
struct Partial {
    float largest, sum;  // of the scores, and of exp(score − largest); sum 0: no position yet
    float* values;       // [head_dim]
};

struct AttendArgs {
    CacheView cache;
    const QueryRow* rows;
    int n_rows, head_dim;
    int64_t begin, end;  // positions, at most kSpan, begin a multiple of it
};

struct VectorKernels {
    // out ← x / rms(x) · weight
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t count, float* out);
    // (a, b) ← (a·cos − b·sin, b·cos + a·sin) for the halves a, b of x [2·half]
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    // gate ← silu(gate) · up
    void (*gate)(float* gate, const float* up, int64_t count);
    // x ← x + y
    void (*add)(float* x, const float* y, int64_t count);
    // Puts one position's key and value [head_dim] into the cache, by the cache's element: float32, half.
    void (*store[2])(const CacheView& cache, int64_t position, const float* key, const float* value, int head_dim);
    // Positions begin … end − 1 for up to `query_rows` rows, into fresh partials.
    void (*attend[2])(const AttendArgs& args, Partial* out);
    int query_rows;
    // Puts the parts of a softmax together, and divides by the sum in the end.
    void (*merge)(Partial& into, const Partial& part, int head_dim);
    void (*finish)(const Partial& partial, int head_dim, float* out);
    // y[m · y_stride + n] ← x_m · w_n for the rows begin … end − 1 of w [.., in_features], by their element.
    void (*dense[3])(const void* w, int64_t in_features, int64_t begin, int64_t end, const float* x, int64_t x_stride,
                     int64_t rows, float* y, int64_t y_stride);
    // One row of such a weight as float32.
    void (*widen[3])(const void* w, int64_t count, float* out);
};

}  // namespace amq
