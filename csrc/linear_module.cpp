// Bindings of the linear kernels: what module.cpp says holds here too.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

#include "amq_formats.h"
#include "checks.h"
#include "cpu/bandwidth.h"
#include "cpu/linear.h"
#include "cpu/prepare.h"
#include "modules.h"

namespace py = pybind11;
using amq::address_of;
using amq::exact_address_of;
using amq::find_isa;
using amq::Memory;
using amq::require;
using amq::require_size;
using amq::require_threads;
using amq::strided_bytes;

namespace {

int find_tiled_format(const std::string& name) {
    static const char* const names[] = {
#define AMQ_NAME(name, levels, unit_codes, unit_bytes) #name,
        AMQ_FORMATS(AMQ_NAME)
#undef AMQ_NAME
    };
    int index = 0;
    for (const char* known : names) {
        if (name == known && amq::tile_bits(index) > 0) return index;
        ++index;
    }
    throw std::invalid_argument("format: expected a compiled dense bitstream, got '" + name + "'");
}

void check_sizes(int64_t in_features, int64_t group_size, int threads) {
    require_size(in_features, "in_features", 1);
    require(group_size >= amq::kBlock && group_size <= amq::kMaxGroup && group_size % amq::kBlock == 0, "group_size",
            "a multiple of " + std::to_string(amq::kBlock) + " up to " + std::to_string(amq::kMaxGroup), group_size);
    require_threads(threads);
}

int64_t prepared_bytes(const std::string& format, int64_t rows, int64_t in_features, int64_t group_size) {
    check_sizes(in_features, group_size, 1);
    require_size(rows, "rows", 0);
    return amq::prepared_bytes(amq::tile_bits(find_tiled_format(format)), rows, in_features, group_size);
}

void prepare(const std::string& format, const Memory& qweight, const Memory& scale, const Memory& zero_point,
             const Memory& out, int64_t qweight_stride, int64_t group_stride, int64_t rows, int64_t in_features,
             int64_t group_size, int threads, const std::string& isa_name) {
    const int index = find_tiled_format(format), bits = amq::tile_bits(index);
    const amq::Isa& isa = find_isa(isa_name);
    check_sizes(in_features, group_size, threads);
    require_size(rows, "rows", 0);
    if (rows == 0) return;
    const int64_t row_bytes = amq::ceil_div(in_features * bits, 8), groups = amq::ceil_div(in_features, group_size);
    const int64_t expected = amq::prepared_bytes(bits, rows, in_features, group_size);
    require(qweight_stride >= row_bytes, "qweight_stride", "at least " + std::to_string(row_bytes), qweight_stride);
    require(group_stride >= groups, "group_stride", "at least " + std::to_string(groups), group_stride);
    const int64_t group_bytes = strided_bytes(rows, groups, group_stride, 2, "scale");
    const amq::PrepareArgs args = {
        address_of<uint8_t>(qweight, "qweight", strided_bytes(rows, row_bytes, qweight_stride, 1, "qweight")),
        address_of<uint16_t>(scale, "scale", group_bytes),
        address_of<uint16_t>(zero_point, "zero_point", group_bytes),
        exact_address_of<uint8_t>(out, "out", expected),
        qweight_stride, group_stride, rows, in_features, group_size};
    py::gil_scoped_release release;
    amq::prepare(index, isa, args, threads);
}

// Checks everything that the kernels rely on; an empty `parts` of the result means that there is nothing to compute.
amq::LinearCall make_call(const std::vector<Part>& parts, const Memory& x, const Memory& bias, const Memory& y,
                          int64_t rows, int64_t in_features, int64_t group_size, int64_t x_stride, int64_t y_stride,
                          bool int8, int threads, bool rotated) {
    check_sizes(in_features, group_size, threads);
    amq::require_rotation(rotated, in_features);
    require_size(rows, "rows", 0);
    amq::LinearCall call;
    int64_t columns = 0;
    const auto* first_bias = reinterpret_cast<const float*>(std::get<0>(bias));
    for (const Part& weight : parts) {
        amq::LinearPart part = checked_part(weight, in_features, group_size);
        part.bias = first_bias ? first_bias + columns : nullptr;
        columns = require_size(columns + part.out_features, "columns of y", 0);
        if (part.out_features > 0 && rows > 0) call.parts.push_back(part);
    }
    if (call.parts.empty()) return call;
    require(rows == 1 || x_stride >= in_features, "x_stride", "at least " + std::to_string(in_features), x_stride);
    require(rows == 1 || y_stride >= columns, "y_stride", "at least " + std::to_string(columns), y_stride);
    call.x = address_of<float>(x, "x", strided_bytes(rows, in_features, x_stride, 4, "x"));
    if (bias != Memory{0, 0}) exact_address_of<float>(bias, "bias", columns * 4);
    call.y = address_of<float>(y, "y", strided_bytes(rows, columns, y_stride, 4, "y"));
    call.rows = rows;
    call.in_features = in_features;
    call.group_size = group_size;
    call.x_stride = x_stride;
    call.y_stride = y_stride;
    call.mode = int8 ? amq::Mode::int8 : amq::Mode::fp32;
    call.rotated = rotated;
    return call;
}

void linear(const std::vector<Part>& parts, const Memory& x, const Memory& bias, const Memory& y, int64_t rows,
            int64_t in_features, int64_t group_size, int64_t x_stride, int64_t y_stride, bool int8, int threads,
            const std::string& isa_name, bool rotated) {
    const amq::Isa& isa = find_isa(isa_name);
    const amq::LinearCall call =
        make_call(parts, x, bias, y, rows, in_features, group_size, x_stride, y_stride, int8, threads, rotated);
    if (call.parts.empty()) return;
    py::gil_scoped_release release;
    amq::linear(call, isa, threads);
}

// One call per part, all into the same y, as an engine without Python between its linears makes them.
void linear_each(const std::vector<Part>& parts, const Memory& x, const Memory& y, int64_t rows, int64_t in_features,
                 int64_t group_size, int64_t y_stride, bool int8, int threads, const std::string& isa_name, bool rotated) {
    const amq::Isa& isa = find_isa(isa_name);
    std::vector<amq::LinearCall> calls;
    for (const Part& part : parts)
        calls.push_back(
            make_call({part}, x, {0, 0}, y, rows, in_features, group_size, in_features, y_stride, int8, threads, rotated));
    py::gil_scoped_release release;
    for (const amq::LinearCall& call : calls)
        if (!call.parts.empty()) amq::linear(call, isa, threads);
}

// One weight for each of `sizes`, which multiplies so many rows of x, one after another; `biases` is empty or has one for
// each, (0, 0) where there is none.
void linear_grouped(const std::vector<Part>& parts, const std::vector<int64_t>& sizes, const Memory& x,
                    const std::vector<Memory>& biases, const Memory& y, int64_t in_features, int64_t group_size, bool int8,
                    int threads, const std::string& isa_name, bool rotated) {
    const amq::Isa& isa = find_isa(isa_name);
    const int64_t n = static_cast<int64_t>(parts.size());
    require(static_cast<int64_t>(sizes.size()) == n && n > 0, "sizes", "one for each weight", sizes.size());
    require(biases.empty() || static_cast<int64_t>(biases.size()) == n, "biases", "one for each weight", biases.size());
    const int64_t columns = require_size(std::get<3>(parts[0]), "columns of y", 0);
    int64_t rows = 0;
    for (int64_t size : sizes) rows = require_size(rows + require_size(size, "rows of a weight", 0), "rows", 0);
    check_sizes(in_features, group_size, threads);
    if (rows > 0 && columns > 0) {
        address_of<float>(x, "x", amq::product({rows, in_features, 4}, "x"));
        address_of<float>(y, "y", amq::product({rows, columns, 4}, "y"));
    }
    std::vector<amq::LinearCall> calls;
    int64_t first = 0;
    for (int64_t i = 0; i < n; first += sizes[i++]) {
        require(std::get<3>(parts[i]) == columns, "rows of a weight in a group", std::to_string(columns), std::get<3>(parts[i]));
        const auto at = [&](const Memory& whole, int64_t width) {
            if (std::get<0>(whole) == 0) return whole;
            return Memory{std::get<0>(whole) + first * width * 4, sizes[i] * width * 4};
        };
        amq::LinearCall call = make_call({parts[i]}, at(x, in_features), biases.empty() ? Memory{0, 0} : biases[i],
                                         at(y, columns), sizes[i], in_features, group_size, in_features, columns, int8, threads,
                                         rotated);
        if (!call.parts.empty()) calls.push_back(std::move(call));
    }
    py::gil_scoped_release release;
    amq::linear_grouped(calls, isa, threads);
}

uint64_t read_bytes(const Memory& data, int threads, int64_t ahead) {
    const int64_t bytes = std::get<1>(data);
    require(bytes >= 0, "bytes", "at least 0", bytes);
    require(bytes == 0 || std::get<0>(data) != 0, "data", "an address", 0);
    require_threads(threads);
    const auto* found = std::find(std::begin(amq::kAheads), std::end(amq::kAheads), ahead);
    require(found != std::end(amq::kAheads), "ahead", "one of READ_AHEADS", ahead);
    const int index = static_cast<int>(found - std::begin(amq::kAheads));
    const amq::Isa& isa = amq::best_isa();
    py::gil_scoped_release release;
    return amq::read_bytes(isa, reinterpret_cast<const uint8_t*>(std::get<0>(data)), bytes, threads, index);
}

}  // namespace

amq::LinearPart checked_part(const Part& part, int64_t in_features, int64_t group_size) {
    const auto& [format, data, bytes, out_features] = part;
    const int index = find_tiled_format(format);
    require_size(out_features, "out_features", 0);
    const int64_t expected = amq::prepared_bytes(amq::tile_bits(index), out_features, in_features, group_size);
    require(bytes == expected, "bytes of a weight", std::to_string(expected), bytes);
    require(out_features == 0 || data != 0, "address of a weight", "not null", 0);  // an empty tensor may have none
    amq::LinearPart made;
    made.format = index;
    made.data = reinterpret_cast<const uint8_t*>(data);
    made.out_features = out_features;
    return made;
}

void bind_linear(py::module_& m) {
    m.def("prepared_bytes", &prepared_bytes, py::arg("format"), py::arg("rows"), py::arg("in_features"),
          py::arg("group_size"), "Bytes of a prepared weight; see csrc/cpu/tiles.h");
    m.def("prepare", &prepare, py::kw_only(), py::arg("format"), py::arg("qweight"), py::arg("scale"),
          py::arg("zero_point"), py::arg("out"), py::arg("qweight_stride"), py::arg("group_stride"),
          py::arg("rows"), py::arg("in_features"), py::arg("group_size"), py::arg("threads"), py::arg("isa") = "",
          "Packed rows -> tiles; see csrc/cpu/prepare.h");
    m.def("linear", &linear, py::arg("parts"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("rows"),
          py::arg("in_features"), py::arg("group_size"), py::arg("x_stride"), py::arg("y_stride"), py::arg("int8"),
          py::arg("threads"), py::arg("isa") = "", py::arg("rotated") = false,
          "Linears that share x; see csrc/cpu/linear.h");
    m.def("linear_grouped", &linear_grouped, py::arg("parts"), py::arg("sizes"), py::arg("x"), py::arg("biases"),
          py::arg("y"), py::arg("in_features"), py::arg("group_size"), py::arg("int8"), py::arg("threads"),
          py::arg("isa") = "", py::arg("rotated") = false, "Linears with rows of x of their own; see csrc/cpu/linear.h");
    m.def("linear_each", &linear_each, py::arg("parts"), py::arg("x"), py::arg("y"), py::arg("rows"),
          py::arg("in_features"), py::arg("group_size"), py::arg("y_stride"), py::arg("int8"), py::arg("threads"),
          py::arg("isa") = "", py::arg("rotated") = false, "One call of linear per part, into the same y: what benchmarks time");
    m.attr("READ_AHEADS") = std::vector<int>(std::begin(amq::kAheads), std::end(amq::kAheads));
    m.def("read_bytes", &read_bytes, py::arg("data"), py::arg("threads"), py::arg("ahead"),
          "Reads memory, for its bandwidth; see csrc/cpu/bandwidth.h");
}
