// Detection of what isa.h names.

#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amq {
namespace {

#if defined(__x86_64__)
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

const char* detect(Isa isa) {
    switch (isa) {
        case Isa::portable: return nullptr;
        case Isa::avx2:
            if (!__builtin_cpu_supports("avx2")) return "the processor has no AVX2";
            if (!__builtin_cpu_supports("fma")) return "the processor has no FMA";
            if (!__builtin_cpu_supports("f16c")) return "the processor has no F16C";
            return nullptr;
        case Isa::avx512:
            if (const char* reason = detect(Isa::avx2)) return reason;
            if (!__builtin_cpu_supports("avx512f")) return "the processor has no AVX-512F";
            if (!__builtin_cpu_supports("avx512bw")) return "the processor has no AVX-512BW";
            if (!__builtin_cpu_supports("avx512dq")) return "the processor has no AVX-512DQ";
            if (!__builtin_cpu_supports("avx512vl")) return "the processor has no AVX-512VL";
            return nullptr;
        case Isa::avx512vnni:
            if (const char* reason = detect(Isa::avx512)) return reason;
            return __builtin_cpu_supports("avx512vnni") ? nullptr : "the processor has no AVX-512 VNNI";
        case Isa::amx:
            if (const char* reason = detect(Isa::avx512vnni)) return reason;
            if (!cpuid_amx_int8()) return "the processor has no AMX-INT8";
            return amx_permitted() ? nullptr : "the operating system does not permit AMX";
    }
    return "unknown instruction set";
}
#else
const char* detect(Isa isa) { return isa == Isa::portable ? nullptr : "the processor is not x86-64"; }
#endif

std::string supported_names() {
    std::string names;
    for (Isa isa : kIsas)
        if (is_supported(isa)) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    return names;
}

Isa forced_or_best() {
    const char* forced = std::getenv("AMQ_CPU_ISA");
    Isa best = Isa::portable;
    for (Isa isa : kIsas) {
        if (forced && std::string(forced) == isa_name(isa)) {
            if (const char* reason = missing_feature(isa))
                throw std::invalid_argument(std::string("AMQ_CPU_ISA=") + forced + ": " + reason +
                                            "; this machine can run " + supported_names());
            return isa;
        }
        if (is_supported(isa)) best = isa;
    }
    if (forced && *forced)
        throw std::invalid_argument(std::string("AMQ_CPU_ISA=") + forced + ": expected one of " + supported_names());
    return best;
}

}  // namespace

const char* missing_feature(Isa isa) {
    static const std::array<const char*, kIsas.size()> reasons = [] {
        std::array<const char*, kIsas.size()> found{};
        for (Isa each : kIsas) found[static_cast<int>(each)] = detect(each);
        return found;
    }();
    return reasons[static_cast<int>(isa)];
}

Isa best_isa() {
    static const Isa best = forced_or_best();  // a throw leaves it unset, so that every call reports the mistake
    return best;
}

}  // namespace amq
