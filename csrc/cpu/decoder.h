// A decoder-only model as one native object: a forward pass over rows of several sequences in one parallel region, with
// no Python and no allocation between its linears.
//
// The model is the Llama family's block, described by data: which projections have a bias, whether queries and keys are
// normed per head, the window of each layer. What a field leaves out (nullptr, 0) is left out of the computation:
//
//     h = h + o · attention(rotate(norm(q)), rotate(norm(k)), v),   q, k, v = qkv · rms_norm(h) (+ bias)
//     h = h + down · (silu(gate) · up),                             gate, up = gate_up · rms_norm(h) (+ bias)

#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "team.h"
#include "vector.h"

namespace amq {

// Linears that share x, multiplied side by side.
struct Projection {
    std::vector<LinearPart> parts;
    const float* bias = nullptr;  // [Σ out_features]
    int64_t in_features = 0;

    int64_t out_features() const;
};

struct Block {
    const float *attention_norm, *mlp_norm;          // [hidden]
    const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim]
    Projection qkv, o, gate_up, down;
    int64_t window = 0;  // positions that a token sees, itself included; 0: all
};

// Rows [vocabulary, hidden]: tiles of a format, or elements.
struct Table {
    int format = -1;  // of amq_formats.h; -1: `element`
    Element element = Element::float32;
    const uint8_t* data = nullptr;
};

struct DecoderModel {
    int64_t hidden, n_heads, n_kv_heads, head_dim, intermediate, vocabulary, context, group_size;
    float epsilon, attention_scale;
    int64_t rotary;            // features of a head that are rotated, half of them with the other half
    const float *cos, *sin;    // [context, rotary / 2]
    const float* final_norm;   // [hidden]
    Table embedding, head;
    std::vector<Block> blocks;
    Mode mode;
    Element cache;  // float32 or half

    // Bytes of a page of the KV cache: kPage positions of all blocks and KV heads.
    int64_t head_bytes() const { return 2 * kPage * head_dim * (cache == Element::half ? 2 : 4); }
    int64_t page_bytes() const { return static_cast<int64_t>(blocks.size()) * n_kv_heads * head_bytes(); }
};

// Consecutive tokens of one sequence: rows `first_row` … of a pass, at `position` … of the sequence.
struct Segment {
    int64_t first_row, rows, position;
    const int32_t* pages;  // of the cache, for all its positions so far
};

struct Pass {
    std::vector<Segment> segments;  // their rows one after another
    const int32_t* tokens;          // [rows]
    int64_t rows;
    std::vector<int64_t> wanted;    // rows whose logits are wanted
    float* logits;                  // [wanted, vocabulary]
    uint8_t* cache;                 // pages
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

    DecoderModel model_;
    int64_t max_rows_;
    int max_threads_;
    // [max_rows, …] each: the residual stream; q, k and v; inputs of a projection; gate and up; outputs to be added.
    Buffer<float> stream_, qkv_, input_, gate_up_, output_;
    Buffer<float> partials_;     // of attention that is split over positions
    Buffer<char> shared_, own_;  // inputs in the kernels' layout: of all threads, of each thread
    Buffer<float> own_input_;    // and their rows before that
    int64_t own_bytes_;
    TeamState team_;
};

}  // namespace amq
