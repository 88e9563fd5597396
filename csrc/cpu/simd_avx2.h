// 16 lanes in two AVX2 registers. `Vnni` says whether the processor multiplies bytes in one instruction (AVX-VNNI).

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace amq {
namespace {

template <bool vnni>
struct Avx2 {
    struct I32 {
        __m256i low, high;
    };
    struct F32 {
        __m256 low, high;
    };
    static constexpr int kGemmTiles = 1, kGemmRows = 4;  // 8 of the 16 registers hold sums
    static constexpr bool kPairs = !vnni, kLooksUp = true;

    static AMQ_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    static AMQ_INLINE I32 load(const void* p) {
        const __m256i* halves = static_cast<const __m256i*>(p);
        return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
    }
    static AMQ_INLINE void store_int(void* p, I32 v) {
        __m256i* halves = static_cast<__m256i*>(p);
        _mm256_storeu_si256(halves, v.low);
        _mm256_storeu_si256(halves + 1, v.high);
    }
    static AMQ_INLINE F32 load_float(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static AMQ_INLINE void store(float* p, F32 v) {
        _mm256_storeu_ps(p, v.low);
        _mm256_storeu_ps(p + 8, v.high);
    }
    static AMQ_INLINE F32 load_half(const void* p) {
        const __m128i* halves = static_cast<const __m128i*>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    }

    // 16 bytes, one to a lane; the low and then the high halves of 8 bytes.
    static AMQ_INLINE I32 load_words(const void* p) { return widen_bytes(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
    static AMQ_INLINE F32 load_bytes(const void* p) { return to_float(load_words(p)); }
    static AMQ_INLINE F32 load_nibbles(const void* p) {
        const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
        const __m128i both = _mm_unpacklo_epi64(bytes, _mm_srli_epi16(bytes, 4));
        return to_float(widen_bytes(_mm_and_si128(both, _mm_set1_epi8(0x0f))));
    }
    static AMQ_INLINE F32 load_bfloat(const void* p) {
        const __m128i* halves = static_cast<const __m128i*>(p);
        return {widen_bfloat(_mm_loadu_si128(halves)), widen_bfloat(_mm_loadu_si128(halves + 1))};
    }
    static AMQ_INLINE void store_half(void* p, F32 v) {
        __m128i* halves = static_cast<__m128i*>(p);
        _mm_storeu_si128(halves, _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
    }

    // Right by `count` bits, left where it is negative.
    template <int count>
    static AMQ_INLINE I32 shift(I32 v) {
        if constexpr (count > 0) return {_mm256_srli_epi32(v.low, count), _mm256_srli_epi32(v.high, count)};
        if constexpr (count < 0) return {_mm256_slli_epi32(v.low, -count), _mm256_slli_epi32(v.high, -count)};
        return v;
    }
    static AMQ_INLINE I32 mask(I32 v, uint32_t bits) {
        const __m256i wide = _mm256_set1_epi32(bits);
        return {_mm256_and_si256(v.low, wide), _mm256_and_si256(v.high, wide)};
    }
    // (v & bits) | other
    static AMQ_INLINE I32 mask_or(I32 v, uint32_t bits, I32 other) {
        v = mask(v, bits);
        return {_mm256_or_si256(v.low, other.low), _mm256_or_si256(v.high, other.high)};
    }

    // sum + Σ over the four bytes of a lane, codes unsigned, the four at x signed and the same for every lane.
    template <int bits>
    static AMQ_INLINE I32 dot(I32 sum, I32 codes, const uint8_t* x) {
        int32_t word;
        std::memcpy(&word, x, sizeof word);
        const __m256i values = _mm256_set1_epi32(word);
        if constexpr (vnni) return dot_vnni(sum, codes, values);
        // Pairs of products must fit 16 bits: wide codes go in two halves.
        if constexpr (2 * 127 * ((1 << bits) - 1) > INT16_MAX) {
            const I32 high = mask(shift<4>(codes), 0x0f0f0f0f);
            codes = mask(codes, 0x0f0f0f0f);
            sum = add_int(sum, pairs(high, values, 16));
        }
        return add_int(sum, pairs(codes, values, 1));
    }
    // As dot, sums of two products each in 16 bits, which must fit; then sum + factor · those / 2^right.
    static AMQ_INLINE I32 add_pairs(I32 pairs, I32 codes, const uint8_t* x) {
        int32_t word;
        std::memcpy(&word, x, sizeof word);
        const __m256i values = _mm256_set1_epi32(word);
        pairs.low = _mm256_add_epi16(pairs.low, _mm256_maddubs_epi16(codes.low, values));
        pairs.high = _mm256_add_epi16(pairs.high, _mm256_maddubs_epi16(codes.high, values));
        asm("" : "+x"(pairs.low), "+x"(pairs.high));  // or GCC adds products of several steps first, and spills them
        return pairs;
    }
    template <int factor, int right = 0>
    static AMQ_INLINE I32 add_widened(I32 sum, I32 pairs) {
        const __m256i factors = _mm256_set1_epi16(factor);
        return add_int(sum, {_mm256_srai_epi32(_mm256_madd_epi16(pairs.low, factors), right),
                             _mm256_srai_epi32(_mm256_madd_epi16(pairs.high, factors), right)});
    }
    // Byte i ← table[byte i of `index`], which is below 16.
    static AMQ_INLINE I32 look_up(const uint8_t (&table)[16], I32 index) {
        const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        return {_mm256_shuffle_epi8(both, index.low), _mm256_shuffle_epi8(both, index.high)};
    }
    static AMQ_INLINE I32 add_int(I32 a, I32 b) {
        return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
    }

    static AMQ_INLINE F32 to_float(I32 v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
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
    static AMQ_INLINE F32 splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static AMQ_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static AMQ_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static AMQ_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static AMQ_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
    // b where either is NaN.
    static AMQ_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static AMQ_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
    static AMQ_INLINE I32 as_int(F32 v) { return {_mm256_castps_si256(v.low), _mm256_castps_si256(v.high)}; }
    static AMQ_INLINE F32 as_float(I32 v) { return {_mm256_castsi256_ps(v.low), _mm256_castsi256_ps(v.high)}; }
    static AMQ_INLINE F32 fma(F32 a, F32 b, F32 c) {  // a·b + c
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static AMQ_INLINE F32 fnma(F32 a, F32 b, F32 c) {  // c − a·b
        return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
    }

private:
    static AMQ_INLINE I32 dot_vnni(I32 sum, I32 codes, __m256i values) {
#ifdef __AVXVNNI__
        sum.low = _mm256_dpbusd_avx_epi32(sum.low, codes.low, values);
        sum.high = _mm256_dpbusd_avx_epi32(sum.high, codes.high, values);
        asm("" : "+x"(sum.low), "+x"(sum.high));  // or GCC copies every sum in every step
        return sum;
#else
        return (void)codes, (void)values, sum;  // not instantiated: the file is built without AVX-VNNI
#endif
    }
    static AMQ_INLINE I32 widen_bytes(__m128i bytes) {
        return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
    }
    static AMQ_INLINE __m256 widen_bfloat(__m128i halves) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static AMQ_INLINE __m256i pairs(__m256i codes, __m256i values, int16_t factor) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, values), _mm256_set1_epi16(factor));
    }
    static AMQ_INLINE I32 pairs(I32 codes, __m256i values, int16_t factor) {
        return {pairs(codes.low, values, factor), pairs(codes.high, values, factor)};
    }
};

}  // namespace
}  // namespace amq
