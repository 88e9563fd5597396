// The KV cache of attention: what a page holds of 64 positions of a KV head, and how a row gets there.
//
//     fp16   keys    [64 positions, head_dim]
//            values  [32 pairs of positions, head_dim, 2]
//     int8   the same in bytes, code + 128; then float32 scales, of keys [64] and of values [64]: largest magnitude / 127
//
// KV heads lie one after another. A tensor core wants neighbours of what it sums over in one word: features of a key, which
// are neighbours anyway, and positions of a value, hence the pairs. 16 bytes are what a lane loads, and `unpack` makes words of
// two fp16 numbers of them.

#pragma once

#include "calls.h"
#include "device.cuh"
#include "layout.cuh"
#include "rounding.cuh"

namespace amq {

constexpr int kPage = 64;  // positions

struct HalfCache {
    static constexpr int kUnit = 8;  // elements in 16 bytes
    static constexpr bool kScaled = false;
    AMQ_DEVICE static void unpack(const uint4& v, uint32_t (&pairs)[4]) {
        pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
    }
};

struct Int8Cache {
    static constexpr int kUnit = 16;
    static constexpr bool kScaled = true;
    AMQ_DEVICE static void unpack(const uint4& v, uint32_t (&pairs)[8]) {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        for (int i = 0; i < 4; ++i) {
            uint32_t two[2];
            unpack_bytes(words[i], two);
            pairs[2 * i] = two[0], pairs[2 * i + 1] = two[1];
        }
    }
};

// What a KV head takes in a page.
template <class Cache>
__host__ __device__ constexpr int64_t head_bytes(int head_dim) {
    return 2 * kPage * (head_dim * (16 / Cache::kUnit) + (Cache::kScaled ? 4 : 0));
}

// A KV head's part of a page.
template <class Cache>
struct HeadPage {
    static constexpr int kBytes = 16 / Cache::kUnit;  // of an element

    uint8_t* data;
    int head_dim;

    // The page that holds `position` of the sequence whose pages are row `slot` of the tables.
    AMQ_DEVICE HeadPage(const AttentionCall& c, int slot, int position, int kv_head) : head_dim(c.head_dim) {
        const int64_t page = load_shared_by_many(c.tables + slot * c.table_stride + position / kPage);
        data = c.cache + page * c.page_bytes + c.cache_offset + kv_head * head_bytes<Cache>(head_dim);
    }
    AMQ_DEVICE uint8_t* key(int place, int feature) const { return data + (place * head_dim + feature) * kBytes; }
    // Of `place`, which is even, and the next: the pair of a feature.
    AMQ_DEVICE uint8_t* values(int place, int feature) const {
        return data + (kPage * head_dim + place * head_dim + 2 * feature) * kBytes;
    }
    AMQ_DEVICE float* scale(bool of_values, int place) const {
        return reinterpret_cast<float*>(data + 2 * kPage * head_dim * kBytes) + (of_values ? kPage : 0) + place;
    }
};

// Features lane, lane + 32, … of a row of qkv.
template <int kPerLane>
struct Features {
    float x[kPerLane];
};

// x · weight / √(mean of x² + epsilon) where there is a weight, then the rotation of the row's position where there are angles;
// features beyond head_dim are 0. Sums and products are written out as fused ones: a key is computed by two kernels, and the
// compiler might fuse them in one and not in the other.
template <int kPerLane>
AMQ_DEVICE Features<kPerLane> prepare_row(const AttentionCall& c, const float* row, const float* weight, const float* cos,
                                          const float* sin) {
    const int lane = threadIdx.x % kWarp, half = c.rotary / 2;
    Features<kPerLane> out;
    float squares = 0.0f;
    for (int j = 0; j < kPerLane; ++j) {
        const int i = lane + kWarp * j;
        out.x[j] = i < c.head_dim ? row[i] : 0.0f;
        squares = fmaf(out.x[j], out.x[j], squares);
    }
    const float factor = weight ? 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(c.head_dim) + c.epsilon) : 1.0f;
    for (int j = 0; j < kPerLane; ++j) {
        const int i = lane + kWarp * j;
        if (i >= c.head_dim) break;
        if (weight) out.x[j] = weight[i] * (out.x[j] * factor);
        if (!cos || i >= c.rotary) continue;
        const int other = i < half ? i + half : i - half, angle = i < half ? i : other;
        float y = row[other];
        if (weight) y = weight[other] * (y * factor);
        out.x[j] = fmaf(i < half ? -y : y, sin[angle], out.x[j] * cos[angle]);
    }
    return out;
}

// Where the angles of a row begin, or null.
struct Angles {
    const float *cos = nullptr, *sin = nullptr;

    AMQ_DEVICE Angles(const AttentionCall& c, int row, int position) {
        if (!c.cos[0]) return;
        const int table = c.cos[1] && c.long_text && c.long_text[row] ? 1 : 0;
        const int64_t from = static_cast<int64_t>(position) * (c.rotary / 2);
        cos = c.cos[table] + from;
        sin = c.sin[table] + from;
    }
};

// A warp puts the key of a row, or its value, into the cache.
template <class Cache, int kPerLane>
AMQ_DEVICE void store_row(const AttentionCall& c, int row, int position, int kv_head, bool is_value) {
    const int lane = threadIdx.x % kWarp, place = position % kPage;
    const int head = kv_head + (is_value && !c.keys_are_values ? c.n_kv_heads : 0);
    const float* from = c.qkv + row * c.qkv_stride + c.n_heads * c.q_stride + head * c.head_dim;
    const Angles angles(c, row, position);
    const Features<kPerLane> made = prepare_row<kPerLane>(c, from, is_value ? c.v_norm : c.k_norm,
                                                          is_value ? nullptr : angles.cos, angles.sin);
    const HeadPage<Cache> page(c, c.slots[row], position, kv_head);
    float scale = 0.0f, factor = 0.0f;
    if constexpr (Cache::kScaled) {
        float largest = 0.0f;
        for (float x : made.x) largest = fabsf(x) <= FLT_MAX ? fmaxf(largest, fabsf(x)) : INFINITY;
        factor = scale_of(warp_max(largest), &scale);
        if (lane == 0) *page.scale(is_value, place) = scale;
    }
    for (int j = 0; j < kPerLane; ++j) {
        const int i = lane + kWarp * j;
        if (i >= c.head_dim) break;
        uint8_t* to = is_value ? page.values(place & ~1, i) + place % 2 * HeadPage<Cache>::kBytes : page.key(place, i);
        if constexpr (Cache::kScaled)
            *to = static_cast<uint8_t>(factor == 0.0f ? 128 : static_cast<int>(round_even(made.x[j] * factor)) + 128);
        else
            from_float(made.x[j], reinterpret_cast<__half*>(to));
    }
}

// A block of two warps for each row and KV head: its key and its value.
template <class Cache, int kPerLane>
__global__ void __launch_bounds__(2 * kWarp) store_kernel(AttentionCall c) {
    const int row = blockIdx.x / c.n_kv_heads, kv_head = blockIdx.x % c.n_kv_heads, position = c.positions[row];
    if (position < 0) return;
    store_row<Cache, kPerLane>(c, row, position, kv_head, threadIdx.x >= kWarp);
}

}  // namespace amq
