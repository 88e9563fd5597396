// int5: one code in a byte; the three spare bits of five planes' bytes, 15 bits in a row, are three more codes.

#pragma once

#include "layout.cuh"

namespace amq {

struct int5 {
    static constexpr int kBits = 5;

    template <int kWord>
    AMQ_DEVICE static uint32_t byte_word(const uint32_t (&planes)[kBits]) {
        if constexpr (kWord < kBits) return planes[kWord];
        if constexpr (kWord == kBits)
            return (planes[0] >> 5 & 0x07070707u) | (planes[1] >> 2 & 0x18181818u);
        if constexpr (kWord == kBits + 1)
            return (planes[1] >> 7 & 0x01010101u) | (planes[2] >> 4 & 0x0e0e0e0eu) | (planes[3] >> 1 & 0x10101010u);
        return (planes[3] >> 6 & 0x03030303u) | (planes[4] >> 3 & 0x1c1c1c1cu);
    }
};

}  // namespace amq
