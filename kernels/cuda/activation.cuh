// Activations of an MLP; formulas: Activation in csrc/cpu/vector.h. A NaN stays one.

#pragma once

#include "device.cuh"

namespace amq {

AMQ_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

AMQ_DEVICE float activated(int kind, float gate, float up, float limit) {
    if (kind == kSilu) return gate * sigmoid(gate) * up;
    if (kind == kGeluTanh) {
        constexpr float kTwice = 1.5957691216f;  // 2√(2/π), as (1 + tanh(x)) / 2 = sigmoid(2x)
        return gate * sigmoid(kTwice * (gate + 0.044715f * gate * gate * gate)) * up;
    }
    if (kind == kClampedSwiglu) {
        const float g = gate > limit ? limit : gate, u = up > limit ? limit : up < -limit ? -limit : up;
        return g * sigmoid(1.702f * g) * (u + 1.0f);
    }
    const float positive = gate < 0.0f ? 0.0f : gate;
    return positive * positive;
}

}  // namespace amq
