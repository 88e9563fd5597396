// Activations of an MLP; formulas: Activation in csrc/cpu/vector.h. A NaN stays one. Sums and products are written out as fused
// ones: two kernels compute the same, and the compiler might fuse them in one and not in the other.

#pragma once

#include "calls.h"
#include "device.cuh"

namespace amq {

AMQ_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x · sigmoid(inner); 0 where e^(−inner) overflows.
AMQ_DEVICE float gated(float x, float inner) { return x / (1.0f + expf(-inner)); }

AMQ_DEVICE float activated(int kind, float gate, float up, float limit) {
    if (kind == kSilu) return gated(gate, gate) * up;
    if (kind == kGeluTanh) {  // (1 + tanh(x)) / 2 = sigmoid(2x)
        constexpr float kTwice = 1.5957691216f;  // 2√(2/π)
        return gated(gate, kTwice * fmaf(gate * gate * gate, 0.044715f, gate)) * up;
    }
    if (kind == kClampedSwiglu) {
        const float g = gate > limit ? limit : gate;
        const float u = up > limit ? limit : up < -limit ? -limit : up;
        return gated(g, 1.702f * g) * (u + 1.0f);
    }
    return gate < 0.0f ? 0.0f : gate * gate;
}

}  // namespace amq
