// Softmax attention of up to 8 query rows (heads that share keys, tokens that follow each other) over a paged cache, on
// tensor cores. Formulas: csrc/cpu/decoder_attention.cpp.
//
// A product has 16 rows, and queries and weights are float32: rows 0 to 7 hold what fp16 keeps of them, rows 8 to 15 what it
// leaves over, and the sum of a row and the one 8 below it is the product of 22 bits. Scores come out where the second product
// wants its weights, so that neither goes through memory:
//
//     scores [row, position] = queries · keysᵀ        a lane has row lane / 4, positions 2 · (lane % 4) and the next, of 8
//     out [row, feature]     = weights · values       weights: the same places, a word for two positions
//
// Positions are cut into spans (attention_spans.cuh), a span into one part for each group of warps, and a part into tiles of
// 16 positions. Warps of a group (`kSlices`) have features of their own and add up their scores. A row's softmax is what its
// parts give, put together part by part within a span, then span by span; a row with other rows beside it sees its own tiles
// only. Hence the same bits for a token of a prompt, which a block walks span by span, and for one that is decoded, whose
// spans are blocks and which the last of them to arrive puts together.

#pragma once

#include "attention_cache.cuh"
#include "attention_spans.cuh"

namespace amq {

constexpr int kQueries = 8;  // of a product
constexpr int kTile = 16;    // positions
constexpr float kValueRange = 64.0f;  // weights times scales of int8 values, below 1, are raised into fp16's range

struct AttentionArguments {
    AttentionCall call;
    bool walks;     // a block has kQueries queries of its rows and all of their spans; else all of one row, and one of its spans
    bool stores;    // keys and values of the row are to be put into the cache
    int tile_rows;  // rows of a block
    int parts;      // blocks for these rows and a KV head
};

template <class Cache, int kDims, int kSlices>
struct Attention {
    static constexpr int kAll = kDims * kSlices;      // features that are computed with
    static constexpr int kWarps = kSlices > 4 ? kSlices : 4;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kGroups = kWarps / kSlices;  // of warps, with positions of their own
    static constexpr int kUnit = Cache::kUnit;
    static constexpr int kChunks = kDims / (4 * kUnit);         // 16-byte loads for a row of keys, by a lane of four
    static constexpr int kPieces = kQueries * kAll / kThreads;  // features of a row that a thread puts together
    static constexpr int kLanes = kThreads / kQueries;          // threads of such a row

    struct Shared {
        uint4 queries[kAll / 16][kWarp];  // fragments of 16 features
        float factors[kQueries];          // that scores are multiplied with
        float scores[2][kSlices > 1 ? kWarps : 1][4][kWarp];
        float values[kGroups][kQueries][kAll + 1];
        float largest[kGroups][kQueries], sums[kGroups][kQueries];
        int is_last;
    };

    struct Sums {                   // of a warp, over the tiles of its part
        float largest = -INFINITY;  // of row lane / 4
        float sum = 0.0f;           // the lane's positions only
        float values[kChunks][kUnit / 2][4] = {};
    };

    struct Query {
        int row, head;
    };

    const AttentionArguments& a;
    const AttentionCall& c;
    Shared& shared;
    int first_row, kv_head;  // of the block
    int begin, count;        // queries that are worked on, which share what follows
    int slot, log2;          // their sequence, and Sight::log2
    int low, high;           // first and last position that any of them sees
    Sight mine;              // of query lane / 4

    AMQ_DEVICE Attention(const AttentionArguments& arguments, Shared& memory)
        : a(arguments), c(arguments.call), shared(memory) {}

    AMQ_DEVICE static int lane() { return threadIdx.x % kWarp; }
    AMQ_DEVICE static int slice() { return threadIdx.x / kWarp % kSlices; }
    AMQ_DEVICE static int group() { return threadIdx.x / kWarp / kSlices; }
    AMQ_DEVICE int heads() const { return c.n_heads / c.n_kv_heads; }  // that share keys
    AMQ_DEVICE Query query(int index) const {
        return {first_row + index / heads(), kv_head * heads() + index % heads()};
    }

    // -- what a tensor core reads

    // Puts a feature of a query into its place in the fragments, where a lane finds the features that it has of a key.
    AMQ_DEVICE void place_feature(int index, int feature, float x) {
        const int unit = feature / kUnit, pair = feature % kUnit / 2;
        const int step = unit / 4 * (kUnit / 4) + pair / 2;
        __half* words = reinterpret_cast<__half*>(&shared.queries[step][index * 4 + unit % 4]);
        __half kept;
        from_float(x, &kept);
        words[pair % 2 * 4 + feature % 2] = kept;
        from_float(x - to_float(kept), &words[pair % 2 * 4 + 2 + feature % 2]);
    }

    // Query `index` of those that are worked on; one that is not there is zeros. Its largest magnitude is brought to 2^14.
    AMQ_DEVICE void prepare_query(int index) {
        Features<kAll / kWarp> made = {};
        float factor = 1.0f, back = 1.0f;
        if (index < count) {
            const Query q = query(begin + index);
            const int position = c.positions[q.row];
            const Angles angles(c, q.row, position);
            made = prepare_row<kAll / kWarp>(c, c.qkv + q.row * c.qkv_stride + q.head * c.q_stride, c.q_norm, angles.cos,
                                             angles.sin);
            const float scale = c.scale * (c.position_scale ? c.position_scale[position] : 1.0f);
            float largest = 0.0f;
            for (float& x : made.x) largest = fmaxf(largest, fabsf(x *= scale));
            largest = warp_max(largest);
            if (largest > 0.0f && largest <= FLT_MAX) {
                const uint32_t exponent = min(127 + 14 - (static_cast<int>(word_of(largest) >> 23) - 127), 253);
                factor = float_of(exponent << 23), back = float_of((254 - exponent) << 23);
            }
        }
        if (lane() == 0) shared.factors[index] = back;
        for (int j = 0; j < kAll / kWarp; ++j) place_feature(index, lane() + kWarp * j, made.x[j] * factor);
    }

    // Queries into shared memory, and the row's key and value into the cache where this block is the one to do it.
    AMQ_DEVICE void prepare(bool stores) {
        for (int job = threadIdx.x / kWarp; job < kQueries + 2; job += kWarps) {
            if (job >= 2)
                prepare_query(job - 2);
            else if (stores)
                store_row<Cache, kAll / kWarp>(c, first_row, high, kv_head, job == 1);
        }
    }

    // -- a tile

    // Keys of 8 positions a piece; a lane has position lane / 4 of each.
    AMQ_DEVICE void load_keys(const HeadPage<Cache>& page, int place, uint4 (&keys)[2][kChunks]) const {
        for (int n = 0; n < 2; ++n)
            for (int i = 0; i < kChunks; ++i) {
                const int feature = slice() * kDims + (4 * i + lane() % 4) * kUnit;
                const uint8_t* from = page.key(place + 8 * n + lane() / 4, feature);
                keys[n][i] = feature < c.head_dim ? *reinterpret_cast<const uint4*>(from) : uint4{};
            }
    }

    // Values of 4 pairs of positions a piece; a lane has pair lane % 4 of each.
    AMQ_DEVICE void load_values(const HeadPage<Cache>& page, int place, uint4 (&values)[2][kChunks]) const {
        for (int n = 0; n < 2; ++n)
            for (int i = 0; i < kChunks; ++i) {
                const int feature = slice() * kDims + (8 * i + lane() / 4) * (kUnit / 2);
                const uint8_t* from = page.values(place + 8 * n + lane() % 4 * 2, feature);
                values[n][i] = feature < c.head_dim ? *reinterpret_cast<const uint4*>(from) : uint4{};
            }
    }

    // Places that nobody sees hold anything, and 0 times that could be no number.
    AMQ_DEVICE void hide_values(int position, uint4 (&values)[2][kChunks]) const {
        for (int n = 0; n < 2; ++n) {
            const int first = position + 8 * n + lane() % 4 * 2;
            const uint32_t mask = (first >= low && first <= high ? 0xffffu : 0u) |
                                  (first + 1 >= low && first + 1 <= high ? 0xffff0000u : 0u);
            for (uint4& v : values[n]) v = {v.x & mask, v.y & mask, v.z & mask, v.w & mask};
        }
    }

    // scores[n][i]: of row lane / 4 and position 8 · n + 2 · (lane % 4) + i, over the features of this slice.
    AMQ_DEVICE void multiply_keys(const uint4 (&keys)[2][kChunks], float (&scores)[2][2]) const {
        float sums[2][4] = {};
        for (int i = 0; i < kChunks; ++i) {
            uint32_t pairs[2][kUnit / 2];
            for (int n = 0; n < 2; ++n) Cache::unpack(keys[n][i], pairs[n]);
            for (int step = 0; step < kUnit / 4; ++step) {
                const uint4 q = shared.queries[(slice() * kChunks + i) * (kUnit / 4) + step][lane()];
                const uint32_t words[4] = {q.x, q.y, q.z, q.w};
                for (int n = 0; n < 2; ++n) mma(sums[n], words, pairs[n][2 * step], pairs[n][2 * step + 1], __half{});
            }
        }
        for (int n = 0; n < 2; ++n)
            for (int i = 0; i < 2; ++i) scores[n][i] = sums[n][i] + sums[n][i + 2];
    }

    // Adds up the scores of a group's warps, in their order. `turn` tells neighbouring tiles apart.
    AMQ_DEVICE void add_slices(int turn, float (&scores)[2][2]) {
        if constexpr (kSlices > 1) {
            const int warp = threadIdx.x / kWarp;
            for (int i = 0; i < 4; ++i) shared.scores[turn][warp][i][lane()] = scores[i / 2][i % 2];
            synchronize();
            for (int i = 0; i < 4; ++i) {
                float sum = 0.0f;
                for (int s = 0; s < kSlices; ++s) sum += shared.scores[turn][group() * kSlices + s][i][lane()];
                scores[i / 2][i % 2] = sum;
            }
        }
    }

    // Scores to weights, as fragments of the product with values; sums so far are brought to the new largest score.
    AMQ_DEVICE void soften(const HeadPage<Cache>& page, int position, float (&scores)[2][2], Sums& sums,
                           uint32_t (&weights)[4]) const {
        float2 key_scales[2], value_scales[2];
        if constexpr (Cache::kScaled)
            for (int n = 0; n < 2; ++n) {
                const int place = position % kPage + 8 * n + lane() % 4 * 2;
                key_scales[n] = *reinterpret_cast<const float2*>(page.scale(false, place));
                value_scales[n] = *reinterpret_cast<const float2*>(page.scale(true, place));
            }
        const float factor = shared.factors[lane() / 4];
        float largest = sums.largest;
        bool seen[2][2];
        for (int n = 0; n < 2; ++n)
            for (int i = 0; i < 2; ++i) {
                const int at = position + 8 * n + lane() % 4 * 2 + i;
                float score = scores[n][i] * factor;
                if constexpr (Cache::kScaled) score *= i == 0 ? key_scales[n].x : key_scales[n].y;
                if (c.softcap > 0.0f) score = c.softcap * tanhf(score / c.softcap);
                seen[n][i] = at >= mine.first && at <= mine.last;
                scores[n][i] = seen[n][i] ? score : -INFINITY;
                largest = fmaxf(largest, scores[n][i]);
            }
        for (int lanes = 1; lanes < 4; lanes *= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
        const float keep = largest == sums.largest ? 1.0f : expf(sums.largest - largest);
        sums.largest = largest;
        sums.sum *= keep;
        for (auto& chunk : sums.values)
            for (auto& tile : chunk)
                for (float& v : tile) v *= keep;
        for (int n = 0; n < 2; ++n) {
            float w[2];
            for (int i = 0; i < 2; ++i) {
                w[i] = seen[n][i] ? expf(scores[n][i] - largest) : 0.0f;
                sums.sum += w[i];
                if constexpr (Cache::kScaled)
                    if (seen[n][i]) w[i] *= kValueRange * (i == 0 ? value_scales[n].x : value_scales[n].y);
            }
            weights[2 * n] = pack_halves(w[0], w[1]);
            const float2 kept = unpack_halves(weights[2 * n]);
            weights[2 * n + 1] = pack_halves(w[0] - kept.x, w[1] - kept.y);
        }
    }

    AMQ_DEVICE void multiply_values(const uint32_t (&weights)[4], const uint4 (&values)[2][kChunks], Sums& sums) const {
        for (int i = 0; i < kChunks; ++i) {
            uint32_t pairs[2][kUnit / 2];
            for (int n = 0; n < 2; ++n) Cache::unpack(values[n][i], pairs[n]);
            for (int k = 0; k < kUnit / 2; ++k) mma(sums.values[i][k], weights, pairs[0][k], pairs[1][k], __half{});
        }
    }

    // -- a span

    // Tiles first … end − 1 of the part of a span that begins at `part` and holds `tiles`: those that somebody sees.
    AMQ_DEVICE void tiles_of(int part, int tiles, int& first, int& end) const {
        first = max(0, (low - part) >> 4);
        end = min(tiles, ((high - part) >> 4) + 1);
    }

    AMQ_DEVICE int part_size() const { return (1 << log2) / kGroups; }
    // Where the part of a span begins that is a group's own.
    AMQ_DEVICE int part_of(int span, int which) const { return (span << log2) + which * part_size(); }

    // The part's keys and values of its first tile, which are next to each other in memory, are asked for early.
    AMQ_DEVICE void prefetch_tile(int span) const {
        int first, end;
        tiles_of(part_of(span, group()), part_size() / kTile, first, end);
        if (first >= end) return;
        const int position = part_of(span, group()) + first * kTile;
        const HeadPage<Cache> page(c, slot, position, kv_head);
        const int bytes = kTile * c.head_dim * HeadPage<Cache>::kBytes;
        for (int i = (slice() * kWarp + lane()) * 128; i < bytes; i += kSlices * kWarp * 128) {
            prefetch(page.key(position % kPage, 0) + i);
            prefetch(page.values(position % kPage, 0) + i);
        }
    }

    AMQ_DEVICE void attend_span(int span, Sums& sums) {
        const int part = part_of(span, group()), tiles = part_size() / kTile;
        int first, end;
        tiles_of(part, tiles, first, end);
        int from = first, to = end;
        if constexpr (kSlices > 1)  // all warps meet at every tile
            for (int other = 0; other < kGroups; ++other) {
                int its_first, its_end;
                tiles_of(part_of(span, other), tiles, its_first, its_end);
                if (its_first >= its_end) continue;
                from = first < end ? min(from, its_first) : its_first;
                to = first < end ? max(to, its_end) : its_end;
            }
        uint4 keys[2][kChunks], values[2][kChunks];
        for (int tile = from; tile < to; ++tile) {
            const bool own = kSlices == 1 || (tile >= first && tile < end);
            const int position = part + (own ? tile : first) * kTile;
            float scores[2][2] = {};
            const HeadPage<Cache> page(c, slot, own ? position : high, kv_head);
            if (own) {
                if (tile == first) load_keys(page, position % kPage, keys);
                load_values(page, position % kPage, values);
                multiply_keys(keys, scores);
                if (tile + 1 < end)
                    load_keys(HeadPage<Cache>(c, slot, position + kTile, kv_head), (position + kTile) % kPage, keys);
            }
            add_slices(tile % 2, scores);
            if (!own) continue;
            uint32_t weights[4];
            soften(page, position, scores, sums, weights);
            if (!Cache::kScaled && (position < low || position + kTile - 1 > high)) hide_values(position, values);
            multiply_values(weights, values, sums);
        }
    }

    // The warp's sums into shared memory, where every thread finds its row's.
    AMQ_DEVICE void share(Sums& sums) {
        const int row = lane() / 4;
        for (int lanes = 1; lanes < 4; lanes *= 2) sums.sum += shuffle_xor(sums.sum, lanes);
        if (lane() % 4 == 0 && slice() == 0) {
            shared.largest[group()][row] = sums.largest;
            shared.sums[group()][row] = sums.sum;
        }
        float* to = shared.values[group()][row] + slice() * kDims + lane() % 4 * kUnit;
        for (int i = 0; i < kChunks; ++i)
            for (int k = 0; k < kUnit / 2; ++k)
                for (int column = 0; column < 2; ++column) {
                    const float sum = sums.values[i][k][column] + sums.values[i][k][column + 2];
                    to[i * 4 * kUnit + column * (kUnit / 2) + k] = Cache::kScaled ? sum / kValueRange : sum;
                }
    }

    // Puts the softmax of a span together for the thread's row and features, and adds it to what came before it.
    AMQ_DEVICE void gather(Softmax<kPieces>& total) const {
        const int row = threadIdx.x / kLanes, feature = threadIdx.x % kLanes;
        Softmax<kPieces> span;
        for (int part = 0; part < kGroups; ++part)
            span.merge(shared.largest[part][row], shared.sums[part][row],
                       [&](int j) { return shared.values[part][row][feature + kLanes * j]; });
        total.merge(span.largest, span.sum, [&](int j) { return span.values[j]; });
    }

    // -- queries of one sequence

    // The thread's feature j of its row's output; whether there is one.
    AMQ_DEVICE bool own_feature(int j, int& feature) const {
        feature = threadIdx.x % kLanes + kLanes * j;
        return static_cast<int>(threadIdx.x) / kLanes < count && feature < c.head_dim;
    }

    AMQ_DEVICE Query own_query() const { return query(begin + threadIdx.x / kLanes); }

    AMQ_DEVICE void finish(Softmax<kPieces>& total) const {
        const Query q = own_query();
        if (c.sinks && static_cast<int>(threadIdx.x) / kLanes < count)
            total.merge(c.sinks[q.head], 1.0f, [](int) { return 0.0f; });
        const float inverse = 1.0f / total.sum;
        const float* gate = c.qkv + q.row * c.qkv_stride + q.head * c.q_stride + c.head_dim;
        const int64_t to = q.row * c.out_stride + q.head * c.head_dim;
        int feature;
        for (int j = 0; j < kPieces; ++j) {
            if (!own_feature(j, feature)) continue;
            float y = total.values[j] * inverse;
            if (c.gated) y *= 1.0f / (1.0f + expf(-gate[feature]));
            store_element(c.out, c.out_kind, to + feature, y);
        }
    }

    AMQ_DEVICE void write_zeros() const {
        const Query q = own_query();
        int feature;
#pragma unroll 1
        for (int j = 0; j < kPieces; ++j)
            if (own_feature(j, feature))
                store_element(c.out, c.out_kind, q.row * c.out_stride + q.head * c.head_dim + feature, 0.0f);
    }

    AMQ_DEVICE float* partial(Query q, int span) const {
        return c.partials + ((static_cast<int64_t>(q.row) * c.n_heads + q.head) * c.splits + span) * (c.head_dim + 2);
    }

    AMQ_DEVICE void keep_partial(const Softmax<kPieces>& total, int span) const {
        float* to = partial(own_query(), span);
        int feature;
        for (int j = 0; j < kPieces; ++j)
            if (own_feature(j, feature)) to[2 + feature] = total.values[j];
        if (!own_feature(0, feature) || feature > 0) return;
        to[0] = total.largest;
        to[1] = total.sum;
    }

    // Queries begin … begin + count − 1: spans first … last of those that they see. `own_span` is where to keep what comes out;
    // −1: it is all there is.
    AMQ_DEVICE void attend(int first, int last, bool stores, int own_span) {
        prefetch_tile(first);
        prepare(stores);
        synchronize();
        Softmax<kPieces> total;
        for (int span = first; span <= last; ++span) {
            Sums sums;
            attend_span(span, sums);
            share(sums);
            synchronize();
            gather(total);
            if (span < last) synchronize();
        }
        if (own_span >= 0)
            keep_partial(total, own_span);
        else
            finish(total);
    }

    // -- a block

    // Takes as many queries from `begin` on, before `end`, as one walk serves: of one sequence and with spans of one length.
    // Returns whether they see anything.
    AMQ_DEVICE bool take(int end) {
        const Sight sight(c, query(begin).row);
        slot = c.slots[query(begin).row];
        count = 1;
        log2 = sight.log2, low = sight.first, high = sight.last;
        mine = lane() / 4 == 0 ? sight : Sight();
        if (high < 0) return false;
        for (; begin + count < end; ++count) {
            const int row = query(begin + count).row;
            const Sight other(c, row);
            if (other.last < 0 || other.log2 != log2 || c.slots[row] != slot) break;
            low = min(low, other.first), high = max(high, other.last);
            if (lane() / 4 == count) mine = other;
        }
        return true;
    }

    // Whether this block, of those for the spans of a row and KV head, is the last to have kept its partials.
    AMQ_DEVICE bool is_last(int spans) {
        memory_fence();
        synchronize();
        if (threadIdx.x == 0) {
            int32_t* counter = c.counters + static_cast<int64_t>(first_row) * c.n_heads + kv_head;
            shared.is_last = atomic_add(counter, 1) == spans - 1;
            if (shared.is_last) *counter = 0;
        }
        synchronize();
        if (shared.is_last) memory_fence();  // before what the others kept is read
        return shared.is_last;
    }

    AMQ_DEVICE void finish_spans(int spans) const {
        constexpr int kBatch = kPieces < 32 ? 32 / kPieces : 1;  // as many loads at once as a lane has registers for
        Softmax<kPieces> total;
        for (int first = 0; first < spans; first += kBatch) {
            float largest[kBatch], sums[kBatch], values[kBatch][kPieces];
            for (int s = 0; s < kBatch; ++s) {
                const float* from = partial(own_query(), first + s);
                const bool is_there = first + s < spans && static_cast<int>(threadIdx.x) / kLanes < count;
                largest[s] = is_there ? load_fresh(from) : -INFINITY;
                sums[s] = is_there ? load_fresh(from + 1) : 0.0f;
                int feature;
                for (int j = 0; j < kPieces; ++j)
                    values[s][j] = own_feature(j, feature) && is_there ? load_fresh(from + 2 + feature) : 0.0f;
            }
            for (int s = 0; s < kBatch; ++s) total.merge(largest[s], sums[s], [&](int j) { return values[s][j]; });
        }
        finish(total);
    }

    // A block has one span of all queries of a row, and the last block of those that have any puts them together; or it walks all
    // spans of kQueries queries. What computes is the same code, and so are the bits.
    AMQ_DEVICE void run() {
        const int part = blockIdx.x % a.parts, tile = blockIdx.x / a.parts;
        kv_head = tile % c.n_kv_heads;
        first_row = tile / c.n_kv_heads * a.tile_rows;
        const int rows = min(a.tile_rows, c.rows - first_row);
        const Sight sight(c, first_row);
        const int spans = a.walks || sight.last < 0 ? 1 : sight.spans();
        if (!a.walks && part >= spans) return;
        const int first = a.walks ? part * kQueries : 0, all = rows * heads();
        const int end = a.walks ? min(first + kQueries, all) : all;
        for (begin = first; begin < end; begin += count) {
            if (!take(min(begin + kQueries, end))) {
                write_zeros();
                continue;
            }
            const int span = (low >> log2) + (a.walks ? 0 : part);
            attend(span, a.walks ? high >> log2 : span, a.stores && begin == 0 && part == spans - 1, spans > 1 ? part : -1);
        }
        if (spans == 1 || !is_last(spans)) return;
        for (begin = 0; begin < all; begin += count) {
            take(min(begin + kQueries, all));
            finish_spans(spans);
        }
    }
};

template <class Cache, int kDims, int kSlices>
__global__ void AMQ_REGISTERS(kDims <= 64 ? 168 : 240, (Attention<Cache, kDims, kSlices>::kThreads))
    attention_kernel(AttentionArguments arguments) {
    using Work = Attention<Cache, kDims, kSlices>;
    __shared__ typename Work::Shared shared;
    Work(arguments, shared).run();
}

}  // namespace amq
