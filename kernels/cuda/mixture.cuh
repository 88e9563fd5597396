// Mixtures of experts around their linears: which experts a row is given to and with what weights (csrc/cpu/decoder_router.h says
// the same for a CPU), and the sum of what they give.
//
//   choose_kernel   A warp has a row, a block eight of them, so that a pass of up to eight rows is one block, which also lists
//                   the experts that were chosen, with their rows. Scores lie in shared memory, expert e in lane e % 32.
//   combine_kernel  A thread has a feature of a row, or every 256th one where a norm wants whole rows.

#pragma once

#include "activation.cuh"
#include "device.cuh"

namespace amq::mixture {

constexpr int kMixtureLanes = 32, kMixtureRows = 8, kMixtureThreads = kMixtureLanes * kMixtureRows;
constexpr int kMostExperts = 512, kMostChosen = 32;

// Of the rows of a block.
struct ChooseScratch {
    float score[kMixtureRows][kMostExperts];   // what weights are made of
    float judged[kMixtureRows][kMostExperts];  // what experts are chosen by
    float group[kMixtureRows][kMostExperts / 2];
    int32_t found[kMixtureRows][kMostChosen];   // experts from the best on
    int32_t choice[kMixtureRows][kMostChosen];  // ascending
};

// One row, and its warp's part of the scratch memory.
struct Choice {
    const ChooseCall& call;
    ChooseScratch& scratch;
    int warp, lane;
    int64_t row;
    bool present;          // there is such a row, and it is not empty
    bool numbers = false;  // all its scores are

    AMQ_DEVICE Choice(const ChooseCall& given, ChooseScratch& memory)
        : call(given), scratch(memory), warp(threadIdx.x / kMixtureLanes), lane(threadIdx.x % kMixtureLanes),
          row(static_cast<int64_t>(blockIdx.x) * kMixtureRows + warp) {
        present = row < call.rows && !(call.positions && call.positions[row] < 0);
    }

    AMQ_DEVICE void score() {
        const float* scores = call.scores + row * call.score_stride;
        float largest = -INFINITY, sum = 0.0f, odd = 0.0f;
        float *made = scratch.score[warp], *judged = scratch.judged[warp];
        if (!call.sigmoid) {
            for (int e = lane; e < call.experts; e += kMixtureLanes) largest = fmaxf(largest, scores[e]);
            largest = warp_max(largest);
            for (int e = lane; e < call.experts; e += kMixtureLanes) sum += made[e] = expf(scores[e] - largest);
            sum = warp_sum(sum);
        }
        for (int e = lane; e < call.experts; e += kMixtureLanes) {
            made[e] = call.sigmoid ? sigmoid(scores[e]) : made[e] / sum;
            judged[e] = call.correction ? made[e] + call.correction[e] : made[e];
            if (judged[e] != judged[e]) odd = 1.0f;
        }
        numbers = warp_max(odd) == 0.0f;
    }

    AMQ_DEVICE int group_size() const { return call.experts / call.groups; }

    // A group is as good as its two best experts together.
    AMQ_DEVICE void score_groups() {
        for (int group = lane; group < call.groups; group += kMixtureLanes) {
            float first = -INFINITY, second = -INFINITY;
            for (int e = group * group_size(); e < (group + 1) * group_size(); ++e) {
                second = fmaxf(second, fminf(first, scratch.judged[warp][e]));
                first = fmaxf(first, scratch.judged[warp][e]);
            }
            scratch.group[warp][group] = first + second;
        }
    }

    AMQ_DEVICE void drop_groups() {
        const float* scores = scratch.group[warp];
        for (int group = lane; group < call.groups; group += kMixtureLanes) {
            int better = 0;
            for (int other = 0; other < call.groups; ++other)
                better += scores[other] > scores[group] || (scores[other] == scores[group] && other < group);
            for (int e = group * group_size(); better >= call.top_groups && e < (group + 1) * group_size(); ++e)
                scratch.judged[warp][e] = -INFINITY;
        }
    }

    // Whether one expert is chosen before another: of equals the first.
    AMQ_DEVICE static bool is_before(float value, float expert, float other_value, float other) {
        return value > other_value || (value == other_value && expert < other);
    }

    // Experts as floats, which is what shuffles take; kMostExperts, where a lane has none left.
    AMQ_DEVICE void take_best() {
        uint32_t taken = 0;  // of this lane's
        for (int i = 0; i < call.top_k; ++i) {
            float best = -INFINITY, expert = kMostExperts;
            for (int n = 0, e = lane; e < call.experts; ++n, e += kMixtureLanes) {
                const float value = scratch.judged[warp][e];
                if (taken >> n & 1 || !is_before(value, e, best, expert)) continue;
                best = value;
                expert = e;
            }
            for (int lanes = kMixtureLanes / 2; lanes > 0; lanes /= 2) {
                const float other_best = shuffle_xor(best, lanes), other = shuffle_xor(expert, lanes);
                if (!is_before(other_best, other, best, expert)) continue;
                best = other_best;
                expert = other;
            }
            const int chosen = static_cast<int>(expert);
            if (chosen % kMixtureLanes == lane) taken |= 1u << chosen / kMixtureLanes;
            if (lane == 0) scratch.found[warp][i] = chosen;
        }
    }

    // A lane has an expert: its place is the number of those before it.
    AMQ_DEVICE void sort() {
        if (lane >= call.top_k) return;
        const int mine = present && !numbers ? lane : present ? scratch.found[warp][lane] : -1;
        int place = lane;
        if (present && numbers) {
            place = 0;
            for (int i = 0; i < call.top_k; ++i) place += scratch.found[warp][i] < mine;
        }
        scratch.choice[warp][place] = mine;
    }

    AMQ_DEVICE void write() {
        if (lane >= call.top_k || row >= call.rows) return;
        const int* choice = scratch.choice[warp];
        float weight = present ? NAN : 0.0f;
        if (present && numbers) {
            weight = scratch.score[warp][choice[lane]];
            float sum = call.epsilon;
            for (int i = 0; i < call.top_k; ++i) sum += scratch.score[warp][choice[i]];
            if (call.normalized) weight /= sum;
            weight *= call.scale;
            if (call.expert_scale) weight *= call.expert_scale[choice[lane]];
        }
        call.choice[row * call.top_k + lane] = choice[lane];
        call.weights[row * call.top_k + lane] = weight;
    }
};

// The distinct experts of the block's rows, ascending, each with its entries. A thread has an entry; that of an expert's first
// row writes the expert.
AMQ_DEVICE void list_experts(const ChooseCall& call, const ChooseScratch& scratch, bool (&leads)[kMixtureThreads]) {
    const int entries = call.rows * call.top_k, entry = threadIdx.x;
    const auto expert_of = [&](int i) { return scratch.choice[i / call.top_k][i % call.top_k]; };
    const int expert = entry < entries ? expert_of(entry) : -1;
    bool first = expert >= 0;
    for (int i = 0; first && i < entry; ++i) first = expert_of(i) != expert;
    leads[entry] = first;
    synchronize();
    if (entry == 0) {
        int count = 0;
        for (int i = 0; i < entries; ++i) count += leads[i];
        *call.n_groups = count;
    }
    if (!first) return;
    int place = 0;
    for (int i = 0; i < entries; ++i) place += leads[i] && expert_of(i) < expert;
    ExpertRows& group = call.groups_out[place];
    int count = 0;
    for (int i = entry; i < entries; ++i)
        if (expert_of(i) == expert) group.entries[count++] = i;
    group.expert = expert;
    group.count = count;
}

__global__ void __launch_bounds__(kMixtureThreads) choose_kernel(ChooseCall call) {
    __shared__ ChooseScratch scratch;
    __shared__ bool leads[kMixtureThreads];
    Choice choice(call, scratch);
    if (choice.present) choice.score();
    if (call.groups > 1) {
        synchronize();
        if (choice.present) choice.score_groups();
        synchronize();
        if (choice.present) choice.drop_groups();
    }
    synchronize();
    if (choice.present && choice.numbers) choice.take_best();
    synchronize();
    choice.sort();
    synchronize();
    choice.write();
    if (call.groups_out) list_experts(call, scratch, leads);
}

// Sums over the whole block, the same in all threads.
AMQ_DEVICE float2 block_sums(float2 v, float2 (&sums)[kMixtureRows]) {
    v = {warp_sum(v.x), warp_sum(v.y)};
    if (threadIdx.x % kMixtureLanes == 0) sums[threadIdx.x / kMixtureLanes] = v;
    synchronize();
    v = sums[0];
    for (int warp = 1; warp < kMixtureRows; ++warp) v = {v.x + sums[warp].x, v.y + sums[warp].y};
    return v;
}

struct CombineArguments {
    CombineCall call;
    int blocks;  // of a row
};

// Σ weights · outputs of a feature, eight loads under way at a time. A weight of 0 counts for none: nobody wrote what belongs
// to an expert that was not chosen.
AMQ_DEVICE float sum_experts(const CombineCall& call, int64_t row, int feature) {
    const float* weights = call.weights + row * call.top_k;
    const float* outputs = call.outputs + row * call.top_k * call.features + feature;
    float sum = 0.0f;
    for (int first = 0; first < call.top_k; first += 8) {
        float weight[8], output[8];
        for (int i = 0; i < 8; ++i) {
            weight[i] = first + i < call.top_k ? weights[first + i] : 0.0f;
            output[i] = weight[i] != 0.0f ? outputs[static_cast<int64_t>(first + i) * call.features] : 0.0f;
        }
        for (int i = 0; i < 8; ++i)
            if (weight[i] != 0.0f) sum = fmaf(weight[i], output[i], sum);
    }
    return sum;
}

__global__ void __launch_bounds__(kMixtureThreads) combine_kernel(CombineArguments arguments) {
    __shared__ float2 sums[kMixtureRows];
    const CombineCall& call = arguments.call;
    const int64_t row = blockIdx.x / arguments.blocks;
    const int start = blockIdx.x % arguments.blocks * kMixtureThreads + threadIdx.x, step = arguments.blocks * kMixtureThreads;
    const float* shared = call.shared ? call.shared + row * call.features : nullptr;
    float* y = call.y + row * call.features;
    const float gate = call.shared_gate ? sigmoid(call.shared_gate[row * call.gate_stride]) : 1.0f;
    const bool normed = call.routed_post_norm || call.shared_post_norm;
    float2 squares = {0.0f, 0.0f};
    for (int feature = start; feature < call.features; feature += step) {
        const float routed = sum_experts(call, row, feature), other = shared ? shared[feature] : 0.0f;
        y[feature] = normed || !shared ? routed : fmaf(gate, other, routed);
        squares = {fmaf(routed, routed, squares.x), fmaf(other, other, squares.y)};
    }
    if (!normed) return;
    squares = block_sums(squares, sums);
    const float features = static_cast<float>(call.features);
    const float routed_factor = 1.0f / sqrtf(squares.x / features + call.epsilon);
    const float shared_factor = 1.0f / sqrtf(squares.y / features + call.epsilon);
    for (int feature = start; feature < call.features; feature += step) {
        float v = y[feature];
        if (call.routed_post_norm) v = call.routed_post_norm[feature] * (v * routed_factor);
        if (shared) {
            float other = shared[feature];
            if (call.shared_post_norm) other = call.shared_post_norm[feature] * (other * shared_factor);
            v = fmaf(gate, other, v);
        }
        y[feature] = v;
    }
}

}  // namespace amq::mixture
