// What a decoder block computes besides its linears, on vectors of float32: norms, rotary embedding, attention over the
// KV cache, the gate of the MLP; and products with weights that are not quantized.
//
// The cache holds pages of kPage positions. In a page each KV head has its keys, a row of kPage positions per feature, and then
// its values, a row of head_dim features per position. So scores of neighbouring positions come out side by side without
// sums across a vector, weighted sums of values are plain sums of rows, and both are one small product over rows that
// lie one after another in memory (vector_attention.h). Elements are float32, fp16, or codes; behind codes of keys, and behind those
// of values, come a scale and then a least value of each of the kPage positions, both fp16: scale · code + least. A position is
// rounded by itself when it comes, so what a query sees does not depend on how its text was cut into passes. Where keys are codes,
// they and the queries come rotated, as values in few bits do (decoder_attention.cpp).
//
// Keys in less than 8 bits lose too much that way. What is large in them is large in the same features at all positions, so there
// each feature has a scale and a least value, for the kPage positions of a page, and is rounded when the page is full. Until then
// the page's keys are in fp16 elsewhere (FreshKeys), and a query sees those: the keys of its own page in fp16, and of every page
// before it in codes, however its text was cut into passes. The first page of a sequence is what all queries look at most: its keys
// and values are those of int8, which take two pages: the keys stand in another one, each head's in its own place there.

#pragma once

#include <cstdint>

#include "element.h"
#include "isa.h"

namespace amq {

constexpr int kPage = 64;       // positions of a page
constexpr int kSpan = 128;      // positions whose softmax is computed at once
constexpr int kMaxHeadDim = 512;
constexpr int kMaxQueryRows = 8;

// What keys and values are kept as: a row here, and its kernels in vector_body.h.
struct CacheKind {
    const char* name;
    int key_bits, value_bits;  // of an element; less than 16: codes

    constexpr bool codes_keys() const { return key_bits < 16; }
    constexpr bool rounds_pages() const { return key_bits < 8; }  // keys, feature by feature
    // Among the features of a position.
    constexpr bool spreads_keys() const { return codes_keys() && !rounds_pages(); }
    constexpr bool spreads_values() const { return value_bits < 8; }  // in 8 bits they lose nothing worth it
    // Pages that a sequence has beside those of its positions: each holds a half of every KV head's FreshKeys, in the head's place.
    constexpr int spare_pages() const { return rounds_pages() ? 2 : 0; }
    constexpr bool first_apart() const { return rounds_pages(); }
};
constexpr CacheKind kCaches[] = {{"float32", 32, 32}, {"float16", 16, 16}, {"int8", 8, 8}, {"k8v4", 8, 4}, {"int4", 4, 4}};
constexpr int kCacheKinds = sizeof kCaches / sizeof *kCaches;
constexpr int kFirstKind = 2;  // of a first page that is kept apart
static_assert(kCaches[kFirstKind].key_bits == 8 && kCaches[kFirstKind].value_bits == 8);

// What a KV head's keys and its values take in a page.
constexpr int64_t key_bytes(const CacheKind& kind, int64_t head_dim) {
    const int64_t bytes = kPage * head_dim * kind.key_bits / 8;
    return kind.codes_keys() ? bytes + 4 * (kind.rounds_pages() ? head_dim : kPage) : bytes;
}
constexpr int64_t head_bytes(const CacheKind& kind, int64_t head_dim) {
    const int64_t values = kPage * head_dim * kind.value_bits / 8;
    return key_bytes(kind, head_dim) + (kind.value_bits < 16 ? values + 4 * kPage : values);
}

// A KV head's keys in fp16, of a page that is not full or that the pass fills: rows of kPage positions per feature as in a page,
// those of the first half of the features and those of the second.
struct FreshKeys {
    uint8_t* half[2];

    static constexpr int64_t half_bytes(int64_t head_dim) { return head_dim / 2 * kPage * 2; }
    AMQ_INLINE uint8_t* row(int feature, int head_dim) const {
        const int first = head_dim / 2;
        return half[feature >= first] + feature % first * kPage * 2;
    }
};

// What an MLP does with what its gate and up give:
//
//     silu            gate · sigmoid(gate) · up
//     gelu_tanh       gate · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) / 2 · up
//     clamped_swiglu  (gpt-oss) g · sigmoid(1.702 · g) · (u + 1), g = min(gate, limit), u = up within ± limit
//     relu2           max(x, 0)², of up alone
enum class Activation { silu, gelu_tanh, clamped_swiglu, relu2 };
constexpr int kActivations = 4;

// A sequence's keys and values in one block of the model and one KV head: page i is at base + pages[i] · page_bytes, its values
// `values` bytes behind that.
struct CacheView {
    uint8_t* base;
    const int32_t* pages;
    int64_t page_bytes, values;

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
    int64_t begin, end;  // positions, at most kSpan, begin a multiple of kPage
    float softcap;       // c > 0: scores → c · tanh(score / c)
    FreshKeys fresh;     // where pages are rounded: of the page that the last positions of all rows are in
};

// A causal convolution of each channel with itself over consecutive tokens: out[t, c] = Σ_j weight[j, c] · x[t − kernel + 1 + j, c],
// where rows before x's first are those of `state` [kernel − 1, .], the newest last.
struct ConvolveArgs {
    const float* x = nullptr;       // [tokens, x_stride]
    const float* state = nullptr;   // nullptr: zeros
    const float* weight = nullptr;  // [kernel, weight_stride]
    const float* bias = nullptr;    // [channels] or nullptr
    float* out = nullptr;           // [tokens, out_stride]
    int64_t x_stride = 0, state_stride = 0, weight_stride = 0, out_stride = 0, tokens = 0, channels = 0, kernel = 0;
    bool silu = false;  // out ← silu(out)
};

// The gated delta rule (decoder.h) of one head, for some columns of its state S, over consecutive tokens. All rows of
// tokens are `stride` apart; `out` may be `v`.
struct DeltaArgs {
    const float *q = nullptr, *k = nullptr;         // [tokens, key_dim], of their lengths; key_dim even
    const float* v = nullptr;                       // [tokens, columns]
    const float *decay = nullptr, *beta = nullptr;  // [tokens]
    float* state = nullptr;                         // [columns / 16, key_dim, 16]
    float* out = nullptr;                           // [tokens, columns]
    int64_t stride = 0, tokens = 0, key_dim = 0, columns = 0;
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
    // x ← x · factor / √(Σ x² + epsilon)
    void (*unit)(float* x, float epsilon, float factor, int64_t count);
    void (*convolve)(const ConvolveArgs& args);
    void (*delta)(const DeltaArgs& args);
    // Puts one position's key and value [head_dim] into the cache, by its place in kCaches; where pages are rounded the key into
    // `fresh`, which is its page's.
    void (*store[kCacheKinds])(const CacheView& cache, int64_t position, const float* key, const float* value, int head_dim,
                               const FreshKeys& fresh);
    // Where pages are rounded: the keys of a full page into its part of the KV head.
    void (*round_page[kCacheKinds])(const FreshKeys& fresh, uint8_t* page, int head_dim);
    // Positions begin … end − 1 for up to `query_rows` rows, into fresh partials.
    void (*attend[kCacheKinds])(const AttendArgs& args, Partial* out);
    int query_rows;
    // Puts the parts of a softmax together, and divides by the sum in the end.
    void (*merge)(Partial& into, const Partial& part, int head_dim);
    void (*finish)(const Partial& partial, int head_dim, float* out);
    DenseKernel dense[3];  // by the element of w
    // One row of such a weight as float32.
    void (*widen[3])(const void* w, int64_t count, float* out);
};

}  // namespace amq
