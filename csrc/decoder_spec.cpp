// One reader per record of amq/runtime/decoder_spec.py. Sizes are bounded as they are read, and every array has the length
// that they make it.

#include "decoder_spec.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "amq_formats.h"
#include "checks.h"
#include "cpu/dequantize.h"
#include "modules.h"

namespace py = pybind11;

namespace amq {
namespace {

constexpr const char* kElements[] = {"float32", "float16", "bfloat16"};

struct Held {
    std::string kind;
    Memory data, scale, zero_point;
    int64_t rotation;
};

class Reader {
public:
    Reader(const py::dict& weights, int64_t context, int64_t group_size, const py::handle& spec)
        : weights_(weights), context_(context), group_size_(group_size), spec_(spec) {}

    DecoderModel model();

private:
    template <class T>
    static T value(const py::handle& record, const char* name) {
        const py::object given_value = record.attr(name);
        try {
            return given_value.cast<T>();
        } catch (const py::cast_error&) {  // Python would get a RuntimeError, and no name
            throw std::invalid_argument(std::string(name) + ": expected a value that fits its type, got " +
                                        py::repr(given_value).cast<std::string>());
        }
    }
    static int64_t size(const py::handle& record, const char* name, int64_t least = 1) {
        return require_size(value<int64_t>(record, name), name, least);
    }
    static float number(const py::handle& record, const char* name) { return value<float>(record, name); }
    static std::string text(const py::handle& record, const char* name) { return value<std::string>(record, name); }
    static bool given(const py::handle& record, const char* name) { return !record.attr(name).is_none(); }

    Held held(const std::string& name) const {
        if (!weights_.contains(name.c_str())) throw std::invalid_argument(name + ": it was not read");
        const auto fields = weights_[name.c_str()].cast<py::tuple>();
        return {fields[0].cast<std::string>(), fields[1].cast<Memory>(), fields[2].cast<Memory>(), fields[3].cast<Memory>(),
                fields[4].cast<int64_t>()};
    }
    const float* floats(const std::string& name, int64_t count) const {
        return exact_address_of<float>(held(name).data, name.c_str(), product({count, 4}, name.c_str()));
    }
    // An Array of the record, which must have `count` elements; nullptr where it is None.
    const float* array(const py::handle& record, const char* name, int64_t count) const {
        if (!given(record, name)) return nullptr;
        const py::object given_array = record.attr(name);
        return floats(text(given_array, "key"), count);
    }
    // One that the operator cannot do without.
    const float* needed(const py::handle& record, const char* name, int64_t count) const {
        require(given(record, name), name, "an array", 0);
        return array(record, name, count);
    }

    LinearPart linear(const py::handle& record) const;
    bool rotated(const std::string& linear, int64_t in_features) const;
    Projection projection(const py::handle& record, const char* name, int64_t in_features, int64_t out_features) const;
    Projection last(const py::handle& record, const char* name, int64_t in_features) const;
    Table table(const py::handle& record) const;
    static Heads heads(const py::handle& record, const char* name, int64_t count, int64_t width, int64_t most);
    static Activation activation(const py::handle& record);

    Attention attention(const py::handle& op) const;
    DeltaNet delta_net(const py::handle& op) const;
    ShortConv short_conv(const py::handle& op) const;
    Mlp mlp(const py::handle& op) const;
    static void check_halves(const Mlp& expert);
    Router router(const py::handle& record) const;
    Mixture mixture(const py::handle& op) const;
    PerLayerInput per_layer_input(const py::handle& op) const;
    PerLayerEmbedding per_layer(const py::handle& record) const;
    Operator op(const py::handle& record) const;
    Rope rope(const py::handle& record, int64_t index) const;

    const py::dict& weights_;
    int64_t context_, group_size_, hidden_ = 0;
    const py::handle& spec_;
};

LinearPart Reader::linear(const py::handle& record) const {
    const std::string name = text(record, "name");
    const Held weight = held(name);
    const int64_t in_features = size(record, "in_features"), out_features = size(record, "out_features");
    LinearPart part;
    for (int i = 0; i < 3 && part.data == nullptr; ++i) {
        if (weight.kind != kElements[i]) continue;
        part.element = static_cast<Element>(i);
        part.out_features = out_features;
        const int64_t bytes = product({out_features, in_features, element_bytes(part.element)}, name.c_str());
        part.data = exact_address_of<uint8_t>(weight.data, name.c_str(), bytes);
    }
    const auto& [address, bytes] = weight.data;
    if (part.data == nullptr) part = checked_part({weight.kind, address, bytes, out_features}, in_features, group_size_);
    if (value<bool>(record, "bias")) part.bias = floats(name + ".bias", out_features);
    return part;
}

// Whether the weight of a linear that is quantized is.
bool Reader::rotated(const std::string& linear, int64_t in_features) const {
    const int64_t width = held(linear).rotation;
    require(width == 0 || width == kRotation, linear.c_str(), "a rotation of 0 or " + std::to_string(kRotation), width);
    require_rotation(width != 0, in_features);
    return width != 0;
}

Projection Reader::projection(const py::handle& record, const char* name, int64_t in_features, int64_t out_features) const {
    Projection made;
    made.in_features = in_features;
    bool quantized = false;
    for (const py::handle& each : record.attr(name).attr("linears")) {
        require(size(each, "in_features") == in_features, text(each, "name").c_str(), std::to_string(in_features) + " in_features",
                size(each, "in_features"));
        made.parts.push_back(linear(each));
        if (made.parts.back().format < 0) continue;
        const std::string linear = text(each, "name");
        const bool one = rotated(linear, in_features);
        require(!quantized || one == made.rotated, linear.c_str(), "to be rotated as the linears beside it", one);
        made.rotated = one, quantized = true;
    }
    require(!made.parts.empty(), name, "at least one linear", 0);
    require(out_features == 0 || made.out_features() == out_features, name, std::to_string(out_features) + " out_features",
            made.out_features());
    return made;
}

// An operator's last projection, whose outputs are added to the stream: one linear, as DecoderPass::run_and_add takes it.
Projection Reader::last(const py::handle& record, const char* name, int64_t in_features) const {
    const Projection made = projection(record, name, in_features, hidden_);
    require(made.parts.size() == 1, name, "one linear", static_cast<int64_t>(made.parts.size()));
    return made;
}

Table Reader::table(const py::handle& record) const {
    const std::string name = text(record, "name");
    const Held weight = held(name);
    Table made;
    made.rows = size(record, "rows");
    made.columns = size(record, "columns");
    const char* const what = name.c_str();
    for (int i = 0; i < 3; ++i) {
        if (weight.kind != kElements[i]) continue;
        made.element = static_cast<Element>(i);
        made.data = exact_address_of<uint8_t>(weight.data, what, product({made.rows, made.columns, element_bytes(made.element)}, what));
        return made;
    }
    const auto& [address, bytes] = weight.data;
    if (std::get<0>(weight.scale) == 0) {
        const LinearPart part = checked_part({weight.kind, address, bytes, made.rows}, made.columns, group_size_);
        made.format = part.format;
        made.data = part.data;
        return made;
    }
    const std::vector<FormatKernels>& formats = compiled_formats();
    for (made.format = 0; made.format < static_cast<int>(formats.size()); ++made.format)
        if (weight.kind == formats[made.format].name) break;
    require(made.format < static_cast<int>(formats.size()), what, "a compiled format", made.format);
    const int64_t row_bytes = formats[made.format].row_bytes(made.columns), groups = ceil_div(made.columns, group_size_);
    made.data = exact_address_of<uint8_t>(weight.data, what, product({made.rows, row_bytes}, what));
    made.scale = exact_address_of<uint16_t>(weight.scale, what, product({made.rows, groups, 2}, what));
    made.zero_point = exact_address_of<uint16_t>(weight.zero_point, what, product({made.rows, groups, 2}, what));
    return made;
}

// `count` parts of `width` features each, in rows of `most`.
Heads Reader::heads(const py::handle& record, const char* name, int64_t count, int64_t width, int64_t most) {
    const py::object said = record.attr(name);
    const Heads made{size(said, "first", 0), size(said, "stride", 0)};
    const int64_t end = made.first + product({count - 1, made.stride}, name) + width;
    require(end <= most, name, "heads within " + std::to_string(most) + " features", end);
    return made;
}

Activation Reader::activation(const py::handle& record) {
    const char* const names[kActivations] = {"silu", "gelu_tanh", "clamped_swiglu", "relu2"};
    const std::string name = text(record, "activation");
    for (int i = 0; i < kActivations; ++i)
        if (name == names[i]) return static_cast<Activation>(i);
    throw std::invalid_argument("activation: expected one of decoder.h, got '" + name + "'");
}

Attention Reader::attention(const py::handle& op) const {
    Attention made;
    made.n_heads = size(op, "n_heads");
    made.n_kv_heads = size(op, "n_kv_heads");
    made.head_dim = size(op, "head_dim");
    require(made.head_dim % 16 == 0 && made.head_dim <= kMaxHeadDim, "head_dim",
            "a multiple of 16 up to " + std::to_string(kMaxHeadDim), made.head_dim);
    require(made.n_heads % made.n_kv_heads == 0, "n_heads", "a multiple of n_kv_heads", made.n_heads);
    made.gated = value<bool>(op, "gated");
    made.keys_are_values = value<bool>(op, "keys_are_values");
    if (given(op, "cache_of")) made.cache_of = size(op, "cache_of", 0);
    const int64_t own = made.cache_of >= 0 ? 0 : made.keys_are_values ? 1 : 2;
    made.qkv = projection(op, "qkv", hidden_, made.q_features() + own * made.kv_features());
    made.o = last(op, "o", made.n_heads * made.head_dim);
    made.q_norm = array(op, "q_norm", made.head_dim);
    made.k_norm = array(op, "k_norm", made.head_dim);
    made.v_norm = array(op, "v_norm", made.head_dim);
    made.q_norm_all = array(op, "q_norm_all", made.q_features());
    made.k_norm_all = array(op, "k_norm_all", made.kv_features());
    require((made.q_norm_all == nullptr) == (made.k_norm_all == nullptr), "q_norm_all", "k_norm_all beside it", 0);
    require(made.q_norm_all == nullptr || (own > 0 && !made.gated), "q_norm_all", "keys of its own, and no gate", own);
    made.sinks = array(op, "sinks", made.n_heads);
    if (given(op, "position_scale")) made.position_scale = floats("position_scale", context_);
    made.scale = number(op, "scale");
    made.softcap = number(op, "softcap");
    if (given(op, "rope")) {
        made.rope = size(op, "rope", 0);
        const int64_t n_ropes = py::len(spec_.attr("ropes"));
        require(made.rope < n_ropes, "rope", "below " + std::to_string(n_ropes), made.rope);
        const int64_t rotary = size(spec_.attr("ropes")[py::int_(made.rope)], "rotary");
        require(rotary <= made.head_dim, "rotary", "at most head_dim " + std::to_string(made.head_dim), rotary);
    }
    made.window = size(op, "window", 0);
    return made;
}

DeltaNet Reader::delta_net(const py::handle& op) const {
    DeltaNet made;
    made.n_key_heads = size(op, "n_key_heads");
    made.n_value_heads = size(op, "n_value_heads");
    made.key_dim = size(op, "key_dim");
    made.value_dim = size(op, "value_dim");
    made.kernel = size(op, "kernel", 2);
    require(made.n_value_heads % made.n_key_heads == 0, "n_value_heads", "a multiple of n_key_heads", made.n_value_heads);
    for (int64_t features : {made.key_dim, made.value_dim})
        require(features % 16 == 0 && features <= kMaxHeadDim, "features of a head",
                "a multiple of 16 up to " + std::to_string(kMaxHeadDim), features);
    made.in = projection(op, "in_", hidden_, 0);
    made.out = last(op, "out", made.values());
    const int64_t keys = made.n_key_heads, share = made.n_value_heads / keys, most = made.in.out_features();
    made.q = heads(op, "q", keys, made.key_dim, most);
    made.k = heads(op, "k", keys, made.key_dim, most);
    made.v = heads(op, "v", keys, share * made.value_dim, most);
    made.z = heads(op, "z", keys, share * made.value_dim, most);
    made.b = heads(op, "b", keys, share, most);
    made.a = heads(op, "a", keys, share, most);
    made.convolution = needed(op, "convolution", product({made.kernel, made.channels()}, "convolution"));
    made.rate = needed(op, "rate", made.n_value_heads);
    made.dt_bias = needed(op, "dt_bias", made.n_value_heads);
    made.norm = needed(op, "norm", made.value_dim);
    product({made.kernel, made.channels(), 8}, "state");
    product({made.n_value_heads, made.key_dim, made.value_dim, 8}, "state");
    return made;
}

ShortConv Reader::short_conv(const py::handle& op) const {
    ShortConv made;
    made.kernel = size(op, "kernel", 2);
    const int64_t channels = size(op.attr("out").attr("linears")[py::int_(0)], "in_features");
    made.in = projection(op, "in_", hidden_, product({3, channels}, "channels"));
    made.out = last(op, "out", channels);
    made.convolution = needed(op, "convolution", product({made.kernel, channels}, "convolution"));
    made.bias = array(op, "bias", channels);
    return made;
}

Mlp Reader::mlp(const py::handle& op) const {
    Mlp made;
    made.activation = activation(op);
    made.limit = number(op, "limit");
    const int64_t wide = size(op.attr("down").attr("linears")[py::int_(0)], "in_features");
    const int64_t gated = made.activation == Activation::relu2 ? 1 : 2;
    made.in = projection(op, "in_", hidden_, product({gated, wide}, "in_"));
    made.down = last(op, "down", wide);
    const int64_t first = made.in.parts[0].out_features;
    require(made.in.parts.size() <= 2 && (first == wide || made.in.parts.size() == 1), "in_",
            "gate and up of " + std::to_string(wide) + " features, or one linear of both", first);
    return made;
}

Router Reader::router(const py::handle& record) const {
    Router made;
    const py::object weight = record.attr("weight");
    require(size(weight, "in_features") == hidden_, "router", std::to_string(hidden_) + " in_features", size(weight, "in_features"));
    made.weight = linear(weight);
    require(made.weight.format < 0, "router", "a weight that is not quantized", made.weight.format);
    made.norm = array(record, "norm", hidden_);
    made.correction = array(record, "correction", made.experts());
    made.expert_scale = array(record, "expert_scale", made.experts());
    const std::string score = text(record, "score");
    if (score != "softmax" && score != "sigmoid")
        throw std::invalid_argument("score: expected softmax or sigmoid, got '" + score + "'");
    made.score = score == "softmax" ? Score::softmax : Score::sigmoid;
    made.top_k = size(record, "top_k");
    require(made.top_k <= made.experts(), "top_k", "at most the experts, " + std::to_string(made.experts()), made.top_k);
    made.normalized = value<bool>(record, "normalized");
    made.epsilon = number(record, "epsilon");
    made.scale = number(record, "scale");
    made.groups = size(record, "groups");
    made.top_groups = size(record, "top_groups");
    require(made.experts() % made.groups == 0, "groups", "a divisor of the experts, " + std::to_string(made.experts()), made.groups);
    require(made.top_groups <= made.groups, "top_groups", "at most " + std::to_string(made.groups), made.top_groups);
    require(made.groups == 1 || made.experts() / made.groups >= 2, "groups", "of two experts at least, by which they are judged",
            made.groups);
    const int64_t eligible = made.experts() / made.groups * made.top_groups;
    require(made.top_k <= eligible, "top_k", "at most the experts of the best groups, " + std::to_string(eligible), made.top_k);
    return made;
}

// Threads share a mixture's features tile by tile, gate and up alike.
void Reader::check_halves(const Mlp& expert) {
    const bool fused = expert.in.parts.size() == 1 && expert.in.out_features() != expert.wide();
    require(!fused || expert.wide() % kLanes == 0, "in_", "gate and up in one linear of an expert to be a multiple of 16 each",
            expert.wide());
}

Mixture Reader::mixture(const py::handle& op) const {
    Mixture made;
    made.router = router(op.attr("router"));
    for (const py::handle& expert : op.attr("experts")) made.experts.push_back(mlp(expert));
    require(static_cast<int64_t>(made.experts.size()) == made.router.experts(), "experts",
            std::to_string(made.router.experts()) + ", as the router scores", static_cast<int64_t>(made.experts.size()));
    for (const Mlp& expert : made.experts) {
        const Mlp& first = made.experts[0];
        require(expert.wide() == first.wide() && expert.in.out_features() == first.in.out_features(), "experts", "one shape",
                expert.wide());
        check_halves(expert);
    }
    if (given(op, "shared")) check_halves(made.shared = mlp(op.attr("shared")));
    made.shared_gate = array(op, "shared_gate", hidden_);
    made.routed_norm = array(op, "routed_norm", hidden_);
    made.shared_post_norm = array(op, "shared_post_norm", hidden_);
    made.routed_post_norm = array(op, "routed_post_norm", hidden_);
    return made;
}

PerLayerInput Reader::per_layer_input(const py::handle& op) const {
    PerLayerInput made;
    const py::object embedding = spec_.attr("per_layer");
    if (embedding.is_none()) throw std::invalid_argument("per_layer: a step reads it, and there is none");
    const int64_t width = size(embedding, "width");
    made.in = projection(op, "in_", hidden_, width);
    made.out = last(op, "out", width);
    require(made.in.parts.size() == 1, "in_", "one linear", static_cast<int64_t>(made.in.parts.size()));
    made.activation = activation(op);
    made.index = size(op, "index", 0);
    const int64_t columns = size(embedding.attr("table"), "columns");
    require(made.index < columns / width, "index", "below " + std::to_string(columns / width), made.index);
    return made;
}

PerLayerEmbedding Reader::per_layer(const py::handle& record) const {
    PerLayerEmbedding made;
    made.table = table(record.attr("table"));
    made.width = size(record, "width");
    require(made.table.columns % made.width == 0, "width", "a divisor of " + std::to_string(made.table.columns), made.width);
    made.projection = projection(record, "projection", hidden_, made.table.columns);
    made.norm = needed(record, "norm", made.width);
    made.table_scale = number(record, "table_scale");
    made.projection_scale = number(record, "projection_scale");
    made.sum_scale = number(record, "sum_scale");
    return made;
}

Operator Reader::op(const py::handle& record) const {
    const std::string kind = py::type::handle_of(record).attr("__name__").cast<std::string>();
    if (kind == "Attention") return attention(record);
    if (kind == "DeltaNet") return delta_net(record);
    if (kind == "ShortConv") return short_conv(record);
    if (kind == "Mlp") return mlp(record);
    if (kind == "Mixture") return mixture(record);
    if (kind == "PerLayerInput") return per_layer_input(record);
    throw std::invalid_argument("op: expected an operator of decoder_spec.py, got " + kind);
}

Rope Reader::rope(const py::handle& record, int64_t index) const {
    Rope made;
    made.rotary = size(record, "rotary", 0);
    require(made.rotary % 2 == 0, "rotary", "an even number", made.rotary);
    const std::string name = "rope." + std::to_string(index);
    const int64_t count = product({context_, made.rotary / 2}, "rotary");
    for (int i = 0; i < (given(record, "long_frequencies") ? 2 : 1); ++i) {
        const char* const which = i ? ".long" : "";
        made.cos[i] = floats(name + which + ".cos", count);
        made.sin[i] = floats(name + which + ".sin", count);
    }
    return made;
}

DecoderModel Reader::model() {
    DecoderModel made;
    made.hidden = hidden_ = size(spec_, "hidden");
    made.vocabulary = size(spec_, "vocabulary");
    made.context = context_;
    made.group_size = group_size_;
    made.epsilon = number(spec_, "epsilon");
    made.embedding_scale = number(spec_, "embedding_scale");
    made.logit_scale = number(spec_, "logit_scale");
    made.logit_softcap = number(spec_, "logit_softcap");
    made.final_norm = needed(spec_, "final_norm", made.hidden);
    made.embedding = table(spec_.attr("embedding"));
    made.head = table(spec_.attr("head"));
    for (const Table* t : {&made.embedding, &made.head})
        require(t->rows == made.vocabulary && t->columns == made.hidden, "embedding and head", "vocabulary by hidden", t->rows);
    if (made.head.scale != nullptr) throw std::invalid_argument("head: expected tiles or elements, got packed rows");
    if (given(spec_, "per_layer")) made.per_layer = per_layer(spec_.attr("per_layer"));
    require(made.per_layer.width == 0 || made.per_layer.table.rows == made.vocabulary, "per_layer",
            std::to_string(made.vocabulary) + " rows", made.per_layer.table.rows);
    int64_t index = 0;
    for (const py::handle& each : spec_.attr("ropes")) made.ropes.push_back(rope(each, index++));
    for (const py::handle& each : spec_.attr("steps")) {
        Step step;
        step.norm = array(each, "norm", made.hidden);
        step.post_norm = array(each, "post_norm", made.hidden);
        step.scale = number(each, "scale");
        if (given(each, "after")) step.after = *array(each, "after", 1);
        step.op = op(each.attr("op"));
        made.steps.push_back(std::move(step));
    }
    require(!made.steps.empty(), "steps", "at least 1", 0);
    for (size_t i = 0; i < made.steps.size(); ++i) {
        const auto* a = std::get_if<Attention>(&made.steps[i].op);
        if (a == nullptr || a->cache_of < 0) continue;
        const auto* from = a->cache_of < static_cast<int64_t>(i) ? std::get_if<Attention>(&made.steps[a->cache_of].op) : nullptr;
        require(from && from->cache_of < 0 && from->n_kv_heads == a->n_kv_heads && from->head_dim == a->head_dim, "cache_of",
                "an earlier step with a cache of the same shape", a->cache_of);
    }
    return made;
}

}  // namespace

DecoderModel read_model(const py::handle& spec, const py::dict& weights, int64_t context, int64_t group_size) {
    require_size(context, "context", 1);
    require(group_size >= kBlock && group_size <= kMaxGroup && group_size % kBlock == 0, "group_size",
            "a multiple of " + std::to_string(kBlock) + " up to " + std::to_string(kMaxGroup), group_size);
    return Reader(weights, context, group_size, spec).model();
}

}  // namespace amq
