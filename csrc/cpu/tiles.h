// The layout that linear kernels read: tiles of 16 output rows, one tile after another, each one contiguous stream.
//
// A vector of 16 lanes of 32 bits holds 16 output rows, so that products are summed down the lanes and no kernel ever
// adds across a vector. Codes of power-of-two formats are split into *planes* of 4, 2 and 1 bits (8 stays whole), since
// only those divide a byte: int3 is a plane of its two low bits and one of its high bit, int5 is 4 + 1, int6 is 4 + 2.
//
//     tile  := group … group                          as many as a row has, the last one may hold fewer blocks
//     group := header block … block                   a block is 32 input features; the row's last one is padded with 0
//     header := scale[16] zero_point[16]              fp16, one line
//     block := plane … plane                          low bits first
//     plane of w bits := w lines
//     line := 16 lanes of 32 bits (64 bytes)
//
// One block is 8 *steps* of 4 input features. Line l of a plane of w bits holds the steps 8l/w … 8(l+1)/w − 1; a lane of
// it, for w = 2:
//
//     bit 0      2      4      6      8      10           16           24
//     | step 0 | step 1 | step 2 | step 3 | step 0 | …    | step 0 …   | step 0 …
//     |        feature 0 of the step      | feature 1     | feature 2  | feature 3
//
// so (line >> w·s) & mask in every byte gives one step: 16 rows × 4 features, one byte each, which is the operand of an
// integer dot product over bytes (VNNI's vpdpbusd) and one row of an AMX tile.
//
// A block of b-bit codes takes 64·b bytes: nothing is added to the packed size but the padding of features to 32. The
// last tile, where out_features is not a multiple of 16, has as many lanes as rows are left.

#pragma once

#include <cstdint>

#include "isa.h"

namespace amq {

constexpr int kLanes = 16;          // output rows of a tile
constexpr int kBlock = 32;          // input features of a block
constexpr int kStep = 4;            // input features of a step
constexpr int kSteps = kBlock / kStep;
constexpr int kLineBytes = 4 * kLanes;
constexpr int kMaxGroup = 128;      // input features of a group: bounds the buffers on the stack
constexpr int kMaxGroupBytes = kLineBytes * (1 + kMaxGroup / kBlock * 8);

// A plane of a code: `width` bits from bit `offset` on; `line` is where it begins in a block. width 0: no more planes.
struct Plane {
    int width, offset, line;
};

// Plane `index` of codes of `bits` bits: widths 4, 2, 1 as in the binary digits of `bits`; 8 alone is one plane.
AMQ_INLINE constexpr Plane plane_of(int bits, int index) {
    int offset = 0;
    for (int width = 8; width > 0; width /= 2) {
        if (!(bits & width)) continue;
        if (index-- == 0) return {width, offset, offset};  // one line per bit: lines and bits count alike
        offset += width;
    }
    return {0, 0, 0};
}

AMQ_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bits of a code of `levels` levels, 0 where `levels` is not a power of two (the layout above does not hold those).
AMQ_INLINE constexpr int bits_of(int levels) {
    for (int bits = 1; bits <= 8; ++bits)
        if (levels == 1 << bits) return bits;
    return 0;
}

// Bytes of a tile with `lanes` output rows.
AMQ_INLINE constexpr int64_t tile_bytes(int bits, int64_t in_features, int64_t group_size, int64_t lanes) {
    return 4 * lanes * (ceil_div(in_features, group_size) + ceil_div(in_features, kBlock) * bits);
}

AMQ_INLINE constexpr int64_t prepared_bytes(int bits, int64_t out_features, int64_t in_features, int64_t group_size) {
    return tile_bytes(bits, in_features, group_size, 1) * out_features;  // lanes of all tiles are all rows
}

}  // namespace amq
