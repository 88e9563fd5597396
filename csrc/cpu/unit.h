// Reading codes out of packed rows: the layout of amq/formats.py as a compile-time record, and two ways to decode it.
//
// A *unit* is `unit_codes` codes written as one little-endian integer of `unit_bytes` bytes whose base-`levels` digits
// are the codes, first code in the lowest digit. When `levels` is a power of two and the units leave no spare bits, a
// row is one dense little-endian bitstream and eight codes at a time are decoded with vector shifts
// (`dequantize_chunk`). Every other format goes unit by unit with divisions by constants (`read_digits`).

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace amq {

// Codes that the vector loops decode at a time: `bits` whole bytes, and a divisor of every group size.
constexpr int kChunk = 8;

template <int levels_, int unit_codes_, int unit_bytes_>
struct Layout {
    static constexpr int levels = levels_;
    static constexpr int unit_codes = unit_codes_;
    static constexpr int unit_bytes = unit_bytes_;

    static constexpr int bits() {  // bits of one digit, 0 when `levels` is not a power of two
        for (int b = 1; b <= 8; ++b)
            if (levels == 1 << b) return b;
        return 0;
    }
    static constexpr bool is_dense = bits() > 0 && unit_codes * bits() == 8 * unit_bytes;

    // Bytes that the largest value of `codes` digits needs: what is left of a unit that the row's end cuts.
    static constexpr int64_t bytes_for(int64_t codes) {
        uint64_t largest = 1;
        for (int64_t i = 0; i < codes; ++i) largest *= levels;
        int64_t bytes = 0;
        for (--largest; largest; largest >>= 8) ++bytes;
        return bytes;
    }
    static constexpr int64_t row_bytes(int64_t in_features) {
        return in_features / unit_codes * unit_bytes + bytes_for(in_features % unit_codes);
    }
};

AMQ_INLINE uint32_t load_le32(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap32(word);
#endif
    return word;
}

// Eight lanes in the compilers' generic vectors: GCC 12 does not vectorise the shifts below from a plain loop (14 GB/s
// instead of 30 to 41 GB/s written to L2; AVX2, one core of an Intel Xeon with AMX, November 2026). Where a target has
// no such register the compiler splits it.
using I32x8 = int32_t __attribute__((vector_size(32)));
using U32x8 = uint32_t __attribute__((vector_size(32)));
using F32x8 = float __attribute__((vector_size(32)));

// kChunk codes at `p` → out[i] = (code[i] − zero) · scale. Eight codes of `bits` bits fill exactly `bits` bytes:
//
//     bit 0      bits     2·bits    3·bits    4·bits …
//     | code 0 | code 1  | code 2  | code 3  | code 4  …
//
// Up to 4 bits, one 32-bit word holds all eight; above, lanes 4 to 7 take a second word from the byte that code 4
// starts in, at most 4 bits before it. Lane i is then (word >> constant) & mask. The last word may reach up to 3 bytes
// past the codes: `kReadAhead` bytes from `p` must be readable.
constexpr int kReadAhead = 8;

template <class L>
AMQ_INLINE void dequantize_chunk(const uint8_t* p, float zero, float scale, float* out) {
    static_assert(L::is_dense && kChunk == 8, "eight codes of a dense bitstream");
    constexpr unsigned b = L::bits(), skip = b <= 4 ? 0 : 4 * b / 8, high = 4 * b - 8 * skip;
    const U32x8 low_words = U32x8{} + load_le32(p), high_words = b <= 4 ? low_words : U32x8{} + load_le32(p + skip);
    const I32x8 is_high = {0, 0, 0, 0, -1, -1, -1, -1};
    const U32x8 words = is_high ? high_words : low_words;
    const U32x8 shifts = {0, b, 2 * b, 3 * b, high, high + b, high + 2 * b, high + 3 * b};
    const I32x8 codes = reinterpret_cast<I32x8>((words >> shifts) & (L::levels - 1u));
    const F32x8 weights = (__builtin_convertvector(codes, F32x8) - zero) * scale;
    std::memcpy(out, &weights, sizeof weights);
}

// The first `count` codes of the unit at `p`, of which `bytes` bytes exist → codes[count]. Any format.
template <class L>
AMQ_INLINE void read_digits(const uint8_t* p, int64_t bytes, int64_t count, uint8_t* codes) {
    uint64_t value = 0;
    for (int64_t i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(p[i]) << 8 * i;
    for (int64_t i = 0; i < count; ++i, value /= L::levels) codes[i] = static_cast<uint8_t>(value % L::levels);
}

// IEEE fp16 bits → float32, exact for every value.
AMQ_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 0x1f, mantissa = half & 0x3ffu;
    uint32_t bits;
    if (exponent == 0) {  // zero or subnormal: mantissa · 2^-24, a normal float32 (no denormal arithmetic to flush)
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &magnitude, sizeof bits);
    } else {  // the exponent bias grows by 127 − 15; infinity and NaN keep an all-ones exponent
        bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    }
    bits |= sign;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// float32 → IEEE fp16 bits, to nearest, ties to even; beyond the range infinity, NaN stays NaN.
AMQ_INLINE uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {  // NaN
        half = 0x7e00u;
    } else if (magnitude >= 0x38800000u) {  // at least 2^-14, normal in fp16: a carry may reach the exponent, and infinity
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
        if (magnitude >= 0x477ff000u) half = 0x7c00u;
    } else {  // the sum's lowest bits are multiples of 2^-24, rounded by the processor
        float shifted;
        std::memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        std::memcpy(&half, &shifted, sizeof half);
        half -= 0x3f000000u;
    }
    return static_cast<uint16_t>(sign | half);
}

}  // namespace amq
