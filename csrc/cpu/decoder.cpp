// The pass of decoder.h around its operators, and the sizes of what it needs.

#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "amq_formats.h"
#include "decoder_pass.h"
#include "dequantize.h"
#include "prepare.h"
#include "unit.h"

namespace amq {
namespace {

// One row of a prepared weight: code and scale of every feature, from its lane of the tile.
void decode_row(const Table& table, int64_t row, int64_t group_size, float* out) {
    const int bits = tile_bits(table.format);
    const int64_t tile = row / kLanes, lane = row % kLanes, lanes = std::min<int64_t>(kLanes, table.rows - tile * kLanes);
    const uint8_t* line = table.data + tile * tile_bytes(bits, table.columns, group_size, kLanes);
    for (int64_t first = 0; first < table.columns; first += group_size) {
        uint16_t halves[2];
        std::memcpy(&halves[0], line + 2 * lane, 2);
        std::memcpy(&halves[1], line + 2 * lanes + 2 * lane, 2);
        const float scale = half_to_float(halves[0]), zero_point = half_to_float(halves[1]);
        line += 4 * lanes;
        const int64_t stop = std::min(first + group_size, table.columns);
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

// One row of packed rows as a checkpoint has them.
void unpack_row(const Table& table, int64_t row, int64_t group_size, const Isa& isa, float* out) {
    const FormatKernels& format = compiled_formats()[table.format];
    const int64_t groups = ceil_div(table.columns, group_size), bytes = format.row_bytes(table.columns);
    const DequantizeArgs args = {table.data + row * bytes, table.scale + row * groups, table.zero_point + row * groups, out,
                                 bytes, groups, table.columns, 1, table.columns, group_size, false};
    format.dequantize_rows[isa.avx2_loops](args, 0, 1);
}

}  // namespace

int64_t Projection::out_features() const {
    int64_t total = 0;
    for (const LinearPart& part : parts) total += part.out_features;
    return total;
}

void DecoderPass::run() {
    embed();
    if (m_.per_layer.width > 0) per_layer_embeddings();
    for (const Step& step : m_.steps) std::visit([&](const auto& op) { apply(step, op); }, step.op);
    if (pass_.final) return final_states();
    logits();
}

void DecoderPass::read_row(const Table& table, int64_t row, float* out) const {
    if (table.scale) return unpack_row(table, row, m_.group_size, isa_, out);
    if (table.format >= 0) return decode_row(table, row, m_.group_size, out);
    const int64_t bytes = table.columns * element_bytes(table.element);
    vector_.widen[static_cast<int>(table.element)](table.data + row * bytes, table.columns, out);
}

void DecoderPass::embed() {
    for (int64_t row = team_.begin(pass_.rows); row < team_.end(pass_.rows); ++row) {
        read_row(m_.embedding, pass_.tokens[row], stream(row));
        if (m_.embedding_scale != 1)
            for (int64_t k = 0; k < m_.hidden; ++k) stream(row)[k] *= m_.embedding_scale;
    }
    team_.wait();
}

// per_layer_(row): what every PerLayerInput reads a part of.
void DecoderPass::per_layer_embeddings() {
    const PerLayerEmbedding& p = m_.per_layer;
    const int64_t columns = p.table.columns;
    float* const rows = d_.per_layer_.data();
    const LinearCall c = call(p.projection, stream(0), m_.hidden, rows, columns, pass_.rows);
    LinearJob job(c, isa_);
    make_input(job, pass_.rows, [](int64_t) {});
    team_.share(job.n_tiles(), kTileUnit, [&](int64_t begin, int64_t end) { job.run_tiles(begin, end); });
    team_.wait();
    for (int64_t row = team_.begin(pass_.rows); row < team_.end(pass_.rows); ++row) {
        float *sum = rows + row * columns, *token = wide(row);
        read_row(p.table, pass_.tokens[row], token);
        for (int64_t k = 0; k < columns; ++k) sum[k] *= p.projection_scale;
        for (int64_t k = 0; k < columns; k += p.width) vector_.rms_norm(sum + k, p.norm, m_.epsilon, p.width, sum + k);
        for (int64_t k = 0; k < columns; ++k) sum[k] = p.sum_scale * (sum[k] + p.table_scale * token[k]);
    }
    team_.wait();
}

void DecoderPass::final_states() {
    const int64_t rows = static_cast<int64_t>(pass_.wanted.size());
    for (int64_t row = team_.begin(rows); row < team_.end(rows); ++row)
        std::copy_n(stream(pass_.wanted[row]), m_.hidden, pass_.final + row * m_.hidden);
}

void DecoderPass::logits() {
    const int64_t rows = static_cast<int64_t>(pass_.wanted.size());
    if (rows == 0) return;
    const Table& head = m_.head;
    Projection projection;
    projection.in_features = m_.hidden;
    projection.parts.resize(1);
    projection.parts[0].format = head.format;
    projection.parts[0].data = head.data;
    projection.parts[0].element = head.element;
    projection.parts[0].out_features = m_.vocabulary;
    const LinearCall c = call(projection, made_row(0, rows), d_.input_stride_, pass_.logits, m_.vocabulary, rows);
    LinearJob job(c, isa_);
    make_input(job, rows, [&](int64_t row) {
        vector_.rms_norm(stream(pass_.wanted[row]), m_.final_norm, m_.epsilon, m_.hidden, made_row(row, rows));
    });
    const bool plain = m_.logit_scale == 1 && m_.logit_softcap == 0;
    team_.share(job.n_tiles(), kTileUnit, [&](int64_t begin, int64_t end) {
        job.run_tiles(begin, end);
        if (plain) return;
        const int64_t first = begin * kLanes, count = std::min(end * kLanes, m_.vocabulary) - first;
        for (int64_t row = 0; row < rows; ++row) {
            float* const y = pass_.logits + row * m_.vocabulary + first;
            for (int64_t k = 0; k < count; ++k) y[k] *= m_.logit_scale;
            if (m_.logit_softcap > 0) vector_.softcap(y, m_.logit_softcap, count);
        }
    });
}

namespace {

// The largest sizes of a row's buffers over all steps, and each step's place in cache and state.
struct Sizes {
    int64_t input, wide = 0, mixed = 0, partial = 0, features;

    explicit Sizes(DecoderModel& m) : input(m.hidden), features(m.hidden) {
        wide = m.per_layer.table.columns;
        for (Step& step : m.steps) std::visit([&](auto& op) { add(m, op); }, step.op);
        for (Step& step : m.steps)
            if (auto* a = std::get_if<Attention>(&step.op); a && a->cache_of >= 0) {
                const Attention& from = std::get<Attention>(m.steps[a->cache_of].op);
                a->cache_offset = from.cache_offset;
                a->cache = from.cache;
            }
        place_fresh(m);
    }

    // Keys that later steps read have a place of their own, all others one in common.
    static void place_fresh(DecoderModel& m) {
        std::vector<bool> is_read(m.steps.size());
        const auto visit = [&](const auto& each) {
            for (size_t i = 0; i < m.steps.size(); ++i)
                if (auto* a = std::get_if<Attention>(&m.steps[i].op)) each(*a, i);
        };
        visit([&](const Attention& a, size_t) {
            if (a.cache_of >= 0) is_read[a.cache_of] = true;
        });
        int64_t common = 0;
        visit([&](const Attention& a, size_t i) {
            if (a.cache_of < 0 && !is_read[i]) common = std::max(common, fresh_bytes(a));
        });
        m.fresh_bytes = common;
        visit([&](Attention& a, size_t i) {
            if (a.cache_of >= 0) a.fresh_offset = std::get<Attention>(m.steps[a.cache_of].op).fresh_offset;
            if (!is_read[i]) return;
            a.fresh_offset = m.fresh_bytes;
            m.fresh_bytes += fresh_bytes(a);
        });
    }
    static int64_t fresh_bytes(const Attention& a) {
        return a.kind().rounds_pages() ? a.n_kv_heads * 2 * FreshKeys::half_bytes(a.head_dim) : 0;
    }

    void project(const Projection& projection) {
        wide = std::max(wide, projection.out_features());
        read(projection);
    }
    void read(const Projection& projection) { features = std::max(features, projection.in_features); }

    void add(DecoderModel& m, Attention& a) {
        project(a.qkv);
        read(a.o);
        input = std::max(input, a.n_heads * a.head_dim);
        partial = std::max(partial, a.n_heads * (a.head_dim + 2));
        if (a.cache_of >= 0) return;
        a.cache_offset = m.page_bytes;
        m.page_bytes += a.n_kv_heads * a.head_bytes();
        m.spare_pages = std::max(m.spare_pages, a.kind().spare_pages());
        m.first_pages = std::max<int>(m.first_pages, a.kind().first_apart());
    }
    void add(DecoderModel& m, DeltaNet& d) {
        project(d.in);
        read(d.out);
        input = std::max(input, d.values());
        mixed = std::max(mixed, d.mixed());
        d.state_offset = m.state_floats;
        m.state_floats += d.state_floats();
    }
    void add(DecoderModel& m, ShortConv& s) {
        project(s.in);
        read(s.out);
        mixed = std::max(mixed, s.channels());
        s.state_offset = m.state_floats;
        m.state_floats += s.state_floats();
    }
    void add(DecoderModel&, Mlp& mlp) {
        project(mlp.in);
        read(mlp.down);
    }
    void add(DecoderModel&, PerLayerInput& p) {
        project(p.in);
        read(p.out);
    }
    void add(DecoderModel&, Mixture&) {}  // has buffers of its own
};

int count_loops(const DecoderModel& m, int64_t max_rows) {
    int loops = 3 + kLoopsPerStep * static_cast<int>(m.steps.size());
    for (const Step& step : m.steps)
        if (const auto* mixture = std::get_if<Mixture>(&step.op)) loops += mixture_loops(*mixture, max_rows);
    return loops;
}

}  // namespace

Decoder::Decoder(DecoderModel model, int64_t max_rows, int max_threads)
    : model_(std::move(model)), max_rows_(max_rows), max_threads_(max_threads),
      team_(count_loops(model_, max_rows)) {
    DecoderModel& m = model_;
    const Sizes sizes(m);
    for (size_t i = 0; i < m.steps.size(); ++i)
        if (auto* a = std::get_if<Attention>(&m.steps[i].op); a && a->kind().codes_keys())
            a->common_key = common_key(m, static_cast<int64_t>(i));
    input_stride_ = sizes.input;
    wide_stride_ = sizes.wide;
    mixed_stride_ = sizes.mixed;
    stream_.resize(max_rows * m.hidden);
    output_.resize(max_rows * m.hidden);
    input_.resize(max_rows * sizes.input);
    own_input_.resize(max_threads * kOwnRows * sizes.input);
    wide_.resize(max_rows * sizes.wide);
    mixed_.resize(max_rows * sizes.mixed);
    per_layer_.resize(max_rows * m.per_layer.table.columns);
    partials_.resize(std::min(max_rows, kSplitRows) * ceil_div(m.context, kSpan) * sizes.partial);
    fresh_.resize(max_rows / 2 * m.fresh_bytes);  // whoever leaves pages behind has a row in each and one more
    // At most a float per feature, every group padded, and two floats per group.
    const int64_t groups = ceil_div(sizes.features, m.group_size);
    const int64_t row_bytes = groups * (m.group_size + 2 * kBlock + 2) * static_cast<int64_t>(sizeof(float));
    const InputBytes routed = resize_mixtures();
    own_bytes_ = std::max(ceil_div(kOwnRows * row_bytes, 64) * 64 + 64, routed.own);
    own_.resize(max_threads * own_bytes_);
    shared_.resize(std::max((ceil_div(max_rows, kLanes) + 1) * kLanes * row_bytes + 64, routed.shared));
}

void Decoder::forward(const Pass& pass, const Isa& isa, int threads) {
    Regions& alike = pass.rows > kOwnRows ? many_rows_ : few_rows_;
    run_team(std::min(threads, max_threads_), team_, alike, [&](Team& team) { DecoderPass(*this, pass, isa, team).run(); });
}

}  // namespace amq
