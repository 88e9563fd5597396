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

// A step of a block, and where its slabs are; the one that follows the last has item −1.
struct alignas(16) Step {
    int32_t item, range, side, part;  // part: of an item whose rows are more than the format of its weight takes at once
    int32_t stale;                    // whether its x is not where the step before had it, and has to be staged
    int32_t bits, row;                // of its weight; the first of its output rows
    int32_t tiles, slabs;             // of its weight from that row, and of x from its range on
    int32_t codes_stride, scales_stride;  // from tile to tile
    int32_t staged;                   // bytes to its range of x
    const uint4 *codes, *scales;      // of its first tile and slab
};

// Steps that a block knows: one thread prepares them, two ahead. What others still read is not replaced.
constexpr int kSteps = 4;

constexpr int kOutputs = kMostRows * kMaxRows;  // of an item at most: i is row i / kMaxRows, column i % kMaxRows

// What a block shares beside x.
struct Shared {
    Weight weights[kMaxWeights];
    float partials[2][kWarps][kOutputs];  // of steps that follow one another
    float sums[2][kOutputs];              // of an item's sides; each is one thread's own
    float squares[kMaxRows][kWarps];
    int32_t x_rows[kMaxRows], y_rows[kMaxRows];
    int32_t rows, first_range, end_range;  // of the block
    Step steps[kSteps];
    int32_t last;
};

static_assert(sizeof(Shared) + kStageBytes <= 48 << 10, "what a block has without asking for more");

// What a thread knows of its block.
struct Block {
    const LinearArguments& arguments;
    Shared& shared;
    char* staged;

    AMQ_DEVICE int items() const { return arguments.first_item[arguments.call.n_weights]; }

    // The weight of an item's first side.
    AMQ_DEVICE int weight_of(int item) const {
        int index = arguments.sides == 2 ? 0 : arguments.call.n_weights - 1;
        while (item < arguments.first_item[index]) --index;
        return index;
    }
    AMQ_DEVICE int rows_of_item(int index) const {
        return arguments.item_rows ? arguments.item_rows : kPairRows * pairs_of(shared.weights[index].bits);
    }
    // The first output row of an item.
    AMQ_DEVICE int row_of(int item, int index) const { return (item - arguments.first_item[index]) * rows_of_item(index); }
};

// Fills in what follows from item, range, side and part.
template <class Element, int kGroup>
AMQ_DEVICE Step locate(const Block& block, Step step) {
    const int index = block.weight_of(step.item), slab = step.range * kWarps;
    const Weight& weight = block.shared.weights[index + step.side];
    step.bits = weight.bits;
    step.row = block.row_of(step.item, index) + step.part * kPairRows * pairs_of(weight.bits);
    const int64_t tile = step.row / kTileRows;
    step.tiles = (weight.rows - 1) / kTileRows + 1 - static_cast<int>(tile);
    step.slabs = weight.slabs - slab;
    step.codes_stride = weight.planes * kWarp;
    step.scales_stride = weight.slabs * kTileRows * kScaleWords<kGroup>;
    const int staged = block.arguments.resident ? step.range - block.shared.first_range : 0;
    step.staged = staged * Range<Element, kGroup>::bytes(block.shared.rows);
    step.codes = weight.codes + tile * step.codes_stride + slab * weight.bits * kWarp;
    step.scales = weight.scales + tile * step.scales_stride + slab * kTileRows * kScaleWords<kGroup>;
    return step;
}

template <class Element, int kGroup>
AMQ_DEVICE Step after(const Block& block, Step step) {
    if (step.item < 0) return step;
    step.stale = 0;
    if (kPairRows * pairs_of(step.bits) * ++step.part >= block.arguments.item_rows) {
        step.part = 0;
        if (++step.side == block.arguments.sides) {
            step.side = 0;
            step.stale = !block.arguments.resident;
            if (++step.range == block.shared.end_range) {
                step.range = block.shared.first_range;
                step.item += block.arguments.blocks;
                if (step.item >= block.items()) return {-1};
            }
        }
    }
    return locate<Element, kGroup>(block, step);
}

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
    if (t == 0) {
        shared.rows = rows;
        shared.first_range = arguments.span * (blockIdx.x / arguments.blocks % arguments.splits);
        shared.end_range = min(shared.first_range + arguments.span, arguments.ranges);
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
        stage<Element, kGroup>(source, range, block.staged + (range - first) * Range<Element, kGroup>::bytes(block.shared.rows));
    synchronize();
}

// Codes of this warp's slab of a step into L2.
AMQ_DEVICE void fetch(const Step& step) {
    const int warp = threadIdx.x / kWarp;
    if (warp >= step.slabs) return;
    constexpr int kLines = kWarp * sizeof(uint4) / 128;  // of a plane
    const int tiles = min(2 * pairs_of(step.bits), step.tiles);
    const uint4* codes = step.codes + warp * step.bits * kWarp;
    for (int i = threadIdx.x % kWarp; i < kLines * step.bits; i += kWarp)
        for (int tile = 0; tile < tiles; ++tile) prefetch(codes + tile * step.codes_stride + i * (kWarp / kLines));
}

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
    if (call.epilogue == kAdd) value = fmaf(value, call.scale, static_cast<const float*>(call.y)[to]);
    else value *= call.scale;
    store_element(call.y, call.y_kind, to, value);
}

// Sums of each range of each item: [items, ranges, sides, kOutputs].
AMQ_DEVICE float* partial_of(const Block& block, int item, int range, int side) {
    const LinearArguments& arguments = block.arguments;
    const int64_t index = (static_cast<int64_t>(item) * arguments.ranges + range) * arguments.sides + side;
    return arguments.call.partials + kCounters + index * kOutputs;
}

// Whether the other blocks of an item are done; the last one's shared.sums are those of all ranges then.
AMQ_DEVICE bool gather(const Block& block, int item) {
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
        for (int i = threadIdx.x; i < kOutputs && i % kMaxRows < block.shared.rows; i += kThreads) {
            float sum = 0.0f;
            for (int range = 0; range < arguments.ranges; ++range) sum += load_fresh(partial_of(block, item, range, side) + i);
            block.shared.sums[side][i] = sum;
        }
    return true;
}

AMQ_DEVICE void finish_item(const Block& block, int item) {
    if (block.arguments.splits > 1 && !gather(block, item)) return;
    const int index = block.weight_of(item), first = block.row_of(item, index);
    const int rows = min(block.rows_of_item(index), block.shared.weights[index].rows - first);
    for (int i = threadIdx.x; i < rows * kMaxRows && i % kMaxRows < block.shared.rows; i += kThreads)
        store_output(block, index, first + i / kMaxRows, i % kMaxRows, block.shared.sums[0][i], block.shared.sums[1][i]);
}

// A step's outputs are added to the sums of its item. pairs: of tiles, that its format takes at once.
AMQ_DEVICE void add_up(const Registers& registers, const Block& block, const Step& step, int pairs, float factor, int parity) {
    const Lane lane = this_lane();
    auto& partials = block.shared.partials[parity];
    float* mine = partials[threadIdx.x / kWarp] + lane.row * kMaxRows + 2 * lane.column;
    for (int pair = 0; pair < kMostRows / kPairRows; ++pair)
        for (int half = 0; half < 2 && pair < pairs; ++half)
            *reinterpret_cast<float2*>(mine + (2 * pair + half) * kTileRows * kMaxRows) = {registers.outputs[pair][2 * half],
                                                                                          registers.outputs[pair][2 * half + 1]};
    synchronize();
    if (threadIdx.x % kMaxRows >= block.shared.rows) return;
    static_assert(kPairRows * kMaxRows == kThreads, "a thread has an output of each pair");
    for (int pair = 0; pair < kMostRows / kPairRows; ++pair) {
        if (pair >= pairs) break;
        const int i = pair * kThreads + threadIdx.x, to = step.part * pairs * kThreads + i;
        const float sum = ((partials[0][i] + partials[1][i]) + (partials[2][i] + partials[3][i])) * factor;
        float& all = block.shared.sums[step.side][to];
        if (block.arguments.splits > 1) partial_of(block, step.item, step.range, step.side)[to] = sum;
        else all = (step.range == block.shared.first_range ? 0.0f : all) + sum;
    }
}

// `call` with the bits of a weight as a constant.
template <int kBits = 1, class Call>
AMQ_DEVICE void with_bits(int bits, const Call& call) {
    if constexpr (kIsCompiled<kBits>)
        if (bits == kBits) return call(std::integral_constant<int, kBits>());
    if constexpr (kBits < kMaxBits) with_bits<kBits + 1>(bits, call);
}

// What a thread reads of every staged range: the slab of its warp.
template <class Element, int kGroup>
AMQ_DEVICE StagedSlab find_slab(const Block& block) {
    using Sizes = Range<Element, kGroup>;
    const Lane lane = this_lane();
    const int warp = threadIdx.x / kWarp, row = min(lane.row, block.shared.rows - 1);
    const char* x = block.staged + Sizes::kHead + row * Sizes::kPitch + warp * kSlab * Sizes::kBytes;
    const float* sums = reinterpret_cast<const float*>(block.staged) + warp * (kSlab / kGroup) * kMaxRows;
    return {reinterpret_cast<const uint4*>(x) + lane.column, reinterpret_cast<const float2*>(sums) + lane.column};
}

// Where this thread's warp finds its slab of a step.
template <int kGroup>
AMQ_DEVICE Place find_place(const Step& step) {
    const Lane lane = this_lane();
    const int warp = threadIdx.x / kWarp;
    return {step.codes + (warp * step.bits * kWarp + static_cast<int>(threadIdx.x) % kWarp),
            step.scales + (warp * kTileRows + lane.row) * kScaleWords<kGroup>,
            step.codes_stride, step.scales_stride, warp < step.slabs ? step.tiles : 0};
}

// The first two steps, by the whole block.
template <class Element, int kGroup>
AMQ_DEVICE void begin_steps(const Block& block) {
    auto& steps = block.shared.steps;
    if (threadIdx.x == 0) {
        const Step first = {static_cast<int32_t>(blockIdx.x % block.arguments.blocks), block.shared.first_range, 0, 0, 1};
        steps[0] = locate<Element, kGroup>(block, first);
        steps[1] = after<Element, kGroup>(block, steps[0]);
    }
    synchronize();
}

// Multiplies a step with `multiply`, and adds its outputs up.
template <class Element, class Multiply>
AMQ_DEVICE void run_step(const Block& block, int turn, int pairs, Registers& registers, const Multiply& multiply) {
    for (auto& outputs : registers.outputs)
        for (float& output : outputs) output = 0.0f;
    multiply();
    add_up(registers, block, block.shared.steps[turn % kSteps], pairs, Element::kFinal, turn % 2);
}

// All steps of a block.
template <class Element, int kGroup>
AMQ_DEVICE void run_steps(const Block& block, const Source& source) {
    auto& steps = block.shared.steps;
    const StagedSlab slab = find_slab<Element, kGroup>(block);
    Registers registers{};
    bool loaded = false;  // this warp's planes are in registers, or on their way
    for (int turn = 0; steps[turn % kSteps].item >= 0; ++turn) {
        const Step &step = steps[turn % kSteps], &next_step = steps[(turn + 1) % kSteps];
        const Place place = find_place<kGroup>(step);
        if (!loaded) {
            if (step.stale) {
                const int end = block.arguments.resident ? block.shared.end_range : step.range + 1;
                stage_ranges<Element, kGroup>(block, source, step.range, end);
            }
            registers = {};
            with_bits(step.bits, [&](auto bits) { load_slab<decltype(bits)::value, Element, kGroup>(registers, place); });
        }
        loaded = next_step.item >= 0 && !next_step.stale && next_step.bits == step.bits;
        Place next = place;
        if (loaded) {
            next = find_place<kGroup>(next_step);
        } else {
            next.tiles = 0;
            if (next_step.item >= 0) fetch(next_step);
        }
        if (place.tiles <= 0) loaded = false;
        if (threadIdx.x == 0) steps[(turn + 2) % kSteps] = after<Element, kGroup>(block, next_step);
        run_step<Element>(block, turn, pairs_of(step.bits), registers, [&] {
            if (place.tiles > 0)
                with_bits(step.bits, [&](auto bits) {
                    multiply_slab<decltype(bits)::value, Element, kGroup>(registers, slab.at(step.staged), place, next);
                });
        });
        if (steps[(turn + 1) % kSteps].item != step.item) finish_item(block, step.item);
    }
}

template <class Element, int kGroup>
__global__ void AMQ_REGISTERS(kRegisters, kThreads) linear_kernel(const __grid_constant__ LinearArguments arguments) {
    __shared__ Shared shared;
    AMQ_SHARED_OF_LAUNCH(staged, kStageBytes);
    const LinearCall& call = arguments.call;
    const int rows = find_work(arguments, blockIdx.x / (arguments.blocks * arguments.splits), shared);
    if (rows == 0) return;
    const Block block = {arguments, shared, reinterpret_cast<char*>(staged)};
    const Source source = {call.x, call.x_stride, call.x_kind, call.in_features, call.norm, call.dtype, call.epsilon,
                           call.rotated, rows, shared.x_rows, shared.squares};
    begin_steps<Element, kGroup>(block);
    fetch(shared.steps[0]);
    if (call.norm) sum_squares(source);
    run_steps<Element, kGroup>(block, source);
}

}  // namespace amq
