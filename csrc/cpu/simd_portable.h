// 16 lanes in the compiler's generic vectors, which it splits into what the processor has: any architecture.

#pragma once

#include <cstdint>
#include <cstring>

#include "unit.h"

namespace amq {
namespace {

struct Portable {
    using I32 = uint32_t __attribute__((vector_size(64)));
    using F32 = float __attribute__((vector_size(64)));
    using Signed = int32_t __attribute__((vector_size(64)));
    static constexpr int kGemmTiles = 1, kGemmRows = 4;
    static constexpr bool kPairs = false, kLooksUp = false;

    static AMQ_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
    static AMQ_INLINE I32 load(const void* p) {
        I32 v;
        std::memcpy(&v, p, sizeof v);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "lanes are little-endian words"
#endif
        return v;
    }
    static AMQ_INLINE void store_int(void* p, I32 v) { std::memcpy(p, &v, sizeof v); }
    static AMQ_INLINE F32 load_float(const float* p) {
        F32 v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static AMQ_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }
    static AMQ_INLINE F32 load_half(const void* p) {
        uint16_t halves[16];
        float values[16];
        std::memcpy(halves, p, sizeof halves);
        for (int i = 0; i < 16; ++i) values[i] = half_to_float(halves[i]);
        return load_float(values);
    }

    // 16 bytes, one to a lane; the low and then the high halves of 8 bytes.
    static AMQ_INLINE I32 load_words(const void* p) {
        uint8_t bytes[16];
        I32 words{};
        std::memcpy(bytes, p, sizeof bytes);
        for (int i = 0; i < 16; ++i) words[i] = bytes[i];
        return words;
    }
    static AMQ_INLINE F32 load_bytes(const void* p) { return to_float(load_words(p)); }
    static AMQ_INLINE F32 load_nibbles(const void* p) {
        uint8_t bytes[8];
        I32 words{};
        std::memcpy(bytes, p, sizeof bytes);
        for (int i = 0; i < 16; ++i) words[i] = bytes[i % 8] >> (i < 8 ? 0 : 4) & 0xf;
        return to_float(words);
    }
    static AMQ_INLINE F32 load_bfloat(const void* p) {
        uint16_t halves[16];
        I32 words;
        std::memcpy(halves, p, sizeof halves);
        for (int i = 0; i < 16; ++i) words[i] = static_cast<uint32_t>(halves[i]) << 16;
        return as_float(words);
    }
    static AMQ_INLINE void store_half(void* p, F32 v) {
        uint16_t halves[16];
        for (int i = 0; i < 16; ++i) halves[i] = float_to_half(v[i]);
        std::memcpy(p, halves, sizeof halves);
    }

    // Right by `count` bits, left where it is negative.
    template <int count>
    static AMQ_INLINE I32 shift(I32 v) {
        if constexpr (count > 0) return v >> count;
        if constexpr (count < 0) return v << -count;
        return v;
    }
    static AMQ_INLINE I32 mask(I32 v, uint32_t bits) { return v & bits; }
    static AMQ_INLINE I32 mask_or(I32 v, uint32_t bits, I32 other) { return (v & bits) | other; }

    // sum + Σ over the four bytes of a lane, codes unsigned, the four at x signed and the same for every lane.
    template <int bits>
    static AMQ_INLINE I32 dot(I32 sum, I32 codes, const uint8_t* x) {
        int8_t values[4];
        std::memcpy(values, x, sizeof values);
        for (int j = 0; j < 4; ++j) sum += (codes >> (8 * j) & 0xffu) * static_cast<uint32_t>(values[j]);
        return sum;
    }
    static AMQ_INLINE I32 add_int(I32 a, I32 b) { return a + b; }

    static AMQ_INLINE F32 to_float(I32 v) { return __builtin_convertvector(reinterpret_cast<Signed>(v), F32); }
    // Byte j of every lane.
    template <int j>
    static AMQ_INLINE F32 byte_to_float(I32 v) {
        return to_float(v >> (8 * j) & 0xffu);
    }
    // Bits 4j … 4j + 3 of every lane.
    template <int j>
    static AMQ_INLINE F32 nibble_to_float(I32 v) {
        return to_float(mask(shift<4 * j>(v), 0xf));
    }
    static AMQ_INLINE F32 splat(float v) { return F32{} + v; }
    static AMQ_INLINE F32 add(F32 a, F32 b) { return a + b; }
    static AMQ_INLINE F32 sub(F32 a, F32 b) { return a - b; }
    static AMQ_INLINE F32 mul(F32 a, F32 b) { return a * b; }
    static AMQ_INLINE F32 div(F32 a, F32 b) { return a / b; }
    static AMQ_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }  // b where either is NaN
    static AMQ_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
    static AMQ_INLINE I32 as_int(F32 v) { return reinterpret_cast<I32>(v); }
    static AMQ_INLINE F32 as_float(I32 v) { return reinterpret_cast<F32>(v); }
    static AMQ_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }   // a·b + c, fused where the processor does it
    static AMQ_INLINE F32 fnma(F32 a, F32 b, F32 c) { return c - a * b; }  // c − a·b
};

}  // namespace
}  // namespace amq
