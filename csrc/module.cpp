// amq._cpu: the CPU kernels for Python. Tensors come as addresses and sizes, so no libtorch is linked; amq/native.py is
// the typed door, this file checks what would otherwise read or write out of bounds and releases the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/dequantize.h"
#include "cpu/divergence.h"
#include "cpu/unit.h"
#include "modules.h"

namespace py = pybind11;
using amq::find_isa;
using amq::require;

namespace {

const amq::FormatKernels& find_format(const std::string& name) {
    std::string known;
    for (const amq::FormatKernels& format : amq::compiled_formats()) {
        if (format.name == name) return format;
        known += (known.empty() ? "" : ", ") + std::string(format.name);
    }
    throw std::invalid_argument("format: expected one that was compiled in (" + known + "), got '" + name + "'");
}

void dequantize(const std::string& format_name, uintptr_t qweight, uintptr_t scale, uintptr_t zero_point, uintptr_t out,
                int64_t qweight_stride, int64_t group_stride, int64_t out_stride, int64_t rows, int64_t in_features,
                int64_t group_size, int threads, const std::string& isa_name) {
    const amq::FormatKernels& format = find_format(format_name);
    const amq::Isa isa = find_isa(isa_name);
    require(rows >= 0, "rows", "at least 0", rows);
    require(in_features >= 1, "in_features", "at least 1", in_features);
    require(group_size >= 1 && group_size % amq::kChunk == 0, "group_size",
            "a positive multiple of " + std::to_string(amq::kChunk), group_size);
    require(threads >= 1, "threads", "at least 1", threads);
    if (rows == 0) return;  // an empty tensor may have no address
    const int64_t row_bytes = format.row_bytes(in_features), groups = (in_features - 1) / group_size + 1;
    require(qweight_stride >= row_bytes, "qweight_stride", "at least " + std::to_string(row_bytes), qweight_stride);
    require(group_stride >= groups, "group_stride", "at least " + std::to_string(groups), group_stride);
    require(out_stride >= in_features, "out_stride", "at least " + std::to_string(in_features), out_stride);
    for (uintptr_t address : {qweight, scale, zero_point, out}) require(address != 0, "address", "not null", 0);
    const amq::DequantizeArgs args = {
        reinterpret_cast<const uint8_t*>(qweight), reinterpret_cast<const uint16_t*>(scale),
        reinterpret_cast<const uint16_t*>(zero_point), reinterpret_cast<float*>(out),
        qweight_stride, group_stride, out_stride, rows, in_features, group_size};
    py::gil_scoped_release release;
    amq::dequantize(format, isa, args, threads);
}

void jensen_shannon(uintptr_t reference, uintptr_t logits, uintptr_t divergence, int64_t rows, int64_t vocabulary,
                    int threads, const std::string& isa_name) {
    const amq::Isa isa = find_isa(isa_name);
    require(rows >= 0, "rows", "at least 0", rows);
    require(vocabulary >= 1, "vocabulary", "at least 1", vocabulary);
    require(threads >= 1, "threads", "at least 1", threads);
    if (rows == 0) return;
    for (uintptr_t address : {reference, logits, divergence}) require(address != 0, "address", "not null", 0);
    const amq::DivergenceArgs args = {reinterpret_cast<const float*>(reference), reinterpret_cast<const float*>(logits),
                                      reinterpret_cast<double*>(divergence), rows, vocabulary};
    py::gil_scoped_release release;
    amq::jensen_shannon(isa, args, threads);
}

std::map<std::string, std::array<int, 3>> formats() {
    std::map<std::string, std::array<int, 3>> layouts;
    for (const amq::FormatKernels& format : amq::compiled_formats()) layouts[format.name] = format.layout;
    return layouts;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (amq::Isa isa : amq::kIsas)
        if (amq::is_supported(isa)) names.push_back(amq::isa_name(isa));
    return names;
}

std::map<std::string, std::string> missing() {
    std::map<std::string, std::string> reasons;
    for (amq::Isa isa : amq::kIsas)
        if (const char* reason = amq::missing_feature(isa)) reasons[amq::isa_name(isa)] = reason;
    return reasons;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of amq; call them through amq.native";
    m.def("formats", &formats, "Formats compiled in: {name: [levels, unit_codes, unit_bytes]}");
    m.def("isas", &isas, "Instruction sets that this processor can run, worst first");
    m.def("missing", &missing, "What this machine lacks, {instruction set: reason}, of those that it cannot run");
    m.def("isa", [] { return amq::isa_name(amq::best_isa()); }, "The instruction set that kernels use by default");
    m.def("dequantize", &dequantize, py::kw_only(), py::arg("format"), py::arg("qweight"), py::arg("scale"),
          py::arg("zero_point"), py::arg("out"), py::arg("qweight_stride"), py::arg("group_stride"),
          py::arg("out_stride"), py::arg("rows"), py::arg("in_features"), py::arg("group_size"), py::arg("threads"),
          py::arg("isa") = "", "Packed rows at the given addresses -> float32 rows; see csrc/cpu/dequantize.h");
    m.def("jensen_shannon", &jensen_shannon, py::kw_only(), py::arg("reference"), py::arg("logits"),
          py::arg("divergence"), py::arg("rows"), py::arg("vocabulary"), py::arg("threads"), py::arg("isa") = "",
          "Log-probabilities and logits -> float64 divergence per row; see csrc/cpu/divergence.h");
    bind_linear(m);
    bind_decoder(m);
}
