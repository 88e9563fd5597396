// How numbers become 8 bits, in activations and in the KV cache: a = max|x| / 127, x becomes a · round(x / a), ties to even.

#pragma once

#include <cfloat>

#include "device.cuh"

namespace amq {

// A group's largest magnitude becomes its scale; returns the factor that codes are rounded after.
AMQ_DEVICE float scale_of(float largest, float* scale) {
    if (largest > FLT_MAX) {
        *scale = largest - largest;  // NaN
        return 0.0f;
    }
    *scale = largest < 0x1p-100f ? 0.0f : largest / 127.0f;
    return largest < 0x1p-100f ? 0.0f : 1.0f / largest * 127.0f;  // in the order in which torch divides
}

}  // namespace amq
