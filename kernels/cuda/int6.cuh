// int6: one code in a byte; the two spare bits of three planes' bytes are one more, twice.

#pragma once

#include "layout.cuh"

namespace amq {

struct int6 {
    static constexpr int kBits = 6;

    template <int kWord>
    AMQ_DEVICE static uint32_t byte_word(const uint32_t (&planes)[kBits]) {
        if constexpr (kWord < kBits) {
            return planes[kWord];
        } else {
            constexpr int kFrom = 3 * (kWord - kBits);
            return (planes[kFrom] >> 6 & 0x03030303u) | (planes[kFrom + 1] >> 4 & 0x0c0c0c0cu) |
                   (planes[kFrom + 2] >> 2 & 0x30303030u);
        }
    }
};

}  // namespace amq
