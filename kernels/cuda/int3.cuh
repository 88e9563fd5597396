// int3: two codes in a byte; the two spare bits of three planes' bytes are the two codes of a fourth.

#pragma once

#include "layout.cuh"

namespace amq {

struct int3 {
    static constexpr int kBits = 3;

    template <int kWord>
    AMQ_DEVICE static uint32_t byte_word(const uint32_t (&planes)[kBits]) {
        if constexpr (kWord < kBits) return planes[kWord];
        constexpr uint32_t kTop = 0xc0c0c0c0u;
        return (planes[0] & kTop) >> 6 | (planes[1] & kTop) >> 4 | (planes[2] & kTop) >> 2;
    }
};

}  // namespace amq
