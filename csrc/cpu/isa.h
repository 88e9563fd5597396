// Instruction sets that kernels are compiled for; the best one that this processor has is chosen at each call.
//
// A kernel is a template whose body is inlined into one plain wrapper per instruction set, the wrapper carrying the
// compiler's `target` attribute. That keeps one translation unit and one set of flags, and, unlike `target_clones`,
// needs no ifunc support from the C library and lets tests run every variant.
//
// `avx2` includes FMA, which hardly a processor with AVX2 lacks; the compiler uses it only in files built with
// contraction, and dequantize.cpp is not.
//
// AVX-512 is not among them: built for it, dequantize wrote no faster than for AVX2 (both 30 to 41 GB/s to L2, where
// one core fills memory at 9 GB/s), and the divergence, at 37 instead of 47 µs per 49152 logits in L2, would save a
// search less than 1 % (Intel Xeon with AMX, GCC 12, November 2026).

#pragma once

#include <array>

#if defined(__x86_64__)
#define AMQ_TARGET_AVX2 __attribute__((target("avx2,fma")))
#else
#define AMQ_TARGET_AVX2  // compiled as the portable variant, and never offered: see `is_supported`
#endif

namespace amq {

enum class Isa { portable, avx2 };  // worst first

constexpr std::array<Isa, 2> kIsas = {Isa::portable, Isa::avx2};
constexpr std::array<const char*, 2> kIsaNames = {"portable", "avx2"};

inline const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

inline bool is_supported(Isa isa) {
#if defined(__x86_64__)
    return isa == Isa::portable || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#else
    return isa == Isa::portable;
#endif
}

inline Isa best_isa() {
    Isa best = Isa::portable;
    for (Isa isa : kIsas)
        if (is_supported(isa)) best = isa;
    return best;
}

}  // namespace amq
