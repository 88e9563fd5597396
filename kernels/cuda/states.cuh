// Operators that carry a state on, first part: causal convolutions, and the short convolution that is nothing else.
//
// A block has some channels of one segment, a warp every eighth token of it, a lane a channel: tokens of a convolution do not
// wait for each other. The state, the inputs of the last kernel − 1 tokens, is written when the whole block has read it. Every
// sum is of one lane, in the order of the kernel, so that a text gives the same bits however it is cut into passes.

#pragma once

#include "activation.cuh"
#include "device.cuh"

namespace amq::states {

constexpr int kStateThreads = 256, kStateLanes = 32, kStateWarps = kStateThreads / kStateLanes;

struct Segment {
    int64_t first_row;
    int count;
    bool begins;
    float* state;  // this step's part
};

AMQ_DEVICE Segment segment_of(const Segments& segments, int index, float* states, int64_t state_floats, int64_t state_offset) {
    return {segments.first[index], segments.count[index], segments.begins[index] != 0,
            states + segments.state[index] * state_floats + state_offset};
}

// One channel over the tokens of a segment.
struct Convolution {
    const float* weight;  // [kernel, channels], the newest token last; this channel's of the oldest
    float* state;         // [kernel − 1, channels], likewise
    int64_t channels;
    int kernel;
    bool begins;

    // What token t is given: input(t), or before the segment what the state has kept.
    template <class Input>
    AMQ_DEVICE float input_at(int t, const Input& input) const {
        if (t >= 0) return input(t);
        return begins ? 0.0f : state[(t + kernel - 1) * channels];
    }

    // sum + Σ_j weight[j] · what token t − kernel + 1 + j is given; four loads are under way at a time.
    template <class Input>
    AMQ_DEVICE float at(int t, float sum, const Input& input) const {
        for (int first = 0; first < kernel; first += 4) {
            float x[4], w[4];
            for (int i = 0; i < 4; ++i) {
                const bool used = first + i < kernel;
                x[i] = used ? input_at(t - kernel + 1 + first + i, input) : 0.0f;
                w[i] = used ? load_shared_by_many(weight + (first + i) * channels) : 0.0f;
            }
            for (int i = 0; i < 4; ++i) sum = fmaf(w[i], x[i], sum);
        }
        return sum;
    }

    // The state behind `count` tokens. The older come first: what a place is given lies in it or behind it.
    template <class Input>
    AMQ_DEVICE void keep(int count, const Input& input) const {
        for (int i = 0; i < kernel - 1; ++i) state[i * channels] = input_at(count - kernel + 1 + i, input);
    }
};

// out = c · conv(b · x) of 32 channels of a segment.
__global__ void __launch_bounds__(kStateThreads) short_conv_kernel(ShortConvCall call) {
    const int pieces = (call.channels + kStateLanes - 1) / kStateLanes;
    const Segment segment =
        segment_of(call.segments, blockIdx.x / pieces, call.states, call.state_floats, call.state_offset);
    if (segment.count == 0) return;
    const int warp = threadIdx.x / kStateLanes;
    const int channel = blockIdx.x % pieces * kStateLanes + threadIdx.x % kStateLanes;
    const bool mine = channel < call.channels;
    const Convolution convolution = {call.convolution + channel, segment.state + channel, call.channels, call.kernel,
                                     segment.begins};
    const float* in = call.in + segment.first_row * call.in_stride + channel;
    const auto input = [&](int t) {
        const float* row = in + t * call.in_stride;
        return row[0] * row[2 * static_cast<int64_t>(call.channels)];
    };
    for (int t = warp; mine && t < segment.count; t += kStateWarps) {
        const float sum = convolution.at(t, call.bias ? call.bias[channel] : 0.0f, input);
        store_element(call.out, call.out_kind, (segment.first_row + t) * call.out_stride + channel,
                      in[t * call.in_stride + call.channels] * sum);
    }
    synchronize();
    if (mine && warp == 0) convolution.keep(segment.count, input);
}

}  // namespace amq::states
