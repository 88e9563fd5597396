// Activations rounded to 8 bits per row and group, in the order in which byte fragments of codes want them.
//
// a = max|x| / 127 of the group and x becomes a · round(x / a), ties to even, as quantize_activations in
// amq/kernels/backends.py says. A group with a NaN or an infinity gets a = NaN, one whose magnitudes are all below 2^-100
// gets a = 0.
//
//     x_codes   word [row, slab, unit, column]: byte h + 2·p is feature 512·slab + 64·unit + 32·h + 2·column + p
//     x_scales  a [group, row], groups counted through whole slabs

#pragma once

#include <cfloat>

#include "layout.cuh"

namespace amq {

struct QuantizeArguments {
    const void* x;
    int64_t x_stride;
    int rows, in_features, slabs, dtype;
    uint32_t* x_codes;
    float* x_scales;
};

AMQ_DEVICE float load_feature(const QuantizeArguments& arguments, int row, int feature) {
    if (feature >= arguments.in_features) return 0.0f;
    const int64_t from = row * arguments.x_stride + feature;
    return arguments.dtype == kHalf ? to_float(static_cast<const __half*>(arguments.x)[from])
                                    : to_float(static_cast<const __nv_bfloat16*>(arguments.x)[from]);
}

// The group's largest magnitude becomes its scale; returns the factor that codes are rounded after.
AMQ_DEVICE float scale_of(float largest, float* scale) {
    if (largest > FLT_MAX) {
        *scale = largest - largest;  // NaN
        return 0.0f;
    }
    *scale = largest < 0x1p-100f ? 0.0f : largest / 127.0f;
    return largest < 0x1p-100f ? 0.0f : 1.0f / largest * 127.0f;  // in the order in which torch divides
}

// One warp per row and slab: pass p of four takes units 2p and 2p + 1, one column per lane.
template <int kGroup>
__global__ void __launch_bounds__(kWarp) quantize_kernel(QuantizeArguments arguments) {
    const int row = blockIdx.x / arguments.slabs, slab = blockIdx.x % arguments.slabs;
    const int lane = threadIdx.x, column = lane % kColumns;
    for (int pass = 0; pass < kUnits / 2; ++pass) {
        const int unit = 2 * pass + lane / kColumns;
        float x[2][2], largest[2];
        for (int half = 0; half < 2; ++half) {
            largest[half] = 0.0f;
            for (int i = 0; i < 2; ++i) {
                const int feature = slab * kSlab + unit * kUnit + half * kUnit / 2 + 2 * column + i;
                x[half][i] = load_feature(arguments, row, feature);
                const float magnitude = fabsf(x[half][i]);
                largest[half] = magnitude <= FLT_MAX ? fmaxf(largest[half], magnitude) : INFINITY;
            }
            for (int lanes = 1; lanes < kColumns; lanes *= 2)
                largest[half] = fmaxf(largest[half], shuffle_xor(largest[half], lanes));
        }
        if (kGroup >= kUnit) largest[0] = largest[1] = fmaxf(largest[0], largest[1]);
        if (kGroup > kUnit) largest[0] = largest[1] = fmaxf(largest[0], shuffle_xor(largest[0], kColumns));
        uint32_t word = 0;
        for (int half = 0; half < 2; ++half) {
            float scale;
            const float factor = scale_of(largest[half], &scale);
            for (int i = 0; i < 2; ++i) {
                const int code = factor == 0.0f ? 0 : static_cast<int>(round_even(x[half][i] * factor));
                word |= (static_cast<uint32_t>(code) & 0xffu) << 8 * (half + 2 * i);
            }
            const int feature = slab * kSlab + unit * kUnit + half * kUnit / 2;
            if (column == 0 && feature % kGroup == 0) arguments.x_scales[feature / kGroup * kMaxRows + row] = scale;
        }
        arguments.x_codes[((static_cast<int64_t>(row) * arguments.slabs + slab) * kUnits + unit) * kColumns + column] = word;
    }
}

}  // namespace amq
