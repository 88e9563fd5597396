// The formats that are compiled in: those of amq/formats.py, through amq_formats.h, which `native_header` there writes. To a
// GPU a format is the bits of its codes, and layout.cuh has the rest. Formats that are no dense bitstream have no place in
// that layout, and none here.

#pragma once

#include "amq_formats.h"

namespace amq {

constexpr int kMaxBits = 8;

// 0 for a format that is no dense bitstream.
constexpr int dense_bits(int levels, int unit_codes, int unit_bytes) {
    for (int bits = 1; bits <= kMaxBits; ++bits)
        if (levels == 1 << bits && 8 * unit_bytes == unit_codes * bits) return bits;
    return 0;
}

constexpr bool is_compiled(int bits) {
#define AMQ_COMPARE(name, levels, unit_codes, unit_bytes) || bits == dense_bits(levels, unit_codes, unit_bytes)
    return bits > 0 && (false AMQ_FORMATS(AMQ_COMPARE));
#undef AMQ_COMPARE
}
template <int kBits>
constexpr bool kIsCompiled = is_compiled(kBits);  // for device code

}  // namespace amq
