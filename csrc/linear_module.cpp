// Bindings of the linear kernels: what module.cpp says holds here too.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
using amq::find_isa;
using amq::require;

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
    require(in_features >= 1, "in_features", "at least 1", in_features);
    require(group_size >= amq::kBlock && group_size <= amq::kMaxGroup && group_size % amq::kBlock == 0, "group_size",
            "a multiple of " + std::to_string(amq::kBlock) + " up to " + std::to_string(amq::kMaxGroup), group_size);
    require(threads >= 1, "threads", "at least 1", threads);
}

int64_t prepared_bytes(const std::string& format, int64_t rows, int64_t in_features, int64_t group_size) {
    check_sizes(in_features, group_size, 1);
    return amq::prepared_bytes(amq::tile_bits(find_tiled_format(format)), rows, in_features, group_size);
}

void prepare(const std::string& format, uintptr_t qweight, uintptr_t scale, uintptr_t zero_point, uintptr_t out,
             int64_t out_bytes, int64_t qweight_stride, int64_t group_stride, int64_t rows, int64_t in_features,
             int64_t group_size, int threads, const std::string& isa_name) {
    const int index = find_tiled_format(format), bits = amq::tile_bits(index);
    const amq::Isa isa = find_isa(isa_name);
    check_sizes(in_features, group_size, threads);
    require(rows >= 0, "rows", "at least 0", rows);
    if (rows == 0) return;
    const int64_t row_bytes = amq::ceil_div(in_features * bits, 8), groups = amq::ceil_div(in_features, group_size);
    const int64_t expected = amq::prepared_bytes(bits, rows, in_features, group_size);
    require(qweight_stride >= row_bytes, "qweight_stride", "at least " + std::to_string(row_bytes), qweight_stride);
    require(group_stride >= groups, "group_stride", "at least " + std::to_string(groups), group_stride);
    require(out_bytes == expected, "out_bytes", std::to_string(expected), out_bytes);
    for (uintptr_t address : {qweight, scale, zero_point, out}) require(address != 0, "address", "not null", 0);
    const amq::PrepareArgs args = {
        reinterpret_cast<const uint8_t*>(qweight), reinterpret_cast<const uint16_t*>(scale),
        reinterpret_cast<const uint16_t*>(zero_point), reinterpret_cast<uint8_t*>(out),
        qweight_stride, group_stride, rows, in_features, group_size};
    py::gil_scoped_release release;
    amq::prepare(index, isa, args, threads);
}

// Checks everything that the kernels rely on; an empty `parts` of the result means that there is nothing to compute.
amq::LinearCall make_call(const std::vector<Part>& parts, uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows,
                          int64_t in_features, int64_t group_size, int64_t x_stride, int64_t y_stride, bool int8,
                          int threads) {
    check_sizes(in_features, group_size, threads);
    require(rows >= 0, "rows", "at least 0", rows);
    amq::LinearCall call;
    int64_t columns = 0;
    for (const Part& weight : parts) {
        const amq::LinearPart part = checked_part(weight, in_features, group_size);
        columns += part.out_features;
        if (part.out_features > 0 && rows > 0) call.parts.push_back(part);
    }
    if (call.parts.empty()) return call;
    require(rows == 1 || x_stride >= in_features, "x_stride", "at least " + std::to_string(in_features), x_stride);
    require(rows == 1 || y_stride >= columns, "y_stride", "at least " + std::to_string(columns), y_stride);
    for (uintptr_t address : {x, y}) require(address != 0, "address", "not null", 0);
    call.x = reinterpret_cast<const float*>(x);
    call.bias = reinterpret_cast<const float*>(bias);
    call.y = reinterpret_cast<float*>(y);
    call.rows = rows;
    call.in_features = in_features;
    call.group_size = group_size;
    call.x_stride = x_stride;
    call.y_stride = y_stride;
    call.mode = int8 ? amq::Mode::int8 : amq::Mode::fp32;
    return call;
}

void linear(const std::vector<Part>& parts, uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows, int64_t in_features,
            int64_t group_size, int64_t x_stride, int64_t y_stride, bool int8, int threads,
            const std::string& isa_name) {
    const amq::Isa isa = find_isa(isa_name);
    const amq::LinearCall call =
        make_call(parts, x, bias, y, rows, in_features, group_size, x_stride, y_stride, int8, threads);
    if (call.parts.empty()) return;
    py::gil_scoped_release release;
    amq::linear(call, isa, threads);
}

// One call per part, all into the same y, as an engine without Python between its linears makes them.
void linear_each(const std::vector<Part>& parts, uintptr_t x, uintptr_t y, int64_t rows, int64_t in_features,
                 int64_t group_size, int64_t y_stride, bool int8, int threads, const std::string& isa_name) {
    const amq::Isa isa = find_isa(isa_name);
    std::vector<amq::LinearCall> calls;
    for (const Part& part : parts)
        calls.push_back(make_call({part}, x, 0, y, rows, in_features, group_size, in_features, y_stride, int8, threads));
    py::gil_scoped_release release;
    for (const amq::LinearCall& call : calls)
        if (!call.parts.empty()) amq::linear(call, isa, threads);
}

uint64_t read_bytes(uintptr_t data, int64_t bytes, int threads) {
    require(bytes >= 0, "bytes", "at least 0", bytes);
    require(bytes == 0 || data != 0, "address", "not null", 0);
    require(threads >= 1, "threads", "at least 1", threads);
    const amq::Isa isa = amq::best_isa();
    py::gil_scoped_release release;
    return amq::read_bytes(isa, reinterpret_cast<const uint8_t*>(data), bytes, threads);
}

}  // namespace

amq::LinearPart checked_part(const Part& part, int64_t in_features, int64_t group_size) {
    const auto& [format, data, bytes, out_features] = part;
    const int index = find_tiled_format(format);
    require(out_features >= 0, "out_features", "at least 0", out_features);
    const int64_t expected = amq::prepared_bytes(amq::tile_bits(index), out_features, in_features, group_size);
    require(bytes == expected, "bytes of a weight", std::to_string(expected), bytes);
    require(out_features == 0 || data != 0, "address of a weight", "not null", 0);  // an empty tensor may have none
    return {index, reinterpret_cast<const uint8_t*>(data), out_features};
}

void bind_linear(py::module_& m) {
    m.def("prepared_bytes", &prepared_bytes, py::arg("format"), py::arg("rows"), py::arg("in_features"),
          py::arg("group_size"), "Bytes of a prepared weight; see csrc/cpu/tiles.h");
    m.def("prepare", &prepare, py::kw_only(), py::arg("format"), py::arg("qweight"), py::arg("scale"),
          py::arg("zero_point"), py::arg("out"), py::arg("out_bytes"), py::arg("qweight_stride"),
          py::arg("group_stride"), py::arg("rows"), py::arg("in_features"), py::arg("group_size"), py::arg("threads"),
          py::arg("isa") = "", "Packed rows -> tiles; see csrc/cpu/prepare.h");
    m.def("linear", &linear, py::arg("parts"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("rows"),
          py::arg("in_features"), py::arg("group_size"), py::arg("x_stride"), py::arg("y_stride"), py::arg("int8"),
          py::arg("threads"), py::arg("isa") = "", "Linears that share x; see csrc/cpu/linear.h");
    m.def("linear_each", &linear_each, py::arg("parts"), py::arg("x"), py::arg("y"), py::arg("rows"),
          py::arg("in_features"), py::arg("group_size"), py::arg("y_stride"), py::arg("int8"), py::arg("threads"),
          py::arg("isa") = "", "One call of linear per part, into the same y: what benchmarks time");
    m.def("read_bytes", &read_bytes, py::arg("data"), py::arg("bytes"), py::arg("threads"),
          "Reads memory, for its bandwidth; see csrc/cpu/bandwidth.h");
}
