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
// From the slab to the product: multiply_slab → multiply_step (a group, or a unit) → multiply_half (32 features of each unit) →
// multiply (two columns of a fragment, see layout.cuh) → mma.

#pragma once

#include <utility>

#include "formats.cuh"
#include "stage.cuh"

namespace amq {

// Of a lane: two blocks of four warps fit a multiprocessor, each with a slab in its registers or on the way there.
constexpr int kRegisters = 255;
constexpr int kBlocksOfMultiprocessor = 2;
constexpr int kWeightRegisters = 48;  // of those, for the codes of one slab of a warp's rows

// Pairs of tiles (16 output rows, one fragment) that a warp takes at once: fewer for wider codes, so that a slab fits the
// registers.
AMQ_BOTH constexpr int pairs_of(int bits) { return 2 * (2 * 4 * bits) <= kWeightRegisters ? 2 : 1; }
template <int kBits>
constexpr int kPairs = pairs_of(kBits);
constexpr int kPairRows = 2 * kTileRows;
constexpr int kMostRows = 2 * kPairRows;  // output rows at once at most

struct Lane {
    int row, column;  // of a tile, and of the four groups of four columns
};

AMQ_DEVICE Lane this_lane() { return {static_cast<int>(threadIdx.x) % kWarp / 4, static_cast<int>(threadIdx.x) % 4}; }

// Codes and scales of a warp's slab as they come from memory, of whatever format, and its outputs.
struct Registers {
    uint32_t planes[2 * 4 * kMaxBits];      // [tiles, 4 columns, bits]
    uint32_t scales[kMostRows / kTileRows][4];  // of four groups of each tile
    float outputs[kMostRows / kPairRows][4];
};

// A slab of some format in them, while it is multiplied.
template <int kBits_, class Element_, int kGroup_>
struct Work {
    static constexpr int kBits = kBits_;
    using Element = Element_;
    static constexpr int kGroup = kGroup_;
    static constexpr int kTiles = 2 * kPairs<kBits>;
    // Fields that stay in place have sums of different scale, and a group of two units may have two fields.
    static constexpr int kSums = Element::kInPlace && Fields<kBits>::kPerByte > 1 && kGroup > kUnit ? 2 : 1;
    Registers& registers;
    typename Element::Sum sums[kSums][kPairs<kBits>][4];

    AMQ_DEVICE uint32_t* planes(int tile, int column) { return registers.planes + (4 * tile + column) * kBits; }
};

template <class Work>
AMQ_DEVICE void clear_sums(Work& work) {
    for (int i = 0; i < 4; ++i)
        for (auto& sums : work.sums)
            for (auto& sum : sums) sum[i] = 0;
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

template <int kGroup>
constexpr int kScaleWords = kSlab / kGroup / 4;  // 16-byte words of a row of a slab

// Where a lane finds the words of a slab. Tiles past `tiles` of them are not there, and with 0 there is no slab: registers stay
// as they are, and outputs are dropped.
struct Place {
    const uint4 *codes, *scales;        // of the first tile
    int32_t codes_stride, scales_stride;  // from tile to tile
    int tiles;
};

// Plane `word` of all tiles. Planes that the last slab lacks are whatever follows: their codes meet zeros.
template <class Work>
AMQ_DEVICE void load_plane(Work& work, const Place& place, int word) {
    for (int tile = 0; tile < Work::kTiles; ++tile) {
        const uint4* from = place.codes + tile * place.codes_stride + word * kWarp;
        load_once_if(tile < place.tiles, from, work.planes(tile, 0)[word], work.planes(tile, 1)[word], work.planes(tile, 2)[word],
                     work.planes(tile, 3)[word]);
    }
}

// Groups 4 · word … + 3 of the slab.
template <class Work>
AMQ_DEVICE void load_scales(Work& work, const Place& place, int word) {
    for (int tile = 0; tile < Work::kTiles; ++tile) {
        auto& scales = work.registers.scales[tile];
        const uint4* from = place.scales + tile * place.scales_stride + word;
        load_once_if(tile < place.tiles, from, scales[0], scales[1], scales[2], scales[3]);
    }
}

template <int kBits, class Element, int kGroup>
AMQ_DEVICE void load_slab(Registers& registers, const Place& place) {
    Work<kBits, Element, kGroup> work{registers, {}};
    load_scales(work, place, kScaleWords<kGroup> - 1);
    for (int word = kBits - 1; word >= 0; --word) load_plane(work, place, word);
}

// sums += codes · x of kCount units from kFirst on, which are fields of one byte word, for two columns of x's fragment: b0 and
// b1 of each unit. shift: of the half (fp16, bf16); mask: of the bytes of a fragment that take part (int8).
template <int kFirst, int kCount, class Work>
AMQ_DEVICE void multiply(Work& work, int column, int shift, uint32_t mask, const uint32_t (&b0)[kCount],
                         const uint32_t (&b1)[kCount]) {
    constexpr int kBits = Work::kBits;
    using Element = typename Work::Element;
    constexpr int kWord = kFirst / Fields<kBits>::kPerByte;
    constexpr typename Element::Type kKind{};
    for (int pair = 0; pair < kPairs<kBits>; ++pair) {
        uint32_t words[4], a[4];  // (tile, column): as a fragment wants them, rows first
        for (int i = 0; i < 4; ++i)
            words[i] = byte_word<kWord, kBits>(work.planes(2 * pair + i % 2, column + i / 2)) >> shift;
        for (int unit = 0; unit < kCount; ++unit) {
            const int field = (kFirst + unit) % Fields<kBits>::kPerByte * kBits, stay = Element::kInPlace ? field : 0;
            auto& sums = work.sums[(kFirst + unit) % Work::kSums][pair];
            for (int i = 0; i < 4; ++i) a[i] = Element::template fragment<kBits, 0>(words[i] >> (field - stay), stay) & mask;
            mma(sums, a, b0[unit], b1[unit], kKind);
            if constexpr (Element::template kParts<kBits> > 1) {
                for (int i = 0; i < 4; ++i) a[i] = Element::template fragment<kBits, 1>(words[i] >> (field - stay), stay) & mask;
                mma(sums, a, b0[unit], b1[unit], kKind);
            }
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

    AMQ_DEVICE StagedSlab at(int bytes) const {
        return {x + bytes / static_cast<int>(sizeof *x), sums + bytes / static_cast<int>(sizeof *sums)};
    }
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
            const float2 v = unpack_halves(work.registers.scales[2 * pair + half][group % 4]);
            for (int i = 0; i < 2; ++i) {  // the lane's two columns
                const int at = 2 * half + i;
                float sum = kUnscale<Work, kUnitIndex> * static_cast<float>(work.sums[kUnitIndex % Work::kSums][pair][at]);
                if constexpr (Work::kSums > 1) {
                    constexpr int kOther = kUnitIndex ^ 1;
                    sum += kUnscale<Work, kOther> * static_cast<float>(work.sums[kOther % 2][pair][at]);
                }
                const float scale = v.x * (i ? x_scale.y : x_scale.x);
                const float zero = kOffset == 0.0f ? v.y : v.y + kOffset;
                // Fused by name: the compiler might choose otherwise for the other column, and a row's bits depend on its place.
                sum = fmaf(-zero, i ? x_sum.y : x_sum.x, sum);
                work.registers.outputs[pair][at] = fmaf(scale, sum, work.registers.outputs[pair][at]);
            }
        }
    clear_sums(work);
}

// Products of kCount units from kFirst on with all columns; kHalf: of each unit, for 16-bit numbers.
template <int kFirst, int kCount, int kHalf, class Work>
AMQ_DEVICE void multiply_half(Work& work, const StagedSlab& staged) {
    constexpr bool kBytes = kIsInt8<typename Work::Element>;
    // A byte fragment covers both halves of a unit at once; where they are two groups, a mask takes one at a time.
    const uint32_t mask = kBytes && Work::kGroup < kUnit ? 0x00ff00ffu << 8 * kHalf : ~0u;
    const int shift = kBytes ? 0 : 8 * kHalf;
    uint32_t x[4][kCount];
    for (int unit = 0; unit < kCount; ++unit) {
        const uint4 v = staged.x[kBytes ? (kFirst + unit) * 4 : (2 * (kFirst + unit) + kHalf) * 4];
        x[0][unit] = v.x, x[1][unit] = v.y, x[2][unit] = v.z, x[3][unit] = v.w;
    }
    multiply<kFirst, kCount>(work, 0, shift, mask, x[0], x[1]);
    multiply<kFirst, kCount>(work, 2, shift, mask, x[2], x[3]);
}

// Units of a byte word that belong to one group.
template <class Work>
constexpr int kTogether = Work::kGroup > kUnit && Fields<Work::kBits>::kPerByte > 1 ? 2 : 1;

// Step kStep of a slab: kTogether units. It finishes groups that begin there, and loads what comes after: planes and scales of
// `next` into the registers that are free.
template <int kStep, class Work>
AMQ_DEVICE void multiply_step(Work& work, const StagedSlab& staged, const Place& place, const Place& next) {
    constexpr int kCount = kTogether<Work>, kFirst = kStep * kCount, kGroup = Work::kGroup;
    constexpr int kGroupIndex = kFirst * kUnit / kGroup, kPerByte = Fields<Work::kBits>::kPerByte;
    if constexpr (!kIsInt8<typename Work::Element> || kGroup < kUnit) multiply_half<kFirst, kCount, 1>(work, staged);
    if constexpr (kGroup < kUnit) finish_group<kFirst>(work, staged, kGroupIndex + 1);
    multiply_half<kFirst, kCount, 0>(work, staged);
    if constexpr (kFirst % kPerByte == 0 && kFirst / kPerByte < Work::kBits) load_plane(work, next, kFirst / kPerByte);
    if constexpr (kFirst * kUnit % kGroup == 0) {
        finish_group<kFirst>(work, staged, kGroupIndex);
        if constexpr (kGroupIndex == 0) load_scales(work, next, kScaleWords<kGroup> - 1);
        else if constexpr (kGroupIndex % 4 == 0) load_scales(work, place, kGroupIndex / 4 - 1);
    }
}

template <class Work, int... kSteps>
AMQ_DEVICE void multiply_steps(Work& work, const StagedSlab& staged, const Place& place, const Place& next,
                               std::integer_sequence<int, kSteps...>) {
    (multiply_step<static_cast<int>(sizeof...(kSteps)) - 1 - kSteps>(work, staged, place, next), ...);
}

// The slab at `place`, whose planes are loaded, into the outputs. Leaves the planes of `next`, which is of the same format.
template <int kBits, class Element, int kGroup>
AMQ_DEVICE void multiply_slab(Registers& registers, const StagedSlab& staged, const Place& place, const Place& next) {
    Work<kBits, Element, kGroup> work{registers, {}};
    clear_sums(work);
    multiply_steps(work, staged, place, next, std::make_integer_sequence<int, kUnits / kTogether<decltype(work)>>());
    // What only wider formats use would else be kept through all of the above.
    for (int i = 4 * work.kTiles * kBits; work.kTiles > 2 && i < 2 * 4 * kMaxBits; ++i) registers.planes[i] = 0;
}

}  // namespace amq
