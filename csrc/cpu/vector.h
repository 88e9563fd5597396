// What a decoder block computes besides its linears, on vectors of float32: norms, rotary embedding, attention over the
// KV cache, the gate of the MLP; and products with weights that are not quantized.
//
// The cache holds pages of kPage positions. In a page each KV head has its keys, a row of kPage positions per feature, and then
// its values, a row of head_dim features per position. So scores of neighbouring positions come out side by side without
// sums across a vector, weighted sums of values are plain sums of rows, and both are one small product over rows that
// lie one after another in memory (vector_body.h). Elements are fp16 or float32.

#pragma once

#include <cstdint>

#include "element.h"
#include "isa.h"

namespace amq {

constexpr int kPage = 64;       // positions of a page
constexpr int kSpan = 128;      // positions whose softmax is computed at once
constexpr int kMaxHeadDim = 512;
constexpr int kMaxQueryRows = 8;

// What an MLP does with what its gate and up give:
//
//     silu            gate · sigmoid(gate) · up
//     gelu_tanh       gate · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) / 2 · up
//     clamped_swiglu  (gpt-oss) g · sigmoid(1.702 · g) · (u + 1), g = min(gate, limit), u = up within ± limit
//     relu2           max(x, 0)², of up alone
enum class Activation { silu, gelu_tanh, clamped_swiglu, relu2 };
constexpr int kActivations = 4;

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
    float softcap;       // c > 0: scores → c · tanh(score / c)
};

// A causal convolution of each channel with itself over consecutive tokens: out[t, c] = Σ_j weight[j, c] · x[t − kernel + 1 + j, c],
// where rows before x's first are those of `state` [kernel − 1, .], the newest last.
struct ConvolveArgs {
    const float* x;       // [tokens, x_stride]
    const float* state;   // nullptr: zeros
    const float* weight;  // [kernel, .]
    const float* bias;    // [channels] or nullptr
    float* out;           // [tokens, out_stride]
    int64_t x_stride, state_stride, weight_stride, out_stride, tokens, channels, kernel;
    bool silu;            // out ← silu(out)
};

// The gated delta rule (decoder.h) of one head, columns 0 … columns − 1 of its state, over consecutive tokens.
struct DeltaArgs {
    const float *q, *k;  // [tokens, stride of each], [key_dim], normed and scaled
    const float* v;      // [tokens, v_stride], [columns]
    const float *decay, *beta;  // [tokens, gate_stride]
    float* state;        // [key_dim, state_stride]
    float* out;          // [tokens, out_stride], [columns]
    int64_t q_stride, k_stride, v_stride, gate_stride, state_stride, out_stride, tokens, key_dim, columns;
};

// y[m · y_stride + n] ← x_m · w_n for the rows begin … end − 1 of w [.., in_features].
using DenseKernel = void (*)(const void* w, int64_t in_features, int64_t begin, int64_t end, const float* x,
                             int64_t x_stride, int64_t rows, float* y, int64_t y_stride);

struct VectorKernels {
    // out ← x / rms(x) · weight
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t count, float* out);
    // (a, b) ← (a·cos − b·sin, b·cos + a·sin) for the halves a, b of x [2·half]
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    // gate ← activation(gate, up), by Activation; relu2 does not read `up`
    void (*activate[kActivations])(float* gate, const float* up, float limit, int64_t count);
    // x ← x + scale · y
    void (*add)(float* x, const float* y, float scale, int64_t count);
    // x ← x · sigmoid(gate); x ← x · silu(gate)
    void (*gate_sigmoid)(float* x, const float* gate, int64_t count);
    void (*gate_silu)(float* x, const float* gate, int64_t count);
    // x ← c · tanh(x / c)
    void (*softcap)(float* x, float c, int64_t count);
    void (*convolve)(const ConvolveArgs& args);
    void (*delta)(const DeltaArgs& args);
    // Puts one position's key and value [head_dim] into the cache, by the cache's element: float32, half.
    void (*store[2])(const CacheView& cache, int64_t position, const float* key, const float* value, int head_dim);
    // Positions begin … end − 1 for up to `query_rows` rows, into fresh partials.
    void (*attend[2])(const AttendArgs& args, Partial* out);
    int query_rows;
    // Puts the parts of a softmax together, and divides by the sum in the end.
    void (*merge)(Partial& into, const Partial& part, int head_dim);
    void (*finish)(const Partial& partial, int head_dim, float* out);
    DenseKernel dense[3];  // by the element of w
    // One row of such a weight as float32.
    void (*widen[3])(const void* w, int64_t count, float* out);
};

}  // namespace amq
