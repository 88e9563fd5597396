// Instruction sets that kernels are compiled for, one row of a table each (isa.cpp). The last row that this processor can
// run is taken at each call, or the one that the environment variable AMQ_CPU_ISA names.
//
// Two ways to compile for one. Plain loops that the compiler vectorises (dequantize, divergence, prepare) are templates
// inlined into one wrapper per instruction set that carries the compiler's `target` attribute: one translation unit,
// one set of flags. Kernels written in intrinsics (linear, vector, quantize) have one file per instruction set with flags of its own
// in CMakeLists.txt, because intrinsics cannot be inlined into a template that does not carry their target.
//
// The plain loops know portable code, which is what the architecture's baseline has, and AVX2. Built for AVX-512,
// dequantize wrote no faster (both 30 to 41 GB/s to L2, where one core fills memory at 9 GB/s), and the divergence, at 37
// instead of 47 µs per 49152 logits in L2, would save a search less than 1 % (Intel Xeon with AMX, GCC 12, November 2026).

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#if defined(__x86_64__)
#define AMQ_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define AMQ_TARGET_AVX2  // compiled as the portable variant, and never used: no row asks for it
#endif

// What is compiled once per instruction set must be inlined into the function that names the set: a copy that the linker
// shares between files could hold instructions that the processor lacks.
#define AMQ_INLINE inline __attribute__((always_inline))

namespace amq {

struct LinearKernels;
struct QuantizeKernels;
struct VectorKernels;

struct Isa {
    const char* name;
    const char* (*detect)();           // what this machine lacks for it, nullptr if nothing
    const LinearKernels* (*linear)();  // linear.h: for each compiled format, in the order of amq_formats.h
    const VectorKernels* (*vector)();  // vector.h
    const QuantizeKernels* (*quantize)();  // quantize.h
    bool avx2_loops;                   // which variant of the plain loops
};

// All that are compiled in, worst first.
const std::vector<Isa>& isas();

// What `detect` of one of `isas` says; asked once per process.
const char* missing_feature(const Isa& isa);

// The last row that this machine can run, or what AMQ_CPU_ISA says; throws std::invalid_argument if that is unknown or
// unsupported.
const Isa& best_isa();

}  // namespace amq
