// What the tensor cores multiply, one struct per kind of activation: how codes become a fragment, and how x is read.
//
//   HalfElement      A code c at the bottom of an fp16 number is the subnormal c · 2^-24, which tensor cores multiply exactly:
//                    a fragment is a shift and a mask. Sums come out times 2^-24.
//   Bfloat16Element  Subnormal bf16 products would vanish in fp32, so a code goes under the exponent of 128: a fragment is
//                    128 + c, and 128 joins the zero point. A code of 8 bits does not fit there; its nibbles do, one by one.
//   Int8Element      Codes and rounded activations as bytes, sums exact in int32.
//
// Members: Sum and Type, of a sum and of x; kParts<Format>, fragments per code; fragment<Format, part>(byte word, shift); one(),
// the fragment of a weight of one; kOffset<Format>, what fragments exceed codes by; kFinal, what sums are multiplied with at
// last; kWeightRegisters, of a lane for one slab of a warp's rows, and kRegisters, of a lane at most.

#pragma once

#include "layout.cuh"

namespace amq {

struct HalfElement {
    using Sum = float;
    using Type = __half;
    static constexpr float kFinal = 16777216.0f;  // 2^24
    static constexpr int kWeightRegisters = 64;
    static constexpr int kRegisters = 168;  // room for 12 warps on a multiprocessor

    template <class Format>
    static constexpr int kParts = 1;
    template <class Format>
    static constexpr float kOffset = 0.0f;

    template <class Format, int kPart>
    AMQ_DEVICE static uint32_t fragment(uint32_t word, int shift) {
        return word >> shift & Fields<Format>::kMask * 0x00010001u;
    }
    AMQ_DEVICE static uint32_t one() { return 0x00010001u; }
};

struct Bfloat16Element {
    using Sum = float;
    using Type = __nv_bfloat16;
    static constexpr float kFinal = 1.0f;
    static constexpr int kWeightRegisters = 64;
    static constexpr int kRegisters = 168;  // room for 12 warps on a multiprocessor
    static constexpr int kMantissa = 7;

    template <class Format>
    static constexpr int kParts = Format::kBits > kMantissa ? 2 : 1;
    template <class Format>
    static constexpr float kOffset = kParts<Format> > 1 ? 128.0f + 2048.0f : 128.0f;

    template <class Format, int kPart>
    AMQ_DEVICE static uint32_t fragment(uint32_t word, int shift) {
        if constexpr (kParts<Format> == 1) return (word >> shift & Fields<Format>::kMask * 0x00010001u) | 0x43004300u;
        return (word >> (shift + 4 * kPart) & 0x000f000fu) | (kPart ? 0x45004500u : 0x43004300u);  // 2048 + 16·c, 128 + c
    }
    AMQ_DEVICE static uint32_t one() { return 0x3f803f80u; }
};

struct Int8Element {
    using Sum = int32_t;
    using Type = int8_t;
    static constexpr float kFinal = 1.0f;
    static constexpr int kWeightRegisters = 32;
    static constexpr int kRegisters = 255;  // the compiler reads x and the scales far ahead here, and would spill

    template <class Format>
    static constexpr int kParts = 1;
    template <class Format>
    static constexpr float kOffset = 0.0f;

    template <class Format, int kPart>
    AMQ_DEVICE static uint32_t fragment(uint32_t word, int shift) {
        return word >> shift & Fields<Format>::kMask * 0x01010101u;
    }
    AMQ_DEVICE static uint32_t one() { return 0x01010101u; }
};

// Eight neighbouring activations of a row from `feature` on, 0 past its end.
template <class T>
AMQ_DEVICE uint4 load_features(const T* row, int feature, int in_features, bool aligned) {
    uint4 v = {0, 0, 0, 0};
    if (aligned) {
        if (feature < in_features) v = load_shared_by_many(reinterpret_cast<const uint4*>(row + feature));
        return v;
    }
    uint32_t words[4] = {0, 0, 0, 0};
    for (int k = 0; k < 8; ++k)
        if (feature + k < in_features)
            words[k / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[feature + k]) << 16 * (k % 2);
    return {words[0], words[1], words[2], words[3]};
}

}  // namespace amq
