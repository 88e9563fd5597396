// What the tensor cores multiply, one struct per kind of activation: how codes become a fragment.
//
//   HalfElement      A code c from bit s on of an fp16 number is the subnormal c · 2^(s - 24), which tensor cores multiply
//                    exactly: a fragment is a mask, the field stays where it is. Sums come out times 2^(s - 24).
//   Bfloat16Element  Subnormal bf16 products would vanish in fp32, so a code goes under the exponent of 128: a fragment is
//                    128 + c, and 128 joins the zero point. A code of 8 bits does not fit there; its nibbles do, one by one.
//   Int8Element      Codes and rounded activations as bytes, sums exact in int32.
//
// Members: Sum and Type, of a sum and of x; kInPlace, whether fragments may keep the shift of their field; kParts<kBits>,
// fragments per code; fragment<bits, part>(byte word, shift of the field); kOffset<kBits>, what fragments exceed codes by;
// kFinal, what sums are multiplied with at last, and Σx is divided by at first.

#pragma once

#include "layout.cuh"

namespace amq {

// A code is one fragment, and nothing else.
struct PlainCodes {
    template <int kBits>
    static constexpr int kParts = 1;
    template <int kBits>
    static constexpr float kOffset = 0.0f;
};

struct HalfElement : PlainCodes {
    using Sum = float;
    using Type = __half;
    static constexpr bool kInPlace = true;
    static constexpr float kFinal = 16777216.0f;  // 2^24

    template <int kBits, int kPart>
    AMQ_DEVICE static uint32_t fragment(uint32_t word, int shift) {
        return word & Fields<kBits>::kMask * 0x00010001u << shift;
    }
};

struct Bfloat16Element {
    using Sum = float;
    using Type = __nv_bfloat16;
    static constexpr bool kInPlace = false;
    static constexpr float kFinal = 1.0f;
    static constexpr int kMantissa = 7;

    template <int kBits>
    static constexpr int kParts = kBits > kMantissa ? 2 : 1;
    template <int kBits>
    static constexpr float kOffset = kParts<kBits> > 1 ? 128.0f + 2048.0f : 128.0f;

    template <int kBits, int kPart>
    AMQ_DEVICE static uint32_t fragment(uint32_t word, int shift) {
        if constexpr (kParts<kBits> == 1) return and_or(word >> shift, Fields<kBits>::kMask * 0x00010001u, 0x43004300u);
        return and_or(word >> (shift + 4 * kPart), 0x000f000fu, kPart ? 0x45004500u : 0x43004300u);  // 2048 + 16·c, 128 + c
    }
};

struct Int8Element : PlainCodes {
    using Sum = int32_t;
    using Type = int8_t;
    static constexpr bool kInPlace = false;
    static constexpr float kFinal = 1.0f;

    template <int kBits, int kPart>
    AMQ_DEVICE static uint32_t fragment(uint32_t word, int shift) {
        return word >> shift & Fields<kBits>::kMask * 0x01010101u;
    }
};

}  // namespace amq
