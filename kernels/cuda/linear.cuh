// y = epilogue(scale · (W · norm(x) + bias)) for several weights that share x, each in its own format, in one launch: LinearCall.
//
// Input features are cut into ranges of kWarps slabs. A step of a block is one range of some output rows: each warp multiplies
// its slab (gemv.cuh), and the block adds the four up. Ranges are added in their order. So the order of a sum is a function of
// in_features alone: it does not matter how many blocks there are, what else is launched with a weight, or how many rows x has.
//
// An item is the steps of as many output rows as a format takes at once: of a weight, or of gate and up together. Blocks take
// items in turn. Where all of a block's ranges of x fit its shared memory they are staged once (stage.cuh), else range by range
// for each item. Where blocks would be too few, or x is too large, ranges are split among blocks: each writes its ranges' sums
// to `partials`, and the last one that comes adds them up.

#pragma once

#include "activation.cuh"
#include "gemv.cuh"

namespace amq {

constexpr int kCounters = 16384;  // at the begin of `partials`: of items

struct LinearArguments {
    LinearCall call;
    int bias_kind;
    int slabs, ranges;       // of x
    int sides;               // weights that an item takes: 2 where they are gate and up
    int item_rows;           // output rows of an item, 0: as many as the format of its weight takes at once
    int first_item[kMaxWeights + 1];  // of each weight; then how many there are
    int blocks;              // for one split, and one group of experts
    int splits, span;        // of the ranges; ranges of each
    int resident;            // whether a block stages its ranges once
};

// A step, and how steps follow one another in a block.
struct Step {
    int item, range, side, part;  // part: of an item whose rows are more than the format of its weight takes at once
};

constexpr int kSlots = kMostRows * kMaxRows / kThreads;  // outputs of an item that a thread has: row i / kMaxRows, column i % kMaxRows

// What a block shares beside x.
struct Shared {
    Weight weights[kMaxWeights];
    float partials[2][kWarps][kMostRows * kMaxRows];
    float squares[kMaxRows][kWarps];
    int32_t x_rows[kMaxRows], y_rows[kMaxRows];
    int32_t last;
};

// What a thread knows of its block.
struct Block {
    const LinearArguments& arguments;
    Shared& shared;
    char* staged;
    int rows, first_range, end_range;

    AMQ_DEVICE int items() const { return arguments.first_item[arguments.call.n_weights]; }

    // The weight of an item's first side.
    AMQ_DEVICE int weight_of(int item) const {
        int index = arguments.sides == 2 ? 0 : arguments.call.n_weights - 1;
        while (item < arguments.first_item[index]) --index;
        return index;
    }
    AMQ_DEVICE const Weight& weight_of(const Step& step) const { return shared.weights[weight_of(step.item) + step.side]; }

    // The first output row of an item, and of a step.
    AMQ_DEVICE int row_of(int item, int bits) const {
        const int rows = arguments.item_rows ? arguments.item_rows : kPairRows * pairs_of(bits);
        return (item - arguments.first_item[weight_of(item)]) * rows;
    }
    AMQ_DEVICE int row_of(const Step& step, int bits) const {
        return row_of(step.item, bits) + step.part * kPairRows * pairs_of(bits);
    }
    AMQ_DEVICE bool advance(Step& step) const {
        if (kPairRows * pairs_of(weight_of(step).bits) * ++step.part < arguments.item_rows) return true;
        step.part = 0;
        if (++step.side < arguments.sides) return true;
        step.side = 0;
        if (++step.range < end_range) return true;
        step.range = first_range;
        step.item += arguments.blocks;
        return step.item < items();
    }
    // Whether x of `b` is in shared memory where that of `a` was.
    AMQ_DEVICE bool same_x(const Step& a, const Step& b) const {
        return arguments.resident || (a.item == b.item && a.range == b.range);
    }
};

// Rows first_row … of a prepared weight.
AMQ_DEVICE Weight locate(const LinearWeight& rows, const void* data, const float* bias, int bits, int64_t column, int in_features,
                         int group_size) {
    Weight weight;
    const int slabs = (in_features + kSlab - 1) / kSlab, planes = planes_of(bits, in_features);
    const int64_t tiles = (rows.all_rows + kTileRows - 1) / kTileRows, tile = rows.first_row / kTileRows;
    const int64_t slab_scales = kTileRows * (kSlab / group_size) / 4;  // 16-byte words
    const auto* codes = static_cast<const uint4*>(data);
    weight.codes = codes + tile * planes * kWarp;
    weight.scales = codes + tiles * planes * kWarp + tile * slabs * slab_scales;
    weight.bias = bias;
    weight.bits = bits;
    weight.rows = rows.rows;
    weight.planes = planes;
    weight.slabs = slabs;
    weight.column = column;
    return weight;
}

// Fills `shared` with the weights and rows of the group `number`, or of the call; returns how many rows there are, 0 where the
// group has nothing to do.
AMQ_DEVICE int find_work(const LinearArguments& arguments, int number, Shared& shared) {
    const LinearCall& call = arguments.call;
    const ExpertRows* group = nullptr;
    if (call.n_experts > 0) {
        if (number >= load_shared_by_many(call.n_groups)) return 0;
        group = call.groups + number;
    }
    const int rows = group ? load_shared_by_many(&group->count) : call.rows, t = threadIdx.x;
    if (t < call.n_weights) {
        int64_t column = 0;
        for (int i = 0; i < t; ++i) column += call.weights[i].rows;
        const LinearWeight& weight = call.weights[t];
        const void* data = weight.data;
        const float* bias = weight.bias;
        int bits = weight.bits;
        if (group) {
            const ExpertWeight& expert = call.experts[static_cast<int64_t>(group->expert) * call.n_weights + t];
            data = expert.data, bias = expert.bias, bits = static_cast<int>(expert.bits);
        }
        shared.weights[t] = locate(weight, data, bias, bits, column, call.in_features, call.group_size);
    }
    if (t < rows) {
        shared.y_rows[t] = group ? group->entries[t] : t;
        shared.x_rows[t] = group ? group->entries[t] / call.x_share : t;
    }
    synchronize();
    return rows;
}

template <class Element, int kGroup>
AMQ_DEVICE void stage_ranges(const Block& block, const Source& source, int first, int end) {
    for (int range = first; range < end; ++range)
        stage<Element, kGroup>(source, range, block.staged + (range - first) * Range<Element, kGroup>::bytes(block.rows));
    synchronize();
}

// Codes and scales of this warp's slab of a step into L2.
AMQ_DEVICE void fetch(const Block& block, const Step& step) {
    const Weight& weight = block.weight_of(step);
    const int slab = step.range * kWarps + static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    if (slab >= weight.slabs) return;
    constexpr int kLines = kWarp * sizeof(uint4) / 128;  // of a plane
    const int first = block.row_of(step, weight.bits) / kTileRows, lines = kLines * weight.bits;
    const int tiles = min(2 * pairs_of(weight.bits), (weight.rows - 1) / kTileRows + 1 - first);
    for (int i = lane; i < tiles * lines; i += kWarp)
        prefetch(weight.codes + (static_cast<int64_t>(first + i / lines) * weight.planes + slab * weight.bits) * kWarp + i % lines * 8);
}

// What epilogues have of an item: its sums, for each side and slot.
using Sums = float[2][kSlots];

AMQ_DEVICE float with_bias(const Block& block, const Weight& weight, int row, float sum) {
    return weight.bias ? sum + load_element(weight.bias, block.arguments.bias_kind, row) : sum;
}

// An output is complete: n of the item's weight, column m of the product.
AMQ_DEVICE void store_output(const Block& block, int index, int n, int m, float first, float second) {
    const LinearCall& call = block.arguments.call;
    const Weight& weight = block.shared.weights[index];
    const int64_t to = block.shared.y_rows[m] * call.y_stride + weight.column + n;
    float value = with_bias(block, weight, n, first);
    if (call.epilogue == kActivate) {
        const float up = block.arguments.sides == 2 ? with_bias(block, block.shared.weights[1], n, second) : 0.0f;
        return store_element(call.y, call.y_kind, to, activated(call.activation, value, up, call.limit));
    }
    value *= call.scale;
    if (call.epilogue == kAdd) value += static_cast<const float*>(call.y)[to];
    store_element(call.y, call.y_kind, to, value);
}

// Sums of each range of each item: [items, ranges, sides, kMostRows, kMaxRows].
AMQ_DEVICE float* partial_of(const Block& block, int item, int range, int side) {
    const LinearArguments& arguments = block.arguments;
    const int64_t index = (static_cast<int64_t>(item) * arguments.ranges + range) * arguments.sides + side;
    return arguments.call.partials + kCounters + index * kMostRows * kMaxRows;
}

// Whether the other blocks of an item are done; then `sums` are those of all ranges.
AMQ_DEVICE bool gather(const Block& block, int item, Sums& sums) {
    const LinearArguments& arguments = block.arguments;
    auto* counter = reinterpret_cast<int32_t*>(arguments.call.partials) + item;
    memory_fence();
    synchronize();
    if (threadIdx.x == 0) {
        const bool last = atomic_add(counter, 1) == arguments.splits - 1;
        if (last) *counter = 0;
        block.shared.last = last;
    }
    synchronize();
    if (!block.shared.last) return false;
    memory_fence();
    for (int side = 0; side < arguments.sides; ++side)
        for (int slot = 0; slot < kSlots; ++slot) {
            float sum = 0.0f;
            for (int range = 0; threadIdx.x % kMaxRows < block.rows && range < arguments.ranges; ++range)
                sum += load_fresh(partial_of(block, item, range, side) + slot * kThreads + threadIdx.x);
            if (side == 0) sums[0][slot] = sum;
            else sums[1][slot] = sum;
        }
    return true;
}

AMQ_DEVICE void finish_item(const Block& block, int item, Sums& sums) {
    if (block.arguments.splits > 1 && !gather(block, item, sums)) return;
    const int index = block.weight_of(item), bits = block.shared.weights[index].bits;
    const int rows = block.arguments.item_rows ? block.arguments.item_rows : kPairRows * pairs_of(bits);
    for (int slot = 0; slot < kSlots; ++slot) {
        const int i = slot * kThreads + threadIdx.x, n = i / kMaxRows, m = i % kMaxRows;
        const int row = block.row_of(item, bits) + n;
        if (n < rows && m < block.rows && row < block.shared.weights[index].rows)
            store_output(block, index, row, m, sums[0][slot], sums[1][slot]);
    }
}

// A step's outputs become sums of its item.
template <class Work>
AMQ_DEVICE void add_up(const Work& work, const Block& block, const Step& step, int parity, Sums& sums) {
    constexpr int kStepSlots = kPairs<Work::kBits> * kPairRows * kMaxRows / kThreads;
    const Lane lane = this_lane();
    auto& partials = block.shared.partials[parity];
    for (int pair = 0; pair < kPairs<Work::kBits>; ++pair)
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(&partials[threadIdx.x / kWarp][((2 * pair + half) * kTileRows + lane.row) * kMaxRows + 2 * lane.column]) =
                {work.outputs[pair][2 * half], work.outputs[pair][2 * half + 1]};
    synchronize();
    for (int slot = 0; slot < kStepSlots; ++slot) {
        const int i = slot * kThreads + threadIdx.x;
        const float sum = ((partials[0][i] + partials[1][i]) + (partials[2][i] + partials[3][i])) * Work::Element::kFinal;
        if (block.arguments.splits > 1) {
            if (i % kMaxRows < block.rows) partial_of(block, step.item, step.range, step.side)[step.part * kStepSlots * kThreads + i] = sum;
            continue;
        }
        const bool first = step.range == block.first_range;
        for (int side = 0; side < 2; ++side)
            for (int to = 0; to < kSlots; ++to)
                if (side == step.side && to == step.part * kStepSlots + slot) sums[side][to] = (first ? 0.0f : sums[side][to]) + sum;
    }
}

// How far a block is. stale: whether x of `step` is not staged yet; parity: of steps; sums: of step.item.
struct State {
    Step step;
    bool stale;
    int parity;
    Sums sums;
};

// Steps from state.step on that are of one format and whose x is staged; whether there are more.
template <int kBits, class Element, int kGroup>
AMQ_DEVICE bool run_steps(const Block& block, State& state) {
    using Sizes = Range<Element, kGroup>;
    const Lane lane = this_lane();
    const int warp = threadIdx.x / kWarp, row = min(lane.row, block.rows - 1);
    const auto place_of = [&](const Step& step) {
        return Place<Work<kBits, Element, kGroup>>(block.weight_of(step), block.row_of(step, kBits), step.range * kWarps + warp, lane);
    };
    Work<kBits, Element, kGroup> work{};
    auto place = place_of(state.step);
    load_slab(work, place);
    for (;;) {
        const Step step = state.step;
        const bool more = block.advance(state.step);
        state.stale = more && !block.same_x(step, state.step);
        const bool goes_on = more && !state.stale && block.weight_of(state.step).bits == kBits;
        auto next = place;
        next.there = false;
        if (goes_on) next = place_of(state.step);
        else if (more) fetch(block, state.step);
        const char* staged = block.staged + (block.arguments.resident ? step.range - block.first_range : 0) * Sizes::bytes(block.rows);
        const char* x = staged + Sizes::kHead + row * Sizes::kPitch + warp * kSlab * Sizes::kBytes;
        const float* x_sums = reinterpret_cast<const float*>(staged) + warp * (kSlab / kGroup) * kMaxRows;
        const StagedSlab slab = {reinterpret_cast<const uint4*>(x) + lane.column, reinterpret_cast<const float2*>(x_sums) + lane.column};
        clear_outputs(work);
        if (place.there) multiply_slab(work, slab, place, next, std::make_integer_sequence<int, 2 * kUnits>());
        else load_slab(work, next);
        add_up(work, block, step, state.parity, state.sums);
        state.parity ^= 1;
        if (!more || state.step.item != step.item) finish_item(block, step.item, state.sums);
        place = next;
        if (!goes_on) return more;
    }
}

// run_steps for the bits of the step's weight.
template <class Element, int kGroup, int kBits = 1>
AMQ_DEVICE bool run_steps_of_bits(const Block& block, State& state, int bits) {
    if constexpr (kIsCompiled<kBits>)
        if (bits == kBits) return run_steps<kBits, Element, kGroup>(block, state);
    if constexpr (kBits < kMaxBits) return run_steps_of_bits<Element, kGroup, kBits + 1>(block, state, bits);
    return false;
}

template <class Element, int kGroup>
__global__ void AMQ_REGISTERS(kRegisters<kGroup>, kThreads) linear_kernel(const __grid_constant__ LinearArguments arguments) {
    __shared__ Shared shared;
    AMQ_SHARED_OF_LAUNCH(staged, kStageBytes);
    const LinearCall& call = arguments.call;
    const int index = blockIdx.x % arguments.blocks, split = blockIdx.x / arguments.blocks % arguments.splits;
    const int rows = find_work(arguments, blockIdx.x / (arguments.blocks * arguments.splits), shared);
    if (rows == 0) return;
    const int first = split * arguments.span;
    const Block block = {arguments, shared, reinterpret_cast<char*>(staged), rows, first, min(first + arguments.span, arguments.ranges)};
    const Source source = {call.x, call.x_stride, call.x_kind, call.in_features, call.norm, call.epsilon,
                           rows, shared.x_rows, shared.squares};
    State state = {{index, first, 0, 0}, !arguments.resident, 0, {}};
    fetch(block, state.step);
    if (call.norm) sum_squares(source);
    if (arguments.resident) stage_ranges<Element, kGroup>(block, source, first, block.end_range);
    for (bool more = true; more;) {
        if (state.stale) stage_ranges<Element, kGroup>(block, source, state.step.range, state.step.range + 1);
        more = run_steps_of_bits<Element, kGroup>(block, state, block.weight_of(state.step).bits);
    }
}

}  // namespace amq
