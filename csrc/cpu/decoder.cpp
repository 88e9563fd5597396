// The pass of decoder.h. Every thread of the team runs `DecoderPass::run`; between barriers each does its share.

#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "prepare.h"
#include "unit.h"

namespace amq {
namespace {

// Up to this many rows every thread makes a projection's whole input for itself, which takes less time than a barrier.
constexpr int64_t kOwnRows = 2;
// Up to this many rows attention is split over spans of positions too: there are few heads to share among threads.
constexpr int64_t kSplitRows = 16;
constexpr int kLoopsPerBlock = 5;  // that threads share: qkv, attention, o, gate and up, down; and one of the head

// One row of a prepared weight: code and scale of every feature, from its lane of the tile.
void decode_row(const Table& table, int64_t row, int64_t rows, int64_t in_features, int64_t group_size, float* out) {
    const int bits = tile_bits(table.format);
    const int64_t tile = row / kLanes, lane = row % kLanes, lanes = std::min<int64_t>(kLanes, rows - tile * kLanes);
    const uint8_t* line = table.data + tile * tile_bytes(bits, in_features, group_size, kLanes);
    for (int64_t first = 0; first < in_features; first += group_size) {
        uint16_t halves[2];
        std::memcpy(&halves[0], line + 2 * lane, 2);
        std::memcpy(&halves[1], line + 2 * lanes + 2 * lane, 2);
        const float scale = half_to_float(halves[0]), zero_point = half_to_float(halves[1]);
        line += 4 * lanes;
        const int64_t stop = std::min(first + group_size, in_features);
        for (int64_t k = first; k < stop; ++k) {
            const int64_t place = (k - first) % kBlock, step = place / kStep, byte = place % kStep;
            unsigned code = 0;
            for (int index = 0;; ++index) {
                const Plane plane = plane_of(bits, index);
                if (plane.width == 0) break;
                const int64_t per_line = 8 / plane.width;
                const uint8_t word = line[(plane.line + step / per_line) * 4 * lanes + 4 * lane + byte];
                code |= (word >> (plane.width * (step % per_line)) & ((1u << plane.width) - 1)) << plane.offset;
            }
            out[k] = (static_cast<float>(code) - zero_point) * scale;
            if (place == kBlock - 1 || k == stop - 1) line += 4 * lanes * bits;
        }
    }
}

}  // namespace

int64_t Projection::out_features() const {
    int64_t total = 0;
    for (const LinearPart& part : parts) total += part.out_features;
    return total;
}

// One thread's walk through one pass.
class DecoderPass {
public:
    DecoderPass(Decoder& decoder, const Pass& pass, const Isa& isa, Team& team)
        : d_(decoder), m_(decoder.model_), pass_(pass), isa_(isa), team_(team), vector_(*isa.vector()) {}

    void run() {
        embed();
        for (size_t block = 0; block < m_.blocks.size(); ++block) {
            attention(block);
            mlp(m_.blocks[block]);
        }
        logits();
    }

private:
    float* stream(int64_t row) { return d_.stream_.data() + row * m_.hidden; }
    float* qkv(int64_t row) { return d_.qkv_.data() + row * (m_.n_heads + 2 * m_.n_kv_heads) * m_.head_dim; }
    int64_t input_stride() const { return std::max(m_.hidden, m_.n_heads * m_.head_dim); }
    float* input(int64_t row) { return d_.input_.data() + row * input_stride(); }
    bool split() const { return pass_.rows <= kSplitRows; }

    void embed() {
        const int64_t end = team_.end(pass_.rows);
        for (int64_t row = team_.begin(pass_.rows); row < end; ++row) {
            const int64_t token = pass_.tokens[row];
            const Table& table = m_.embedding;
            if (table.format >= 0) {
                decode_row(table, token, m_.vocabulary, m_.hidden, m_.group_size, stream(row));
            } else {
                const int64_t bytes = table.element == Element::float32 ? 4 : 2;
                vector_.widen[static_cast<int>(table.element)](table.data + token * m_.hidden * bytes, m_.hidden, stream(row));
            }
        }
        team_.wait();
    }

    LinearCall call(const Projection& projection, const float* x, int64_t x_stride, float* y, int64_t rows) const {
        LinearCall made;
        made.parts = projection.parts;
        made.x = x;
        made.bias = projection.bias;
        made.y = y;
        made.rows = rows;
        made.in_features = projection.in_features;
        made.group_size = m_.group_size;
        made.x_stride = x_stride;
        made.y_stride = projection.out_features();
        made.mode = m_.mode;
        return made;
    }

    // Makes the job's input; make_row(row) first makes the row of x that it is made from.
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

    // Where a thread makes row `row` of `rows`: its own place where every thread makes all of them.
    float* made_row(int64_t row, int64_t rows) {
        return rows > kOwnRows ? input(row) : d_.own_input_.data() + (team_.index * kOwnRows + row) * input_stride();
    }
    float* made_row(int64_t row) { return made_row(row, pass_.rows); }

    // The job's only part, added to the residual stream.
    void run_and_add(const LinearJob& job, const float* y) {
        team_.share(job.n_tiles(0), kTileUnit, [&](int64_t begin, int64_t end) {
            job.run_tiles(0, begin, end);
            const int64_t first = begin * kLanes, count = std::min(end * kLanes, m_.hidden) - first;
            for (int64_t row = 0; row < pass_.rows; ++row)
                vector_.add(stream(row) + first, y + row * m_.hidden + first, count);
        });
        team_.wait();
    }

    void attention(size_t index) {
        const Block& block = m_.blocks[index];
        {
            const LinearCall c = call(block.qkv, made_row(0), input_stride(), qkv(0), pass_.rows);
            LinearJob job(c, isa_);
            make_input(job, pass_.rows, [&](int64_t row) {
                vector_.rms_norm(stream(row), block.attention_norm, m_.epsilon, m_.hidden, made_row(row));
            });
            team_.share(job.n_tiles(), kTileUnit, [&](int64_t begin, int64_t end) { job.run_tiles(begin, end); });
            team_.wait();
        }
        rotate_and_store(index);
        team_.wait();
        attend(index);
        team_.wait();
        const LinearCall c = call(block.o, made_row(0), input_stride(), d_.output_.data(), pass_.rows);
        LinearJob job(c, isa_);
        make_input(job, pass_.rows, [&](int64_t row) {
            if (split()) merge_row(row);
        });
        run_and_add(job, d_.output_.data());
    }

    CacheView view(const Segment& segment, size_t block, int64_t kv_head) const {
        const int64_t place = (static_cast<int64_t>(block) * m_.n_kv_heads + kv_head) * m_.head_bytes();
        return {pass_.cache + place, segment.pages, m_.page_bytes()};
    }

    void rotate_and_store(size_t index) {
        const Block& block = m_.blocks[index];
        const int64_t per_row = m_.n_heads + m_.n_kv_heads, total = pass_.rows * per_row, end = team_.end(total);
        for (int64_t item = team_.begin(total); item < end; ++item) {
            const int64_t row = item / per_row, head = item % per_row;
            const Segment& segment = segment_of(row);
            const int64_t position = segment.position + row - segment.first_row;
            float* x = qkv(row) + head * m_.head_dim;
            const bool is_key = head >= m_.n_heads;
            if (const float* norm = is_key ? block.k_norm : block.q_norm)
                vector_.rms_norm(x, norm, m_.epsilon, m_.head_dim, x);
            const int64_t half = m_.rotary / 2;
            vector_.rotate(x, m_.cos + position * half, m_.sin + position * half, half);
            if (!is_key) {
                for (int64_t k = 0; k < m_.head_dim; ++k) x[k] *= m_.attention_scale;
                continue;
            }
            const int64_t kv_head = head - m_.n_heads;
            vector_.store[m_.cache == Element::half](view(segment, index, kv_head), position, x,
                                                     x + m_.n_kv_heads * m_.head_dim, static_cast<int>(m_.head_dim));
        }
    }

    const Segment& segment_of(int64_t row) const {
        size_t low = 0;
        while (row >= pass_.segments[low].first_row + pass_.segments[low].rows) ++low;
        return pass_.segments[low];
    }

    int64_t n_spans(const Segment& segment) const { return ceil_div(segment.position + segment.rows, kSpan); }

    // Work of attention: for every segment, KV head and tile of query rows (token by token, the head's group within) all
    // positions, or one span of them.
    void attend(size_t index) {
        const int64_t group = m_.n_heads / m_.n_kv_heads;
        const auto each = [&](const auto& visit) {
            for (const Segment& segment : pass_.segments)
                for (int64_t kv_head = 0; kv_head < m_.n_kv_heads; ++kv_head)
                    for (int64_t first = 0; first < segment.rows * group; first += vector_.query_rows) {
                        const int64_t last_token = std::min<int64_t>(first + vector_.query_rows, segment.rows * group) - 1;
                        const int64_t end = segment.position + last_token / group + 1;
                        const int64_t step = split() ? static_cast<int64_t>(kSpan) : end;
                        for (int64_t begin = 0; begin < end; begin += step)
                            visit(segment, kv_head, first, begin, std::min(begin + step, end));
                    }
        };
        int64_t total = 0;
        each([&](const Segment&, int64_t, int64_t, int64_t begin, int64_t end) { total += end - begin; });
        team_.share(total, 1, [&](int64_t mine, int64_t not_mine) {
            int64_t before = 0;
            each([&](const Segment& segment, int64_t kv_head, int64_t first, int64_t begin, int64_t end) {
                if (before >= mine && before < not_mine) attend_item(index, segment, kv_head, first, begin, end);
                before += end - begin;
            });
        });
    }

    void attend_item(size_t index, const Segment& segment, int64_t kv_head, int64_t first, int64_t begin, int64_t end) {
        const int64_t group = m_.n_heads / m_.n_kv_heads, window = m_.blocks[index].window;
        const int head_dim = static_cast<int>(m_.head_dim);
        const int n_rows = static_cast<int>(std::min<int64_t>(vector_.query_rows, segment.rows * group - first));
        alignas(64) float values[2][kMaxQueryRows][kMaxHeadDim];
        QueryRow rows[kMaxQueryRows];
        Partial sums[kMaxQueryRows], parts[kMaxQueryRows];
        for (int i = 0; i < n_rows; ++i) {
            const int64_t token = (first + i) / group, head = kv_head * group + (first + i) % group;
            const int64_t position = segment.position + token;
            rows[i] = {qkv(segment.first_row + token) + head * head_dim,
                       window ? std::max<int64_t>(0, position - window + 1) : 0, position};
            sums[i] = {-INFINITY, 0, values[0][i]};
            parts[i].values = values[1][i];
            std::fill(values[0][i], values[0][i] + head_dim, 0.0f);
        }
        const auto kernel = vector_.attend[m_.cache == Element::half];
        const CacheView cache = view(segment, index, kv_head);
        const int64_t start = std::max(begin, rows[0].first / kSpan * kSpan);
        for (int64_t p = start; p < end; p += kSpan) {
            kernel({cache, rows, n_rows, head_dim, p, std::min<int64_t>(p + kSpan, end)}, parts);
            for (int i = 0; i < n_rows; ++i) vector_.merge(sums[i], parts[i], head_dim);
        }
        for (int i = 0; i < n_rows; ++i) {
            const int64_t row = segment.first_row + (first + i) / group, head = kv_head * group + (first + i) % group;
            if (split()) {
                float* out = partial(row, head, begin / kSpan);
                out[0] = sums[i].largest;
                out[1] = sums[i].sum;
                std::copy_n(sums[i].values, head_dim, out + 2);
            } else {
                vector_.finish(sums[i], head_dim, input(row) + head * head_dim);
            }
        }
    }

    float* partial(int64_t row, int64_t head, int64_t span) {
        const int64_t spans = ceil_div(m_.context, kSpan);
        return d_.partials_.data() + ((row * m_.n_heads + head) * spans + span) * (m_.head_dim + 2);
    }

    // The row of attention's output from what was computed span by span.
    void merge_row(int64_t row) {
        const Segment& segment = segment_of(row);
        const int64_t spans = (segment.position + row - segment.first_row) / kSpan + 1;
        const int head_dim = static_cast<int>(m_.head_dim);
        for (int64_t head = 0; head < m_.n_heads; ++head) {
            alignas(64) float values[kMaxHeadDim];
            Partial sum{-INFINITY, 0, values};
            std::fill_n(values, head_dim, 0.0f);
            for (int64_t span = 0; span < spans; ++span) {
                float* part = partial(row, head, span);
                vector_.merge(sum, {part[0], part[1], part + 2}, head_dim);
            }
            vector_.finish(sum, head_dim, made_row(row) + head * head_dim);
        }
    }

    void mlp(const Block& block) {
        const int64_t wide = m_.intermediate;
        float* gate_up = d_.gate_up_.data();
        {
            const LinearCall c = call(block.gate_up, made_row(0), input_stride(), gate_up, pass_.rows);
            LinearJob job(c, isa_);
            make_input(job, pass_.rows, [&](int64_t row) {
                vector_.rms_norm(stream(row), block.mlp_norm, m_.epsilon, m_.hidden, made_row(row));
            });
            team_.share(job.n_tiles(0), kTileUnit, [&](int64_t begin, int64_t end) {
                job.run_tiles(0, begin, end);
                job.run_tiles(1, begin, end);
                const int64_t first = begin * kLanes, count = std::min(end * kLanes, wide) - first;
                for (int64_t row = 0; row < pass_.rows; ++row) {
                    float* gate = gate_up + row * 2 * wide + first;
                    vector_.gate(gate, gate + wide, count);
                }
            });
            team_.wait();
        }
        const LinearCall c = call(block.down, gate_up, 2 * wide, d_.output_.data(), pass_.rows);
        LinearJob job(c, isa_);
        make_input(job, pass_.rows, [](int64_t) {});
        run_and_add(job, d_.output_.data());
    }

    void logits() {
        const int64_t rows = static_cast<int64_t>(pass_.wanted.size());
        if (rows == 0) return;
        const auto norm = [&](int64_t row, float* out) {
            vector_.rms_norm(stream(pass_.wanted[row]), m_.final_norm, m_.epsilon, m_.hidden, out);
        };
        if (m_.head.format < 0) {
            for (int64_t row = team_.begin(rows); row < team_.end(rows); ++row) norm(row, input(row));
            team_.wait();
            vector_.dense[static_cast<int>(m_.head.element)](m_.head.data, m_.hidden, team_.begin(m_.vocabulary),
                                                             team_.end(m_.vocabulary), input(0), input_stride(), rows,
                                                             pass_.logits, m_.vocabulary);
            return;
        }
        Projection head;
        head.parts = {{m_.head.format, m_.head.data, m_.vocabulary}};
        head.in_features = m_.hidden;
        const LinearCall c = call(head, made_row(0, rows), input_stride(), pass_.logits, rows);
        LinearJob job(c, isa_);
        make_input(job, rows, [&](int64_t row) { norm(row, made_row(row, rows)); });
        team_.share(job.n_tiles(), kTileUnit, [&](int64_t begin, int64_t end) { job.run_tiles(begin, end); });
    }

    Decoder& d_;
    const DecoderModel& m_;
    const Pass& pass_;
    const Isa& isa_;
    Team& team_;
    const VectorKernels& vector_;
};

Decoder::Decoder(DecoderModel model, int64_t max_rows, int max_threads)
    : model_(std::move(model)), max_rows_(max_rows), max_threads_(max_threads),
      team_(1 + kLoopsPerBlock * static_cast<int>(model_.blocks.size())) {
    const DecoderModel& m = model_;
    const int64_t heads = m.n_heads * m.head_dim, narrow = std::max(m.hidden, heads);
    stream_.resize(max_rows * m.hidden);
    qkv_.resize(max_rows * (heads + 2 * m.n_kv_heads * m.head_dim));
    input_.resize(max_rows * narrow);
    own_input_.resize(max_threads * kOwnRows * narrow);
    gate_up_.resize(max_rows * 2 * m.intermediate);
    output_.resize(max_rows * m.hidden);
    partials_.resize(std::min(max_rows, kSplitRows) * m.n_heads * ceil_div(m.context, kSpan) * (m.head_dim + 2));
    // At most a float per feature, every group padded, and two floats per group.
    const int64_t groups = ceil_div(std::max(narrow, m.intermediate), m.group_size);
    const int64_t row_bytes = groups * (m.group_size + 2 * kBlock + 2) * static_cast<int64_t>(sizeof(float));
    own_bytes_ = ceil_div(kOwnRows * row_bytes, 64) * 64 + 64;
    own_.resize(max_threads * own_bytes_);
    shared_.resize((ceil_div(max_rows, kLanes) + 1) * kLanes * row_bytes + 64);
}

void Decoder::forward(const Pass& pass, const Isa& isa, int threads) {
    run_team(std::min(threads, max_threads_), team_, [&](Team& team) { DecoderPass(*this, pass, isa, team).run(); });
}

}  // namespace amq
