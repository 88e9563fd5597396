// The rotation of amq/rotation.py: kRotation features at a time times the normalised Walsh–Hadamard matrix, which is its own
// inverse. Stages of width 1, 2, … kRotation / 2, then one exact product: bit-equal to `amq.rotation.rotate` on every
// instruction set, since no stage sums more than two numbers.

#pragma once

#include <cstdint>

#include "isa.h"
#include "unit.h"
#include "unroll.h"

namespace amq {

constexpr int kRotation = 64;
constexpr float kRotationScale = 0.125f;  // 1 / √kRotation

#ifdef __clang__
#define AMQ_SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define AMQ_SHUFFLE(x, ...) __builtin_shuffle(x, I32x8{__VA_ARGS__})
#endif

// Lanes of pairs at distance 1, 2 or 4 in one vector: low + high, low − high. By reference: vectors have no ABI without AVX.
template <int distance>
AMQ_INLINE void rotate_lanes(F32x8& x) {
    const F32x8 other = distance == 1   ? AMQ_SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6)
                        : distance == 2 ? AMQ_SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5)
                                        : AMQ_SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3);
    constexpr int32_t sign = INT32_MIN;
    constexpr I32x8 signs = distance == 1   ? I32x8{0, sign, 0, sign, 0, sign, 0, sign}
                            : distance == 2 ? I32x8{0, 0, sign, sign, 0, 0, sign, sign}
                                            : I32x8{0, 0, 0, 0, sign, sign, sign, sign};
    x = other + reinterpret_cast<F32x8>(reinterpret_cast<I32x8>(x) ^ signs);
}

// kRotation features, `in` and `out` the same or apart. NaN and infinity spread over them.
AMQ_INLINE void rotate_block(const float* in, float* out) {
    using Unaligned = float __attribute__((vector_size(32), aligned(4), may_alias));
    constexpr int kVectors = kRotation / 8;
    F32x8 v[kVectors];
    unroll<kVectors>([&](auto i) {
        v[i] = *reinterpret_cast<const Unaligned*>(in + 8 * i);
        rotate_lanes<1>(v[i]);
        rotate_lanes<2>(v[i]);
        rotate_lanes<4>(v[i]);
    });
    unroll<3>([&](auto stage) {
        unroll<kVectors>([&](auto i) {
            constexpr int half = 1 << stage;
            if constexpr ((i & half) == 0) {
                const F32x8 low = v[i], high = v[i + half];
                v[i] = low + high;
                v[i + half] = low - high;
            }
        });
    });
    unroll<kVectors>([&](auto i) { *reinterpret_cast<Unaligned*>(out + 8 * i) = v[i] * kRotationScale; });
}

}  // namespace amq
