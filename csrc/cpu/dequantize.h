// Packed rows → float32 weights, bit-equal to `amq.packing.dequantize`.
//
//     out[n, k] = (float(code[n, k]) − zero_point[n, g]) · scale[n, g],   g = k / group_size
//
// and of rotated weights each row of that rotated back (rotation.h), while it is in the first cache.
// The subtraction and the product are rounded separately (no fused multiply-add), as torch does.
// The formats come from amq/formats.py: setup.py writes them into amq_formats.h.

#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace amq {

// All strides are between rows. Nothing may overlap `out`.
struct DequantizeArgs {
    const uint8_t* qweight;      // [rows, row_bytes(in_features)]
    const uint16_t* scale;       // fp16 bits [rows, n_groups]
    const uint16_t* zero_point;  // fp16 bits [rows, n_groups], in code units
    float* out;                  // [rows, in_features]; need not be initialised
    int64_t qweight_stride;      // bytes
    int64_t group_stride;        // elements, of scale and zero_point
    int64_t out_stride;          // elements
    int64_t rows;
    int64_t in_features;  // any positive number: the last unit and the last group may be ragged
    int64_t group_size;   // a positive multiple of kChunk (unit.h)
    bool rotated;         // kRotation divides in_features then
};

struct FormatKernels {
    const char* name;
    std::array<int, 3> layout;  // levels, unit_codes, unit_bytes
    int64_t (*row_bytes)(int64_t in_features);
    void (*dequantize_rows[2])(const DequantizeArgs&, int64_t begin, int64_t end);  // by Isa::avx2_loops
};

const std::vector<FormatKernels>& compiled_formats();

// Dequantizes all rows on at most `threads` threads; the result does not depend on their number.
void dequantize(const FormatKernels& format, const Isa& isa, const DequantizeArgs& args, int threads);

}  // namespace amq
