// The table of isa.h: a new instruction set is its row here, and the files that the row names.

#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace amq {

// Defined in linear_NAME.cpp, vector_NAME.cpp and quantize_NAME.cpp.
const LinearKernels* linear_kernels_portable();
const VectorKernels* vector_kernels_portable();
const QuantizeKernels* quantize_kernels_portable();
#if defined(__x86_64__)
const LinearKernels* linear_kernels_avx2();
const LinearKernels* linear_kernels_avxvnni();
const LinearKernels* linear_kernels_avx512();
const LinearKernels* linear_kernels_avx512vnni();
const LinearKernels* linear_kernels_amx();
const VectorKernels* vector_kernels_avx2();
const VectorKernels* vector_kernels_avx512();
const QuantizeKernels* quantize_kernels_avx2();
const QuantizeKernels* quantize_kernels_avx512();
#elif defined(__aarch64__)
const LinearKernels* linear_kernels_neon();
const LinearKernels* linear_kernels_dotprod();
const LinearKernels* linear_kernels_i8mm();
const VectorKernels* vector_kernels_neon();
const QuantizeKernels* quantize_kernels_neon();
#endif

namespace {

const char* detect_portable() { return nullptr; }

#if defined(__x86_64__)
const char* detect_avx2() {
    if (!__builtin_cpu_supports("avx2")) return "the processor has no AVX2";
    if (!__builtin_cpu_supports("fma")) return "the processor has no FMA";
    if (!__builtin_cpu_supports("f16c")) return "the processor has no F16C";
    return nullptr;
}

const char* detect_avxvnni() {
    if (const char* reason = detect_avx2()) return reason;
    unsigned a = 7, b = 0, c = 1, d = 0;  // leaf 7.1: EAX bit 4; a processor without the leaf answers 0
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return a >> 4 & 1 ? nullptr : "the processor has no AVX-VNNI";
}

const char* detect_avx512() {
    if (const char* reason = detect_avx2()) return reason;
    if (!__builtin_cpu_supports("avx512f")) return "the processor has no AVX-512F";
    if (!__builtin_cpu_supports("avx512bw")) return "the processor has no AVX-512BW";
    if (!__builtin_cpu_supports("avx512dq")) return "the processor has no AVX-512DQ";
    if (!__builtin_cpu_supports("avx512vl")) return "the processor has no AVX-512VL";
    return nullptr;
}

const char* detect_avx512vnni() {
    if (const char* reason = detect_avx512()) return reason;
    return __builtin_cpu_supports("avx512vnni") ? nullptr : "the processor has no AVX-512 VNNI";
}

// AMX registers are large; Linux hands them to a process that asks, once for all its later threads. Threads that exist
// already keep the answer of their process, since permission is per process.
bool amx_permitted() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool cpuid_amx_int8() {
    unsigned a = 7, b = 0, c = 0, d = 0;  // leaf 7: EDX bit 24 is AMX-TILE, bit 25 AMX-INT8
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (d >> 24 & 3) == 3;
}

const char* detect_amx() {
    if (const char* reason = detect_avx512vnni()) return reason;
    if (!cpuid_amx_int8()) return "the processor has no AMX-INT8";
    return amx_permitted() ? nullptr : "the operating system does not permit AMX";
}
#elif defined(__aarch64__)
// Whether the system says that the processor has a feature: Linux by a bit of a word, macOS by a name.
bool has_feature([[maybe_unused]] unsigned long word, [[maybe_unused]] unsigned long bit, [[maybe_unused]] const char* name) {
#if defined(__linux__)
    return getauxval(word) & bit;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#if !defined(__linux__)
constexpr unsigned long AT_HWCAP = 0, AT_HWCAP2 = 0, HWCAP_ASIMDDP = 0, HWCAP2_I8MM = 0;
#endif

const char* detect_dotprod() {
    const bool has = has_feature(AT_HWCAP, HWCAP_ASIMDDP, "hw.optional.arm.FEAT_DotProd");
    return has ? nullptr : "the processor has no DotProd";
}

const char* detect_i8mm() {
    if (const char* reason = detect_dotprod()) return reason;
    return has_feature(AT_HWCAP2, HWCAP2_I8MM, "hw.optional.arm.FEAT_I8MM") ? nullptr : "the processor has no I8MM";
}
#endif

std::string supported_names() {
    std::string names;
    for (const Isa& isa : isas())
        if (!missing_feature(isa)) names += (names.empty() ? "" : ", ") + std::string(isa.name);
    return names;
}

const Isa& forced_or_best() {
    const std::string forced = std::getenv("AMQ_CPU_ISA") ? std::getenv("AMQ_CPU_ISA") : "";
    const Isa* best = nullptr;
    for (const Isa& isa : isas()) {
        const char* reason = missing_feature(isa);
        if (forced == isa.name) {
            if (!reason) return isa;
            throw std::invalid_argument("AMQ_CPU_ISA=" + forced + ": " + reason + "; this machine can run " +
                                        supported_names());
        }
        if (!reason) best = &isa;
    }
    if (!forced.empty())
        throw std::invalid_argument("AMQ_CPU_ISA=" + forced + ": expected one of " + supported_names());
    return *best;  // the first row runs everywhere
}

}  // namespace

const std::vector<Isa>& isas() {
    // `avx2` includes FMA and F16C, which hardly a processor with AVX2 lacks; `avx512` is F, BW, DQ and VL.
    static const std::vector<Isa> rows = {
        {"portable", detect_portable, linear_kernels_portable, vector_kernels_portable, quantize_kernels_portable, false},
#if defined(__x86_64__)
        {"avx2", detect_avx2, linear_kernels_avx2, vector_kernels_avx2, quantize_kernels_avx2, true},
        {"avxvnni", detect_avxvnni, linear_kernels_avxvnni, vector_kernels_avx2, quantize_kernels_avx2, true},
        {"avx512", detect_avx512, linear_kernels_avx512, vector_kernels_avx512, quantize_kernels_avx512, true},
        {"avx512vnni", detect_avx512vnni, linear_kernels_avx512vnni, vector_kernels_avx512, quantize_kernels_avx512, true},
        {"amx", detect_amx, linear_kernels_amx, vector_kernels_avx512, quantize_kernels_avx512, true},
#elif defined(__aarch64__)
        {"neon", detect_portable, linear_kernels_neon, vector_kernels_neon, quantize_kernels_neon, false},
        {"dotprod", detect_dotprod, linear_kernels_dotprod, vector_kernels_neon, quantize_kernels_neon, false},
        {"i8mm", detect_i8mm, linear_kernels_i8mm, vector_kernels_neon, quantize_kernels_neon, false},
#endif
    };
    return rows;
}

const char* missing_feature(const Isa& isa) {
    static const std::vector<const char*> reasons = [] {
        std::vector<const char*> found;
        for (const Isa& each : isas()) found.push_back(each.detect());
        return found;
    }();
    return reasons[&isa - isas().data()];
}

const Isa& best_isa() {
    static const Isa& best = forced_or_best();  // a throw leaves it unset, so that every call reports the mistake
    return best;
}

}  // namespace amq
