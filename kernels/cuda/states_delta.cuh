// Operators that carry a state on, second part: the gated delta rule (DeltaNet in csrc/cpu/decoder.h), in two launches.
//
//   delta_mix_kernel  A block has a head of q, k or v of one segment: convolution, SiLU, unit length, and beside v the decay
//                     and beta of its head. Row by row into `mixed`: all q, all k, all v, decays, betas.
//   delta_kernel      A block has a value head of one segment, a warp 16 columns of its S over all tokens: no warp waits for
//                     another until the norm. A lane has 4 of the columns and of every 32 rows 4: S comes and goes once, in
//                     16-byte accesses, and lies in registers between. That is for up to 128 features of a key; S of
//                     larger ones stays in memory.
//
// A token's Sᵀk and Sᵀq are sums over a lane's rows in order, then over lanes; v gives way to Sᵀq in `mixed`, and when all
// columns are there, warps norm the tokens.

#pragma once

#include "states.cuh"

namespace amq::states {

constexpr int kMostStateHead = 512;       // features of a key or a value
constexpr int kTileColumns = 16;          // of S, one after another in a row of its layout
constexpr int kQuadRows = 32;             // rows of S between one quad of a lane and its next one
constexpr int kStagedTokens = 16;         // at most
constexpr int kDeltaRegisters = 128;      // of a lane: two blocks on a multiprocessor
constexpr float kUnitEpsilon = 1e-6f;     // beside the squared length of q and k

// Where a part of a value head begins that is `width` wide.
AMQ_DEVICE int64_t value_place(const DeltaCall& call, const HeadPlaces& part, int head, int width) {
    const int group = call.n_value_heads / call.n_key_heads;
    return part.first + head / group * part.stride + head % group * width;
}

AMQ_DEVICE int64_t value_channel(const DeltaCall& call, int head) {
    return 2 * static_cast<int64_t>(call.n_key_heads) * call.key_dim + static_cast<int64_t>(head) * call.value_dim;
}

AMQ_DEVICE int64_t channels_of(const DeltaCall& call) { return value_channel(call, call.n_value_heads); }

// e^(−rate · softplus(a + dt_bias)) and sigmoid(b) of a value head, from a row of `in` into one of `mixed`.
AMQ_DEVICE void store_gates(const DeltaCall& call, int head, const float* in, float* mixed) {
    const float a = in[value_place(call, call.a, head, 1)] + call.dt_bias[head];
    const float softplus = a > 20.0f ? a : log1pf(expf(a));
    float* gate = mixed + channels_of(call) + head;
    gate[0] = expf(-call.rate[head] * softplus);
    gate[call.n_value_heads] = sigmoid(in[value_place(call, call.b, head, 1)]);
}

__global__ void __launch_bounds__(kStateThreads) delta_mix_kernel(DeltaCall call) {
    __shared__ float staged[kStateWarps][kMostStateHead];  // each lane's own
    const int heads = 2 * call.n_key_heads + call.n_value_heads;
    const Segment segment =
        segment_of(call.segments, blockIdx.x / heads, call.states, call.state_floats, call.state_offset);
    if (segment.count == 0) return;
    const int head = blockIdx.x % heads, value_head = head - 2 * call.n_key_heads;
    const int warp = threadIdx.x / kStateLanes, lane = threadIdx.x % kStateLanes;
    const int width = value_head < 0 ? call.key_dim : call.value_dim;
    const int64_t first = value_head < 0 ? static_cast<int64_t>(head) * width : value_channel(call, value_head);
    const int64_t place = value_head >= 0           ? value_place(call, call.v, value_head, width)
                          : head < call.n_key_heads ? call.q.first + head * call.q.stride
                                                    : call.k.first + (head - call.n_key_heads) * call.k.stride;
    const float* in = call.in + segment.first_row * call.in_stride;
    const auto input_of = [&](int channel) {
        return [=, &call](int t) { return in[t * call.in_stride + place + channel]; };
    };
    const auto convolution_of = [&](int channel) {
        return Convolution{call.convolution + first + channel, segment.state + first + channel, channels_of(call), call.kernel,
                           segment.begins};
    };
    const float length = head < call.n_key_heads ? 1.0f / sqrtf(static_cast<float>(call.key_dim)) : 1.0f;
    for (int t = warp; t < segment.count; t += kStateWarps) {
        float* mixed = call.mixed + (segment.first_row + t) * call.mixed_stride;
        float squares = 0.0f;
        for (int channel = lane; channel < width; channel += kStateLanes) {
            const float sum = convolution_of(channel).at(t, 0.0f, input_of(channel)), v = sum * sigmoid(sum);
            squares = fmaf(v, v, squares);
            staged[warp][channel] = v;
        }
        float factor = 1.0f;
        if (value_head < 0) factor = length / sqrtf(warp_sum(squares) + kUnitEpsilon);
        else if (lane == 0) store_gates(call, value_head, in + t * call.in_stride, mixed);
        for (int channel = lane; channel < width; channel += kStateLanes)
            mixed[first + channel] = staged[warp][channel] * factor;
    }
    synchronize();
    for (int channel = threadIdx.x; channel < width; channel += kStateThreads)
        convolution_of(channel).keep(segment.count, input_of(channel));
}

AMQ_DEVICE void add_product(float4& sum, float factor, const float4& v) {
    sum.x = fmaf(factor, v.x, sum.x);
    sum.y = fmaf(factor, v.y, sum.y);
    sum.z = fmaf(factor, v.z, sum.z);
    sum.w = fmaf(factor, v.w, sum.w);
}

// Over the eight lanes that have the same columns.
AMQ_DEVICE float4 sum_of_rows(float4 v) {
    for (int lanes = 4; lanes < kStateLanes; lanes *= 2) {
        v.x += shuffle_xor(v.x, lanes);
        v.y += shuffle_xor(v.y, lanes);
        v.z += shuffle_xor(v.z, lanes);
        v.w += shuffle_xor(v.w, lanes);
    }
    return v;
}

// Some tokens of a head, in shared memory: vectors of 4 features of q and of k, of v of every warp, decay and beta.
struct DeltaTokens {
    float4 queries[kStagedTokens * kQuadRows], keys[kStagedTokens * kQuadRows], values[kStagedTokens][kStateThreads / 8];
    float2 gates[kStagedTokens];
};

// 16 columns of S of a value head in a warp: rows 32 i + 4 (lane / 4) + j, columns 4 (lane % 4) ….
template <int kQuads>  // most i that registers have room for; 0: S stays in memory
struct DeltaTile {
    const DeltaCall& call;
    float4* memory;  // this lane's part of S
    int row;         // this lane's first one
    float4 kept[kQuads ? kQuads : 1][4];

    AMQ_DEVICE DeltaTile(const DeltaCall& given, const Segment& segment, int head, int tile) : call(given) {
        const int lane = threadIdx.x % kStateLanes;
        row = lane / 4 * 4;
        const int64_t column = static_cast<int64_t>(head) * call.value_dim + tile * kTileColumns;
        memory = reinterpret_cast<float4*>(segment.state + (call.kernel - 1) * channels_of(call) + column * call.key_dim +
                                           row * kTileColumns + lane % 4 * 4);
    }

    AMQ_DEVICE int quads() const { return kQuads ? kQuads : (call.key_dim + kQuadRows - 1) / kQuadRows; }
    AMQ_DEVICE bool has(int i) const { return i * kQuadRows + row < call.key_dim; }
    AMQ_DEVICE float4& in_memory(int i, int j) { return memory[(i * kQuadRows + j) * (kTileColumns / 4)]; }
    AMQ_DEVICE float4& at(int i, int j) {
        if constexpr (kQuads) return kept[i][j];
        else return in_memory(i, j);
    }

    AMQ_DEVICE void begin(bool zeros) {
        const float4 none = {0.0f, 0.0f, 0.0f, 0.0f};
        if (!kQuads && !zeros) return;
        for (int i = 0; i < quads(); ++i)
            for (int j = 0; j < 4; ++j)
                if (kQuads || has(i)) at(i, j) = zeros || !has(i) ? none : in_memory(i, j);
    }

    AMQ_DEVICE void end() {
        if constexpr (kQuads)
            for (int i = 0; i < kQuads; ++i)
                for (int j = 0; j < 4; ++j)
                    if (has(i)) in_memory(i, j) = kept[i][j];
    }

    // `count` tokens; their Sᵀq goes to `out`, which is this lane's in the first one's row of mixed.
    AMQ_DEVICE void run(const DeltaTokens& tokens, int count, float* out) {
        const int vectors = 8 * quads(), group = row / 4, column = threadIdx.x / kStateLanes * 4 + threadIdx.x % 4;
        float4 remembered = first_sums(tokens.keys + group);  // Sᵀk of the token to come, before its decay
        for (int t = 0; t < count; ++t) {
            const float4 *queries = tokens.queries + t * vectors + group, *keys = tokens.keys + t * vectors + group;
            const float decay = tokens.gates[t].x, beta = tokens.gates[t].y;
            const float4 v = tokens.values[t][column];
            remembered = sum_of_rows(remembered);
            const float4 change = {beta * fmaf(-decay, remembered.x, v.x), beta * fmaf(-decay, remembered.y, v.y),
                                   beta * fmaf(-decay, remembered.z, v.z), beta * fmaf(-decay, remembered.w, v.w)};
            // Behind the last token the sums of its own key stand in for those of none; they are not used.
            const float4* next = t + 1 < count ? keys + vectors : keys;
            const float4 sums = sum_of_rows(walk(decay, change, queries, keys, next, remembered));
            if (row == 0) *reinterpret_cast<float4*>(out) = sums;
            out += call.mixed_stride;
        }
    }

    // This lane's part of Sᵀk.
    AMQ_DEVICE float4 first_sums(const float4* keys) {
        float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int i = 0; i < quads(); ++i) {
            if (!kQuads && !has(i)) continue;
            const float4 k = keys[8 * i];
            add_product(sums, k.x, at(i, 0));
            add_product(sums, k.y, at(i, 1));
            add_product(sums, k.z, at(i, 2));
            add_product(sums, k.w, at(i, 3));
        }
        return sums;
    }

    // S ← decay · S + k ⊗ change; returns this lane's part of Sᵀq, and of Sᵀk of the next token in `remembered`.
    AMQ_DEVICE float4 walk(float decay, const float4& change, const float4* queries, const float4* keys, const float4* next,
                           float4& remembered) {
        float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
        remembered = out;
        for (int i = 0; i < quads(); ++i) {
            if (!kQuads && !has(i)) continue;
            const float4 k = keys[8 * i], q = queries[8 * i], n = next[8 * i];
            step(at(i, 0), decay, change, k.x, q.x, n.x, out, remembered);
            step(at(i, 1), decay, change, k.y, q.y, n.y, out, remembered);
            step(at(i, 2), decay, change, k.z, q.z, n.z, out, remembered);
            step(at(i, 3), decay, change, k.w, q.w, n.w, out, remembered);
        }
        return out;
    }

    AMQ_DEVICE static void step(float4& place, float decay, const float4& change, float k, float q, float next, float4& out,
                                float4& remembered) {
        const float4 old = place;
        const float4 s = {fmaf(k, change.x, decay * old.x), fmaf(k, change.y, decay * old.y),
                          fmaf(k, change.z, decay * old.z), fmaf(k, change.w, decay * old.w)};
        place = s;
        add_product(out, q, s);
        add_product(remembered, next, s);
    }
};

// `count` tokens from the row `mixed` on: `vectors` of q and of k, zeros behind key_dim; v from the tile `first_tile` on.
AMQ_DEVICE void stage(const DeltaCall& call, const float* mixed, int head, int first_tile, int count, int vectors,
                      DeltaTokens& tokens) {
    const int key_head = head / (call.n_value_heads / call.n_key_heads);
    for (int i = threadIdx.x; i < count * vectors; i += kStateThreads) {
        const int feature = i % vectors * 4;
        const float4 none = {0.0f, 0.0f, 0.0f, 0.0f};
        const float* q = mixed + i / vectors * call.mixed_stride + static_cast<int64_t>(key_head) * call.key_dim + feature;
        const float* k = q + static_cast<int64_t>(call.n_key_heads) * call.key_dim;
        const bool some = feature < call.key_dim;
        tokens.queries[i] = some ? *reinterpret_cast<const float4*>(q) : none;
        tokens.keys[i] = some ? *reinterpret_cast<const float4*>(k) : none;
    }
    constexpr int kVectors = kStateThreads / 8;  // of v, of all warps
    const int column = first_tile * kTileColumns + threadIdx.x % kVectors * 4;
    for (int t = threadIdx.x / kVectors; column < call.value_dim && t < count; t += kStateThreads / kVectors)
        tokens.values[t][threadIdx.x % kVectors] =
            *reinterpret_cast<const float4*>(mixed + t * call.mixed_stride + value_channel(call, head) + column);
    if (threadIdx.x < count) {
        const float* gates = mixed + threadIdx.x * call.mixed_stride + channels_of(call) + head;
        tokens.gates[threadIdx.x] = {gates[0], gates[call.n_value_heads]};
    }
}

// out = norm(Sᵀq) · silu(z), a warp for each token.
AMQ_DEVICE void norm_tokens(const DeltaCall& call, const Segment& segment, int head) {
    const int warp = threadIdx.x / kStateLanes, lane = threadIdx.x % kStateLanes;
    const int64_t z = value_place(call, call.z, head, call.value_dim);
    for (int t = warp; t < segment.count; t += kStateWarps) {
        const int64_t row = segment.first_row + t;
        const float* in = call.in + row * call.in_stride + z;
        const float* values = call.mixed + row * call.mixed_stride + value_channel(call, head);
        float squares = 0.0f;
        for (int i = lane; i < call.value_dim; i += kStateLanes) squares = fmaf(values[i], values[i], squares);
        const float factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(call.value_dim) + call.epsilon);
        for (int i = lane; i < call.value_dim; i += kStateLanes) {
            const float gate = in[i];
            store_element(call.out, call.out_kind, row * call.out_stride + static_cast<int64_t>(head) * call.value_dim + i,
                          call.norm[i] * (values[i] * factor) * (gate * sigmoid(gate)));
        }
    }
}

template <int kQuads>
__global__ void AMQ_REGISTERS(kDeltaRegisters, kStateThreads) delta_kernel(DeltaCall call) {
    __shared__ DeltaTokens tokens;
    const int head = blockIdx.x % call.n_value_heads;
    const Segment segment =
        segment_of(call.segments, blockIdx.x / call.n_value_heads, call.states, call.state_floats, call.state_offset);
    if (segment.count == 0) return;
    const int tiles = call.value_dim / kTileColumns, warp = threadIdx.x / kStateLanes, lane = threadIdx.x % kStateLanes;
    for (int first_tile = 0; first_tile < tiles; first_tile += kStateWarps) {
        const bool mine = first_tile + warp < tiles;
        DeltaTile<kQuads> tile(call, segment, head, first_tile + warp);
        if (mine) tile.begin(segment.begins);
        const int vectors = 8 * tile.quads(), most = kStagedTokens * kQuadRows / vectors;
        for (int first = 0; first < segment.count; first += most) {
            const int count = min(most, segment.count - first);
            float* mixed = call.mixed + (segment.first_row + first) * call.mixed_stride;
            synchronize();  // before what was staged last is overwritten
            stage(call, mixed, head, first_tile, count, vectors, tokens);
            synchronize();
            const int64_t column = value_channel(call, head) + (first_tile + warp) * kTileColumns + lane % 4 * 4;
            if (mine) tile.run(tokens, count, mixed + column);
        }
        if (mine) tile.end();
    }
    synchronize();
    norm_tokens(call, segment, head);
}

}  // namespace amq::states
