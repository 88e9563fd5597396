// What a pass of a decoder asks of the GPU: one struct per call, one function per struct. A pass is a list of calls that
// amq/runtime/cuda_pass.py makes of a DecoderSpec; amq/kernels/cuda_calls.py has the same structs, field by field, with tensors
// in the place of addresses. Formulas: csrc/cpu/decoder.h.
//
// Everything that changes from pass to pass (tokens, positions, pages) is read from device memory, and no call allocates,
// waits or reads for the host: calls can be captured in a CUDA graph once and be replayed. All addresses are of the device,
// aligned to 16 bytes where not said otherwise; "16-bit" is fp16 or bf16 as `dtype` says. A row whose position is −1 is
// empty: calls that read positions write nothing for it but zeros into rows of their own output.
//
// Every function returns 0, a cudaError_t or one of Status; a call of 0 rows does nothing.

#pragma once

#include <cstdint>

#define AMQ_EXPORT __attribute__((visibility("default")))

namespace amq {

enum Status : int {
    kOk = 0,
    kBadRows = -1,     // rows of x outside of what one launch takes
    kBadWeights = -2,  // none or too many
    kBadBits = -3,     // a width that is not compiled in
    kBadGroup = -4,
    kBadDType = -5,
    kBadSize = -6,     // a count that is out of range, or an address that is null or not aligned to 16 bytes
};

enum Kind : int32_t { kHalf = 0, kBfloat16 = 1, kFloat = 2 };

// ---- linear.cu

// Rows first_row … of a prepared weight (gpu_layout.py); first_row divides by 8.
struct LinearWeight {
    const void* data;
    const float* bias;     // [rows] or null
    int32_t bits;
    int32_t all_rows;      // of the weight, whose scales lie behind all of its codes
    int32_t first_row, rows;
};

// A prepared weight of an expert, in the device's memory.
struct ExpertWeight {
    const void* data;
    const float* bias;
    int64_t bits;
};

// Up to 8 rows for one expert: entries row · top_k + place of the choice.
struct ExpertRows {
    int32_t expert, count;
    int32_t entries[8];
};

enum Epilogue : int32_t {
    kStore = 0,     // y = scale · (W · x + bias), weights side by side
    kAdd = 1,       // y += scale · (W · x + bias), y float32, one weight
    kActivate = 2,  // y = activation(gate, up): two weights of equal rows, or one (relu2)
};

enum ActivationKind : int32_t { kSilu = 0, kGeluTanh = 1, kClampedSwiglu = 2, kRelu2 = 3 };  // as Activation in csrc/cpu/vector.h

struct LinearCall {
    LinearWeight weights[4];
    int32_t n_weights;
    int32_t rows;             // of x and y, 1 to 8
    int32_t in_features, group_size;
    int32_t dtype;            // what is multiplied: kHalf or kBfloat16
    int32_t int8;             // whether x is rounded to 8 bits per row and group first
    int32_t x_kind;           // of x: `dtype` or kFloat
    int32_t y_kind;           // kHalf, kBfloat16 or kFloat
    const void* x;            // [rows, in_features], rows x_stride elements apart and at multiples of 16 bytes
    int64_t x_stride;
    const float* norm;        // [in_features]: x, which is kFloat then, is RMS-normed first, as by a NormCall to `dtype`; or null
    float epsilon;            // of the norm
    float scale;
    int32_t epilogue;
    int32_t activation;       // ActivationKind, of kActivate
    float limit;              // of kClampedSwiglu
    int32_t n_experts;        // of `experts`; 0: none
    void* y;                  // rows y_stride elements apart
    int64_t y_stride;
    float* partials;          // scratch of amq_cuda_linear_scratch bytes, zeros before the first call; may be shared by calls that run one after another
    // Of experts, all of one shape, which weights[] has without data and bias: [n_experts, n_weights].
    const ExpertWeight* experts;
    const ExpertRows* groups;  // [most groups]
    const int32_t* n_groups;   // on the device
    int32_t most_groups;       // what the grid is made for
    int32_t x_share;           // entry e reads row e / x_share of x; it writes row e of y
    int32_t rotated;           // whether x, which is of 16 bits where it is normed, is rotated as by a RotateCall, in float32
    int32_t reserved;
};

// ---- rows.cu: what is computed row by row

struct NormCall {             // y = rms_norm(factor · x) · weight, over each of `parts` pieces of a row
    int32_t rows, features, parts, y_kind;
    const float* x;           // [rows, parts · features] float32
    int64_t x_stride;
    const float* weight;      // [features]; null: x is converted only
    float epsilon, factor;
    void* y;                  // may be x
    int64_t y_stride;
};

struct RotateCall {           // y = x · blockdiag(H), 64 features at a time: amq/rotation.py
    int32_t rows, features;   // a multiple of 64
    int32_t kind;             // of x and y
    int32_t reserved;
    const void* x;            // may be y
    int64_t x_stride;
    void* y;
    int64_t y_stride;
};

struct EmbedCall {            // y = scale · row `token` of the table
    int32_t rows, columns;
    const int32_t* tokens;    // [rows]
    int32_t kind;             // 0, 1, 2: elements as Kind; 3: rows packed as a checkpoint has them; 4: a prepared weight (gpu_layout.py)
    int32_t bits, group_size, table_rows;
    const void* data;
    const void *scales, *zero_points;  // of packed rows: fp16 [table_rows, groups]
    int64_t row_bytes;        // of packed rows
    float scale;
    int32_t reserved;
    float* y;
    int64_t y_stride;
};

struct DenseCall {            // y = W · x + bias for a weight that is not quantized
    int32_t rows, in_features, out_features;
    int32_t element, x_kind, y_kind;  // Kind of W, x, y
    const void* weight;       // [out_features, in_features]
    const float* bias;        // [out_features] or null
    const void* x;
    int64_t x_stride;
    void* y;
    int64_t y_stride;
    float scale;              // of W · x + bias
    int32_t reserved;
};

struct ActivateCall {         // y = activation(gate, up); 16-bit or float32
    int32_t rows, features, activation, y_kind;
    const float *gate, *up;   // up: null for kRelu2
    int64_t gate_stride, up_stride;
    float limit;
    int32_t reserved;
    void* y;
    int64_t y_stride;
};

struct FinishCall {           // stream = (stream + scale · rms_norm(y) · post_norm) · after
    int32_t rows, features;
    float* stream;
    int64_t stream_stride;
    const float* y;
    int64_t y_stride;
    const float* post_norm;   // or null: y as it is
    float epsilon, scale, after;
    int32_t reserved;
};

struct PerLayerCall {         // sum = sum_scale · (rms_norm(projection_scale · sum) · norm + table_scale · token), part by part of `width`
    int32_t rows, columns, width, reserved;
    float* sum;               // [rows, columns], in place
    const float* token;       // [rows, columns]
    const float* norm;        // [width]
    float epsilon, table_scale, projection_scale, sum_scale;
};

struct SoftcapCall {          // x = cap · tanh(x / cap)
    int64_t count;
    float* x;
    float cap;
    int32_t reserved;
};

// ---- attention.cu

struct AttentionCall {
    int32_t rows, n_heads, n_kv_heads, head_dim;
    int32_t q_stride;         // between heads' queries in a row of qkv: head_dim, or twice that where each is followed by its gate
    int32_t gated, keys_are_values;
    int32_t own_keys;         // whether qkv has keys (and values): 0 where the cache is another step's
    int32_t stored;           // whether keys and values of all rows are in the cache already (amq_cuda_store); else the rows
                              // are of different sequences
    int32_t rotary, window, cache_kind;  // cache_kind: 0 fp16, 1 int8
    float scale, softcap, epsilon;
    int32_t out_kind;
    const float* qkv;         // [rows, ..]: queries (and gates) of all heads, keys, values
    int64_t qkv_stride;
    const float *q_norm, *k_norm, *v_norm;  // [head_dim] or null
    const float *cos[2], *sin[2];           // [context, rotary / 2]; the second for long texts, else null; no rotary: null
    const float *sinks, *position_scale;    // [n_heads], [context]; or null
    const int32_t *positions, *slots, *long_text;  // [rows]: position of the row; its row of `tables`; which of cos and sin
    const int32_t* tables;    // [.., table_stride]: pages of a sequence
    int64_t table_stride;
    uint8_t* cache;           // pages of page_bytes; this step's part begins at cache_offset
    int64_t page_bytes, cache_offset;
    void* out;                // [rows, n_heads · head_dim] of out_kind
    int64_t out_stride;
    // Scratch, left alone by more than 8 rows that have nothing to store, and with 1 split.
    float* partials;          // [rows, n_heads, splits, head_dim + 2]
    int32_t* counters;        // [rows, n_heads], zeros before and after
    int32_t splits, reserved; // spans of positions that a row is cut into at most: a row's bits depend on it, not on `rows`
};

// ---- states.cu: operators that carry a state on

// Rows first[i] … first[i] + count[i] − 1 of a pass are consecutive tokens of the sequence whose state is number state[i]; begins[i]:
// whether they are its first ones, before which the state is zeros. On the device; count 0: nothing to do.
struct Segments {
    int32_t n;
    int32_t longest;          // most rows that one may have
    const int32_t *first, *count, *state, *begins;
};

struct HeadPlaces {           // of a key head's part in a row: first + head · stride
    int64_t first, stride;
};

struct DeltaCall {            // DeltaNet behind its first projection and before its last one
    Segments segments;
    int32_t n_key_heads, n_value_heads, key_dim, value_dim, kernel, out_kind;  // both dims: multiples of 16, 512 at most
    const float* in;          // [rows, in_stride]
    int64_t in_stride;
    HeadPlaces q, k, v, z, b, a;
    const float *convolution, *rate, *dt_bias, *norm;
    float epsilon;
    int32_t reserved;
    float* mixed;             // scratch: [rows, channels + 2 · n_value_heads], mixed_stride apart, which divides by 4
    int64_t mixed_stride;
    float* states;            // [.., state_floats]; this step's part at state_offset, as decoder.h lays it out; both divide by 4
    int64_t state_floats, state_offset;
    void* out;                // [rows, n_value_heads · value_dim] of out_kind
    int64_t out_stride;
};

struct ShortConvCall {
    Segments segments;
    int32_t channels, kernel, out_kind, reserved;
    const float* in;          // [rows, 3 · channels]: b, c, x
    int64_t in_stride;
    const float *convolution, *bias;
    float* states;
    int64_t state_floats, state_offset;
    void* out;                // [rows, channels] of out_kind
    int64_t out_stride;
};

// ---- mixture.cu

struct ChooseCall {           // Router of decoder.h, of 512 experts and a top_k of 32 at most; `groups` 1: none
    int32_t rows, experts, top_k, sigmoid, normalized, groups, top_groups, score_stride;
    float epsilon, scale;
    const float* scores;      // [rows, score_stride]: products with the router's weight
    const float *correction, *expert_scale;
    const int32_t* positions; // [rows]: an empty row chooses nothing; null: none is empty
    int32_t* choice;          // [rows, top_k], ascending
    float* weights;           // [rows, top_k]
    ExpertRows* groups_out;   // [rows · top_k], for at most 8 rows; or null
    int32_t* n_groups;
};

struct CombineCall {          // Mixture's end: y = Σ weights · outputs (+ shared), each normed where it has a norm
    int32_t rows, features, top_k, reserved;
    const float* outputs;     // [rows · top_k, features]
    const float* weights;     // [rows, top_k]
    const float* shared;      // [rows, features] or null
    const float* shared_gate; // [rows, gate_stride]: shared · sigmoid of it; or null
    int64_t gate_stride;
    const float *routed_post_norm, *shared_post_norm;  // [features] or null
    float epsilon;
    int32_t reserved2;
    float* y;                 // [rows, features]
};

// ---- sample.cu

struct SampleCall {           // the next token of each row, and what the pass after it reads
    int32_t rows, vocabulary;
    const float* logits;      // [rows, vocabulary]
    int32_t *tokens, *positions;     // [rows]: written; positions go up by one where they are not −1
    const float *temperature, *top_p, *min_p;  // [rows]; temperature 0: the likeliest
    const int32_t* top_k;            // [rows]; 0: all
    const uint64_t* seed;            // [rows]
    int32_t* drawn;                  // [rows]: tokens drawn so far, the random number's place; goes up by one
    int32_t* out;                    // [steps, rows], row `*step % steps`: token, or −1 where the logits hold a NaN or no finite largest one
    int32_t* step;                   // goes up by one with each call
    int32_t steps, reserved;
    float* scratch;                  // of amq_cuda_sample_scratch bytes
};

// Which struct of these: for amq_cuda_struct_bytes, in the order in which amq/kernels/cuda_calls.py lists its own.
#define AMQ_CALLS(M) \
    M(LinearCall) M(NormCall) M(EmbedCall) M(DenseCall) M(ActivateCall) M(FinishCall) M(PerLayerCall) M(SoftcapCall) \
    M(AttentionCall) M(DeltaCall) M(ShortConvCall) M(ChooseCall) M(CombineCall) M(SampleCall)

}  // namespace amq

extern "C" {
AMQ_EXPORT int64_t amq_cuda_struct_bytes(int index);
AMQ_EXPORT int amq_cuda_linear_call(const amq::LinearCall*, void* stream);
AMQ_EXPORT int64_t amq_cuda_linear_scratch(const amq::LinearCall*);
AMQ_EXPORT int amq_cuda_norm(const amq::NormCall*, void* stream);
AMQ_EXPORT int amq_cuda_rotate(const amq::RotateCall*, void* stream);
AMQ_EXPORT int amq_cuda_embed(const amq::EmbedCall*, void* stream);
AMQ_EXPORT int amq_cuda_dense(const amq::DenseCall*, void* stream);
AMQ_EXPORT int amq_cuda_activate(const amq::ActivateCall*, void* stream);
AMQ_EXPORT int amq_cuda_finish(const amq::FinishCall*, void* stream);
AMQ_EXPORT int amq_cuda_per_layer(const amq::PerLayerCall*, void* stream);
AMQ_EXPORT int amq_cuda_softcap(const amq::SoftcapCall*, void* stream);
AMQ_EXPORT int amq_cuda_store(const amq::AttentionCall*, void* stream);      // keys and values of all rows into the cache
AMQ_EXPORT int amq_cuda_attention(const amq::AttentionCall*, void* stream);
AMQ_EXPORT int64_t amq_cuda_cache_bytes(const amq::AttentionCall*);          // of a step's part of a page
AMQ_EXPORT int amq_cuda_delta(const amq::DeltaCall*, void* stream);
AMQ_EXPORT int amq_cuda_short_conv(const amq::ShortConvCall*, void* stream);
AMQ_EXPORT int amq_cuda_choose(const amq::ChooseCall*, void* stream);
AMQ_EXPORT int amq_cuda_combine(const amq::CombineCall*, void* stream);
AMQ_EXPORT int amq_cuda_sample(const amq::SampleCall*, void* stream);
AMQ_EXPORT int64_t amq_cuda_sample_scratch(const amq::SampleCall*);
}
