// amq._cpu: the CPU kernels for Python. Tensors come as addresses and lengths, so no libtorch is linked; amq/kernels/cpu.py
// has the typed bindings, this file checks what would otherwise read or write out of bounds and releases the GIL.

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
#include "cpu/threads.h"
#include "cpu/unit.h"
#include "modules.h"

namespace py = pybind11;
using amq::address_of;
using amq::find_isa;
using amq::Memory;
using amq::require;
using amq::require_size;
using amq::require_threads;
using amq::strided_bytes;

namespace {

const amq::FormatKernels& find_format(const std::string& name) {
    std::string known;
    for (const amq::FormatKernels& format : amq::compiled_formats()) {
        if (format.name == name) return format;
        known += (known.empty() ? "" : ", ") + std::string(format.name);
    }
    throw std::invalid_argument("format: expected one that was compiled in (" + known + "), got '" + name + "'");
}

void dequantize(const std::string& format_name, const Memory& qweight, const Memory& scale, const Memory& zero_point,
                const Memory& out, int64_t qweight_stride, int64_t group_stride, int64_t out_stride, int64_t rows,
                int64_t in_features, int64_t group_size, int threads, const std::string& isa_name, bool rotated) {
    const amq::FormatKernels& format = find_format(format_name);
    const amq::Isa& isa = find_isa(isa_name);
    require_size(rows, "rows", 0);
    require_size(in_features, "in_features", 1);
    require(group_size >= 1 && group_size <= amq::kMost && group_size % amq::kChunk == 0, "group_size",
            "a positive multiple of " + std::to_string(amq::kChunk), group_size);
    amq::require_rotation(rotated, in_features);
    require_threads(threads);
    if (rows == 0) return;  // an empty tensor may have no address
    const int64_t row_bytes = format.row_bytes(in_features), groups = (in_features - 1) / group_size + 1;
    require(qweight_stride >= row_bytes, "qweight_stride", "at least " + std::to_string(row_bytes), qweight_stride);
    require(group_stride >= groups, "group_stride", "at least " + std::to_string(groups), group_stride);
    require(out_stride >= in_features, "out_stride", "at least " + std::to_string(in_features), out_stride);
    const int64_t group_bytes = strided_bytes(rows, groups, group_stride, 2, "scale");
    const amq::DequantizeArgs args = {
        address_of<uint8_t>(qweight, "qweight", strided_bytes(rows, row_bytes, qweight_stride, 1, "qweight")),
        address_of<uint16_t>(scale, "scale", group_bytes),
        address_of<uint16_t>(zero_point, "zero_point", group_bytes),
        address_of<float>(out, "out", strided_bytes(rows, in_features, out_stride, 4, "out")),
        qweight_stride, group_stride, out_stride, rows, in_features, group_size, rotated};
    py::gil_scoped_release release;
    amq::dequantize(format, isa, args, threads);
}

void jensen_shannon(const Memory& reference, const Memory& logits, const Memory& divergence, int64_t rows,
                    int64_t vocabulary, int threads, const std::string& isa_name) {
    const amq::Isa& isa = find_isa(isa_name);
    require_size(rows, "rows", 0);
    require_size(vocabulary, "vocabulary", 1);
    require_threads(threads);
    if (rows == 0) return;
    const int64_t bytes = strided_bytes(rows, vocabulary, vocabulary, 4, "logits");
    const amq::DivergenceArgs args = {address_of<float>(reference, "reference", bytes),
                                      address_of<float>(logits, "logits", bytes),
                                      address_of<double>(divergence, "divergence", rows * 8), rows, vocabulary};
    py::gil_scoped_release release;
    amq::jensen_shannon(isa, args, threads);
}

std::map<std::string, std::array<int, 3>> formats() {
    std::map<std::string, std::array<int, 3>> layouts;
    for (const amq::FormatKernels& format : amq::compiled_formats()) layouts[format.name] = format.layout;
    return layouts;
}

std::vector<std::string> runnable_isas() {
    std::vector<std::string> names;
    for (const amq::Isa& isa : amq::isas())
        if (!amq::missing_feature(isa)) names.push_back(isa.name);
    return names;
}

std::map<std::string, std::string> missing() {
    std::map<std::string, std::string> reasons;
    for (const amq::Isa& isa : amq::isas())
        if (const char* reason = amq::missing_feature(isa)) reasons[isa.name] = reason;
    return reasons;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of amq; call them through amq.kernels.cpu";
    m.def("formats", &formats, "Formats compiled in: {name: [levels, unit_codes, unit_bytes]}");
    m.def("isas", &runnable_isas, "Instruction sets that this processor can run, worst first");
    m.def("missing", &missing, "What this machine lacks, {instruction set: reason}, of those that it cannot run");
    m.def("isa", [] { return amq::best_isa().name; }, "The instruction set that kernels use by default");
    m.def("dequantize", &dequantize, py::kw_only(), py::arg("format"), py::arg("qweight"), py::arg("scale"),
          py::arg("zero_point"), py::arg("out"), py::arg("qweight_stride"), py::arg("group_stride"),
          py::arg("out_stride"), py::arg("rows"), py::arg("in_features"), py::arg("group_size"), py::arg("threads"),
          py::arg("isa") = "", py::arg("rotated") = false, "Packed rows at the given addresses -> float32 rows; see csrc/cpu/dequantize.h");
    m.def("jensen_shannon", &jensen_shannon, py::kw_only(), py::arg("reference"), py::arg("logits"),
          py::arg("divergence"), py::arg("rows"), py::arg("vocabulary"), py::arg("threads"), py::arg("isa") = "",
          "Log-probabilities and logits -> float64 divergence per row; see csrc/cpu/divergence.h");
    py::class_<amq::Regions>(m, "Regions", "How many threads a parallel region gets; see csrc/cpu/threads.h")
        .def(py::init<>())
        .def("granted", &amq::Regions::granted, py::arg("asked"), py::arg("now"))
        .def("note", &amq::Regions::note, py::arg("asked"), py::arg("threads"), py::arg("wall"), py::arg("queued"),
             py::arg("now"));
    bind_linear(m);
    bind_decoder(m);
    bind_coder(m);
    bind_quantize(m);
}
