// Attention of vector.h: keys and values into the cache, scores, softmax and weighted sums. Included by vector_body.h.

#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "tiles.h"
#include "unit.h"
#include "unroll.h"
#include "vector.h"
#include "vector_lanes.h"

namespace amq {
namespace {

// Elements of a cache, 16 in kLineBytes; kLevels: of codes, 0 where elements are numbers; kByFeature: see vector.h.
template <class S>
struct Float32Cache : Float32<S> {
    static constexpr int64_t kLineBytes = 4 * kWidth;
    static constexpr int kLevels = 0;
    static constexpr bool kByFeature = false;
};
template <class S>
struct HalfCache : Half<S> {
    static constexpr int64_t kLineBytes = 2 * kWidth;
    static constexpr int kLevels = 0;
    static constexpr bool kByFeature = false;
};
template <class S>
struct ByteCache {
    static constexpr int64_t kLineBytes = kWidth;
    static constexpr int kLevels = 256;
    static constexpr bool kByFeature = false;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_bytes(p); }
    static AMQ_INLINE void store_row(uint8_t* row, const uint8_t* codes, int count) { std::memcpy(row, codes, count); }
};
// 32 codes in 16 bytes, code i in the low half of byte i and code 16 + i in the high one; 16 more at the end of a row in 8 bytes,
// code i and code 8 + i. Two lines of codes come out of one line of bytes, that is why.
template <class S, bool by_feature = false>
struct NibbleCache {
    static constexpr int64_t kLineBytes = kWidth / 2;
    static constexpr int kLevels = 16;
    static constexpr bool kByFeature = by_feature;
    static AMQ_INLINE typename S::F32 load(const uint8_t* p) { return S::load_nibbles(p); }  // of 8 bytes
    static AMQ_INLINE void store_row(uint8_t* row, const uint8_t* codes, int count) {
        for (int rest = count; rest > 0;) {
            const int width = rest < 2 * kWidth ? kWidth / 2 : kWidth;
            for (int i = 0; i < width; ++i) row[i] = static_cast<uint8_t>(codes[i] | codes[width + i] << 4);
            row += width;
            codes += 2 * width;
            rest -= 2 * width;
        }
    }
};

// Rounds x to scale · code + least, and returns the fp16 bits of both. All of x lies between the least and the largest code's number:
// `least` is rounded down and the scale up. Where x holds a NaN or an infinity both are NaN.
struct Grid {
    uint16_t scale, least;
};
AMQ_INLINE uint16_t half_below(float value) {
    const uint16_t half = float_to_half(value);
    if (half_to_float(half) <= value) return half;
    if (half == 0) return 0x8001;
    return half & 0x8000 ? half + 1 : half - 1;
}
AMQ_INLINE uint16_t half_above(float value) { return half_below(-value) ^ 0x8000; }

template <int levels>
AMQ_INLINE Grid round_to_codes(const float* x, int count, uint8_t* codes) {
    constexpr float kRound = 0x1.8p23f;  // as in `exponential`
    float least = x[0], largest = x[0], finite = 0;
    for (int k = 0; k < count; ++k) {
        least = x[k] < least ? x[k] : least;
        largest = x[k] > largest ? x[k] : largest;
        finite += x[k] * 0.0f;
    }
    if (!(finite == 0)) {
        std::memset(codes, 0, count);
        return {0x7e00, 0x7e00};
    }
    const uint16_t low = half_below(least);
    const float zero = half_to_float(low);
    const uint16_t step = half_above((largest - zero) / (levels - 1));
    const float scale = half_to_float(step), factor = scale > 0 ? 1.0f / scale : 0.0f;
    for (int k = 0; k < count; ++k) {
        float shifted = (x[k] - zero) * factor;
        shifted = (shifted < levels - 1 ? (shifted > 0 ? shifted : 0.0f) : levels - 1) + kRound;
        uint32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        codes[k] = static_cast<uint8_t>(bits);
    }
    return {step, low};
}

// Keys or values of a KV head in a page, as vector.h lays them out.
template <class E>
struct Part {
    uint8_t* data;
    int head_dim;

    AMQ_INLINE int64_t bytes() const { return kPage / kWidth * E::kLineBytes * head_dim; }  // of the elements
    AMQ_INLINE int64_t grids() const { return E::kByFeature ? head_dim : kPage; }
    AMQ_INLINE uint8_t* scale(int64_t place) const { return data + bytes() + 2 * place; }
    AMQ_INLINE uint8_t* least(int64_t place) const { return scale(grids() + place); }

    // Rounds the numbers of a position or a feature to `codes`, and puts their scale and least value where they belong.
    AMQ_INLINE void round(const float* x, int64_t place, uint8_t* codes) const {
        const Grid grid = round_to_codes<E::kLevels>(x, E::kByFeature ? kPage : head_dim, codes);
        std::memcpy(scale(place), &grid.scale, 2);
        std::memcpy(least(place), &grid.least, 2);
    }
};

template <class S, class E>
AMQ_INLINE void store_values(const Part<E>& part, int64_t place, const float* value) {
    uint8_t* row = part.data + place * (part.head_dim / kWidth) * E::kLineBytes;
    if constexpr (E::kLevels > 0) {
        uint8_t codes[kMaxHeadDim];
        part.round(value, place, codes);
        E::store_row(row, codes, part.head_dim);
    } else {
        for (int k = 0; k < part.head_dim; k += kWidth, row += E::kLineBytes) E::store(row, S::load_float(value + k));
    }
}

// As store_values, each element into the row of its feature.
template <class S, class E>
AMQ_INLINE void store_keys(const Part<E>& part, int64_t place, const float* key) {
    constexpr int64_t kBytes = E::kLineBytes / kWidth;
    static_assert(kBytes > 0, "neighbouring positions would share a byte");
    alignas(64) uint8_t all[kMaxHeadDim * kBytes];
    if constexpr (E::kLevels > 0) {
        part.round(key, place, all);
    } else {
        for (int k = 0; k < part.head_dim; k += kWidth) E::store(all + k * kBytes, S::load_float(key + k));
    }
    for (int k = 0; k < part.head_dim; ++k)
        std::memcpy(part.data + (k * kPage + place) * kBytes, all + k * kBytes, kBytes);
}

template <class S>
AMQ_INLINE void store_fresh(const FreshKeys& fresh, int64_t place, const float* key, int head_dim) {
    alignas(64) uint8_t all[2 * kMaxHeadDim];
    for (int k = 0; k < head_dim; k += kWidth) S::store_half(all + 2 * k, S::load_float(key + k));
    for (int k = 0; k < head_dim; ++k) std::memcpy(fresh.row(k, head_dim) + 2 * place, all + 2 * k, 2);
}

template <class S, class K, class V>
void store_position(const CacheView& cache, int64_t position, const float* key, const float* value, int head_dim,
                    const FreshKeys& fresh) {
    const Part<K> keys{cache.page(position), head_dim};
    if constexpr (K::kByFeature) store_fresh<S>(fresh, position % kPage, key, head_dim);
    else store_keys<S>(keys, position % kPage, key);
    store_values<S>(Part<V>{keys.data + cache.values, head_dim}, position % kPage, value);
}

template <class S, class K, class V>
void round_page(const FreshKeys& fresh, uint8_t* page, int head_dim) {
    if constexpr (K::kByFeature) {
        const Part<K> keys{page, head_dim};
        for (int k = 0; k < head_dim; ++k) {
            alignas(64) float values[kPage];
            uint8_t codes[kPage];
            const uint8_t* row = fresh.row(k, head_dim);
            for (int p = 0; p < kPage; p += kWidth) S::store(values + p, S::load_half(row + 2 * p));
            keys.round(values, k, codes);
            K::store_row(page + k * (kPage / kWidth) * K::kLineBytes, codes, kPage);
        }
    }
}

// Neighbouring tiles of a row from p on, as numbers.
template <class S, class E>
struct Tiles {
    template <int tiles>
    static AMQ_INLINE void load(const uint8_t* p, typename S::F32 (&line)[tiles]) {
        unroll<tiles>([&](auto t) __attribute__((always_inline)) { line[t] = E::load(p + t * E::kLineBytes); });
    }
};
template <class S>
struct NibblePairs {
    template <int tiles>
    static AMQ_INLINE void load(const uint8_t* p, typename S::F32 (&line)[tiles]) {
        unroll<tiles / 2>([&](auto t) __attribute__((always_inline)) {
            const auto words = S::load_words(p + t * kWidth);
            line[2 * t] = S::template nibble_to_float<0>(words);
            line[2 * t + 1] = S::template nibble_to_float<1>(words);
        });
    }
};
template <class S, int half>
struct NibblesOfPair {
    static AMQ_INLINE void load(const uint8_t* p, typename S::F32 (&line)[1]) {
        line[0] = S::template nibble_to_float<half>(S::load_words(p));
    }
};

// sum[row][tile] += Σ_k a[row][k] · b(k, tile), where b(k, .) are the tiles at b + k·stride (bytes). Every k fetches the next
// kAhead bytes from `ahead` on: what is read after this. (Of narrow keys that is the page's values too: fetching no more than
// as many keys took 1.5 times as long on an AMD EPYC of the Zen 5 line, 2026-12.)
constexpr int64_t kAhead = 128;

template <class S, class Load, int rows, int tiles>
AMQ_INLINE void multiply(const float* const (&a)[rows], const uint8_t* b, int64_t stride, int64_t count, const uint8_t* ahead,
                         typename S::F32 (&sum)[rows][tiles]) {
    for (int64_t k = 0; k < count; ++k, b += stride, ahead += kAhead) {
        typename S::F32 line[tiles];
        S::prefetch(ahead);
        S::prefetch(ahead + kAhead / 2);
        Load::load(b, line);
        unroll<rows>([&](auto m) __attribute__((always_inline)) {
            const auto value = S::splat(a[m][k]);
            unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                sum[m][t] = S::fma(value, line[t], sum[m][t]);
            });
        });
    }
}

// Of tiles `tile` … of the `of` tiles that the rows at b have: the product that is both scores (a the queries, b keys) and weighted
// sums (a the weights, b values).
template <class S, class E, int rows, int tiles>
AMQ_INLINE void multiply_tiles(const float* const (&a)[rows], const uint8_t* b, int64_t tile, int64_t of, int64_t count,
                               const uint8_t* ahead, typename S::F32 (&sum)[rows][tiles]) {
    const int64_t stride = of * E::kLineBytes;
    const auto from = [&](auto load, int64_t place) __attribute__((always_inline)) {
        multiply<S, decltype(load), rows, tiles>(a, b + place, stride, count, ahead, sum);
    };
    if constexpr (E::kLevels != 16) from(Tiles<S, E>{}, tile * E::kLineBytes);
    else if constexpr (tiles > 1) from(NibblePairs<S>{}, tile * E::kLineBytes);
    else if (tile % 2) from(NibblesOfPair<S, 1>{}, (tile - 1) * E::kLineBytes);
    else if (tile + 1 < of) from(NibblesOfPair<S, 0>{}, tile * E::kLineBytes);
    else from(Tiles<S, E>{}, tile * E::kLineBytes);
}

// Scores of a span of positions for `rows` query rows, then their softmax, then its weighted sums of values.
template <class S, class K, class V, int rows>
struct Attention {
    // As many sums as S has registers for.
    static constexpr int kSums = S::kGemmTiles * S::kGemmRows / rows, kTiles = kSums > 4 ? 4 : kSums;
    static_assert(kTiles == 1 || kTiles % 2 == 0, "tiles of NibbleCache go in pairs");

    const AttendArgs& args;
    alignas(64) float scores[rows][kSpan];
    float q_sum[rows], shift[rows] = {};  // of codes: Σ q, or Σ q · least of a page's features; Σ weight · least

    explicit Attention(const AttendArgs& given) : args(given) {}

    AMQ_INLINE Part<K> keys(int64_t position) const { return {args.cache.page(position), args.head_dim}; }
    AMQ_INLINE Part<V> values(int64_t position) const { return {keys(position).data + args.cache.values, args.head_dim}; }

    // Of `tiles` · 16 positions from `place` of the page on.
    template <int tiles>
    AMQ_INLINE void score_tiles(const Part<K>& page, int64_t place, const uint8_t* ahead, const float* const (&q)[rows],
                                int64_t column) {
        typename S::F32 sum[rows][tiles] = {};
        multiply_tiles<S, K, rows, tiles>(q, page.data, place / kWidth, kPage / kWidth, args.head_dim, ahead, sum);
        for (int t = 0; t < tiles; ++t) {
            if constexpr (K::kByFeature) {
                for (int m = 0; m < rows; ++m) sum[m][t] = S::add(sum[m][t], S::splat(q_sum[m]));
            } else if constexpr (K::kLevels > 0) {
                const auto scale = S::load_half(page.scale(place + t * kWidth));
                const auto least = S::load_half(page.least(place + t * kWidth));
                for (int m = 0; m < rows; ++m) sum[m][t] = S::fma(sum[m][t], scale, S::mul(least, S::splat(q_sum[m])));
            }
            for (int m = 0; m < rows; ++m) S::store(&scores[m][column + t * kWidth], sum[m][t]);
        }
    }

    // Of the page at `p` as far as positions are there, up to kTiles tiles at once: each(how many, the first one's place).
    template <class Each>
    AMQ_INLINE void for_tiles(int64_t p, const Each& each) {
        const int64_t left = ceil_div(args.end - p, kWidth), n = left < kPage / kWidth ? left : kPage / kWidth;
        int64_t t = 0;
        for (; t + kTiles <= n; t += kTiles) each(std::integral_constant<int, kTiles>{}, t * kWidth);
        for (; t < n; ++t) each(std::integral_constant<int, 1>{}, t * kWidth);
    }

    AMQ_INLINE void score(const float* const (&q)[rows]) {
        if constexpr (K::kLevels > 0 && !K::kByFeature)
            for (int m = 0; m < rows; ++m) {
                auto sum = S::load_float(q[m]);
                for (int k = kWidth; k < args.head_dim; k += kWidth) sum = S::add(sum, S::load_float(q[m] + k));
                q_sum[m] = sum_lanes<S>(sum);
            }
        for (int64_t p = args.begin; p < args.end; p += kPage) {
            const uint8_t* ahead = p + kPage < args.end ? keys(p + kPage).data : values(args.begin).data;
            const Part<K> page = keys(p);
            const auto page_scores = [&](const float* const (&with)[rows]) __attribute__((always_inline)) {
                for_tiles(p, [&](auto tiles, int64_t place) __attribute__((always_inline)) {
                    score_tiles<tiles>(page, place, ahead, with, p - args.begin + place);
                });
            };
            if constexpr (!K::kByFeature) {
                page_scores(q);
            } else if (p / kPage == args.rows[0].last / kPage) {
                score_fresh(p, ahead, q);
            } else {
                alignas(64) float scaled[rows][kMaxHeadDim];
                const float* with[rows];
                for (int m = 0; m < rows; ++m) with[m] = scaled[m];
                scale_queries(page, q, scaled);
                page_scores(with);
            }
        }
    }

    // Of codes by feature: Σ q · (scale · code + least) = Σ (q · scale) · code + Σ q · least.
    AMQ_INLINE void scale_queries(const Part<K>& page, const float* const (&q)[rows], float (&scaled)[rows][kMaxHeadDim]) {
        for (int m = 0; m < rows; ++m) {
            auto shifted = S::splat(0.0f);
            for (int k = 0; k < args.head_dim; k += kWidth) {
                const auto value = S::load_float(q[m] + k);
                shifted = S::fma(value, S::load_half(page.least(k)), shifted);
                S::store(&scaled[m][k], S::mul(value, S::load_half(page.scale(k))));
            }
            q_sum[m] = sum_lanes<S>(shifted);
        }
    }

    // Of the page that the rows are in themselves.
    AMQ_INLINE void score_fresh(int64_t p, const uint8_t* ahead, const float* const (&q)[rows]) {
        const int half = args.head_dim / 2;
        const float* second[rows];
        for (int m = 0; m < rows; ++m) second[m] = q[m] + half;
        for_tiles(p, [&](auto tiles, int64_t place) __attribute__((always_inline)) {
            typename S::F32 sum[rows][tiles] = {};
            multiply_tiles<S, HalfCache<S>, rows, tiles>(q, args.fresh.half[0], place / kWidth, kPage / kWidth, half, ahead, sum);
            multiply_tiles<S, HalfCache<S>, rows, tiles>(second, args.fresh.half[1], place / kWidth, kPage / kWidth, half, ahead, sum);
            for (int m = 0; m < rows; ++m)
                for (int t = 0; t < tiles; ++t) S::store(&scores[m][p - args.begin + place + t * kWidth], sum[m][t]);
        });
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

    // Weights of values → what their codes are multiplied with: Σ w · (scale · code + least) = Σ (w · scale) · code + shift. Lane by
    // lane, so that rows which see more positions change no sum.
    AMQ_INLINE void fold_scales(int m) {
        auto sum = S::splat(0.0f);
        for (int64_t p = args.begin; p < args.end; p += kWidth) {
            const Part<V> page = values(p);
            const uint8_t *scale = page.scale(p % kPage), *least = page.least(p % kPage);
            uint16_t written[2][kWidth] = {};  // the last line: what lies behind is of another sequence, or of none
            if (const int64_t left = args.end - p; left < kWidth) {
                std::memcpy(written[0], scale, 2 * left);
                std::memcpy(written[1], least, 2 * left);
                scale = reinterpret_cast<const uint8_t*>(written[0]);
                least = reinterpret_cast<const uint8_t*>(written[1]);
            }
            float* w = scores[m] + (p - args.begin);
            const auto weight = S::load_float(w);
            sum = S::fma(weight, S::load_half(least), sum);
            S::store(w, S::mul(weight, S::load_half(scale)));
        }
        shift[m] = sum_lanes<S>(sum);
    }

    template <int tiles>
    AMQ_INLINE void weigh_tiles(int64_t first, Partial* out) {
        typename S::F32 sum[rows][tiles] = {};
        for (int64_t p = args.begin; p < args.end; p += kPage) {
            const uint8_t* page = values(p).data;
            const uint8_t* ahead = p + kPage < args.end ? values(p + kPage).data : page;
            const int64_t left = args.end - p;
            const float* weights[rows];
            for (int m = 0; m < rows; ++m) weights[m] = scores[m] + (p - args.begin);
            multiply_tiles<S, V, rows, tiles>(weights, page, first / kWidth, args.head_dim / kWidth, left < kPage ? left : kPage,
                                              ahead, sum);
        }
        for (int m = 0; m < args.n_rows; ++m)
            for (int t = 0; t < tiles; ++t) {
                if constexpr (V::kLevels > 0) sum[m][t] = S::add(sum[m][t], S::splat(shift[m]));
                S::store(out[m].values + first + t * kWidth, sum[m][t]);
            }
    }

    AMQ_INLINE void run(Partial* out) {
        const float* q[rows];
        for (int m = 0; m < rows; ++m) q[m] = args.rows[m < args.n_rows ? m : 0].q;
        score(q);
        for (int m = 0; m < args.n_rows; ++m) soften(m, args.rows[m], out[m]);
        if constexpr (V::kLevels > 0)
            for (int m = 0; m < args.n_rows; ++m) fold_scales(m);
        for (int m = args.n_rows; m < rows; ++m) std::memset(scores[m], 0, sizeof scores[m]);
        int64_t k = 0;
        for (; k + kTiles * kWidth <= args.head_dim; k += kTiles * kWidth) weigh_tiles<kTiles>(k, out);
        for (; k < args.head_dim; k += kWidth) weigh_tiles<1>(k, out);
    }
};

template <class S, class K, class V>
void attend(const AttendArgs& args, Partial* out) {
    if (args.n_rows == 1) return Attention<S, K, V, 1>(args).run(out);
    if (args.n_rows == 2) return Attention<S, K, V, 2>(args).run(out);
    if (args.n_rows == 3) return Attention<S, K, V, 3>(args).run(out);
    if (args.n_rows == 4) return Attention<S, K, V, 4>(args).run(out);
    if constexpr (S::kGemmRows > 4) Attention<S, K, V, S::kGemmRows>(args).run(out);
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

}  // namespace
}  // namespace amq
