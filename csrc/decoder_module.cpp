// Bindings of the decoder (cpu/decoder.h): what module.cpp says holds here too. The arrays and weights that a Decoder is
// given by address must outlive it; amq/runtime/native_engine.py keeps them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/decoder.h"
#include "modules.h"

namespace py = pybind11;
using amq::require;

namespace {

template <class T>
const T* pointer(const py::handle& address, const char* name, bool optional = false) {
    const auto value = address.cast<uintptr_t>();
    require(optional || value != 0, name, "an address", 0);
    return reinterpret_cast<const T*>(value);
}

amq::Projection make_projection(const py::dict& block, const char* name, int64_t in_features, int64_t group_size,
                                std::vector<int64_t> out_features) {
    const auto fields = block[name].cast<py::tuple>();  // (parts, address of the bias or 0)
    const auto parts = fields[0].cast<std::vector<Part>>();
    amq::Projection made;
    made.in_features = in_features;
    made.bias = pointer<float>(fields[1], name, true);
    require(parts.size() == out_features.size(), name, std::to_string(out_features.size()) + " weights",
            static_cast<int64_t>(parts.size()));
    for (size_t i = 0; i < parts.size(); ++i) {
        made.parts.push_back(checked_part(parts[i], in_features, group_size));
        require(made.parts[i].out_features == out_features[i], name, std::to_string(out_features[i]) + " rows",
                made.parts[i].out_features);
    }
    return made;
}

amq::Block make_block(const py::dict& block, const amq::DecoderModel& m) {
    const int64_t q = m.n_heads * m.head_dim, kv = m.n_kv_heads * m.head_dim;
    amq::Block made;
    made.attention_norm = pointer<float>(block["attention_norm"], "attention_norm");
    made.mlp_norm = pointer<float>(block["mlp_norm"], "mlp_norm");
    made.q_norm = pointer<float>(block["q_norm"], "q_norm", true);
    made.k_norm = pointer<float>(block["k_norm"], "k_norm", true);
    made.qkv = make_projection(block, "qkv", m.hidden, m.group_size, {q, kv, kv});
    made.o = make_projection(block, "o", q, m.group_size, {m.hidden});
    made.gate_up = make_projection(block, "gate_up", m.hidden, m.group_size, {m.intermediate, m.intermediate});
    made.down = make_projection(block, "down", m.intermediate, m.group_size, {m.hidden});
    made.window = block["window"].cast<int64_t>();
    require(made.window >= 0, "window", "at least 0", made.window);
    return made;
}

// (format or element, address, bytes)
amq::Table make_table(const py::handle& given, const char* name, const amq::DecoderModel& m) {
    const auto [kind, address, bytes] = given.cast<std::tuple<std::string, uintptr_t, int64_t>>();
    amq::Table table;
    const char* const elements[] = {"float32", "float16", "bfloat16"};
    for (int i = 0; i < 3; ++i) {
        if (kind != elements[i]) continue;
        const int64_t expected = m.vocabulary * m.hidden * (i == 0 ? 4 : 2);
        require(bytes == expected && address != 0, name, std::to_string(expected) + " bytes", bytes);
        table.element = static_cast<amq::Element>(i);
        table.data = reinterpret_cast<const uint8_t*>(address);
        return table;
    }
    const amq::LinearPart part = checked_part({kind, address, bytes, m.vocabulary}, m.hidden, m.group_size);
    table.format = part.format;
    table.data = part.data;
    return table;
}

std::unique_ptr<amq::Decoder> make_decoder(const py::dict& sizes, const py::dict& arrays, const py::list& blocks, bool int8,
                                           bool half_cache, int64_t max_rows, int threads) {
    amq::DecoderModel m{};
    const auto size = [&](const char* name, int64_t least) {
        const auto value = sizes[name].cast<int64_t>();
        require(value >= least, name, "at least " + std::to_string(least), value);
        return value;
    };
    m.hidden = size("hidden", 1);
    m.n_heads = size("n_heads", 1);
    m.n_kv_heads = size("n_kv_heads", 1);
    m.head_dim = size("head_dim", 1);
    m.intermediate = size("intermediate", 1);
    m.vocabulary = size("vocabulary", 1);
    m.context = size("context", 1);
    m.group_size = size("group_size", 1);
    m.rotary = size("rotary", 0);
    require(m.head_dim % 16 == 0 && m.head_dim <= amq::kMaxHeadDim, "head_dim",
            "a multiple of 16 up to " + std::to_string(amq::kMaxHeadDim), m.head_dim);
    require(m.n_heads % m.n_kv_heads == 0, "n_heads", "a multiple of n_kv_heads", m.n_heads);
    require(m.rotary % 2 == 0 && m.rotary <= m.head_dim, "rotary", "even and at most head_dim", m.rotary);
    require(max_rows >= 1 && max_rows <= amq::kCallRows, "max_rows", "1 to " + std::to_string(amq::kCallRows), max_rows);
    require(threads >= 1, "threads", "at least 1", threads);
    m.epsilon = sizes["epsilon"].cast<float>();
    m.attention_scale = sizes["attention_scale"].cast<float>();
    m.cos = pointer<float>(arrays["cos"], "cos", m.rotary == 0);
    m.sin = pointer<float>(arrays["sin"], "sin", m.rotary == 0);
    m.final_norm = pointer<float>(arrays["final_norm"], "final_norm");
    m.embedding = make_table(arrays["embedding"], "embedding", m);
    m.head = make_table(arrays["head"], "head", m);
    m.mode = int8 ? amq::Mode::int8 : amq::Mode::fp32;
    m.cache = half_cache ? amq::Element::half : amq::Element::float32;
    for (const py::handle& block : blocks) m.blocks.push_back(make_block(block.cast<py::dict>(), m));
    return std::make_unique<amq::Decoder>(std::move(m), max_rows, threads);
}

// (tokens, position, address of the pages, how many)
using SegmentTuple = std::tuple<int64_t, int64_t, uintptr_t, int64_t>;

void forward(amq::Decoder& decoder, uintptr_t tokens, const std::vector<SegmentTuple>& segments,
             std::vector<int64_t> wanted, uintptr_t logits, uintptr_t cache, int64_t cache_pages, int threads,
             const std::string& isa_name) {
    const amq::DecoderModel& m = decoder.model();
    amq::Pass pass{};
    for (const auto& [rows, position, pages, n_pages] : segments) {
        require(rows >= 1, "tokens of a segment", "at least 1", rows);
        require(position >= 0 && position + rows <= m.context, "position",
                "within the context of " + std::to_string(m.context), position);
        require(n_pages * amq::kPage >= position + rows, "pages", "enough for the sequence", n_pages);
        const auto* table = reinterpret_cast<const int32_t*>(pages);
        for (int64_t i = 0; i < n_pages; ++i)
            require(table[i] >= 0 && table[i] < cache_pages, "page", "below " + std::to_string(cache_pages), table[i]);
        pass.segments.push_back({pass.rows, rows, position, table});
        pass.rows += rows;
    }
    require(pass.rows >= 1 && pass.rows <= decoder.max_rows(), "tokens of a pass",
            "1 to " + std::to_string(decoder.max_rows()), pass.rows);
    require(tokens != 0 && cache != 0, "address", "not null", 0);
    require(logits != 0 || wanted.empty(), "logits", "an address", 0);
    pass.tokens = reinterpret_cast<const int32_t*>(tokens);
    for (int64_t i = 0; i < pass.rows; ++i)
        require(pass.tokens[i] >= 0 && pass.tokens[i] < m.vocabulary, "token", "below " + std::to_string(m.vocabulary),
                pass.tokens[i]);
    for (int64_t row : wanted) require(row >= 0 && row < pass.rows, "wanted row", "one of the pass", row);
    pass.wanted = std::move(wanted);
    pass.logits = reinterpret_cast<float*>(logits);
    pass.cache = reinterpret_cast<uint8_t*>(cache);
    require(threads >= 1, "threads", "at least 1", threads);
    const amq::Isa isa = amq::find_isa(isa_name);
    py::gil_scoped_release release;
    decoder.forward(pass, isa, threads);
}

}  // namespace

void bind_decoder(py::module_& m) {
    m.attr("PAGE") = amq::kPage;
    py::class_<amq::Decoder>(m, "Decoder", "A model of the Llama family; see csrc/cpu/decoder.h")
        .def(py::init(&make_decoder), py::kw_only(), py::arg("sizes"), py::arg("arrays"), py::arg("blocks"),
             py::arg("int8"), py::arg("half_cache"), py::arg("max_rows"), py::arg("threads"))
        .def_property_readonly("page_bytes", [](const amq::Decoder& d) { return d.model().page_bytes(); })
        .def("forward", &forward, py::arg("tokens"), py::arg("segments"), py::arg("wanted"), py::arg("logits"),
             py::arg("cache"), py::arg("cache_pages"), py::arg("threads"), py::arg("isa") = "", "One pass over rows of several sequences");
}
