// Operators that carry a state on: delta nets and short convolutions.
//
// An item of the loops that threads share is a part of the state over all tokens of a segment. No other item touches that part, so
// this one reads it, writes it and copies it for snapshots without a barrier. Sums run token by token: a text gives the same
// bits however it is cut into passes.

#include <cmath>

#include "decoder_pass.h"

namespace amq {
namespace {

constexpr int64_t kColumns = 2 * kLanes;  // of S in one item: with a key_dim of 128 they stay in the first cache over all tokens
constexpr int64_t kChannels = 128;        // of a short convolution in one item
constexpr float kUnitEpsilon = 1e-6f;     // beside the squared length of q and k

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// What the convolution will look back on after `rows` tokens. `to` may be args.state: every row is read before it is written.
void keep_inputs(const ConvolveArgs& args, int64_t rows, float* to) {
    const int64_t before = args.kernel - 1;
    for (int64_t i = 0; i < before; ++i, to += args.state_stride) {
        const int64_t from = rows + i - before;
        if (from >= 0) std::copy_n(args.x + from * args.x_stride, args.channels, to);
        else if (args.state) std::copy_n(args.state + (from + before) * args.state_stride, args.channels, to);
        else std::fill_n(to, args.channels, 0.0f);
    }
}

}  // namespace

// mixed(row): q, k and v behind their convolution, then decay and beta of each value head. In the end v gives way to the output.
void DecoderPass::apply(const Step& step, const DeltaNet& op) {
    project_stream(step, op.in);
    const int64_t segments = static_cast<int64_t>(pass_.segments.size()), heads = 2 * op.n_key_heads + op.n_value_heads;
    team_.share(segments * heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) mix_head(op, pass_.segments[item / heads], item % heads);
    });
    team_.wait();
    const int64_t blocks = ceil_div(op.value_dim, kColumns), items = op.n_value_heads * blocks;
    team_.share(segments * items, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item)
            carry_on(op, pass_.segments[item / items], item % items / blocks, item % blocks * kColumns);
    });
    team_.wait();
    const LinearCall c = call(op.out, made_row(0), d_.input_stride_, output(0), m_.hidden, pass_.rows);
    LinearJob job(c, isa_);
    make_input(job, pass_.rows, [&](int64_t row) {
        for (int64_t head = 0; head < op.n_value_heads; ++head) {
            float* out = made_row(row) + head * op.value_dim;
            vector_.rms_norm(mixed(row) + op.value_channel(head), op.norm, m_.epsilon, op.value_dim, out);
            vector_.gate_silu(out, wide(row) + op.of_value_head(op.z, head, op.value_dim), op.value_dim);
        }
    });
    run_and_add(step, job);
}

// head: of all heads of q, then of k, then of v, which go with the gates of their head.
void DecoderPass::mix_head(const DeltaNet& op, const Segment& segment, int64_t head) {
    const int64_t value_head = head - 2 * op.n_key_heads, width = value_head < 0 ? op.key_dim : op.value_dim;
    const int64_t channel = value_head < 0 ? head * width : op.value_channel(value_head);
    const int64_t place = value_head >= 0         ? op.of_value_head(op.v, value_head, width)
                          : head < op.n_key_heads ? op.q.of(head)
                                                  : op.k.of(head - op.n_key_heads);
    ConvolveArgs args;
    args.x = wide(segment.first_row) + place;
    args.weight = op.convolution + channel;
    args.out = mixed(segment.first_row) + channel;
    args.state_stride = args.weight_stride = op.channels();
    args.channels = width;
    args.kernel = op.kernel;
    args.silu = true;
    convolve(args, segment, op.state_offset + channel);
    const float length = head < op.n_key_heads ? 1.0f / std::sqrt(static_cast<float>(op.key_dim)) : 1.0f;
    for (int64_t row = segment.first_row; row < segment.first_row + segment.rows; ++row) {
        if (value_head < 0) {
            vector_.unit(mixed(row) + channel, kUnitEpsilon, length, width);
            continue;
        }
        const float a = wide(row)[op.of_value_head(op.a, value_head, 1)], b = wide(row)[op.of_value_head(op.b, value_head, 1)];
        float* gate = mixed(row) + op.channels() + value_head;
        gate[0] = std::exp(-op.rate[value_head] * softplus(a + op.dt_bias[value_head]));
        gate[op.n_value_heads] = sigmoid(b);
    }
}

// Columns `column` … of a value head's S.
void DecoderPass::carry_on(const DeltaNet& op, const Segment& segment, int64_t head, int64_t column) {
    const int64_t columns = std::min(kColumns, op.value_dim - column), floats = op.key_dim * columns;
    const int64_t place = op.state_offset + (op.kernel - 1) * op.channels() + (head * op.value_dim + column) * op.key_dim;
    const int64_t key_head = head / (op.n_value_heads / op.n_key_heads);
    float* state = state_of(segment.state) + place;
    if (segment.position == 0) std::fill_n(state, floats, 0.0f);
    int64_t done = 0;
    const auto run_to = [&](int64_t rows) {
        if (rows == done) return;
        float* row = mixed(segment.first_row + done);
        DeltaArgs args;
        args.q = row + key_head * op.key_dim;
        args.k = row + (op.n_key_heads + key_head) * op.key_dim;
        args.v = args.out = row + op.value_channel(head) + column;
        args.decay = row + op.channels() + head;
        args.beta = args.decay + op.n_value_heads;
        args.state = state;
        args.stride = d_.mixed_stride_;
        args.tokens = rows - done;
        args.key_dim = op.key_dim;
        args.columns = columns;
        vector_.delta(args);
        done = rows;
    };
    for (const Snapshot& snapshot : segment.snapshots) {
        run_to(snapshot.rows);
        std::copy_n(state, floats, state_of(snapshot.state) + place);
    }
    run_to(segment.rows);
}

void DecoderPass::apply(const Step& step, const ShortConv& op) {
    project_stream(step, op.in);
    const int64_t segments = static_cast<int64_t>(pass_.segments.size()), blocks = ceil_div(op.channels(), kChannels);
    team_.share(segments * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) mix_channels(op, pass_.segments[item / blocks], item % blocks * kChannels);
    });
    team_.wait();
    const LinearCall c = call(op.out, mixed(0), d_.mixed_stride_, output(0), m_.hidden, pass_.rows);
    LinearJob job(c, isa_);
    make_input(job, pass_.rows, [](int64_t) {});
    run_and_add(step, job);
}

// Channels `channel` …; b · x takes the place of x.
void DecoderPass::mix_channels(const ShortConv& op, const Segment& segment, int64_t channel) {
    const int64_t count = std::min(kChannels, op.channels() - channel), end = segment.first_row + segment.rows;
    for (int64_t row = segment.first_row; row < end; ++row) {
        const float* b = wide(row) + channel;
        float* x = wide(row) + 2 * op.channels() + channel;
        for (int64_t k = 0; k < count; ++k) x[k] *= b[k];
    }
    ConvolveArgs args;
    args.x = wide(segment.first_row) + 2 * op.channels() + channel;
    args.weight = op.convolution + channel;
    args.bias = op.bias ? op.bias + channel : nullptr;
    args.out = mixed(segment.first_row) + channel;
    args.state_stride = args.weight_stride = op.channels();
    args.channels = count;
    args.kernel = op.kernel;
    convolve(args, segment, op.state_offset + channel);
    for (int64_t row = segment.first_row; row < end; ++row) {
        const float* c = wide(row) + op.channels() + channel;
        float* out = mixed(row) + channel;
        for (int64_t k = 0; k < count; ++k) out[k] *= c[k];
    }
}

// Some channels over a segment: from wide to mixed, with their part of the state, which begins at float `place`.
void DecoderPass::convolve(ConvolveArgs args, const Segment& segment, int64_t place) {
    float* state = state_of(segment.state) + place;
    args.state = segment.position ? state : nullptr;
    args.x_stride = d_.wide_stride_;
    args.out_stride = d_.mixed_stride_;
    args.tokens = segment.rows;
    vector_.convolve(args);
    for (const Snapshot& snapshot : segment.snapshots) keep_inputs(args, snapshot.rows, state_of(snapshot.state) + place);
    keep_inputs(args, segment.rows, state);
}

}  // namespace amq
