// A decoder-only model as one native object: a forward pass over rows of several sequences in one parallel region, with
// no Python between its parts.
//
// A model is a list of steps on the residual stream h, each of one operator:
//
//     h = (h + scale · post_norm(op(norm(h)))) · after
//
// and an operator is data: what a field leaves out (nullptr, 0, no part) is left out of the computation. Families of models are
// functions that make this data of a config (amq/runtime/families); amq/runtime/decoder_spec.py is the same record in Python, field by
// field, with the names of tensors in the place of their addresses. All norms are RMS norms; 1 is added to weights where a
// family says 1 + weight before they come here.

#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <variant>
#include <vector>

#include "element.h"
#include "isa.h"
#include "linear.h"
#include "team.h"
#include "vector.h"

namespace amq {

// Linears that share x, multiplied side by side: their outputs lie one after another in a row.
struct Projection {
    std::vector<LinearPart> parts;
    int64_t in_features = 0;
    bool rotated = false;  // as LinearCall has it

    int64_t out_features() const;
};

// Angles of a rotary embedding; features beyond `rotary` of a head stay as they are.
struct Rope {
    int64_t rotary = 0;                           // features of a head that are rotated, half of them with the other half
    const float *cos[2] = {}, *sin[2] = {};       // [context, rotary / 2]; the second for long texts, else nullptr
};

struct Attention {
    int64_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
    // Queries, keys, values; without values where keys are values, and without both where the cache is another step's.
    Projection qkv, o;
    bool gated = false;            // each head's query is followed by its gate: output · sigmoid(gate)
    bool keys_are_values = false;  // as they are before their norm and rotation
    int64_t cache_of = -1;         // the step whose keys and values are used; -1: its own
    const float *q_norm = nullptr, *k_norm = nullptr, *v_norm = nullptr;  // [head_dim]
    const float *q_norm_all = nullptr, *k_norm_all = nullptr;  // over all heads together, [n_heads · head_dim], [n_kv_heads · head_dim]
    const float* sinks = nullptr;           // [n_heads], scores of a position that has no value
    const float* position_scale = nullptr;  // [context], of queries
    float scale = 1, softcap = 0;           // softcap c: scores → c · tanh(score / c)
    int64_t rope = -1;                      // of DecoderModel::ropes; -1: none
    int64_t window = 0;                     // positions that a token sees, itself included; 0: all
    int cache = 0;                          // of kCaches; of a step that uses another's, that one's (set by the Decoder)
    int64_t cache_offset = 0;               // bytes, in a page of the cache (set by the Decoder)
    int64_t fresh_offset = 0;               // bytes, in a page of Decoder::fresh_ (set by the Decoder)
    // [n_kv_heads · head_dim], taken off the keys before they become codes; none where empty (set by the Decoder).
    std::vector<float> common_key;

    int64_t q_stride() const { return gated ? 2 * head_dim : head_dim; }
    int64_t q_features() const { return n_heads * q_stride(); }
    int64_t kv_features() const { return n_kv_heads * head_dim; }
    int64_t group() const { return n_heads / n_kv_heads; }  // heads that share keys and values
    const CacheKind& kind() const { return kCaches[cache]; }
    int64_t head_bytes() const { return amq::head_bytes(kind(), head_dim); }  // of a page
};

// Where in a row of `in` a part of each key head begins: head h at first + h · stride.
struct Heads {
    int64_t first = 0, stride = 0;

    int64_t of(int64_t head) const { return first + head * stride; }
};

// Gated delta rule (arXiv 2412.06464) behind a causal convolution of q, k and v with SiLU. Value head j, which belongs to key head
// j / (n_value_heads / n_key_heads), carries S [key_dim, value_dim] on; with q and k of length 1, q then over √key_dim:
//
//     S ← e^(−rate · softplus(a + dt_bias)) · S;  S ← S + k ⊗ sigmoid(b) · (v − Sᵀk);  out = norm(Sᵀq) · silu(z)
struct DeltaNet {
    int64_t n_key_heads = 0, n_value_heads = 0, key_dim = 0, value_dim = 0, kernel = 0;
    Projection in, out;
    Heads q, k, v, z, b, a;  // v, z, b and a of a key head are those of its value heads, one after another
    const float* convolution = nullptr;  // [kernel, channels], the newest position last; channels: all q, all k, all v
    const float *rate = nullptr, *dt_bias = nullptr;  // [n_value_heads]
    const float* norm = nullptr;         // [value_dim]
    // Floats, in a sequence's state (set by the Decoder): [kernel − 1, channels], then S of each value head as
    // [value_dim / 16, key_dim, 16].
    int64_t state_offset = 0;

    int64_t channels() const { return 2 * n_key_heads * key_dim + n_value_heads * value_dim; }
    int64_t values() const { return n_value_heads * value_dim; }
    int64_t mixed() const { return channels() + 2 * n_value_heads; }  // and decay and beta of each value head
    int64_t value_channel(int64_t head) const { return 2 * n_key_heads * key_dim + head * value_dim; }
    // Where a part of a value head begins that is `width` wide.
    int64_t of_value_head(const Heads& part, int64_t head, int64_t width) const {
        const int64_t group = n_value_heads / n_key_heads;
        return part.of(head / group) + head % group * width;
    }
    int64_t state_floats() const { return (kernel - 1) * channels() + n_value_heads * key_dim * value_dim; }
};

// LFM2's operator: b, c, x = in · h; out · (c · conv(b · x)), a causal convolution per channel.
struct ShortConv {
    int64_t kernel = 0;
    Projection in, out;                  // in: b, c, x, [channels] each
    const float* convolution = nullptr;  // [kernel, channels], the newest position last
    const float* bias = nullptr;         // [channels]
    int64_t state_offset = 0;  // set by the Decoder; floats: b · x of the last kernel − 1 positions, [kernel − 1, channels]

    int64_t channels() const { return out.in_features; }
    int64_t state_floats() const { return (kernel - 1) * channels(); }
};

// down · activation(gate, up); `in` is gate and up, or both in one linear, or up alone (Activation::relu2).
struct Mlp {
    Projection in, down;
    Activation activation = Activation::silu;
    float limit = 0;  // of Activation::clamped_swiglu

    int64_t wide() const { return down.in_features; }
};

enum class Score { softmax, sigmoid };

// Chooses `top_k` of `experts` experts for a row by scores (+ correction) and gives them weights by scores alone.
struct Router {
    LinearPart weight;              // [experts], not quantized
    const float* norm = nullptr;    // the row is normed for it by itself
    const float* correction = nullptr;  // [experts]
    const float* expert_scale = nullptr;  // [experts], of weights
    Score score = Score::softmax;
    int64_t top_k = 0;
    bool normalized = false;        // weights over (their sum + epsilon)
    float epsilon = 0, scale = 1;
    int64_t groups = 1, top_groups = 1;  // only the `top_groups` best of `groups` groups are chosen from, by their two best

    int64_t experts() const { return weight.out_features; }
};

// Experts, and a shared one beside them whose output is added, times sigmoid(shared_gate · row) where there is a gate.
struct Mixture {
    Router router;
    std::vector<Mlp> experts;   // all of one width, which is a multiple of 16 where gate and up are one linear
    Mlp shared;                 // no parts: none; else likewise
    const float* shared_gate = nullptr;  // [hidden]
    // Gemma 4: experts read the stream through a norm of their own, and both outputs are normed before they are added.
    const float *routed_norm = nullptr, *shared_post_norm = nullptr, *routed_post_norm = nullptr;  // [hidden]

    bool has_shared() const { return !shared.in.parts.empty(); }
};

// Gemma's per-layer input: out · (activation(in · h) · part `index` of the token's per-layer embedding).
struct PerLayerInput {
    Projection in, out;
    Activation activation = Activation::gelu_tanh;
    int64_t index = 0;
};

using Operator = std::variant<Attention, DeltaNet, ShortConv, Mlp, Mixture, PerLayerInput>;

struct Step {
    const float *norm = nullptr, *post_norm = nullptr;  // [hidden]
    float scale = 1, after = 1;
    Operator op;

    bool plain() const { return post_norm == nullptr && after == 1; }  // features of a row are added one by one
};

// Rows [rows, columns]: tiles of a format, packed rows of a format as a checkpoint has them, or elements.
struct Table {
    int format = -1;  // of amq_formats.h; -1: `element`
    Element element = Element::float32;
    const uint8_t* data = nullptr;
    const uint16_t *scale = nullptr, *zero_point = nullptr;  // of packed rows
    int64_t rows = 0, columns = 0;
};

// Of a token, for all its PerLayerInputs: sum_scale · (norm(projection_scale · projection · h) + table_scale · row of the table),
// part by part of `width`.
struct PerLayerEmbedding {
    Table table;  // no columns: none
    Projection projection;
    const float* norm = nullptr;  // [width]
    int64_t width = 0;
    float table_scale = 1, projection_scale = 1, sum_scale = 1;
};

struct DecoderModel {
    int64_t hidden = 0, vocabulary = 0, context = 0, group_size = 0;
    float epsilon = 0;
    float embedding_scale = 1, logit_scale = 1, logit_softcap = 0;
    const float* final_norm = nullptr;  // [hidden]
    Table embedding, head;
    PerLayerEmbedding per_layer;
    std::vector<Rope> ropes;
    std::vector<Step> steps;
    Mode mode = Mode::fp32;

    int64_t page_bytes = 0;    // of the KV cache: kPage positions of all steps and KV heads (set by the Decoder)
    // Of a sequence, beside those of its positions: the most that a step's kind has, and of its first page's keys (set by the Decoder).
    int spare_pages = 0, first_pages = 0;
    int64_t fresh_bytes = 0;   // of a page of Decoder::fresh_ (set by the Decoder)
    int64_t state_floats = 0;  // of a sequence's recurrent state, 0 where there is none (set by the Decoder)
};

// After `rows` rows of a segment, the state of its sequence is copied to `state`, too.
struct Snapshot {
    int64_t rows, state;
};

// Consecutive tokens of one sequence: rows `first_row` … of a pass, at `position` … of the sequence.
struct Segment {
    int64_t first_row, rows, position;
    const int32_t* pages;  // of the cache, for all its positions so far
    const int32_t* spare;  // pages of its own, DecoderModel::spare_pages of them
    const int32_t* first;  // that with the keys of its first page, where there is one
    bool long_text;        // which of two tables of angles
    int64_t state;         // number of its recurrent state; not read at position 0
    std::vector<Snapshot> snapshots;  // by rows
    int64_t fresh = 0;     // where pages are rounded: the first of its pages in Decoder::fresh_, left_pages of them

    int64_t first_page() const { return position / kPage; }
    int64_t last_page() const { return (position + rows - 1) / kPage; }
    int64_t left_pages() const { return last_page() - first_page(); }                   // that it writes to and leaves behind
    int64_t full_pages() const { return (position + rows) / kPage - first_page(); }  // that it fills
};

struct Pass {
    std::vector<Segment> segments;  // their rows one after another
    const int32_t* tokens;          // [rows]
    int64_t rows;
    std::vector<int64_t> wanted;    // rows whose logits are wanted
    float* logits;                  // [wanted, vocabulary]; nullptr with `final`
    float* final;                   // [wanted, hidden]: the stream behind the last step, in the place of logits
    uint8_t* cache;                 // pages
    float* states;                  // [.., state_floats]
};

// Memory that is aligned to a cache line, and touched only where it is used.
template <class T>
class Buffer {
public:
    void resize(int64_t count) {
        memory_.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
    }
    T* data() { return memory_.get(); }

private:
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    std::unique_ptr<T[], Free> memory_;
};

// Buffers for passes of up to `max_rows` rows on up to `max_threads` threads; one pass at a time.
class Decoder {
public:
    Decoder(DecoderModel model, int64_t max_rows, int max_threads);
    const DecoderModel& model() const { return model_; }
    int64_t max_rows() const { return max_rows_; }

    // The result does not depend on `threads`, and a row's not on the other rows of the pass.
    void forward(const Pass& pass, const Isa& isa, int threads);

private:
    friend class DecoderPass;
    friend class MixturePass;

    // What inputs in the kernels' layout take: of all threads, of each thread (a multiple of a cache line).
    struct InputBytes {
        int64_t shared = 0, own = 0;
    };
    InputBytes resize_mixtures();  // decoder_mixture.cpp

    DecoderModel model_;
    int64_t max_rows_;
    int max_threads_;
    int64_t input_stride_ = 0, wide_stride_ = 0, mixed_stride_ = 0;
    // [max_rows, …] each: the residual stream; what a projection reads; what the first one of an operator gives; what is added to
    // the stream; what a convolution gives; per-layer embeddings.
    Buffer<float> stream_, input_, wide_, output_, mixed_, per_layer_;
    Buffer<float> partials_;     // of attention that is split over positions
    Buffer<uint8_t> fresh_;      // [max_rows / 2, fresh_bytes]: FreshKeys of pages that the pass leaves behind
    Buffer<char> shared_, own_;  // inputs in the kernels' layout: of all threads, of each thread
    Buffer<float> own_input_;    // and their rows before that
    int64_t own_bytes_ = 0;
    // Of mixtures (decoder_mixture.cpp): scores [max_rows, experts + 1]; experts of each row and their weights [max_rows, top_k];
    // rows that experts or a router read through a norm of their own; outputs of gate and up, and of down, of a batch of
    // experts' rows and of all rows of a shared one.
    Buffer<float> scores_, choice_weights_, routed_input_, routed_own_, routed_wide_, routed_output_;
    Buffer<int32_t> choice_;
    TeamState team_;
    Regions few_rows_, many_rows_;
};

}  // namespace amq
