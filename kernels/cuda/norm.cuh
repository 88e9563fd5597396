// How the squares of an RMS norm are added up, which two kernels do: norm_kernel (rows.cuh), and a linear that norms its input
// itself (stage.cuh), for rows of which it depends on the pass who norms them. Feature k goes to sum k % 512, in order; two
// sums that differ in the lowest bit of their number are added, then those of two that differ in the next bit, and so on.

#pragma once

#include "device.cuh"

namespace amq {

// Over a warp; neighbours first.
AMQ_DEVICE float warp_sum_upward(float v) {
    for (int lanes = 1; lanes < 32; lanes *= 2) v += shuffle_xor(v, lanes);
    return v;
}

// Of 2ⁿ numbers, neighbours first.
template <int kCount>
AMQ_DEVICE float sum_upward(const float (&from)[kCount]) {
    float v[kCount];
    for (int i = 0; i < kCount; ++i) v[i] = from[i];
    for (int width = 1; width < kCount; width *= 2)
        for (int i = 0; i < kCount; i += 2 * width) v[i] += v[i + width];
    return v[0];
}

// What makes a vector one whose mean of squares is 1.
AMQ_DEVICE float norm_factor(float squares, int features, float epsilon) {
    return 1.0f / sqrtf(squares / static_cast<float>(features) + epsilon);
}

}  // namespace amq
