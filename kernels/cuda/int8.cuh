// int8: codes fill their bytes, so every byte word is a plane.

#pragma once

#include "layout.cuh"

namespace amq {

struct int8 {
    static constexpr int kBits = 8;

    template <int kWord>
    AMQ_DEVICE static uint32_t byte_word(const uint32_t (&planes)[kBits]) {
        return planes[kWord];
    }
};

}  // namespace amq
