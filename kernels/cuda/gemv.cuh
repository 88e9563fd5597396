// What one warp does: the products of a slab of some output rows with 1 to 8 rows of x, on tensor cores.
//
// All planes of the slab are in registers. Units go from the last to the first: byte words that are gathered from the spare bits
// of all planes come first then, and a plane's registers are free as soon as its own units are done; the warp's next slab is
// loaded into them there, so that its loads are in flight while the rest of this one is multiplied. Per group of input features
// one chain of products into fresh sums, which scale and zero point turn into outputs:
//
//     y[n, m] += scale[n, g] · (Σ code · x − zero_point[n, g] · Σ x)
//
// with x and Σ x from shared memory (stage.cuh). Rows of a product are output rows, columns are rows of x: up to eight of them
// cost what one does. Columns past the last row of x repeat it and are dropped. Fragment layouts: PTX manual, "Matrix Fragments
// for mma.m16n8k16" and "m16n8k32"; which input features a fragment calls its k-th is free, and amq/kernels/gpu_layout.py chose.
//
// From the slab to the product: multiply_slab → multiply_step (32 features) → multiply (two columns of a fragment, see
// layout.cuh) → mma.

#pragma once

#include <utility>

#include "formats.cuh"
#include "stage.cuh"

namespace amq {

// Of a lane: three blocks fit a multiprocessor, or two where groups of 32 want more scales.
template <int kGroup>
constexpr int kRegisters = kGroup < kUnit ? 208 : 168;
constexpr int kWeightRegisters = 48;  // of those, for the codes of one slab of a warp's rows

// Pairs of tiles (16 output rows, one fragment) that a warp takes at once: fewer for wider codes, so that a slab fits the
// registers.
AMQ_BOTH constexpr int pairs_of(int bits) { return kWeightRegisters / (2 * 4 * bits) >= 2 ? 2 : 1; }
template <int kBits>
constexpr int kPairs = pairs_of(kBits);
constexpr int kPairRows = 2 * kTileRows;
constexpr int kMostRows = 2 * kPairRows;  // output rows at once at most

struct Lane {
    int row, column;  // of a tile, and of the four groups of four columns
};

AMQ_DEVICE Lane this_lane() { return {static_cast<int>(threadIdx.x) % kWarp / 4, static_cast<int>(threadIdx.x) % 4}; }

// What a warp knows of one slab: the planes of its tiles, scales and zero points of four of its groups, and its sums.
template <int kBits_, class Element_, int kGroup_>
struct Work {
    static constexpr int kBits = kBits_;
    using Element = Element_;
    static constexpr int kGroup = kGroup_;
    static constexpr int kTiles = 2 * kPairs<kBits>;
    static constexpr int kScaleWords = kSlab / kGroup / 4;  // of 16 bytes, of a row of a slab
    // Fields that stay in place have sums of different scale, and a group of two units may have two fields.
    static constexpr int kSums = Element::kInPlace && Fields<kBits>::kPerByte > 1 && kGroup > kUnit ? 2 : 1;
    uint32_t planes[kTiles][4][kBits];
    uint32_t scales[kTiles][4];
    typename Element::Sum sums[kSums][kPairs<kBits>][4];
    float outputs[kPairs<kBits>][4];
};

template <class Work>
AMQ_DEVICE void clear_sums(Work& work) {
    for (int i = 0; i < 4; ++i)
        for (auto& sums : work.sums)
            for (auto& sum : sums) sum[i] = 0;
}

template <class Work>
AMQ_DEVICE void clear_outputs(Work& work) {
    for (auto& outputs : work.outputs)
        for (float& output : outputs) output = 0.0f;
}

// Rows of a prepared weight.
struct Weight {
    const uint4* codes;    // [tiles, planes, 32]
    const uint4* scales;   // [tiles, slabs, 8, 16-byte words of a slab's groups]: scale below, zero point above, both fp16
    const void* bias;      // [rows] or null
    int bits, rows;
    int planes, slabs;     // of a tile
    int64_t column;        // of y where its outputs begin
};

// Where a lane finds the words of each tile of a slab. Tiles past the last one repeat it; their outputs are dropped. None where
// `there` is false.
template <class Work>
struct Place {
    const uint4 *codes, *scales;
    uint32_t codes_from[Work::kTiles], scales_from[Work::kTiles];
    bool there;

    AMQ_DEVICE Place(const Weight& weight, int first_row, int slab, Lane lane)
        : codes(weight.codes), scales(weight.scales), there(slab < weight.slabs) {
        for (int i = 0; i < Work::kTiles; ++i) {
            const uint32_t tile = min(first_row / kTileRows + i, (weight.rows - 1) / kTileRows);
            codes_from[i] = (tile * weight.planes + slab * Work::kBits) * kWarp + 4 * lane.row + lane.column;
            scales_from[i] = ((tile * weight.slabs + slab) * kTileRows + lane.row) * Work::kScaleWords;
        }
    }
};

// Plane `word` of all tiles. Planes that the last slab lacks are whatever follows: their codes meet zeros.
template <class Work>
AMQ_DEVICE void load_plane(Work& work, const Place<Work>& place, int word) {
    for (int tile = 0; tile < Work::kTiles; ++tile) {
        auto& planes = work.planes[tile];
        const uint4* from = place.codes + place.codes_from[tile] + word * kWarp;
        load_once_if(place.there, from, planes[0][word], planes[1][word], planes[2][word], planes[3][word]);
    }
}

// Groups 4 · word … + 3 of the slab.
template <class Work>
AMQ_DEVICE void load_scales(Work& work, const Place<Work>& place, int word) {
    for (int tile = 0; tile < Work::kTiles; ++tile) {
        auto& scales = work.scales[tile];
        load_once_if(place.there, place.scales + place.scales_from[tile] + word, scales[0], scales[1], scales[2], scales[3]);
    }
}

template <class Work>
AMQ_DEVICE void load_slab(Work& work, const Place<Work>& place) {
    load_scales(work, place, Work::kScaleWords - 1);
    for (int word = Work::kBits - 1; word >= 0; --word) load_plane(work, place, word);
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
}

// What a sum of unit kUnitIndex is multiplied with for the field that its codes stayed in.
template <class Work, int kUnitIndex>
constexpr float kUnscale =
    Work::Element::kInPlace ? 1.0f / (1 << (kUnitIndex % Fields<Work::kBits>::kPerByte * Work::kBits)) : 1.0f;

// A slab of x as a lane reads it.
struct StagedSlab {
    const uint4* x;       // of its row
    const float2* sums;   // of its two columns, kMaxRows / 2 for each group
};

// A group is done, of which kUnitIndex is the first unit: its sums become outputs.
template <int kUnitIndex, class Work>
AMQ_DEVICE void finish_group(Work& work, const StagedSlab& staged, int group) {
    constexpr int kBits = Work::kBits;
    using Element = typename Work::Element;
    constexpr float kOffset = Element::template kOffset<kBits>;
    const float2 x_sum = staged.sums[group * (kMaxRows / 2)];
    float2 x_scale = {1.0f, 1.0f};
    if constexpr (kIsInt8<Element>) x_scale = staged.sums[group * (kMaxRows / 2) + Range<Element, Work::kGroup>::kPerGroup / 2];
    for (int pair = 0; pair < kPairs<kBits>; ++pair)
        for (int half = 0; half < 2; ++half) {  // rows 0 to 7 and 8 to 15 of the fragment
            const float2 v = unpack_halves(work.scales[2 * pair + half][group % 4]);
            for (int i = 0; i < 2; ++i) {  // the lane's two columns
                const int at = 2 * half + i;
                float sum = kUnscale<Work, kUnitIndex> * static_cast<float>(work.sums[kUnitIndex % Work::kSums][pair][at]);
                if constexpr (Work::kSums > 1) {
                    constexpr int kOther = kUnitIndex ^ 1;
                    sum += kUnscale<Work, kOther> * static_cast<float>(work.sums[kOther % 2][pair][at]);
                }
                const float scale = v.x * (i ? x_scale.y : x_scale.x);
                work.outputs[pair][at] += scale * (sum - (v.y + kOffset) * (i ? x_sum.y : x_sum.x));
            }
        }
    clear_sums(work);
}

// Step kStep of a slab: 32 features, half a unit. It finishes a group that begins there, and loads what comes after: planes and
// scales of `next` into the registers that are free.
template <int kStep, class Work>
AMQ_DEVICE void multiply_step(Work& work, const StagedSlab& staged, const Place<Work>& place, const Place<Work>& next) {
    constexpr int kUnitIndex = kStep / 2, kHalf = kStep % 2, kFeature = kStep * kUnit / 2, kGroupIndex = kFeature / Work::kGroup;
    if constexpr (!kIsInt8<typename Work::Element>) {
        const uint4 v = staged.x[kStep * 4];
        multiply<kUnitIndex>(work, 0, 8 * kHalf, ~0u, v.x, v.y);
        multiply<kUnitIndex>(work, 2, 8 * kHalf, ~0u, v.z, v.w);
    } else if constexpr (Work::kGroup < kUnit || kHalf == 0) {
        // A byte fragment covers both halves of a unit at once; where they are two groups, a mask takes one at a time.
        const uint32_t mask = Work::kGroup < kUnit ? 0x00ff00ffu << 8 * kHalf : ~0u;
        const uint4 v = staged.x[kUnitIndex * 4];
        multiply<kUnitIndex>(work, 0, 0, mask, v.x, v.y);
        multiply<kUnitIndex>(work, 2, 0, mask, v.z, v.w);
    }
    if constexpr (kFeature % Work::kGroup == 0) finish_group<kUnitIndex>(work, staged, kGroupIndex);
    constexpr int kPerByte = Fields<Work::kBits>::kPerByte;
    if constexpr (kHalf == 0 && kUnitIndex % kPerByte == 0 && kUnitIndex / kPerByte < Work::kBits)
        load_plane(work, next, kUnitIndex / kPerByte);
    if constexpr (kFeature % Work::kGroup == 0 && kGroupIndex % 4 == 0) {
        if constexpr (kGroupIndex > 0) load_scales(work, place, kGroupIndex / 4 - 1);
        if constexpr (kGroupIndex == 0) load_scales(work, next, Work::kScaleWords - 1);
    }
}

// The slab at `place`, whose planes are loaded, into work.outputs. Leaves the planes of `next`.
template <class Work, int... kSteps>
AMQ_DEVICE void multiply_slab(Work& work, const StagedSlab& staged, const Place<Work>& place, const Place<Work>& next,
                              std::integer_sequence<int, kSteps...>) {
    clear_sums(work);
    (multiply_step<static_cast<int>(sizeof...(kSteps)) - 1 - kSteps>(work, staged, place, next), ...);
}

}  // namespace amq
