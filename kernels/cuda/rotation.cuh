// x · H for each kUnit features, H the normalised Walsh–Hadamard matrix: amq/rotation.py, to the bit.

#pragma once

#include "device.cuh"
#include "layout.cuh"

namespace amq {

// A lane's part of a unit: features 4·j … + 3 of each half, j = lane % 8, one unit per 8 lanes.
struct Piece {
    float v[2][4];
};

AMQ_DEVICE void butterfly(float& low, float& high) {
    const float sum = low + high;
    high = low - high;
    low = sum;
}

// By all lanes of a warp; stages of width 1, 2, 4, … 32, whose order decides the bits.
AMQ_DEVICE void rotate(Piece& piece, int j) {
    static_assert(kUnit == 64, "what amq/rotation.py rotates at a time");
    for (auto& v : piece.v) {
        butterfly(v[0], v[1]), butterfly(v[2], v[3]);
        butterfly(v[0], v[2]), butterfly(v[1], v[3]);
        for (int lanes = 1; lanes < 8; lanes *= 2)
            for (float& value : v) {
                const float other = shuffle_xor(value, lanes);
                value = j & lanes ? other - value : value + other;
            }
    }
    for (int i = 0; i < 4; ++i) {
        butterfly(piece.v[0][i], piece.v[1][i]);
        for (auto& v : piece.v) v[i] *= 0.125f;
    }
}

}  // namespace amq
