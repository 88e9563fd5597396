// The kernels of vector.h, once for all instruction sets, as linear_body.h is for linears: `S` is a vector of 16 lanes.
// A row's result depends on that row alone, never on the rows beside it or on how many there are.

#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "tiles.h"
#include "unroll.h"
#include "vector.h"
#include "vector_state.h"

namespace amq {
namespace {

constexpr int64_t kWidth = 16;

template <class S>
AMQ_INLINE float sum_lanes(typename S::F32 v) {
    alignas(64) float lanes[kWidth];
    S::store(lanes, v);
    for (int width = kWidth / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <class S>
AMQ_INLINE float largest_lane(typename S::F32 v) {
    alignas(64) float lanes[kWidth];
    S::store(lanes, v);
    for (int width = kWidth / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// e^x to 2e-7 of itself, for x in [-87, 88]; beyond, the value at the end of the range. NaN stays NaN.
//
// x = n·ln 2 + r with an integer n and |r| ≤ ln 2 / 2, so e^x = 2^n · e^r: a Taylor polynomial, and n added to the exponent.
template <class S>
AMQ_INLINE typename S::F32 exponential(typename S::F32 x) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the lowest bits
    constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // the first has 15 bits: n times it is exact
    x = S::min(S::splat(88.0f), S::max(S::splat(-87.0f), x));
    const auto shifted = S::fma(x, S::splat(1.44269504f), S::splat(kRound));
    const auto n = S::sub(shifted, S::splat(kRound));
    const auto r = S::fnma(n, S::splat(kLn2Low), S::fnma(n, S::splat(kLn2High), x));
    auto sum = S::splat(1.0f / 5040);
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = S::fma(sum, r, S::splat(coefficient));
    return S::as_float(S::add_int(S::as_int(sum), S::template shift<-23>(S::as_int(shifted))));
}

template <class S>
void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, float* out) {
    typename S::F32 squares[2] = {};
    int64_t k = 0;
    for (; k + 2 * kWidth <= count; k += 2 * kWidth)
        unroll<2>([&](auto i) __attribute__((always_inline)) {
            const auto v = S::load_float(x + k + i * kWidth);
            squares[i] = S::fma(v, v, squares[i]);
        });
    float sum = sum_lanes<S>(S::add(squares[0], squares[1]));
    for (; k < count; ++k) sum += x[k] * x[k];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + epsilon);
    for (k = 0; k + kWidth <= count; k += kWidth)
        S::store(out + k, S::mul(S::load_float(weight + k), S::mul(S::load_float(x + k), S::splat(factor))));
    for (; k < count; ++k) out[k] = weight[k] * (x[k] * factor);
}

template <class S>
void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    int64_t k = 0;
    for (; k + kWidth <= half; k += kWidth) {
        const auto a = S::load_float(x + k), b = S::load_float(x + half + k);
        const auto c = S::load_float(cos + k), s = S::load_float(sin + k);
        S::store(x + k, S::fnma(b, s, S::mul(a, c)));
        S::store(x + half + k, S::fma(a, s, S::mul(b, c)));
    }
    for (; k < half; ++k) {
        const float a = x[k], b = x[half + k];
        x[k] = a * cos[k] - b * sin[k];
        x[half + k] = b * cos[k] + a * sin[k];
    }
}

// Each(values…) of 16 elements of the vectors x… at a time, into the first of them.
template <class S, class Each, class... Rest>
AMQ_INLINE void for_each_line(const Each& each, int64_t count, float* x, const Rest*... rest) {
    int64_t k = 0;
    for (; k + kWidth <= count; k += kWidth) S::store(x + k, each(S::load_float(x + k), S::load_float(rest + k)...));
    if (k == count) return;
    const auto part = [&](const float* p) __attribute__((always_inline)) {
        alignas(64) float line[kWidth] = {};
        std::memcpy(line, p + k, (count - k) * sizeof(float));
        return S::load_float(line);
    };
    alignas(64) float line[kWidth];
    S::store(line, each(part(x), part(rest)...));
    std::memcpy(x + k, line, (count - k) * sizeof(float));
}

template <class S>
AMQ_INLINE typename S::F32 sigmoid(typename S::F32 x) {
    const auto one = S::splat(1.0f);
    return S::div(one, S::add(one, exponential<S>(S::sub(S::splat(0.0f), x))));
}

// c · tanh(x / c) = c − 2c / (e^(2x / c) + 1)
template <class S>
AMQ_INLINE typename S::F32 capped(typename S::F32 x, float c) {
    const auto power = exponential<S>(S::mul(x, S::splat(2 / c)));
    return S::sub(S::splat(c), S::div(S::splat(2 * c), S::add(power, S::splat(1.0f))));
}

template <class S, Activation activation>
AMQ_INLINE typename S::F32 activated(typename S::F32 gate, typename S::F32 up, float limit) {
    if constexpr (activation == Activation::silu) return S::mul(S::mul(gate, sigmoid<S>(gate)), up);
    if constexpr (activation == Activation::gelu_tanh) {  // (1 + tanh(x)) / 2 = sigmoid(2x)
        constexpr float kTwice = 1.5957691216f;            // 2√(2/π)
        const auto cube = S::mul(S::mul(gate, gate), gate);
        const auto inner = S::mul(S::splat(kTwice), S::fma(cube, S::splat(0.044715f), gate));
        return S::mul(S::mul(gate, sigmoid<S>(inner)), up);
    }
    if constexpr (activation == Activation::clamped_swiglu) {
        const auto g = S::min(S::splat(limit), gate);
        const auto u = S::min(S::splat(limit), S::max(S::splat(-limit), up));
        return S::mul(S::mul(g, sigmoid<S>(S::mul(S::splat(1.702f), g))), S::add(u, S::splat(1.0f)));
    }
    const auto positive = S::max(S::splat(0.0f), gate);
    return S::mul(positive, positive);
}

template <class S, Activation activation>
void activate(float* gate, const float* up, float limit, int64_t count) {
    const auto each = [limit](typename S::F32 g, typename S::F32 u) __attribute__((always_inline)) {
        return activated<S, activation>(g, u, limit);
    };
    for_each_line<S>(each, count, gate, activation == Activation::relu2 ? gate : up);
}

template <class S>
void gate_sigmoid(float* x, const float* gate, int64_t count) {
    const auto each = [](typename S::F32 v, typename S::F32 g) __attribute__((always_inline)) { return S::mul(v, sigmoid<S>(g)); };
    for_each_line<S>(each, count, x, gate);
}

template <class S>
void gate_silu(float* x, const float* gate, int64_t count) {
    const auto each = [](typename S::F32 v, typename S::F32 g) __attribute__((always_inline)) {
        return S::mul(v, S::mul(g, sigmoid<S>(g)));
    };
    for_each_line<S>(each, count, x, gate);
}

template <class S>
void softcap(float* x, float c, int64_t count) {
    for_each_line<S>([c](typename S::F32 v) __attribute__((always_inline)) { return capped<S>(v, c); }, count, x);
}

template <class S>
void add(float* x, const float* y, float scale, int64_t count) {
    const auto each = [scale](typename S::F32 a, typename S::F32 b) __attribute__((always_inline)) {
        return S::fma(b, S::splat(scale), a);
    };
    for_each_line<S>(each, count, x, y);
}

// What 16 elements of a cache or a weight are as float32, and back.
template <class S>
struct Float32 {
    static constexpr int64_t kBytes = 4;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_float(reinterpret_cast<const float*>(p)); }
    static AMQ_INLINE void store(uint8_t* p, typename S::F32 v) { S::store(reinterpret_cast<float*>(p), v); }
};
template <class S>
struct Half {
    static constexpr int64_t kBytes = 2;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_half(p); }
    static AMQ_INLINE void store(uint8_t* p, typename S::F32 v) { S::store_half(p, v); }
};
template <class S>
struct Bfloat {
    static constexpr int64_t kBytes = 2;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_bfloat(p); }
};

template <class S, class E>
void store_position(const CacheView& cache, int64_t position, const float* key, const float* value, int head_dim) {
    uint8_t* page = cache.page(position);
    const int64_t place = position % kPage;
    uint8_t* keys = page + place * E::kBytes;
    uint8_t* values = page + (kPage + place) * head_dim * E::kBytes;
    alignas(64) uint8_t line[kWidth * E::kBytes];
    for (int k = 0; k < head_dim; k += kWidth) {
        E::store(line, S::load_float(key + k));
        for (int i = 0; i < kWidth; ++i)
            std::memcpy(keys + (k + i) * kPage * E::kBytes, line + i * E::kBytes, E::kBytes);
        E::store(values + k * E::kBytes, S::load_float(value + k));
    }
}

// sum[row][tile] += Σ_k a[row][k] · b(k, tile), where b(k, tile) are 16 elements at b + k·k_stride + tile·tile_stride
// (bytes): the product that is both scores (a the queries, b keys) and weighted sums (a the weights, b values). Every k
// fetches the next kAhead bytes from `ahead` on: what is read after this.
constexpr int64_t kAhead = 128;

template <class S, class E, int rows, int tiles>
AMQ_INLINE void multiply(const float* const (&a)[rows], const uint8_t* b, int64_t k_stride, int64_t tile_stride,
                         int64_t count, const uint8_t* ahead, typename S::F32 (&sum)[rows][tiles]) {
    for (int64_t k = 0; k < count; ++k, b += k_stride, ahead += kAhead) {
        typename S::F32 line[tiles];
        S::prefetch(ahead);
        S::prefetch(ahead + kAhead / 2);
        unroll<tiles>([&](auto t) __attribute__((always_inline)) { line[t] = E::load(b + t * tile_stride); });
        unroll<rows>([&](auto m) __attribute__((always_inline)) {
            const auto value = S::splat(a[m][k]);
            unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                sum[m][t] = S::fma(value, line[t], sum[m][t]);
            });
        });
    }
}

// Scores of a span of positions for `rows` query rows, then their softmax, then its weighted sums of values.
template <class S, class E, int rows>
struct Attention {
    // As many sums as S has registers for.
    static constexpr int kSums = S::kGemmTiles * S::kGemmRows / rows, kTiles = kSums > 4 ? 4 : kSums;

    const AttendArgs& args;
    alignas(64) float scores[rows][kSpan];

    explicit Attention(const AttendArgs& given) : args(given) {}

    AMQ_INLINE int64_t part_bytes() const { return kPage * args.head_dim * E::kBytes; }  // keys or values of a page

    template <int tiles>
    AMQ_INLINE void score_tiles(const uint8_t* keys, const uint8_t* ahead, const float* const (&q)[rows], int64_t column) {
        typename S::F32 sum[rows][tiles] = {};
        multiply<S, E, rows, tiles>(q, keys, kPage * E::kBytes, kWidth * E::kBytes, args.head_dim, ahead, sum);
        for (int m = 0; m < rows; ++m)
            for (int t = 0; t < tiles; ++t) S::store(&scores[m][column + t * kWidth], sum[m][t]);
    }

    AMQ_INLINE void score(const float* const (&q)[rows]) {
        constexpr int64_t kTileBytes = kWidth * E::kBytes;
        const uint8_t* values = args.cache.page(args.begin) + part_bytes();
        for (int64_t p = args.begin; p < args.end; p += kPage) {
            const uint8_t* keys = args.cache.page(p);
            const uint8_t* ahead = p + kPage < args.end ? args.cache.page(p + kPage) : values;
            const int64_t left = ceil_div(args.end - p, kWidth), n = left < kPage / kWidth ? left : kPage / kWidth;
            int64_t t = 0, column = p - args.begin;
            for (; t + kTiles <= n; t += kTiles) score_tiles<kTiles>(keys + t * kTileBytes, ahead, q, column + t * kWidth);
            for (; t < n; ++t) score_tiles<1>(keys + t * kTileBytes, ahead, q, column + t * kWidth);
        }
    }

    // Scores → exp(score − largest) where the row attends, 0 elsewhere. Places beyond `end` hold what an earlier sequence
    // left there, and are overwritten too.
    AMQ_INLINE void soften(int m, const QueryRow& row, Partial& out) {
        const int64_t width = ceil_div(args.end - args.begin, kWidth) * kWidth;
        const int64_t first = row.first > args.begin ? row.first - args.begin : 0;
        const int64_t stop = (row.last + 1 < args.end ? row.last + 1 : args.end) - args.begin;
        float* s = scores[m];
        if (args.softcap > 0) softcap<S>(s, args.softcap, width);
        out.largest = -INFINITY;
        out.sum = 0;
        if (first >= stop) {
            std::memset(s, 0, width * sizeof(float));
            return;
        }
        for (int64_t k = 0; k < first; ++k) s[k] = -INFINITY;
        for (int64_t k = stop; k < width; ++k) s[k] = -INFINITY;
        auto largest = S::load_float(s);
        for (int64_t k = kWidth; k < width; k += kWidth) largest = S::max(largest, S::load_float(s + k));
        out.largest = largest_lane<S>(largest);
        for (int64_t k = 0; k < width; k += kWidth)
            S::store(s + k, exponential<S>(S::sub(S::load_float(s + k), S::splat(out.largest))));
        for (int64_t k = 0; k < first; ++k) s[k] = 0;
        for (int64_t k = stop; k < width; ++k) s[k] = 0;
        auto sum = S::splat(0.0f);
        for (int64_t k = 0; k < width; k += kWidth) sum = S::add(sum, S::load_float(s + k));
        out.sum = sum_lanes<S>(sum);
    }

    template <int tiles>
    AMQ_INLINE void weigh_tiles(int64_t first, Partial* out) {
        typename S::F32 sum[rows][tiles] = {};
        for (int64_t p = args.begin; p < args.end; p += kPage) {
            const uint8_t* values = args.cache.page(p) + part_bytes() + first * E::kBytes;
            const uint8_t* ahead = p + kPage < args.end ? args.cache.page(p + kPage) + part_bytes() : values;
            const int64_t left = args.end - p;
            const float* weights[rows];
            for (int m = 0; m < rows; ++m) weights[m] = scores[m] + (p - args.begin);
            multiply<S, E, rows, tiles>(weights, values, args.head_dim * E::kBytes, kWidth * E::kBytes,
                                        left < kPage ? left : kPage, ahead, sum);
        }
        for (int m = 0; m < args.n_rows; ++m)
            for (int t = 0; t < tiles; ++t) S::store(out[m].values + first + t * kWidth, sum[m][t]);
    }

    AMQ_INLINE void run(Partial* out) {
        const float* q[rows];
        for (int m = 0; m < rows; ++m) q[m] = args.rows[m < args.n_rows ? m : 0].q;
        score(q);
        for (int m = 0; m < args.n_rows; ++m) soften(m, args.rows[m], out[m]);
        for (int m = args.n_rows; m < rows; ++m) std::memset(scores[m], 0, sizeof scores[m]);
        int64_t k = 0;
        for (; k + kTiles * kWidth <= args.head_dim; k += kTiles * kWidth) weigh_tiles<kTiles>(k, out);
        for (; k < args.head_dim; k += kWidth) weigh_tiles<1>(k, out);
    }
};

template <class S, class E>
void attend(const AttendArgs& args, Partial* out) {
    if (args.n_rows == 1) return Attention<S, E, 1>(args).run(out);
    if (args.n_rows == 2) return Attention<S, E, 2>(args).run(out);
    if (args.n_rows <= 4) return Attention<S, E, 4>(args).run(out);
    if constexpr (S::kGemmRows > 4) Attention<S, E, S::kGemmRows>(args).run(out);
}

template <class S>
void merge(Partial& into, const Partial& part, int head_dim) {
    if (part.sum == 0) return;
    const bool grows = !(part.largest <= into.largest);  // NaN counts as growing, and stays
    const float factor = into.sum == 0 ? 0.0f : std::exp(grows ? into.largest - part.largest : part.largest - into.largest);
    const float keep = grows ? factor : 1.0f, take = grows ? 1.0f : factor;
    for (int k = 0; k < head_dim; k += kWidth) {
        const auto taken = S::mul(S::load_float(part.values + k), S::splat(take));
        S::store(into.values + k, S::fma(S::load_float(into.values + k), S::splat(keep), taken));
    }
    into.sum = into.sum * keep + part.sum * take;
    if (grows) into.largest = part.largest;
}

template <class S>
void finish(const Partial& partial, int head_dim, float* out) {
    const auto sum = S::splat(partial.sum);
    for (int k = 0; k < head_dim; k += kWidth) S::store(out + k, S::div(S::load_float(partial.values + k), sum));
}

// Four weight rows times one row of x at a time; sums over lanes at the end.
template <class S, class E>
void dense(const void* w, int64_t in_features, int64_t begin, int64_t end, const float* x, int64_t x_stride, int64_t rows,
           float* y, int64_t y_stride) {
    const int64_t whole = in_features / kWidth * kWidth, row_bytes = in_features * E::kBytes;
    for (int64_t n = begin; n < end; ++n) {
        const uint8_t* row = static_cast<const uint8_t*>(w) + n * row_bytes;
        alignas(64) float rest[kWidth] = {};
        if (whole < in_features) {
            alignas(64) uint8_t line[kWidth * E::kBytes] = {};
            std::memcpy(line, row + whole * E::kBytes, (in_features - whole) * E::kBytes);
            S::store(rest, E::load(line));
        }
        for (int64_t m = 0; m < rows; ++m) {
            const float* values = x + m * x_stride;
            typename S::F32 sum[4] = {};
            int64_t k = 0;
            for (; k + 4 * kWidth <= in_features; k += 4 * kWidth)
                unroll<4>([&](auto i) __attribute__((always_inline)) {
                    S::prefetch(row + k * E::kBytes + i * kWidth * E::kBytes + 2048);
                    sum[i] = S::fma(E::load(row + (k + i * kWidth) * E::kBytes), S::load_float(values + k + i * kWidth),
                                    sum[i]);
                });
            for (; k < whole; k += kWidth) sum[0] = S::fma(E::load(row + k * E::kBytes), S::load_float(values + k), sum[0]);
            float total = sum_lanes<S>(S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3])));
            for (int64_t i = whole; i < in_features; ++i) total += rest[i - whole] * values[i];
            y[m * y_stride + n] = total;
        }
    }
}

template <class S, class E>
void widen(const void* w, int64_t count, float* out) {
    const uint8_t* p = static_cast<const uint8_t*>(w);
    int64_t k = 0;
    for (; k + kWidth <= count; k += kWidth) S::store(out + k, E::load(p + k * E::kBytes));
    if (k == count) return;
    alignas(64) uint8_t line[kWidth * E::kBytes] = {};
    alignas(64) float rest[kWidth];
    std::memcpy(line, p + k * E::kBytes, (count - k) * E::kBytes);
    S::store(rest, E::load(line));
    std::memcpy(out + k, rest, (count - k) * sizeof(float));
}

template <class S>
constexpr VectorKernels make_vector_kernels() {
    return {rms_norm<S>,
            rotate<S>,
            {activate<S, Activation::silu>, activate<S, Activation::gelu_tanh>, activate<S, Activation::clamped_swiglu>,
             activate<S, Activation::relu2>},
            add<S>,
            gate_sigmoid<S>,
            gate_silu<S>,
            softcap<S>,
            convolve<S>,
            delta<S>,
            {store_position<S, Float32<S>>, store_position<S, Half<S>>},
            {attend<S, Float32<S>>, attend<S, Half<S>>},
            S::kGemmRows,
            merge<S>,
            finish<S>,
            {dense<S, Float32<S>>, dense<S, Half<S>>, dense<S, Bfloat<S>>},
            {widen<S, Float32<S>>, widen<S, Half<S>>, widen<S, Bfloat<S>>}};
}

}  // namespace
}  // namespace amq

// Defines vector_kernels_<isa>() from the vector type S.
#define AMQ_DEFINE_VECTOR_KERNELS(isa)                                 \
    namespace amq {                                                    \
    const VectorKernels* vector_kernels_##isa() {                      \
        static constexpr VectorKernels kernels = make_vector_kernels<S>(); \
        return &kernels;                                               \
    }                                                                  \
    }
