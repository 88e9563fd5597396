// Instruction sets that kernels are compiled for; the best one that this processor has is chosen at each call, or the
// one that the environment variable AMQ_CPU_ISA names.
//
// Two ways to compile for one. Plain loops that the compiler vectorises (dequantize, divergence, prepare) are templates
// inlined into one wrapper per instruction set that carries the compiler's `target` attribute: one translation unit,
// one set of flags. Kernels written in intrinsics (linear) have one file per instruction set with flags of its own in
// CMakeLists.txt, because intrinsics cannot be inlined into a template that does not carry their target.
//
// The plain loops stop at AVX2: built for AVX-512, dequantize wrote no faster (both 30 to 41 GB/s to L2, where one core
// fills memory at 9 GB/s), and the divergence, at 37 instead of 47 µs per 49152 logits in L2, would save a search less
// than 1 % (Intel Xeon with AMX, GCC 12, November 2026).

#pragma once

#include <array>
#include <cstdint>

#if defined(__x86_64__)
#define AMQ_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define AMQ_TARGET_AVX2  // compiled as the portable variant, and never offered: see `missing_feature`
#endif

// What is compiled once per instruction set must be inlined into the function that names the set: a copy that the linker
// shares between files could hold instructions that the processor lacks.
#define AMQ_INLINE inline __attribute__((always_inline))

namespace amq {

// Worst first. `avx2` includes FMA and F16C, which hardly a processor with AVX2 lacks; `avx512` is F, BW, DQ and VL.
enum class Isa { portable, avx2, avx512, avx512vnni, amx };

constexpr std::array<Isa, 5> kIsas = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::amx};
constexpr std::array<const char*, 5> kIsaNames = {"portable", "avx2", "avx512", "avx512vnni", "amx"};

inline const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

// What this machine lacks for `isa`, nullptr if nothing. Asked once per process and instruction set.
const char* missing_feature(Isa isa);

inline bool is_supported(Isa isa) { return missing_feature(isa) == nullptr; }

// The best supported one, or what AMQ_CPU_ISA says; throws std::invalid_argument if that is unknown or unsupported.
Isa best_isa();

// Where a kernel has no variant above AVX2.
inline bool use_avx2(Isa isa) { return isa >= Isa::avx2; }

}  // namespace amq
