// One thread's walk through a pass of decoder.h: what operators share. Every thread of the team runs `run`; between barriers each
// does its share. Operators stand in decoder_attention.cpp, decoder_mlp.cpp, decoder_mixture.cpp and decoder_state.cpp.

#pragma once

#include <algorithm>

#include "decoder.h"

namespace amq {

// Up to this many rows every thread makes a projection's whole input for itself, which takes less time than a barrier.
constexpr int64_t kOwnRows = 2;
// Up to this many rows attention is split over spans of positions too: there are few heads to share among threads.
constexpr int64_t kSplitRows = 16;
constexpr int kLoopsPerStep = 6;  // of Team::share, at most; mixtures have more
int mixture_loops(const Mixture& op, int64_t max_rows);  // decoder_mixture.cpp
std::vector<float> common_key(const DecoderModel& m, int64_t index);  // decoder_attention.cpp: of an attention's step

class DecoderPass {
public:
    DecoderPass(Decoder& decoder, const Pass& pass, const Isa& isa, Team& team)
        : d_(decoder), m_(decoder.model_), pass_(pass), isa_(isa), team_(team), vector_(*isa.vector()) {}

    void run();

private:
    friend class MixturePass;

    // decoder.cpp
    void embed();
    void per_layer_embeddings();
    void final_states();
    void logits();
    void read_row(const Table& table, int64_t row, float* out) const;

    // An operator ends with its output in the stream (run_and_add or finish), and a barrier behind that.
    void apply(const Step& step, const Attention& op);      // decoder_attention.cpp
    void apply(const Step& step, const DeltaNet& op);       // decoder_state.cpp
    void apply(const Step& step, const ShortConv& op);      // decoder_state.cpp
    void apply(const Step& step, const Mlp& op);            // decoder_mlp.cpp
    void apply(const Step& step, const PerLayerInput& op);  // decoder_mlp.cpp
    void apply(const Step& step, const Mixture& op);        // decoder_mixture.cpp

    // decoder_attention.cpp; rows of `wide` hold q (and gates), k and v of all heads
    CacheView head_cache(const Attention& op, const Segment& segment, int64_t kv_head) const;
    CacheView first_cache(const Attention& op, const Segment& segment, int64_t kv_head) const;
    FreshKeys fresh_keys(const Attention& op, const Segment& segment, int64_t kv_head, int64_t page) const;
    void move_begun(const Attention& op);
    void round_pages(const Attention& op);
    void rotate_and_store(const Attention& op);
    void store_head(const Attention& op, const Segment& segment, int64_t position, int64_t kv_head, float* key, float* value);
    void rotate(const Attention& op, const Segment& segment, int64_t position, float* x);
    bool split() const { return pass_.rows <= kSplitRows; }
    void attend(const Attention& op);
    struct Rows {
        int64_t begin, end;
    };
    Rows tile(const Attention& op, const Segment& segment, int64_t row) const;
    int64_t first_span(const Attention& op, const Segment& segment, int64_t first) const;
    void attend_item(const Attention& op, const Segment& segment, int64_t kv_head, Rows tile, int64_t begin, int64_t end);
    float* partial(const Attention& op, int64_t row, int64_t head, int64_t span) const;
    void finish_head(const Attention& op, int64_t head, Partial& sum, float* out) const;
    void merge_row(const Attention& op, int64_t row);

    // decoder_state.cpp
    void mix_head(const DeltaNet& op, const Segment& segment, int64_t head);
    void carry_on(const DeltaNet& op, const Segment& segment, int64_t head, int64_t column);
    void mix_channels(const ShortConv& op, const Segment& segment, int64_t channel);
    void convolve(ConvolveArgs args, const Segment& segment, int64_t place);
    float* state_of(int64_t number) const { return pass_.states + number * m_.state_floats; }

    float* stream(int64_t row) const { return d_.stream_.data() + row * m_.hidden; }
    // Rows in the place of outputs of an operator's first projection, `wide_stride` apart; of inputs of projections.
    float* wide(int64_t row) const { return d_.wide_.data() + row * d_.wide_stride_; }
    float* input(int64_t row) const { return d_.input_.data() + row * d_.input_stride_; }
    float* mixed(int64_t row) const { return d_.mixed_.data() + row * d_.mixed_stride_; }
    float* output(int64_t row) const { return d_.output_.data() + row * m_.hidden; }

    // Where a thread makes row `row` of `rows`: its own place where every thread makes all of them.
    float* made_row(int64_t row, int64_t rows) const {
        return rows > kOwnRows ? input(row) : d_.own_input_.data() + (team_.index * kOwnRows + row) * d_.input_stride_;
    }
    float* made_row(int64_t row) const { return made_row(row, pass_.rows); }

    const Segment& segment_of(int64_t row) const {
        size_t low = 0;
        while (row >= pass_.segments[low].first_row + pass_.segments[low].rows) ++low;
        return pass_.segments[low];
    }

    LinearCall call(const Projection& projection, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                    int64_t rows) const {
        LinearCall made;
        made.parts = projection.parts;
        made.x = x;
        made.y = y;
        made.rows = rows;
        made.in_features = projection.in_features;
        made.group_size = m_.group_size;
        made.x_stride = x_stride;
        made.y_stride = y_stride;
        made.mode = m_.mode;
        made.rotated = projection.rotated;
        return made;
    }

    // Makes the job's input; make_row(row) first makes the row of x that it is made from, at made_row(row, rows).
    template <class MakeRow>
    void make_input(LinearJob& job, int64_t rows, const MakeRow& make_row) {
        if (rows <= kGemvRows) job.fetch(team_.begin(job.n_tiles()), team_.end(job.n_tiles()));
        if (rows <= kOwnRows) {
            job.place(d_.own_.data() + team_.index * d_.own_bytes_);
            for (int64_t row = 0; row < rows; ++row) make_row(row);
            return job.make_input(0, job.padded_rows());
        }
        job.place(d_.shared_.data());
        const int64_t unit = job.row_unit(), units = job.padded_rows() / unit;
        const int64_t begin = team_.begin(units) * unit, end = team_.end(units) * unit;
        for (int64_t row = begin; row < std::min(end, rows); ++row) make_row(row);
        job.make_input(begin, end);
        team_.wait();
    }

    // The row of the stream as the step's operator reads it.
    void read_stream(const Step& step, int64_t row, float* out) const {
        if (step.norm) return vector_.rms_norm(stream(row), step.norm, m_.epsilon, m_.hidden, out);
        std::copy_n(stream(row), m_.hidden, out);
    }

    // An operator's first projection: wide(row) ← projection · norm(stream(row)) for all rows, and a barrier.
    void project_stream(const Step& step, const Projection& projection) {
        const LinearCall c = call(projection, made_row(0), d_.input_stride_, wide(0), d_.wide_stride_, pass_.rows);
        LinearJob job(c, isa_);
        make_input(job, pass_.rows, [&](int64_t row) { read_stream(step, row, made_row(row)); });
        team_.share(job.n_tiles(), kTileUnit, [&](int64_t begin, int64_t end) { job.run_tiles(begin, end); });
        team_.wait();
    }

    // A row of the operator's output, which is normed in place, into the stream.
    void finish_row(const Step& step, int64_t row, float* y) const {
        if (step.post_norm) vector_.rms_norm(y, step.post_norm, m_.epsilon, m_.hidden, y);
        vector_.add(stream(row), y, step.scale, m_.hidden);
        if (step.after != 1)
            for (int64_t k = 0; k < m_.hidden; ++k) stream(row)[k] *= step.after;
    }

    // The operator's last linear, the job's only part with output(0) for y, into the stream, and a barrier.
    void run_and_add(const Step& step, const LinearJob& job) {
        team_.share(job.n_tiles(0), kTileUnit, [&](int64_t begin, int64_t end) {
            job.run_tiles(0, begin, end);
            if (!step.plain()) return;
            const int64_t first = begin * kLanes, count = std::min(end * kLanes, m_.hidden) - first;
            for (int64_t row = 0; row < pass_.rows; ++row)
                vector_.add(stream(row) + first, output(row) + first, step.scale, count);
        });
        team_.wait();
        if (step.plain()) return;
        for (int64_t row = team_.begin(pass_.rows); row < team_.end(pass_.rows); ++row) finish_row(step, row, output(row));
        team_.wait();
    }

    Decoder& d_;
    const DecoderModel& m_;
    const Pass& pass_;
    const Isa& isa_;
    Team& team_;
    const VectorKernels& vector_;
};

}  // namespace amq
