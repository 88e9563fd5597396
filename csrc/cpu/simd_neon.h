// 16 lanes in four NEON registers. `product` says how the processor multiplies bytes.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace amq {
namespace {

enum class Product {
    wide,      // eight products of 16 bits, whose sums take two more instructions
    signed_,   // DotProd: sums of four products of signed bytes
    unsigned_  // I8MM: of an unsigned and a signed one
};

template <Product product>
struct Neon {
    struct I32 {
        uint32x4_t v[4];
    };
    struct F32 {
        float32x4_t v[4];
    };
    static constexpr int kGemmTiles = 1, kGemmRows = 4;  // 16 of the 32 registers hold sums
    static constexpr bool kPairs = false, kLooksUp = false;

    template <class Each>
    static AMQ_INLINE I32 ints(const Each& each) {
        return {{each(0), each(1), each(2), each(3)}};
    }
    template <class Each>
    static AMQ_INLINE F32 floats(const Each& each) {
        return {{each(0), each(1), each(2), each(3)}};
    }

    static AMQ_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
    static AMQ_INLINE I32 load(const void* p) {
        const uint8_t* bytes = static_cast<const uint8_t*>(p);
        return ints([&](int i) __attribute__((always_inline)) { return vreinterpretq_u32_u8(vld1q_u8(bytes + 16 * i)); });
    }
    static AMQ_INLINE void store_int(void* p, I32 v) {
        for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, vreinterpretq_u8_u32(v.v[i]));
    }
    static AMQ_INLINE F32 load_float(const float* p) {
        return floats([&](int i) __attribute__((always_inline)) { return vld1q_f32(p + 4 * i); });
    }
    static AMQ_INLINE void store(float* p, F32 v) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.v[i]);
    }
    static AMQ_INLINE F32 load_half(const void* p) {
        return floats([&](int i) __attribute__((always_inline)) { return vcvt_f32_f16(vreinterpret_f16_u16(load_four(p, i))); });
    }
    static AMQ_INLINE void store_half(void* p, F32 v) {
        for (int i = 0; i < 4; ++i)
            vst1_u8(static_cast<uint8_t*>(p) + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(v.v[i])));
    }
    static AMQ_INLINE F32 load_bfloat(const void* p) {
        return floats([&](int i) __attribute__((always_inline)) {
            return vreinterpretq_f32_u32(vshll_n_u16(load_four(p, i), 16));
        });
    }
    // 16 bytes, one to a lane; the low and then the high halves of 8 bytes.
    static AMQ_INLINE I32 load_words(const void* p) { return widen(vld1q_u8(static_cast<const uint8_t*>(p))); }
    static AMQ_INLINE F32 load_bytes(const void* p) { return to_float(load_words(p)); }
    static AMQ_INLINE F32 load_nibbles(const void* p) {
        const uint8x8_t bytes = vld1_u8(static_cast<const uint8_t*>(p));
        return to_float(widen(vcombine_u8(vand_u8(bytes, vdup_n_u8(0x0f)), vshr_n_u8(bytes, 4))));
    }

    // Right by `count` bits, left where it is negative.
    template <int count>
    static AMQ_INLINE I32 shift(I32 v) {
        if constexpr (count > 0) return ints([&](int i) __attribute__((always_inline)) { return vshrq_n_u32(v.v[i], count); });
        if constexpr (count < 0) return ints([&](int i) __attribute__((always_inline)) { return vshlq_n_u32(v.v[i], -count); });
        return v;
    }
    static AMQ_INLINE I32 mask(I32 v, uint32_t bits) {
        const uint32x4_t wide = vdupq_n_u32(bits);
        return ints([&](int i) __attribute__((always_inline)) { return vandq_u32(v.v[i], wide); });
    }
    // (v & bits) | other
    static AMQ_INLINE I32 mask_or(I32 v, uint32_t bits, I32 other) {
        const uint32x4_t wide = vdupq_n_u32(bits);
        return ints([&](int i) __attribute__((always_inline)) { return vorrq_u32(vandq_u32(v.v[i], wide), other.v[i]); });
    }

    // sum + Σ over the four bytes of a lane, codes unsigned, the four at x signed and the same for every lane.
    template <int bits>
    static AMQ_INLINE I32 dot(I32 sum, I32 codes, const uint8_t* x) {
        uint32_t word;
        std::memcpy(&word, x, sizeof word);
        const int8x16_t values = vreinterpretq_s8_u32(vdupq_n_u32(word));
        if constexpr (product == Product::unsigned_) {
            return ints([&](int i) __attribute__((always_inline)) { return dot_unsigned(sum.v[i], codes.v[i], values); });
        } else if constexpr (bits < 8) {
            return ints([&](int i) __attribute__((always_inline)) { return dot_signed(sum.v[i], codes.v[i], values); });
        } else {  // code = 2 · (code / 2) + code % 2, of which both fit a signed byte
            const uint32x4_t ones = vdupq_n_u32(0x01010101), zero = vdupq_n_u32(0);
            return ints([&](int i) __attribute__((always_inline)) {
                const uint32x4_t half = vreinterpretq_u32_u8(vshrq_n_u8(vreinterpretq_u8_u32(codes.v[i]), 1));
                const uint32x4_t twice = vshlq_n_u32(dot_signed(zero, half, values), 1);
                return vaddq_u32(twice, dot_signed(sum.v[i], vandq_u32(codes.v[i], ones), values));
            });
        }
    }
    static AMQ_INLINE I32 add_int(I32 a, I32 b) {
        return ints([&](int i) __attribute__((always_inline)) { return vaddq_u32(a.v[i], b.v[i]); });
    }

    static AMQ_INLINE F32 to_float(I32 v) {
        return floats([&](int i) __attribute__((always_inline)) { return vcvtq_f32_s32(vreinterpretq_s32_u32(v.v[i])); });
    }
    // Byte j of every lane.
    template <int j>
    static AMQ_INLINE F32 byte_to_float(I32 v) {
        if constexpr (j == 3) return to_float(shift<24>(v));
        return to_float(mask(shift<8 * j>(v), 0xff));
    }
    // Bits 4j … 4j + 3 of every lane.
    template <int j>
    static AMQ_INLINE F32 nibble_to_float(I32 v) {
        return to_float(mask(shift<4 * j>(v), 0xf));
    }
    static AMQ_INLINE F32 splat(float v) {
        return floats([&](int) __attribute__((always_inline)) { return vdupq_n_f32(v); });
    }
    static AMQ_INLINE F32 add(F32 a, F32 b) {
        return floats([&](int i) __attribute__((always_inline)) { return vaddq_f32(a.v[i], b.v[i]); });
    }
    static AMQ_INLINE F32 sub(F32 a, F32 b) {
        return floats([&](int i) __attribute__((always_inline)) { return vsubq_f32(a.v[i], b.v[i]); });
    }
    static AMQ_INLINE F32 mul(F32 a, F32 b) {
        return floats([&](int i) __attribute__((always_inline)) { return vmulq_f32(a.v[i], b.v[i]); });
    }
    static AMQ_INLINE F32 div(F32 a, F32 b) {
        return floats([&](int i) __attribute__((always_inline)) { return vdivq_f32(a.v[i], b.v[i]); });
    }
    // b where either is NaN.
    static AMQ_INLINE F32 max(F32 a, F32 b) {
        return floats([&](int i) __attribute__((always_inline)) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
    }
    static AMQ_INLINE F32 min(F32 a, F32 b) {
        return floats([&](int i) __attribute__((always_inline)) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
    }
    static AMQ_INLINE I32 as_int(F32 v) {
        return ints([&](int i) __attribute__((always_inline)) { return vreinterpretq_u32_f32(v.v[i]); });
    }
    static AMQ_INLINE F32 as_float(I32 v) {
        return floats([&](int i) __attribute__((always_inline)) { return vreinterpretq_f32_u32(v.v[i]); });
    }
    static AMQ_INLINE F32 fma(F32 a, F32 b, F32 c) {  // a·b + c
        return floats([&](int i) __attribute__((always_inline)) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
    }
    static AMQ_INLINE F32 fnma(F32 a, F32 b, F32 c) {  // c − a·b
        return floats([&](int i) __attribute__((always_inline)) { return vfmsq_f32(c.v[i], a.v[i], b.v[i]); });
    }

private:
    static AMQ_INLINE uint16x4_t load_four(const void* p, int i) {
        return vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(p) + 8 * i));
    }
    static AMQ_INLINE I32 widen(uint8x16_t bytes) {
        const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
        return {{vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)),
                 vmovl_u16(vget_high_u16(high))}};
    }
    // Codes of at most 7 bits.
    static AMQ_INLINE uint32x4_t dot_signed(uint32x4_t sum, uint32x4_t codes, int8x16_t values) {
        const int8x16_t a = vreinterpretq_s8_u32(codes);
        int32x4_t total = vreinterpretq_s32_u32(sum);
        if constexpr (product == Product::wide) {
            const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(values)));
            const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, values));
            total = vaddq_s32(total, vpaddq_s32(low, high));
        }
#ifdef __ARM_FEATURE_DOTPROD
        else {
            total = vdotq_s32(total, a, values);
        }
#endif
        return vreinterpretq_u32_s32(total);
    }
    static AMQ_INLINE uint32x4_t dot_unsigned(uint32x4_t sum, uint32x4_t codes, int8x16_t values) {
#ifdef __ARM_FEATURE_MATMUL_INT8
        return vreinterpretq_u32_s32(vusdotq_s32(vreinterpretq_s32_u32(sum), vreinterpretq_u8_u32(codes), values));
#else
        return (void)codes, (void)values, sum;  // not instantiated: the file is built without I8MM
#endif
    }
};

}  // namespace
}  // namespace amq
