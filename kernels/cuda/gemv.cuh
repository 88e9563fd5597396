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
// features a fragment calls its k-th is free, and amq/gpu/layout.py chose.

#pragma once

#include <type_traits>
#include <utility>

#include "elements.cuh"
#include "formats.cuh"

namespace amq {

constexpr int kMaxWarps = 8;

// Pairs of tiles (16 output rows, one fragment) of a block: fewer for wider codes, so that a slab fits the registers.
template <class Format, class Element>
constexpr int kPairs = Element::kWeightRegisters / (2 * 4 * Format::kBits) >= 2 ? 2 : 1;
constexpr int kMaxPairs = 2;

template <class Format, class Element>
constexpr int kBlockRows = 2 * kTileRows * kPairs<Format, Element>;

struct Lane {
    int row, column;  // of a tile, and of the four groups of four columns
};

// What a warp knows of one slab: the planes of its tiles, and its sums.
template <class Format, class Element>
struct Work {
    static constexpr int kTiles = 2 * kPairs<Format, Element>;
    uint32_t planes[kTiles][4][Format::kBits];
    typename Element::Sum sums[kPairs<Format, Element>][4];
    typename Element::Sum x_sums[4];
    float outputs[kPairs<Format, Element>][4];
};

template <class Format, class Element>
AMQ_DEVICE void clear_sums(Work<Format, Element>& work) {
    for (int i = 0; i < 4; ++i) {
        work.x_sums[i] = 0;
        for (int pair = 0; pair < kPairs<Format, Element>; ++pair) work.sums[pair][i] = 0;
    }
}

// All planes of a slab. Tiles and planes that do not exist repeat the last one: their outputs are dropped, their x is 0.
template <class Format, class Element>
AMQ_DEVICE void load_planes(Work<Format, Element>& work, const Segment& segment, int first_tile, int slab, int lane) {
    const int last_tile = (segment.out_features - 1) / kTileRows;
    for (int tile = 0; tile < work.kTiles; ++tile) {
        const int64_t from = static_cast<int64_t>(min(first_tile + tile, last_tile)) * segment.planes;
        for (int word = 0; word < Format::kBits; ++word) {
            const int plane = min(slab * Format::kBits + word, segment.planes - 1);
            const uint4 v = load_once(segment.codes + (from + plane) * kWarp + lane);
            work.planes[tile][0][word] = v.x;
            work.planes[tile][1][word] = v.y;
            work.planes[tile][2][word] = v.z;
            work.planes[tile][3][word] = v.w;
        }
    }
}

// sums += codes · x for two columns of x's fragment, b0 and b1, where `mask` picks the bytes of a fragment that take part.
template <class Format, class Element, int kUnitIndex>
AMQ_DEVICE void multiply(Work<Format, Element>& work, int column, int shift, uint32_t mask, uint32_t b0, uint32_t b1) {
    using F = Fields<Format>;
    constexpr int kWord = kUnitIndex / F::kPerByte;
    constexpr typename Element::Type kKind{};
    shift += kUnitIndex % F::kPerByte * F::kBits;
    for (int pair = 0; pair < kPairs<Format, Element>; ++pair) {
        uint32_t words[4];  // (tile, column): as a fragment wants them, rows first
        for (int i = 0; i < 4; ++i)
            words[i] = Format::template byte_word<kWord>(work.planes[2 * pair + i % 2][column + i / 2]);
        uint32_t a[4];
        for (int i = 0; i < 4; ++i) a[i] = Element::template fragment<Format, 0>(words[i], shift) & mask;
        mma(work.sums[pair], a, b0, b1, kKind);
        if constexpr (Element::template kParts<Format> > 1) {
            for (int i = 0; i < 4; ++i) a[i] = Element::template fragment<Format, 1>(words[i], shift) & mask;
            mma(work.sums[pair], a, b0, b1, kKind);
        }
    }
    const uint32_t one = Element::one() & mask;
    mma(work.x_sums, {one, one, one, one}, b0, b1, kKind);
}

// What turns a group's sums into outputs: its scales and zero points per tile, and its x's scale per column.
template <class Format, class Element>
struct Scales {
    uint32_t weights[2 * kPairs<Format, Element>];
    float2 x;
};

template <class Format, class Element, int kGroup>
AMQ_DEVICE Scales<Format, Element> load_scales(const LinearArguments& arguments, const Segment& segment, int first_tile, int slab,
                                      int group, Lane lane) {
    constexpr int kSlabGroups = kSlab / kGroup;
    Scales<Format, Element> scales;
    const int last_tile = (segment.out_features - 1) / kTileRows;
    for (int tile = 0; tile < 2 * kPairs<Format, Element>; ++tile) {
        const int64_t slab_of_tile = static_cast<int64_t>(min(first_tile + tile, last_tile)) * arguments.slabs + slab;
        const uint32_t* word = segment.scales + (slab_of_tile * kTileRows + lane.row) * kSlabGroups + group;
        scales.weights[tile] = load_shared_by_many(word);
    }
    scales.x = {1.0f, 1.0f};
    if constexpr (std::is_same_v<Element, Int8Element>) {
        const float* x_scale = arguments.x_scales + (slab * kSlabGroups + group) * kMaxRows + 2 * lane.column;
        scales.x = load_shared_by_many(reinterpret_cast<const float2*>(x_scale));
    }
    return scales;
}

// A group is done: its sums become outputs.
template <class Format, class Element>
AMQ_DEVICE void finish_group(Work<Format, Element>& work, const Scales<Format, Element>& scales) {
    constexpr float kOffset = Element::template kOffset<Format>;
    for (int pair = 0; pair < kPairs<Format, Element>; ++pair)
        for (int half = 0; half < 2; ++half) {  // rows 0 to 7 and 8 to 15 of the fragment
            const float2 v = unpack_halves(scales.weights[2 * pair + half]);
            for (int i = 0; i < 2; ++i) {  // the lane's two columns
                const float sum = static_cast<float>(work.sums[pair][2 * half + i]);
                const float x_sum = static_cast<float>(work.x_sums[2 * half + i]);
                const float scale = v.x * (i ? scales.x.y : scales.x.x);
                work.outputs[pair][2 * half + i] += scale * (sum - (v.y + kOffset) * x_sum);
            }
        }
    clear_sums(work);
}

// Unit kUnitIndex of a slab, 64 features: one field of one byte word. First half, then second, 32 features each.
template <class Format, class Element, int kUnitIndex>
AMQ_DEVICE void multiply_unit(Work<Format, Element>& work, const LinearArguments& arguments, int slab, int x_row, int half,
                              Lane lane) {
    const auto* x = static_cast<const typename Element::Type*>(arguments.x) + x_row * arguments.x_stride;
    const int feature = slab * kSlab + kUnitIndex * kUnit + half * kUnit / 2 + 8 * lane.column;
    const uint4 v = load_features(x, feature, arguments.in_features, arguments.aligned);
    multiply<Format, Element, kUnitIndex>(work, 0, 8 * half, ~0u, v.x, v.y);
    multiply<Format, Element, kUnitIndex>(work, 2, 8 * half, ~0u, v.z, v.w);
}

// A byte fragment covers both halves at once, in `half` 0; where they are different groups, a mask takes one at a time.
template <class Format, int kUnitIndex, bool kSplit>
AMQ_DEVICE void multiply_unit_int8(Work<Format, Int8Element>& work, const LinearArguments& arguments, int slab, int x_row,
                                   int half, Lane lane) {
    if (!kSplit && half > 0) return;
    const int64_t unit = (static_cast<int64_t>(x_row) * arguments.slabs + slab) * kUnits + kUnitIndex;
    const uint4 v = load_shared_by_many(arguments.x_codes + unit * 4 + lane.column);
    const uint32_t mask = kSplit ? 0x00ff00ffu << 8 * half : ~0u;
    multiply<Format, Int8Element, kUnitIndex>(work, 0, 0, mask, v.x, v.y);
    multiply<Format, Int8Element, kUnitIndex>(work, 2, 0, mask, v.z, v.w);
}

template <class Format, class Element, int kGroup, int... kUnitIndices>
AMQ_DEVICE void multiply_slab(Work<Format, Element>& work, const LinearArguments& arguments, const Segment& segment,
                              int first_tile, int slab, int x_row, Lane lane,
                              std::integer_sequence<int, kUnitIndices...>) {
    Scales<Format, Element> scales;
    (
        [&] {
            for (int half = 0; half < 2; ++half) {
                const int feature = kUnitIndices * kUnit + half * kUnit / 2;
                if (feature % kGroup == 0)
                    scales = load_scales<Format, Element, kGroup>(arguments, segment, first_tile, slab, feature / kGroup, lane);
                if constexpr (std::is_same_v<Element, Int8Element>)
                    multiply_unit_int8<Format, kUnitIndices, (kGroup < kUnit)>(work, arguments, slab, x_row, half, lane);
                else
                    multiply_unit<Format, Element, kUnitIndices>(work, arguments, slab, x_row, half, lane);
                if ((feature + kUnit / 2) % kGroup == 0) finish_group(work, scales);
            }
        }(),
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

template <class Format, class Element, int kGroup>
AMQ_DEVICE void multiply_rows(const LinearArguments& arguments, const Segment& segment, int block, Partials& partials) {
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int lane_index = threadIdx.x % kWarp;
    const Lane lane = {lane_index / 4, lane_index % 4};
    const int first_tile = block * 2 * kPairs<Format, Element>;
    const int x_row = min(lane.row, arguments.rows - 1);

    Work<Format, Element> work;
    for (int pair = 0; pair < kPairs<Format, Element>; ++pair)
        for (int i = 0; i < 4; ++i) work.outputs[pair][i] = 0.0f;
    clear_sums(work);
    for (int slab = warp; slab < arguments.slabs; slab += warps) {
        load_planes(work, segment, first_tile, slab, lane_index);
        multiply_slab<Format, Element, kGroup>(work, arguments, segment, first_tile, slab, x_row, lane,
                                               std::make_integer_sequence<int, kUnits>());
    }

    for (int pair = 0; pair < kPairs<Format, Element>; ++pair)
        for (int i = 0; i < 4; ++i)
            partials[warp][2 * kTileRows * pair + kTileRows * (i / 2) + lane.row][2 * lane.column + i % 2] =
                work.outputs[pair][i];
    synchronize();
    for (int i = threadIdx.x; i < kBlockRows<Format, Element> * arguments.rows; i += blockDim.x) {
        const int n = i % kBlockRows<Format, Element>, row = i / kBlockRows<Format, Element>;
        const int out = block * kBlockRows<Format, Element> + n;
        if (out >= segment.out_features) continue;
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += partials[w][n][row];
        store(arguments, row, segment.column + out, sum * Element::kFinal);
    }
}

template <class Element, int kGroup>
__global__ void __maxnreg__(Element::kRegisters) linear_kernel(LinearArguments arguments) {
    __shared__ Partials partials;
    int index = arguments.n_segments - 1;
    while (static_cast<int>(blockIdx.x) < arguments.segments[index].first_block) --index;
    const Segment& segment = arguments.segments[index];
    const int block = blockIdx.x - segment.first_block;
    switch (segment.format) {
#define AMQ_CASE(name) \
    case kIndex_##name: return multiply_rows<name, Element, kGroup>(arguments, segment, block, partials);
        AMQ_CUDA_FORMATS(AMQ_CASE)
#undef AMQ_CASE
    }
}

}  // namespace amq
