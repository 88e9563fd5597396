// 16 lanes in one AVX-512 register. `Vnni` says whether the processor multiplies bytes in one instruction.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace amq {
namespace {

template <bool vnni>
struct Avx512 {
    using I32 = __m512i;
    using F32 = __m512;
    static constexpr int kGemmTiles = 2, kGemmRows = 8;  // 16 sums in flight hide the latency of either multiplication
    static constexpr bool kPairs = !vnni, kLooksUp = false;

    static AMQ_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    static AMQ_INLINE I32 load(const void* p) { return _mm512_loadu_si512(p); }
    static AMQ_INLINE void store_int(void* p, I32 v) { _mm512_storeu_si512(p, v); }
    static AMQ_INLINE F32 load_float(const float* p) { return _mm512_loadu_ps(p); }
    static AMQ_INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
    static AMQ_INLINE F32 load_half(const void* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    }

    // 16 bytes, one to a lane; the low and then the high halves of 8 bytes.
    static AMQ_INLINE I32 load_words(const void* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static AMQ_INLINE F32 load_bytes(const void* p) { return _mm512_cvtepi32_ps(load_words(p)); }
    static AMQ_INLINE F32 load_nibbles(const void* p) {
        const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
        const __m128i both = _mm_unpacklo_epi64(bytes, _mm_srli_epi16(bytes, 4));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(both, _mm_set1_epi8(0x0f))));
    }
    static AMQ_INLINE F32 load_bfloat(const void* p) {
        const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static AMQ_INLINE void store_half(void* p, F32 v) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }

    // Right by `count` bits, left where it is negative.
    template <int count>
    static AMQ_INLINE I32 shift(I32 v) {
        if constexpr (count > 0) return _mm512_srli_epi32(v, count);
        if constexpr (count < 0) return _mm512_slli_epi32(v, -count);
        return v;
    }
    static AMQ_INLINE I32 mask(I32 v, uint32_t bits) { return _mm512_and_si512(v, _mm512_set1_epi32(bits)); }
    // (v & bits) | other
    static AMQ_INLINE I32 mask_or(I32 v, uint32_t bits, I32 other) {
        return _mm512_ternarylogic_epi32(v, _mm512_set1_epi32(bits), other, 0xEA);
    }

    // sum + Σ over the four bytes of a lane, codes unsigned, the four at x signed and the same for every lane.
    template <int bits>
    static AMQ_INLINE I32 dot(I32 sum, I32 codes, const uint8_t* x) {
        int32_t word;
        std::memcpy(&word, x, sizeof word);
        const I32 values = _mm512_set1_epi32(word);
        if constexpr (vnni) return dot_vnni(sum, codes, values);
        // Pairs of products must fit 16 bits: wide codes go in two halves.
        if constexpr (2 * 127 * ((1 << bits) - 1) > INT16_MAX) {
            const I32 low = _mm512_maddubs_epi16(mask(codes, 0x0f0f0f0f), values);
            const I32 high = _mm512_maddubs_epi16(mask(shift<4>(codes), 0x0f0f0f0f), values);
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
            return _mm512_add_epi32(sum, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
        }
        return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, values), _mm512_set1_epi16(1)));
    }
    // As dot, sums of two products each in 16 bits, which must fit; then sum + factor · those / 2^right.
    static AMQ_INLINE I32 add_pairs(I32 pairs, I32 codes, const uint8_t* x) {
        int32_t word;
        std::memcpy(&word, x, sizeof word);
        pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes, _mm512_set1_epi32(word)));
        asm("" : "+v"(pairs));  // or GCC adds products of several steps first, and spills them
        return pairs;
    }
    template <int factor, int right = 0>
    static AMQ_INLINE I32 add_widened(I32 sum, I32 pairs) {
        return _mm512_add_epi32(sum, _mm512_srai_epi32(_mm512_madd_epi16(pairs, _mm512_set1_epi16(factor)), right));
    }
    static AMQ_INLINE I32 add_int(I32 a, I32 b) { return _mm512_add_epi32(a, b); }

    static AMQ_INLINE F32 to_float(I32 v) { return _mm512_cvtepi32_ps(v); }
    // Byte j of every lane.
    template <int j>
    static AMQ_INLINE F32 byte_to_float(I32 v) {
        if constexpr (j == 3) return to_float(shift<24>(v));
        return to_float(mask(shift<8 * j>(v), 0xff));
    }
    // Bits 4j … 4j + 3 of every lane: a permutation looks at no others.
    template <int j>
    static AMQ_INLINE F32 nibble_to_float(I32 v) {
        const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(shift<4 * j>(v), numbers);
    }
    static AMQ_INLINE F32 splat(float v) { return _mm512_set1_ps(v); }
    static AMQ_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
    static AMQ_INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
    static AMQ_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
    static AMQ_INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
    // b where either is NaN.
    static AMQ_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
    static AMQ_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
    static AMQ_INLINE I32 as_int(F32 v) { return _mm512_castps_si512(v); }
    static AMQ_INLINE F32 as_float(I32 v) { return _mm512_castsi512_ps(v); }
    static AMQ_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }    // a·b + c
    static AMQ_INLINE F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }  // c − a·b

private:
    static AMQ_INLINE I32 dot_vnni(I32 sum, I32 codes, I32 values) {
#ifdef __AVX512VNNI__
        sum = _mm512_dpbusd_epi32(sum, codes, values);
        asm("" : "+v"(sum));  // or GCC copies sums in every step
        return sum;
#else
        return (void)codes, (void)values, sum;  // not instantiated: the file is built without VNNI
#endif
    }
};

}  // namespace
}  // namespace amq
