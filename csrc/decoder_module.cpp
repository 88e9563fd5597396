// Bindings of the decoder (cpu/decoder.h): what module.cpp says holds here too. The arrays and weights that a Decoder
// is given by address must outlive it; amq/runtime/native_engine.py keeps them. Sizes are bounded as they are read, and
// every array has the length that they make it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "checks.h"
#include "cpu/decoder.h"
#include "decoder_spec.h"
#include "modules.h"

namespace py = pybind11;
using amq::address_of;
using amq::Memory;
using amq::product;
using amq::require;
using amq::require_size;
using amq::require_threads;

namespace {

int find_cache(const std::string& name) {
    for (int kind = 0; kind < amq::kCacheKinds; ++kind)
        if (name == amq::kCaches[kind].name) return kind;
    throw std::invalid_argument("cache: expected one of CACHES, got '" + name + "'");
}

// A kind for all steps with keys and values of their own, or one for each of them in their order.
using CacheNames = std::variant<std::string, std::vector<std::string>>;

void set_caches(amq::DecoderModel& m, const CacheNames& given) {
    std::vector<amq::Attention*> own;
    for (amq::Step& step : m.steps)
        if (auto* a = std::get_if<amq::Attention>(&step.op); a && a->cache_of < 0) own.push_back(a);
    const auto* const name = std::get_if<std::string>(&given);
    const std::vector<std::string> names = name ? std::vector(own.size(), *name) : std::get<1>(given);
    require(names.size() == own.size(), "cache",
            "a kind for each of " + std::to_string(own.size()) + " steps with keys and values of their own",
            static_cast<int64_t>(names.size()));
    for (size_t i = 0; i < own.size(); ++i) own[i]->cache = find_cache(names[i]);
}

std::unique_ptr<amq::Decoder> make_decoder(const py::object& spec, const py::dict& weights, int64_t context, int64_t group_size,
                                           bool int8, const CacheNames& cache, int64_t max_rows, int threads) {
    require(max_rows >= 1 && max_rows <= amq::kCallRows, "max_rows", "1 to " + std::to_string(amq::kCallRows), max_rows);
    require_threads(threads);
    amq::DecoderModel m = amq::read_model(spec, weights, context, group_size);
    m.mode = int8 ? amq::Mode::int8 : amq::Mode::fp32;
    set_caches(m, cache);
    // What the decoder sizes its buffers and pages by, beside the weights whose bytes were compared already.
    int64_t cached = 0;
    for (const amq::Step& step : m.steps)
        if (const auto* a = std::get_if<amq::Attention>(&step.op)) {
            cached += a->kv_features();
            product({a->n_heads, m.context, a->head_dim + 2, 64}, "n_heads and context");
        }
    product({cached, 8 * amq::kPage}, "page_bytes");
    return std::make_unique<amq::Decoder>(std::move(m), max_rows, threads);
}

// (tokens, position, pages: int32, the last of them its spare ones and then that of its first page's keys, whether the text is a
// long one, its state, [(tokens, state)] of its snapshots)
using SegmentTuple = std::tuple<int64_t, int64_t, Memory, bool, int64_t, std::vector<std::tuple<int64_t, int64_t>>>;

amq::Segment make_segment(const amq::DecoderModel& m, const SegmentTuple& given, int64_t first_row, int64_t cache_pages,
                          int64_t n_states) {
    const auto& [rows, position, pages, long_text, state, snapshots] = given;
    require_size(rows, "tokens of a segment", 1);
    require(position >= 0 && position <= m.context - rows, "position", "within the context of " + std::to_string(m.context),
            position);
    const int64_t n_pages = (position + rows - 1) / amq::kPage + 1, n_more = m.spare_pages + m.first_pages;
    const int32_t* table = m.page_bytes == 0 ? nullptr : address_of<int32_t>(pages, "pages", (n_pages + n_more) * 4);
    const int32_t* spare = table ? table + std::get<1>(pages) / 4 - n_more : nullptr;
    const auto check = [&](const int32_t* numbers, int64_t count) {
        for (int64_t i = 0; numbers && i < count; ++i)
            require(numbers[i] >= 0 && numbers[i] < cache_pages, "page", "below " + std::to_string(cache_pages), numbers[i]);
    };
    check(table, n_pages);
    check(spare, n_more);
    amq::Segment made{first_row, rows, position, table, spare, spare ? spare + m.spare_pages : nullptr, long_text, state, {}};
    if (m.state_floats == 0) return made;
    require(state >= 0 && state < n_states, "state", "below " + std::to_string(n_states), state);
    for (const auto& [after, number] : snapshots) {
        const int64_t before = made.snapshots.empty() ? 0 : made.snapshots.back().rows;
        require(after > before && after <= rows, "rows of a snapshot", "ascending up to " + std::to_string(rows), after);
        require(number >= 0 && number < n_states && number != state, "state of a snapshot",
                "another one below " + std::to_string(n_states), number);
        made.snapshots.push_back({after, number});
    }
    return made;
}

// Threads write states side by side: each is of one segment, or of one snapshot.
void check_states(const std::vector<amq::Segment>& segments) {
    std::vector<int64_t> written;
    for (const amq::Segment& segment : segments) {
        written.push_back(segment.state);
        for (const amq::Snapshot& snapshot : segment.snapshots) written.push_back(snapshot.state);
    }
    std::sort(written.begin(), written.end());
    const auto twice = std::adjacent_find(written.begin(), written.end());
    require(twice == written.end(), "state", "each of a pass once", twice == written.end() ? 0 : *twice);
}

void forward(amq::Decoder& decoder, const Memory& tokens, const std::vector<SegmentTuple>& segments,
             std::vector<int64_t> wanted, const Memory& logits, const Memory& cache, const Memory& states, int threads,
             const std::string& isa_name, bool final) {
    const amq::DecoderModel& m = decoder.model();
    amq::Pass pass{};
    if (m.page_bytes > 0) pass.cache = address_of<uint8_t>(cache, "cache", m.page_bytes);
    const int64_t cache_pages = m.page_bytes == 0 ? 0 : std::get<1>(cache) / m.page_bytes;
    int64_t n_states = 0;
    if (m.state_floats > 0) {
        pass.states = address_of<float>(states, "states", m.state_floats * 4);
        n_states = std::get<1>(states) / (m.state_floats * 4);
    }
    int64_t fresh = 0;
    for (const SegmentTuple& segment : segments) {
        pass.segments.push_back(make_segment(m, segment, pass.rows, cache_pages, n_states));
        pass.segments.back().fresh = fresh;
        fresh += pass.segments.back().left_pages();
        pass.rows += std::get<0>(segment);
    }
    if (m.state_floats > 0) check_states(pass.segments);
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
    const int64_t logits_bytes = product({n_wanted, final ? m.hidden : m.vocabulary, 4}, "logits");
    float* const out = n_wanted == 0 ? nullptr : address_of<float>(logits, "logits", logits_bytes);
    (final ? pass.final : pass.logits) = out;
    require_threads(threads);
    const amq::Isa& isa = amq::find_isa(isa_name);
    py::gil_scoped_release release;
    decoder.forward(pass, isa, threads);
}

}  // namespace

void bind_decoder(py::module_& m) {
    m.attr("PAGE") = amq::kPage;
    py::list caches;
    for (const amq::CacheKind& kind : amq::kCaches) caches.append(kind.name);
    m.attr("CACHES") = py::tuple(caches);
    py::class_<amq::Decoder>(m, "Decoder", "A model as steps; see csrc/cpu/decoder.h and csrc/decoder_spec.h")
        .def(py::init(&make_decoder), py::kw_only(), py::arg("spec"), py::arg("weights"), py::arg("context"),
             py::arg("group_size"), py::arg("int8"), py::arg("cache"), py::arg("max_rows"), py::arg("threads"))
        .def_property_readonly("page_bytes", [](const amq::Decoder& d) { return d.model().page_bytes; })
        .def_property_readonly("spare_pages", [](const amq::Decoder& d) { return d.model().spare_pages; })
        .def_property_readonly("first_pages", [](const amq::Decoder& d) { return d.model().first_pages; })
        .def_property_readonly("state_floats", [](const amq::Decoder& d) { return d.model().state_floats; })
        .def("forward", &forward, py::arg("tokens"), py::arg("segments"), py::arg("wanted"), py::arg("logits"),
             py::arg("cache"), py::arg("states"), py::arg("threads"), py::arg("isa") = "", py::arg("final") = false,
             "One pass over rows of several sequences; final: float32 [wanted, hidden], the stream behind the last step, goes to `logits`");
}
