// Checks of arguments from Python for the bindings in module.cpp; pybind11 turns what they throw into ValueError.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace amq {

inline Isa find_isa(const std::string& name) {
    if (name.empty()) return best_isa();
    for (Isa isa : kIsas)
        if (isa_name(isa) == name && is_supported(isa)) return isa;
    throw std::invalid_argument("isa: expected one of isas(), got '" + name + "'");
}

inline void require(bool holds, const char* argument, const std::string& expected, int64_t got) {
    if (!holds)
        throw std::invalid_argument(std::string(argument) + ": expected " + expected + ", got " + std::to_string(got));
}

}  // namespace amq
