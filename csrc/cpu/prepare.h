// Packed rows → the tiles of tiles.h.

#pragma once

#include <cstdint>

#include "isa.h"

namespace amq {

struct PrepareArgs {
    const uint8_t* qweight;      // [rows, qweight_stride bytes], packed as in amq/formats.py
    const uint16_t* scale;       // fp16 bits [rows, group_stride]
    const uint16_t* zero_point;  // fp16 bits [rows, group_stride]
    uint8_t* out;                // prepared_bytes(…); need not be initialised
    int64_t qweight_stride, group_stride, rows, in_features, group_size;
};

// `format` is its place in amq_formats.h.
void prepare(int format, const Isa& isa, const PrepareArgs& args, int threads);

// Bits of a code of that format, 0 where tiles do not hold it.
int tile_bits(int format);

}  // namespace amq
