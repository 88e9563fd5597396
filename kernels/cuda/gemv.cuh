// y[1…8 rows, N] = x · Wᵀ on tensor cores, for several weights that share x, each in its own format, in one launch.
//
// A block owns kPairs · 16 output rows. Its warps share out the slabs, so each element of x is read once per block, and add
// their sums up at the end. A warp takes one slab at a time: all its planes first, so that the loads are in flight together,
// then per group of input features one chain of products into fresh sums, which scale and zero point turn into outputs:
//
//     y[n, m] += scale[n, g] · (Σ code · x − zero_point[n, g] · Σ x)
//
// Σ x comes from the same fragments of x against a weight of one: no shuffles, and exactly the x that the codes met. Rows of
// a product are output rows, columns are rows of x: up to eight of them cost what one does. Columns past the last row of x
// repeat it and are dropped. Fragment layouts: PTX manual, "Matrix Fragments for mma.m16n8k16" and "m16n8k32"; which input
// features a fragment calls its k-th is free, and amq/kernels/gpu_layout.py chose.
//
// From the kernel to the product: linear_kernel (one weight) → multiply_rows (a warp's slabs) → multiply_slab → multiply_step
// (32 features) → multiply (two columns of a fragment, see layout.cuh) → mma.

#pragma once

#include <type_traits>
#include <utility>

#include "elements.cuh"
#include "formats.cuh"

namespace amq {

constexpr int kMaxWarps = 8;

// Of a lane: three blocks of four warps fit a multiprocessor, or two where groups of 32 want twice the scales.
template <int kGroup>
constexpr int kRegisters = kGroup < kUnit ? 208 : 168;
constexpr int kWeightRegisters = 48;  // of those, for the codes of one slab of a warp's rows

// Pairs of tiles (16 output rows, one fragment) of a block: fewer for wider codes, so that a slab fits the registers.
constexpr int pairs_of(int bits) { return kWeightRegisters / (2 * 4 * bits) >= 2 ? 2 : 1; }
template <int kBits>
constexpr int kPairs = pairs_of(kBits);
constexpr int kMaxPairs = 2;

template <int kBits>
constexpr int kBlockRows = 2 * kTileRows * kPairs<kBits>;

struct Lane {
    int row, column;  // of a tile, and of the four groups of four columns
};

// What a warp knows of one slab: the planes of its tiles, and its sums.
template <int kBits_, class Element_, int kGroup_>
struct Work {
    static constexpr int kBits = kBits_;
    using Element = Element_;
    static constexpr int kGroup = kGroup_;
    static constexpr int kTiles = 2 * kPairs<kBits>;
    // Fields that stay in place have sums of different scale, and a group of two units may have two fields.
    static constexpr int kSums = Element::kInPlace && Fields<kBits>::kPerByte > 1 && kGroup > kUnit ? 2 : 1;
    uint32_t planes[kTiles][4][kBits];
    typename Element::Sum sums[kSums][kPairs<kBits>][4];
    typename Element::Sum x_sums[4];
    float outputs[kPairs<kBits>][4];
};

template <class Work>
AMQ_DEVICE void clear_sums(Work& work) {
    for (int i = 0; i < 4; ++i) {
        work.x_sums[i] = 0;
        for (auto& sums : work.sums)
            for (auto& sum : sums) sum[i] = 0;
    }
}

// What a warp works on, and where its lane finds the words of each tile of slab 0. Tiles past the last one repeat it; their
// outputs are dropped.
template <class Work>
struct Place {
    const LinearArguments& arguments;
    const uint4* codes;
    const uint32_t* scales;
    Lane lane;
    uint32_t codes_from[Work::kTiles], scales_from[Work::kTiles];

    AMQ_DEVICE Place(const LinearArguments& arguments, const Weight& weight, int block, Lane lane)
        : arguments(arguments), codes(weight.codes), scales(weight.scales), lane(lane) {
        for (int i = 0; i < Work::kTiles; ++i) {
            const uint32_t tile = min(block * Work::kTiles + i, (weight.out_features - 1) / kTileRows);
            codes_from[i] = tile * weight.planes * kWarp + 4 * lane.row + lane.column;
            scales_from[i] = (tile * arguments.slabs * kTileRows + lane.row) * (kSlab / Work::kGroup);
        }
    }
};

// All planes of a slab. Planes that the last slab lacks are whatever follows: their codes meet no x.
template <class Work>
AMQ_DEVICE void load_planes(Work& work, const Place<Work>& place, int slab) {
    constexpr int kBits = Work::kBits;
    for (int tile = 0; tile < Work::kTiles; ++tile) {
        const uint4* from = place.codes + (place.codes_from[tile] + slab * kBits * kWarp);
        for (int word = 0; word < kBits; ++word) {
            const uint4 v = load_once(from + word * kWarp);
            work.planes[tile][0][word] = v.x;
            work.planes[tile][1][word] = v.y;
            work.planes[tile][2][word] = v.z;
            work.planes[tile][3][word] = v.w;
        }
    }
}

// sums += codes · x for two columns of x's fragment, b0 and b1. shift: of the half (fp16, bf16); mask: of the bytes of a
// fragment that take part (int8).
template <int kUnitIndex, class Work>
AMQ_DEVICE void multiply(Work& work, int column, int shift, uint32_t mask, uint32_t b0, uint32_t b1) {
    constexpr int kBits = Work::kBits;
    using Element = typename Work::Element;
    constexpr int kWord = kUnitIndex / Fields<kBits>::kPerByte;
    constexpr int kField = kUnitIndex % Fields<kBits>::kPerByte * kBits;
    constexpr int kStay = Element::kInPlace ? kField : 0;
    shift += kField - kStay;
    constexpr typename Element::Type kKind{};
    for (int pair = 0; pair < kPairs<kBits>; ++pair) {
        auto& sums = work.sums[kUnitIndex % Work::kSums][pair];
        uint32_t words[4], a[4];  // (tile, column): as a fragment wants them, rows first
        for (int i = 0; i < 4; ++i)
            words[i] = byte_word<kWord>(work.planes[2 * pair + i % 2][column + i / 2]) >> shift;
        for (int i = 0; i < 4; ++i) a[i] = Element::template fragment<kBits, 0>(words[i], kStay) & mask;
        mma(sums, a, b0, b1, kKind);
        if constexpr (Element::template kParts<kBits> > 1) {
            for (int i = 0; i < 4; ++i) a[i] = Element::template fragment<kBits, 1>(words[i], kStay) & mask;
            mma(sums, a, b0, b1, kKind);
        }
    }
    const uint32_t one = Element::one() & mask;
    mma(work.x_sums, {one, one, one, one}, b0, b1, kKind);
}

// What turns a group's sums into outputs: its scales and zero points per tile, and its x's scale per column.
template <class Work>
struct Scales {
    uint32_t weights[Work::kTiles];
    float2 x;
};

template <class Work>
AMQ_DEVICE Scales<Work> load_scales(const Place<Work>& place, int slab, int group) {
    Scales<Work> scales;
    const uint32_t of_slab = slab * kTileRows * (kSlab / Work::kGroup);
    for (int tile = 0; tile < Work::kTiles; ++tile)
        scales.weights[tile] = load_shared_by_many(place.scales + (place.scales_from[tile] + of_slab) + group);
    scales.x = {1.0f, 1.0f};
    if constexpr (std::is_same_v<typename Work::Element, Int8Element>) {
        const int row = slab * (kSlab / Work::kGroup) * kMaxRows + 2 * place.lane.column;
        scales.x = load_shared_by_many(reinterpret_cast<const float2*>(place.arguments.x_scales + row + group * kMaxRows));
    }
    return scales;
}

// What a sum of unit kUnitIndex is multiplied with for the field that its codes stayed in.
template <class Work, int kUnitIndex>
constexpr float kUnscale =
    Work::Element::kInPlace ? 1.0f / (1 << (kUnitIndex % Fields<Work::kBits>::kPerByte * Work::kBits)) : 1.0f;

// A group is done, of which kUnitIndex is the last unit: its sums become outputs.
template <int kUnitIndex, class Work>
AMQ_DEVICE void finish_group(Work& work, const Scales<Work>& scales) {
    constexpr int kBits = Work::kBits;
    using Element = typename Work::Element;
    constexpr float kOffset = Element::template kOffset<kBits>;
    for (int pair = 0; pair < kPairs<kBits>; ++pair)
        for (int half = 0; half < 2; ++half) {  // rows 0 to 7 and 8 to 15 of the fragment
            const float2 v = unpack_halves(scales.weights[2 * pair + half]);
            for (int i = 0; i < 2; ++i) {  // the lane's two columns
                const int at = 2 * half + i;
                float sum = kUnscale<Work, kUnitIndex> * static_cast<float>(work.sums[kUnitIndex % Work::kSums][pair][at]);
                if constexpr (Work::kSums > 1) {
                    constexpr int kOther = kUnitIndex ^ 1;
                    sum += kUnscale<Work, kOther> * static_cast<float>(work.sums[kOther % 2][pair][at]);
                }
                const float scale = v.x * (i ? scales.x.y : scales.x.x);
                work.outputs[pair][at] += scale * (sum - (v.y + kOffset) * static_cast<float>(work.x_sums[at]));
            }
        }
    clear_sums(work);
}

// The lane's row of x at a slab: 8 numbers per vector, or the codes of quantize.cuh.
template <class Element>
AMQ_DEVICE const uint4* locate_x(const LinearArguments& arguments, int x_row, int slab, Lane lane) {
    if constexpr (std::is_same_v<Element, Int8Element>)
        return arguments.x_codes + ((x_row * arguments.slabs + slab) * kUnits * 4 + lane.column);
    const auto* row = static_cast<const typename Element::Type*>(arguments.x) + x_row * arguments.x_stride;
    return reinterpret_cast<const uint4*>(row + (slab * kSlab + 8 * lane.column));
}

// Step kStep of a slab: 32 features, half a unit. It loads the scales of a group that begins with it, and finishes one that
// ends with it. `x` as `locate_x` has it.
template <int kStep, class Work>
AMQ_DEVICE void multiply_step(Work& work, const Place<Work>& place, int slab, const uint4* x, Scales<Work>& scales) {
    constexpr int kUnitIndex = kStep / 2, kHalf = kStep % 2, kFeature = kStep * kUnit / 2;
    if constexpr (kFeature % Work::kGroup == 0) scales = load_scales(place, slab, kFeature / Work::kGroup);
    if constexpr (!std::is_same_v<typename Work::Element, Int8Element>) {
        const uint4 v = load_shared_by_many(x + kFeature / 8);
        multiply<kUnitIndex>(work, 0, 8 * kHalf, ~0u, v.x, v.y);
        multiply<kUnitIndex>(work, 2, 8 * kHalf, ~0u, v.z, v.w);
    } else if constexpr (Work::kGroup < kUnit || kHalf == 0) {
        // A byte fragment covers both halves of a unit at once; where they are two groups, a mask takes one at a time.
        const uint32_t mask = Work::kGroup < kUnit ? 0x00ff00ffu << 8 * kHalf : ~0u;
        const uint4 v = load_shared_by_many(x + kUnitIndex * 4);
        multiply<kUnitIndex>(work, 0, 0, mask, v.x, v.y);
        multiply<kUnitIndex>(work, 2, 0, mask, v.z, v.w);
    }
    if constexpr ((kFeature + kUnit / 2) % Work::kGroup == 0) finish_group<kUnitIndex>(work, scales);
}

// A slab, in quarters that are each a whole number of groups. Those past the end of x are skipped, by all lanes alike.
template <class Work, int... kQuarters>
AMQ_DEVICE void multiply_slab(Work& work, const Place<Work>& place, int slab, int x_row,
                              std::integer_sequence<int, kQuarters...>) {
    const uint4* x = locate_x<typename Work::Element>(place.arguments, x_row, slab, place.lane);
    const int features = place.arguments.in_features - slab * kSlab;
    Scales<Work> scales;
    ((2 * kUnit * kQuarters < features
          ? (multiply_step<4 * kQuarters>(work, place, slab, x, scales),
             multiply_step<4 * kQuarters + 1>(work, place, slab, x, scales),
             multiply_step<4 * kQuarters + 2>(work, place, slab, x, scales),
             multiply_step<4 * kQuarters + 3>(work, place, slab, x, scales))
          : void()),
     ...);
}

AMQ_DEVICE void store(const LinearArguments& arguments, int row, int64_t column, float value) {
    const int64_t to = row * arguments.y_stride + column;
    if (arguments.dtype == kHalf) {
        if (arguments.bias) value += to_float(static_cast<const __half*>(arguments.bias)[column]);
        from_float(value, static_cast<__half*>(arguments.y) + to);
    } else {
        if (arguments.bias) value += to_float(static_cast<const __nv_bfloat16*>(arguments.bias)[column]);
        from_float(value, static_cast<__nv_bfloat16*>(arguments.y) + to);
    }
}

using Partials = float[kMaxWarps][2 * kTileRows * kMaxPairs][kMaxRows];

template <int kBits, class Element, int kGroup>
AMQ_DEVICE void multiply_rows(const LinearArguments& arguments, const Weight& weight, int block, Partials& partials) {
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const Lane lane = {static_cast<int>(threadIdx.x) % kWarp / 4, static_cast<int>(threadIdx.x) % 4};
    const int x_row = min(lane.row, arguments.rows - 1);

    Work<kBits, Element, kGroup> work;
    const Place<decltype(work)> place(arguments, weight, block, lane);
    for (int pair = 0; pair < kPairs<kBits>; ++pair)
        for (int i = 0; i < 4; ++i) work.outputs[pair][i] = 0.0f;
    clear_sums(work);
    for (int slab = warp; slab < arguments.slabs; slab += warps) {
        load_planes(work, place, slab);
        multiply_slab(work, place, slab, x_row, std::make_integer_sequence<int, kUnits / 2>());
    }

    for (int pair = 0; pair < kPairs<kBits>; ++pair)
        for (int i = 0; i < 4; ++i)
            partials[warp][2 * kTileRows * pair + kTileRows * (i / 2) + lane.row][2 * lane.column + i % 2] =
                work.outputs[pair][i];
    synchronize();
    for (int i = threadIdx.x; i < kBlockRows<kBits> * arguments.rows; i += blockDim.x) {
        const int n = i % kBlockRows<kBits>, row = i / kBlockRows<kBits>;
        const int out = block * kBlockRows<kBits> + n;
        if (out >= weight.out_features) continue;
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += partials[w][n][row];
        store(arguments, row, weight.column + out, sum * Element::kFinal);
    }
}

// multiply_rows for the bits of `weight`.
template <class Element, int kGroup, int kBits = 1>
AMQ_DEVICE void multiply_rows_of_bits(const LinearArguments& arguments, const Weight& weight, int block, Partials& partials) {
    if constexpr (kIsCompiled<kBits>)
        if (weight.bits == kBits) return multiply_rows<kBits, Element, kGroup>(arguments, weight, block, partials);
    if constexpr (kBits < kMaxBits)
        multiply_rows_of_bits<Element, kGroup, kBits + 1>(arguments, weight, block, partials);
}

template <class Element, int kGroup>
__global__ void AMQ_REGISTERS(kRegisters<kGroup>, kMaxWarps * kWarp) linear_kernel(LinearArguments arguments) {
    __shared__ Partials partials;
    int index = arguments.n_weights - 1;
    while (static_cast<int>(blockIdx.x) < arguments.weights[index].first_block) --index;
    const Weight& weight = arguments.weights[index];
    const int block = blockIdx.x - weight.first_block;
    multiply_rows_of_bits<Element, kGroup>(arguments, weight, block, partials);
}

}  // namespace amq
