// Mixtures of experts in a pass of decoder.h.
//
// A router scores the experts for every row and each row chooses some (decoder_router.h). An *entry* is a row in one of its
// experts; entries lie by expert, and by row within. Every expert is multiplied once, with all rows that chose it, and
// many experts are in one region, where a thread takes whole runs of tiles, weighed by what they cost. What a row gets of its
// experts is summed in the order of experts, so that it does not depend on how the others were processed.
//
// A prompt has thousands of entries, whose outputs would fill tens of megabytes: experts are processed kEntries entries at
// a time, which costs no time (512 rows of 128 experts of 2048 × 768, 8 of them chosen: within 3 % at 512 to 8192 entries;
// AMD EPYC with AVX-512 VNNI, November 2026).

#include <algorithm>
#include <cmath>

#include "decoder_pass.h"
#include "decoder_router.h"

namespace amq {
namespace {

constexpr int64_t kEntries = 1024;
constexpr int64_t kLine = 64;  // bytes of a cache line

// Rows and experts of a block of scores: its inputs stay in the second cache.
constexpr int64_t kScoreRows = 16, kScoreExperts = 4;

// Rows that an expert's input takes at most, in whole panels; entries of a batch, which may be of one expert alone.
int64_t padded_rows(int64_t rows) { return rows <= kGemvRows ? kGemvRows : ceil_div(rows, kLanes) * kLanes; }
int64_t batch_entries(int64_t max_rows) { return std::max(kEntries, padded_rows(max_rows)); }

// One expert with its rows in a batch, or the shared one with all of them.
struct ExpertRows {
    const Mlp* mlp;
    int64_t rows;
    const float* x;         // rows `x_rows` of it, [rows], or all in order
    int64_t x_stride;
    const int32_t* x_rows;
    float* wide;            // [rows, mlp->in.out_features()]
    float* output;          // [rows, hidden]

    int64_t wide_stride() const { return mlp->in.out_features(); }
};

// Linears of several experts in one region.
struct Jobs {
    std::vector<LinearCall> calls;
    std::vector<LinearJob> jobs;

    size_t size() const { return jobs.size(); }
};

}  // namespace

// One thread's walk through one mixture.
class MixturePass {
public:
    MixturePass(DecoderPass& pass, const Step& step, const Mixture& op)
        : p_(pass), d_(pass.d_), m_(pass.m_), team_(pass.team_), vector_(pass.vector_), step_(step), op_(op),
          rows_(pass.pass_.rows), top_k_(op.router.top_k), own_(rows_ <= kOwnRows),
          whole_(!step.plain() || op.shared_post_norm || op.routed_post_norm) {}

    void run() {
        score();
        choose();
        sort();
        for (size_t batch = 0; batch + 1 < batches_.size(); ++batch) {
            first_expert_ = batches_[batch];
            end_expert_ = batches_[batch + 1];
            first_ = first_expert_ == 0, last_ = batch + 2 == batches_.size();
            const std::vector<ExpertRows> experts = batch_experts();
            gate_and_up(experts);
            down(experts);
        }
        if (whole_ && own_) {
            for (int64_t row = team_.begin(rows_); row < team_.end(rows_); ++row) finish(row);
        }
        team_.wait();
    }

private:
    // Places of rows, each thread's own where every thread makes all rows.
    float* own_rows() const { return d_.routed_own_.data() + team_.index * 2 * kOwnRows * m_.hidden; }
    float* routed_rows() const {
        if (!op_.routed_norm) return p_.made_row(0);
        return own_ ? own_rows() : d_.routed_input_.data();
    }
    int64_t routed_stride() const { return op_.routed_norm ? m_.hidden : d_.input_stride_; }
    float* router_rows() const {
        if (!op_.router.norm) return p_.made_row(0);
        return own_ ? own_rows() + kOwnRows * m_.hidden : p_.output(0);  // which is free until experts are summed
    }
    int64_t router_stride() const { return op_.router.norm ? m_.hidden : d_.input_stride_; }
    // Scores of a row, and of its shared expert's gate behind them.
    float* scores(int64_t row) const { return d_.scores_.data() + row * (op_.router.experts() + 1); }

    void make_row(int64_t row) const {
        p_.read_stream(step_, row, p_.made_row(row));
        const float* x = p_.stream(row);
        if (op_.routed_norm) vector_.rms_norm(x, op_.routed_norm, m_.epsilon, m_.hidden, routed_rows() + row * m_.hidden);
        if (op_.router.norm) vector_.rms_norm(x, op_.router.norm, m_.epsilon, m_.hidden, router_rows() + row * m_.hidden);
    }

    void score() {
        const int64_t begin = own_ ? 0 : team_.begin(rows_), end = own_ ? rows_ : team_.end(rows_);
        for (int64_t row = begin; row < end; ++row) make_row(row);
        if (!own_) team_.wait();
        const LinearPart& weight = op_.router.weight;
        const auto dense = vector_.dense[static_cast<int>(weight.element)];
        const int64_t experts = op_.router.experts(), columns = ceil_div(experts, kScoreExperts), stride = experts + 1;
        team_.share(ceil_div(rows_, kScoreRows) * columns, 1, [&](int64_t first, int64_t last) {
            for (int64_t item = first; item < last; ++item) {
                const int64_t row = item / columns * kScoreRows, count = std::min(kScoreRows, rows_ - row);
                const int64_t expert = item % columns * kScoreExperts, stop = std::min(expert + kScoreExperts, experts);
                dense(weight.data, m_.hidden, expert, stop, router_rows() + row * router_stride(), router_stride(), count,
                      scores(row), stride);
                for (int64_t i = row; i < row + count && weight.bias; ++i)
                    for (int64_t e = expert; e < stop; ++e) scores(i)[e] += weight.bias[e];
                if (op_.shared_gate && expert == 0)
                    vector_.dense[static_cast<int>(Element::float32)](
                        op_.shared_gate, m_.hidden, 0, 1, p_.made_row(0) + row * d_.input_stride_, d_.input_stride_, count,
                        scores(row) + experts, stride);
            }
        });
        team_.wait();
    }

    void choose() {
        ExpertChoice chooser(op_.router);
        if (own_) own_choice_.resize(rows_ * top_k_), own_weights_.resize(rows_ * top_k_);
        choice_ = own_ ? own_choice_.data() : d_.choice_.data();
        weights_ = own_ ? own_weights_.data() : d_.choice_weights_.data();
        const int64_t begin = own_ ? 0 : team_.begin(rows_), end = own_ ? rows_ : team_.end(rows_);
        for (int64_t row = begin; row < end; ++row) chooser.choose(scores(row), choice_ + row * top_k_, weights_ + row * top_k_);
        if (!own_) team_.wait();
    }

    // Entries by expert, and experts in batches, by every thread for itself.
    void sort() {
        const int64_t experts = op_.router.experts(), entries = rows_ * top_k_;
        begins_.assign(experts + 1, 0);
        for (int64_t i = 0; i < entries; ++i) ++begins_[choice_[i] + 1];
        batches_.assign(1, 0);
        int64_t padded = 0;
        for (int64_t expert = 0; expert < experts; ++expert) {
            const int64_t rows = begins_[expert + 1], more = rows ? padded_rows(rows) : 0;
            if (padded + more > kEntries && padded) {
                batches_.push_back(expert);
                padded = 0;
            }
            padded += more;
            begins_[expert + 1] += begins_[expert];
        }
        batches_.push_back(experts);
        entry_rows_.resize(entries);
        places_.resize(entries);
        std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
        for (int64_t i = 0; i < entries; ++i) {
            places_[i] = static_cast<int32_t>(next[choice_[i]]++);
            entry_rows_[places_[i]] = static_cast<int32_t>(i / top_k_);
        }
    }

    float* entry_output(int64_t entry) const {
        return d_.routed_output_.data() + (entry - begins_[first_expert_]) * m_.hidden;
    }
    float* shared_output(int64_t row) const {
        return d_.routed_output_.data() + (batch_entries(d_.max_rows_) + row) * m_.hidden;
    }

    // The batch's experts that have rows; the shared one is in the last batch.
    std::vector<ExpertRows> batch_experts() const {
        std::vector<ExpertRows> found;
        const int64_t stride = op_.experts[0].in.out_features(), first = begins_[first_expert_];
        for (int64_t expert = first_expert_; expert < end_expert_; ++expert) {
            const int64_t begin = begins_[expert], rows = begins_[expert + 1] - begin;
            if (!rows) continue;
            found.push_back({&op_.experts[expert], rows, routed_rows(), routed_stride(), &entry_rows_[begin],
                             d_.routed_wide_.data() + (begin - first) * stride, entry_output(begin)});
        }
        if (last_ && op_.has_shared())
            found.push_back({&op_.shared, rows_, p_.made_row(0), d_.input_stride_, nullptr,
                             d_.routed_wide_.data() + batch_entries(d_.max_rows_) * stride, shared_output(0)});
        return found;
    }

    Jobs make_jobs(const std::vector<ExpertRows>& experts, bool down) const {
        Jobs made;
        made.calls.reserve(experts.size());
        made.jobs.reserve(experts.size());
        for (const ExpertRows& e : experts) {
            const float* x = down ? e.wide : e.x;
            float* y = down ? e.output : e.wide;
            LinearCall& call = made.calls.emplace_back(
                p_.call(down ? e.mlp->down : e.mlp->in, x, down ? e.wide_stride() : e.x_stride, y,
                        down ? m_.hidden : e.wide_stride(), e.rows));
            call.x_rows = down ? nullptr : e.x_rows;
            made.jobs.emplace_back(call, p_.isa_);
        }
        return made;
    }

    // Inputs of all jobs, one after another in memory. A pass of one row has one input for all experts; what is not
    // quantized reads x itself.
    void make_inputs(Jobs& jobs) const {
        char* memory = own_ ? d_.own_.data() + team_.index * d_.own_bytes_ : d_.shared_.data();
        std::vector<int64_t> units(jobs.size());
        int64_t total = 0;
        const float* made = nullptr;
        bool rotated = false;
        char* place = nullptr;
        for (size_t i = 0; i < jobs.size(); ++i) {
            LinearJob& job = jobs.jobs[i];
            const std::vector<LinearPart>& parts = jobs.calls[i].parts;
            if (std::all_of(parts.begin(), parts.end(), [](const LinearPart& part) { return part.format < 0; })) continue;
            const LinearCall& call = jobs.calls[i];
            if (rows_ > 1 || call.x != made || call.rotated != rotated) {
                made = call.x, rotated = call.rotated, place = memory;
                memory += ceil_div(static_cast<int64_t>(job.memory_bytes()), kLine) * kLine;
                total += units[i] = job.padded_rows() / job.row_unit();
            }
            job.place(place);
        }
        int64_t begin = own_ ? 0 : team_.begin(total), end = own_ ? total : team_.end(total);
        for (size_t i = 0; i < jobs.size(); ++i) {
            const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, units[i]), unit = jobs.jobs[i].row_unit();
            if (first < last) jobs.jobs[i].make_input(first * unit, last * unit);
            begin -= units[i];
            end -= units[i];
        }
        if (!own_) team_.wait();
    }

    // run(job, first tile, last tile) for all columns of tiles of all jobs, shared among threads by their costs.
    template <class Columns, class Run>
    void share_tiles(const Jobs& jobs, const Columns& columns, const Run& run) {
        int64_t tiles = 0, total = 0;
        for (size_t i = 0; i < jobs.size(); ++i) tiles += columns(i);
        const int64_t unit = tiles < 4 * kTileUnit * team_.count ? 1 : kTileUnit;
        std::vector<int64_t> costs;
        for (size_t i = 0; i < jobs.size(); ++i) {
            int64_t cost = 0;
            for (const LinearPart& part : jobs.calls[i].parts)  // tiles of a linear that is gate and up are two in a column
                cost += tile_cost(part, jobs.calls[i]) * ceil_div(part.out_features, kLanes * columns(i));
            total += costs.emplace_back(cost) * ceil_div(columns(i), unit);
        }
        team_.share(total, 1, [&](int64_t begin, int64_t end) {  // a unit is the range's that it begins in
            for (size_t i = 0; i < jobs.size(); ++i) {
                const int64_t units = ceil_div(columns(i), unit);
                const int64_t first = std::clamp<int64_t>(ceil_div(begin, costs[i]), 0, units);
                const int64_t last = std::clamp<int64_t>(ceil_div(end, costs[i]), 0, units);
                if (first < last) run(i, first * unit, std::min(last * unit, columns(i)));
                begin -= units * costs[i];
                end -= units * costs[i];
            }
        });
    }

    void gate_and_up(const std::vector<ExpertRows>& experts) {
        Jobs jobs = make_jobs(experts, false);
        make_inputs(jobs);
        const auto columns = [&](size_t i) { return ceil_div(experts[i].mlp->wide(), kLanes); };
        share_tiles(jobs, columns, [&](size_t i, int64_t begin, int64_t end) {
            // Few tiles at a time where many rows would push what comes out of the cache before its activation.
            const int64_t step = experts[i].rows > kGemvRows ? kTileUnit : end - begin;
            for (; begin < end; begin += step) gate_and_up(experts[i], jobs.jobs[i], begin, std::min(begin + step, end));
        });
        team_.wait();
    }

    void gate_and_up(const ExpertRows& e, const LinearJob& job, int64_t begin, int64_t end) const {
        const Mlp& mlp = *e.mlp;
        const int64_t wide = mlp.wide(), tiles = wide / kLanes;  // where both halves of one linear begin
        job.run_tiles(0, begin, end);
        if (mlp.activation != Activation::relu2) {
            const bool fused = mlp.in.parts.size() == 1;
            job.run_tiles(fused ? 0 : 1, fused ? tiles + begin : begin, fused ? tiles + end : end);
        }
        const int64_t first = begin * kLanes, count = std::min(end * kLanes, wide) - first;
        const auto activate = vector_.activate[static_cast<int>(mlp.activation)];
        for (int64_t row = 0; row < e.rows; ++row) {
            float* gate = e.wide + row * e.wide_stride() + first;
            activate(gate, gate + wide, mlp.limit, count);
        }
    }

    void down(const std::vector<ExpertRows>& experts) {
        Jobs jobs = make_jobs(experts, true);
        make_inputs(jobs);
        const int64_t tiles = ceil_div(m_.hidden, kLanes);
        if (own_) {  // all experts' outputs of a range of features, and their sum
            team_.share(tiles, kTileUnit, [&](int64_t begin, int64_t end) {
                for (const LinearJob& job : jobs.jobs) job.run_tiles(0, begin, end);
                const int64_t first = begin * kLanes, count = std::min(end * kLanes, m_.hidden) - first;
                for (int64_t row = 0; row < rows_; ++row) sum_experts(row, first, count);
            });
            if (whole_ || !last_) team_.wait();
            return;
        }
        share_tiles(jobs, [&](size_t) { return tiles; },
                    [&](size_t i, int64_t begin, int64_t end) { jobs.jobs[i].run_tiles(0, begin, end); });
        team_.wait();
        for (int64_t row = team_.begin(rows_); row < team_.end(rows_); ++row) {
            sum_experts(row, 0, m_.hidden);
            if (whole_ && last_) finish(row);
        }
    }

    // Adds the batch's experts to the row's sum, features first … first + count − 1, and in the end the sum to the stream.
    void sum_experts(int64_t row, int64_t first, int64_t count) const {
        float* sum = p_.output(row) + first;
        if (first_) std::fill_n(sum, count, 0.0f);
        for (int64_t i = row * top_k_; i < (row + 1) * top_k_; ++i)
            if (choice_[i] >= first_expert_ && choice_[i] < end_expert_)
                vector_.add(sum, entry_output(places_[i]) + first, weights_[i], count);
        if (!last_ || whole_) return;
        if (op_.has_shared()) vector_.add(sum, shared_output(row) + first, shared_weight(row), count);
        vector_.add(p_.stream(row) + first, sum, step_.scale, count);
    }

    float shared_weight(int64_t row) const {
        return op_.shared_gate ? 1 / (1 + std::exp(-scores(row)[op_.router.experts()])) : 1.0f;
    }

    // Whole rows, where norms want them.
    void finish(int64_t row) const {
        float *sum = p_.output(row), *shared = shared_output(row);
        if (op_.routed_post_norm) vector_.rms_norm(sum, op_.routed_post_norm, m_.epsilon, m_.hidden, sum);
        if (op_.has_shared()) {
            if (op_.shared_post_norm) vector_.rms_norm(shared, op_.shared_post_norm, m_.epsilon, m_.hidden, shared);
            vector_.add(sum, shared, shared_weight(row), m_.hidden);
        }
        p_.finish_row(step_, row, sum);
    }

    DecoderPass& p_;
    Decoder& d_;
    const DecoderModel& m_;
    Team& team_;
    const VectorKernels& vector_;
    const Step& step_;
    const Mixture& op_;
    const int64_t rows_, top_k_;
    const bool own_;    // every thread makes all inputs for itself
    const bool whole_;  // outputs are added to the stream as whole rows
    std::vector<int32_t> own_choice_, entry_rows_, places_;  // [rows, top_k]; row of each entry; entry of each choice
    std::vector<float> own_weights_;
    int32_t* choice_ = nullptr;  // [rows, top_k]
    float* weights_ = nullptr;
    std::vector<int64_t> begins_, batches_;  // first entry of each expert, first expert of each batch, and an end
    int64_t first_expert_ = 0, end_expert_ = 0;
    bool first_ = true, last_ = true;  // batch
};

void DecoderPass::apply(const Step& step, const Mixture& op) { MixturePass(*this, step, op).run(); }

int mixture_loops(const Mixture& op, int64_t max_rows) {
    // Rows of experts are padded; two batches beside each other hold more than kEntries of them, and take two loops each.
    const int64_t entries = max_rows * op.router.top_k;
    const int64_t padded = entries + std::min((kGemvRows - 1) * entries, (kLanes - 1) * op.router.experts());
    return static_cast<int>(2 * (2 * padded / kEntries + 1));
}

Decoder::InputBytes Decoder::resize_mixtures() {
    const DecoderModel& m = model_;
    const int64_t entries = batch_entries(max_rows_), element = m.mode == Mode::int8 ? 1 : sizeof(float);
    int64_t scores = 0, choices = 0, wide = 0, shared_rows = 0, normed = 0;
    InputBytes bytes;
    for (const Step& step : m.steps) {
        const Mixture* op = std::get_if<Mixture>(&step.op);
        if (!op) continue;
        const int64_t experts = op->router.experts(), top_k = op->router.top_k, shared = op->has_shared() ? max_rows_ : 0;
        scores = std::max(scores, max_rows_ * (experts + 1));
        choices = std::max(choices, max_rows_ * top_k);
        wide = std::max(wide, entries * op->experts[0].in.out_features() + shared * op->shared.in.out_features());
        shared_rows = std::max(shared_rows, shared);
        if (op->routed_norm) normed = max_rows_;
        // Every group of a row is padded, and has a scale and a sum.
        const int64_t features = std::max({m.hidden, op->experts[0].wide(), shared ? op->shared.wide() : 0});
        const int64_t group_bytes = (m.group_size + 2 * kBlock) * element + 2 * static_cast<int64_t>(sizeof(float));
        const int64_t row_bytes = ceil_div(features, m.group_size) * group_bytes;
        const int64_t ends = 2 * kLine * (std::min(experts, entries) + 1);  // every expert's input begins at a cache line
        bytes.shared = std::max(bytes.shared, (entries + padded_rows(shared)) * row_bytes + ends);
        bytes.own = std::max(bytes.own, ceil_div(kOwnRows * (top_k + 1) * row_bytes + ends, kLine) * kLine);
    }
    scores_.resize(scores);
    choice_.resize(choices);
    choice_weights_.resize(choices);
    routed_wide_.resize(wide);
    routed_output_.resize(scores ? (entries + shared_rows) * m.hidden : 0);
    routed_input_.resize(normed * m.hidden);
    routed_own_.resize(scores ? max_threads_ * 2 * kOwnRows * m.hidden : 0);
    return bytes;
}

}  // namespace amq
