// Bindings of the decoder (cpu/decoder.h): what module.cpp says holds here too. The arrays and weights that a Decoder
// is given by address must outlive it; amq/runtime/native_engine.py keeps them. Sizes are bounded as they are read, and
// every array has the length that they make it.

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
using amq::address_of;
using amq::exact_address_of;
using amq::Memory;
using amq::product;
using amq::require;
using amq::require_size;
using amq::require_threads;

namespace {

// The float32 array of `count` elements at `given`, (address, bytes); nullptr for (0, 0) where it is optional.
const float* floats(const py::handle& given, const char* name, int64_t count, bool optional = false) {
    const auto memory = given.cast<Memory>();
    if (optional && memory == Memory{0, 0}) return nullptr;
    return exact_address_of<float>(memory, name, product({count, 4}, name));
}

amq::Projection make_projection(const py::dict& block, const char* name, int64_t in_features, int64_t group_size,
                                std::vector<int64_t> out_features) {
    const auto fields = block[name].cast<py::tuple>();  // (parts, bias)
    const auto parts = fields[0].cast<std::vector<Part>>();
    amq::Projection made;
    made.in_features = in_features;
    require(parts.size() == out_features.size(), name, std::to_string(out_features.size()) + " weights",
            static_cast<int64_t>(parts.size()));
    for (size_t i = 0; i < parts.size(); ++i) {
        made.parts.push_back(checked_part(parts[i], in_features, group_size));
        require(made.parts[i].out_features == out_features[i], name, std::to_string(out_features[i]) + " rows",
                made.parts[i].out_features);
    }
    made.bias = floats(fields[1], name, made.out_features(), true);
    return made;
}

amq::Block make_block(const py::dict& block, const amq::DecoderModel& m) {
    const int64_t q = m.n_heads * m.head_dim, kv = m.n_kv_heads * m.head_dim;
    amq::Block made;
    made.attention_norm = floats(block["attention_norm"], "attention_norm", m.hidden);
    made.mlp_norm = floats(block["mlp_norm"], "mlp_norm", m.hidden);
    made.q_norm = floats(block["q_norm"], "q_norm", m.head_dim, true);
    made.k_norm = floats(block["k_norm"], "k_norm", m.head_dim, true);
    made.qkv = make_projection(block, "qkv", m.hidden, m.group_size, {q, kv, kv});
    made.o = make_projection(block, "o", q, m.group_size, {m.hidden});
    made.gate_up = make_projection(block, "gate_up", m.hidden, m.group_size, {m.intermediate, m.intermediate});
    made.down = make_projection(block, "down", m.intermediate, m.group_size, {m.hidden});
    made.window = require_size(block["window"].cast<int64_t>(), "window", 0);
    return made;
}

// (format or element, address, bytes)
amq::Table make_table(const py::handle& given, const char* name, const amq::DecoderModel& m) {
    const auto [kind, address, bytes] = given.cast<std::tuple<std::string, uintptr_t, int64_t>>();
    amq::Table table;
    const char* const elements[] = {"float32", "float16", "bfloat16"};
    for (int i = 0; i < 3; ++i) {
        if (kind != elements[i]) continue;
        table.element = static_cast<amq::Element>(i);
        const int64_t expected = product({m.vocabulary, m.hidden, i == 0 ? 4 : 2}, name);
        table.data = exact_address_of<uint8_t>({address, bytes}, name, expected);
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
        return require_size(sizes[name].cast<int64_t>(), name, least);
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
    require_threads(threads);
    m.epsilon = sizes["epsilon"].cast<float>();
    m.attention_scale = sizes["attention_scale"].cast<float>();
    m.cos = floats(arrays["cos"], "cos", m.context * (m.rotary / 2), m.rotary == 0);
    m.sin = floats(arrays["sin"], "sin", m.context * (m.rotary / 2), m.rotary == 0);
    m.final_norm = floats(arrays["final_norm"], "final_norm", m.hidden);
    m.embedding = make_table(arrays["embedding"], "embedding", m);
    m.head = make_table(arrays["head"], "head", m);
    m.mode = int8 ? amq::Mode::int8 : amq::Mode::fp32;
    m.cache = half_cache ? amq::Element::half : amq::Element::float32;
    for (const py::handle& block : blocks) m.blocks.push_back(make_block(block.cast<py::dict>(), m));
    require(!m.blocks.empty(), "blocks", "at least 1", 0);
    // What the decoder sizes its buffers and pages by, beside the weights whose bytes were compared above.
    product({static_cast<int64_t>(m.blocks.size()), m.n_kv_heads, 8 * amq::kPage, m.head_dim}, "page_bytes");
    product({m.n_heads, m.context, m.head_dim + 2, 64}, "n_heads and context");
    return std::make_unique<amq::Decoder>(std::move(m), max_rows, threads);
}

// (tokens, position, pages: int32)
using SegmentTuple = std::tuple<int64_t, int64_t, Memory>;

void forward(amq::Decoder& decoder, const Memory& tokens, const std::vector<SegmentTuple>& segments,
             std::vector<int64_t> wanted, const Memory& logits, const Memory& cache, int threads,
             const std::string& isa_name) {
    const amq::DecoderModel& m = decoder.model();
    amq::Pass pass{};
    pass.cache = address_of<uint8_t>(cache, "cache", m.page_bytes());
    const int64_t cache_pages = std::get<1>(cache) / m.page_bytes();
    for (const auto& [rows, position, pages] : segments) {
        require_size(rows, "tokens of a segment", 1);
        require(position >= 0 && position <= m.context - rows, "position",
                "within the context of " + std::to_string(m.context), position);
        const int64_t n_pages = (position + rows - 1) / amq::kPage + 1;
        const int32_t* table = address_of<int32_t>(pages, "pages", n_pages * 4);
        for (int64_t i = 0; i < n_pages; ++i)
            require(table[i] >= 0 && table[i] < cache_pages, "page", "below " + std::to_string(cache_pages), table[i]);
        pass.segments.push_back({pass.rows, rows, position, table});
        pass.rows += rows;
    }
    require(pass.rows >= 1 && pass.rows <= decoder.max_rows(), "tokens of a pass",
            "1 to " + std::to_string(decoder.max_rows()), pass.rows);
    pass.tokens = address_of<int32_t>(tokens, "tokens", pass.rows * 4);
    for (int64_t i = 0; i < pass.rows; ++i)
        require(pass.tokens[i] >= 0 && pass.tokens[i] < m.vocabulary, "token", "below " + std::to_string(m.vocabulary),
                pass.tokens[i]);
    for (int64_t row : wanted) require(row >= 0 && row < pass.rows, "wanted row", "one of the pass", row);
    pass.wanted = std::move(wanted);
    const int64_t n_wanted = static_cast<int64_t>(pass.wanted.size());
    require(n_wanted <= pass.rows, "wanted rows", "at most those of the pass", n_wanted);
    const int64_t logits_bytes = product({n_wanted, m.vocabulary, 4}, "logits");
    pass.logits = n_wanted == 0 ? nullptr : address_of<float>(logits, "logits", logits_bytes);
    require_threads(threads);
    const amq::Isa& isa = amq::find_isa(isa_name);
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
             py::arg("cache"), py::arg("threads"), py::arg("isa") = "", "One pass over rows of several sequences");
}
