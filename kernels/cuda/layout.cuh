// The layout of prepared weights, as amq/kernels/gpu_layout.py writes it, from memory to what a tensor core multiplies.
//
// 1. A weight is cut into tiles of 8 output rows and slabs of 512 input features. A slab of a tile is `bits` planes of 512
//    bytes, 8 rows × 16 columns of 32-bit words, which a warp reads with one 16-byte load per lane and plane:
//
//        plane 0            column  0…3     4…7    8…11    12…15       plane 1      …      plane bits − 1
//                  row 0   | lane 0 | lane 1 | lane 2 | lane 3 |       the same
//                  row 1   | lane 4 | lane 5 | lane 6 | lane 7 |
//                    …
//                  row 7   | lane 28| lane 29| lane 30| lane 31|
//
// 2. A row and column owns 32 codes, in byte words: words whose four bytes hold the same fields. 8 units i of 64 features go
//    to fields, low bits first, then to words. Feature 64·i + 32·h + 2·column + p of the slab is in byte h + 2·p:
//
//        bit        31         24 23         16 15          8 7           0
//                  | h = 1, p = 1 | h = 0, p = 1 | h = 1, p = 0 | h = 0, p = 0 |
//        2 bits    |  3  2  1  0  |  3  2  1  0  |  3  2  1  0  |  3  2  1  0  |   word 0; 4 to 7 are in word 1
//        3 bits    | s   1    0   | s   1    0   | s   1    0   | s   1    0   |   word 0; 2 to 7 in words 1 to 3
//        8 bits    |      0       |      0       |      0       |      0       |   word 0; i in word i
//
//    The first `bits` words are the planes. Where fields leave bits of a byte over (s), those of all planes in a row are the
//    words that are missing: `byte_word` gathers them, the 6 bits of word 3 of 3-bit codes from 2 bits of each of 3 planes.
//
// 3. One shift and one mask of a byte word are a register of a fragment: for fp16 and bf16 the two neighbours p = 0 and 1 of
//    one unit and half, for int8 (mask of every byte) both halves too:
//
//        fp16   | 0 … 0  code, p = 1 | 0 … 0  code, p = 0 |          int8   | code | code | code | code |
//
//    A lane's registers of one product are those of two columns and two tiles, which are the 16 rows of the fragment:
//
//        a[0]  tile 0, column c      a[2]  tile 0, column c + 1       c = 4·(lane % 4), then c + 2
//        a[1]  tile 1, column c      a[3]  tile 1, column c + 1       row lane / 4 of the tile

#pragma once

#include "calls.h"
#include "device.cuh"

namespace amq {

constexpr int kTileRows = 8;
constexpr int kColumns = 16;
constexpr int kSlab = 512;
constexpr int kUnits = 8;             // units of 64 features in a slab: all codes of one field of one byte word
constexpr int kUnit = kSlab / kUnits;
constexpr int kWarp = 32;
constexpr int kMaxRows = 8;           // rows of x that one launch multiplies: the columns of a tensor-core product
constexpr int kMaxWeights = 4;

// Planes of a tile, as gpu_layout.py counts them: a last slab of fewer features keeps those that hold some.
AMQ_BOTH int planes_of(int bits, int in_features) {
    const int features_per_word = kUnit * (8 / bits), rest = in_features % kSlab;
    const int words = (rest + features_per_word - 1) / features_per_word;
    return in_features / kSlab * bits + (words < bits ? words : bits);
}


// The fields of codes of kBits bits.
template <int kBits>
struct Fields {
    static constexpr int kPerByte = 8 / kBits;
    static constexpr int kUsed = kPerByte * kBits;  // bits of a byte
    static constexpr uint32_t kMask = (1u << kBits) - 1;
};

// Byte word kWord of a row and column. The first kBits are the planes; the spare top bits of the planes' bytes, plane 0's
// lowest, hold the others one after another, kUsed bits each. Where codes fill their bytes there are no others.
template <int kWord, int kBits>
AMQ_DEVICE uint32_t byte_word(const uint32_t* planes) {
    if constexpr (kWord < kBits) {
        return planes[kWord];
    } else {
        constexpr int kUsed = Fields<kBits>::kUsed, kSpare = 8 - kUsed, kBegin = (kWord - kBits) * kUsed;
        uint32_t word = 0;
        for (int plane = kBegin / kSpare; plane * kSpare < kBegin + kUsed; ++plane) {
            const int to = plane * kSpare - kBegin;  // bit of the byte that this plane's first spare bit is
            const int first = to > 0 ? to : 0, last = to + kSpare < kUsed ? to + kSpare : kUsed;
            const uint32_t mask = ((1u << last) - (1u << first)) * 0x01010101u;
            word |= (planes[plane] & mask << (kUsed - to)) >> (kUsed - to);
        }
        return word;
    }
}

}  // namespace amq
