// In which order a row's softmax is put together, which its position alone decides: positions are cut into spans of 2ⁿ · 64,
// aligned to the sequence, the shortest of which at most `splits` reach from the first position that the row sees to its own.

#pragma once

#include "calls.h"
#include "device.cuh"

namespace amq {

// What a row attends to: positions first … last in spans of 1 << log2; last −1: nothing.
struct Sight {
    int first = 0, last = -1, log2 = 6;

    Sight() = default;
    AMQ_DEVICE Sight(const AttentionCall& c, int row) : last(c.positions[row]) {
        if (c.window > 0) first = max(0, last - c.window + 1);
        while ((last >> log2) - (first >> log2) >= c.splits) ++log2;
    }
    AMQ_DEVICE int spans() const { return (last >> log2) - (first >> log2) + 1; }
};

// Softmax over some positions, for the thread's row and features; as Partial and merge in csrc/cpu.
template <int kCount>
struct Softmax {
    float largest = -INFINITY, sum = 0.0f, values[kCount] = {};

    template <class Value>
    AMQ_DEVICE void merge(float other_largest, float other_sum, Value value) {
        if (other_sum == 0.0f) return;
        const bool grows = !(other_largest <= largest);
        const float factor = sum == 0.0f ? 0.0f : expf(grows ? largest - other_largest : other_largest - largest);
        const float keep = grows ? factor : 1.0f, take = grows ? 1.0f : factor;
        for (int j = 0; j < kCount; ++j) values[j] = fmaf(values[j], keep, value(j) * take);
        sum = fmaf(sum, keep, other_sum * take);
        if (grows) largest = other_largest;
    }
};

}  // namespace amq
