// Bindings of the entropy coder (cpu/coder.h): what module.cpp says holds here too. Codes and levels are looked at before
// the coder sees them, for they choose addresses; amq/split/coder.py has refused wrong ones before, by name.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/coder.h"
#include "modules.h"

namespace py = pybind11;
using amq::exact_address_of;
using amq::Memory;
using amq::product;
using amq::require;
using amq::require_size;

namespace {

std::string possible_levels() { return "1 to " + std::to_string(amq::kMostLevels); }

// Where a tensor is empty it may have no address.
template <class T>
T* array(const Memory& memory, const char* name, int64_t count) {
    const int64_t bytes = product({count, static_cast<int64_t>(sizeof(T))}, name);
    return bytes ? exact_address_of<T>(memory, name, bytes) : nullptr;
}

amq::CoderArgs checked(const Memory& levels, int64_t channels, int64_t tokens) {
    require_size(channels, "channels", 0);
    require_size(tokens, "tokens", 0);
    require_size(product({channels, tokens}, "codes"), "codes", 0);
    const int32_t* const given = array<int32_t>(levels, "levels", channels);
    for (int64_t c = 0; c < channels; ++c)
        require(given[c] >= 1 && given[c] <= amq::kMostLevels, "levels", possible_levels(), given[c]);
    return {given, nullptr, nullptr, channels, tokens};
}

amq::CoderArgs checked(const Memory& levels, const Memory& center, const Memory& scale, int64_t channels, int64_t tokens) {
    amq::CoderArgs args = checked(levels, channels, tokens);
    args.center = array<uint8_t>(center, "center", channels);
    args.scale = array<uint8_t>(scale, "scale", channels);
    return args;
}

const uint8_t* checked_codes(const amq::CoderArgs& args, const Memory& codes) {
    const uint8_t* const given = array<uint8_t>(codes, "codes", args.channels * args.tokens);
    for (int64_t c = 0; c < args.channels && args.tokens > 0; ++c) {
        const uint8_t* const row = given + c * args.tokens;
        const int largest = *std::max_element(row, row + args.tokens);
        require(largest < args.levels[c], "codes", "less than " + std::to_string(args.levels[c]), largest);
    }
    return given;
}

std::vector<uint32_t> powers() {
    std::vector<uint32_t> out(256);
    amq::powers(out.data());
    return out;
}

std::vector<uint32_t> frequencies(int64_t levels, int64_t center, int64_t scale) {
    require(levels >= 1 && levels <= amq::kMostLevels, "levels", possible_levels(), levels);
    require(center >= 0 && center <= UINT8_MAX, "center", "a byte", center);
    require(scale >= 0 && scale <= UINT8_MAX, "scale", "a byte", scale);
    std::vector<uint32_t> out(levels);
    amq::frequencies(static_cast<int>(levels), static_cast<int>(center), static_cast<int>(scale), out.data());
    return out;
}

// What was written lies from the returned place to the end of `out`.
int64_t encode(const Memory& codes, const Memory& levels, const Memory& center, const Memory& scale, const Memory& out,
               int64_t channels, int64_t tokens) {
    const amq::CoderArgs args = checked(levels, center, scale, channels, tokens);
    const uint8_t* const given = checked_codes(args, codes);
    const int64_t capacity = std::get<1>(out);
    uint8_t* const to = exact_address_of<uint8_t>(out, "out", capacity);
    int64_t begin = 0;
    {
        py::gil_scoped_release release;
        begin = amq::encode(args, given, to, capacity);
    }
    require(begin >= 0, "out", "memory for two bytes per code and more", capacity);
    return begin;
}

// 0, or which of amq::Coded is wrong.
int decode(const Memory& data, const Memory& levels, const Memory& center, const Memory& scale, const Memory& codes,
           int64_t channels, int64_t tokens) {
    const amq::CoderArgs args = checked(levels, center, scale, channels, tokens);
    uint8_t* const to = array<uint8_t>(codes, "codes", args.channels * args.tokens);
    const int64_t size = std::get<1>(data);
    const uint8_t* const from = array<uint8_t>(data, "data", size);
    py::gil_scoped_release release;
    return static_cast<int>(amq::decode(args, from, size, to));
}

void fit(const Memory& codes, const Memory& levels, const Memory& center, const Memory& scale, int64_t channels,
         int64_t tokens) {
    const amq::CoderArgs args = checked(levels, channels, tokens);
    const uint8_t* const given = checked_codes(args, codes);
    uint8_t* const to_center = array<uint8_t>(center, "center", channels);
    uint8_t* const to_scale = array<uint8_t>(scale, "scale", channels);
    py::gil_scoped_release release;
    amq::fit(args, given, to_center, to_scale);
}

}  // namespace

void bind_coder(py::module_& m) {
    m.def("coder_powers", &powers, "2^(-i/256), 30 fraction bits: what tables of frequencies are made of");
    m.def("coder_frequencies", &frequencies, py::arg("levels"), py::arg("center"), py::arg("scale"),
          "What a channel's codes weigh, of 2^16");
    m.def("coder_encode", &encode, py::kw_only(), py::arg("codes"), py::arg("levels"), py::arg("center"),
          py::arg("scale"), py::arg("out"), py::arg("channels"), py::arg("tokens"),
          "Codes -> where the coded bytes begin in `out`; see csrc/cpu/coder.h");
    m.def("coder_decode", &decode, py::kw_only(), py::arg("data"), py::arg("levels"), py::arg("center"),
          py::arg("scale"), py::arg("codes"), py::arg("channels"), py::arg("tokens"),
          "Coded bytes -> codes; 0, or the fault of the bytes");
    m.def("coder_fit", &fit, py::kw_only(), py::arg("codes"), py::arg("levels"), py::arg("center"), py::arg("scale"),
          py::arg("channels"), py::arg("tokens"), "Codes -> the two bytes of each channel's model");
}
