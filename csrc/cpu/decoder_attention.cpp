// Attention of decoder.h: queries, keys and values, their norms and rotation, the cache, and the softmax over it.

#include <algorithm>
#include <cmath>

#include "decoder_pass.h"
#include "rotation.h"

namespace amq {
namespace {

// x ← x · blockdiag(H), H the normalised Walsh–Hadamard matrix of the largest power of two up to kRotation that divides head_dim.
// Of queries and keys alike, so that their products stay; a key's few large features are spread over many, and codes between its
// least and its largest number are the finer. Likewise of values, whose weighted sums turn back, H being its own inverse.
void spread(float* x, int64_t head_dim) {
    int64_t width = kRotation;
    while (head_dim % width) width /= 2;
    const float scale = 1 / std::sqrt(static_cast<float>(width));
    for (float* block = x; block < x + head_dim; block += width) {
        if (width == kRotation) {
            rotate_block(block, block);
            continue;
        }
        for (int64_t half = 1; half < width; half *= 2)
            for (int64_t k = 0; k < width; ++k) {
                if (k & half) continue;
                const float low = block[k], high = block[k + half];
                block[k] = low + high;
                block[k + half] = low - high;
            }
        for (int64_t k = 0; k < width; ++k) block[k] *= scale;
    }
}

// Whether a head's keys and its values of a first page each fit in its place of a page.
constexpr bool first_fits(int64_t head_dim) {
    const int64_t keys = key_bytes(kCaches[kFirstKind], head_dim), values = head_bytes(kCaches[kFirstKind], head_dim) - keys;
    for (const CacheKind& kind : kCaches)
        if (kind.first_apart() && std::max(keys, values) > head_bytes(kind, head_dim)) return false;
    return true;
}
static_assert(first_fits(16) && first_fits(kMaxHeadDim));  // linear in between

}  // namespace

// What biases of keys come to behind the rotary embedding, on average over kMean positions: of features that turn slowly about
// themselves, and about nothing of the others. What all keys have in common changes no softmax, but these biases are a hundred times
// the rest of a key in some heads of Qwen 2.5. Empty where there are none, or where scores are more than a softmax's.
std::vector<float> common_key(const DecoderModel& m, int64_t index) {
    constexpr double kMean = 4096;
    const Attention& a = std::get<Attention>(m.steps[index].op);
    const bool shared = std::any_of(m.steps.begin(), m.steps.end(), [&](const Step& step) {
        const auto* other = std::get_if<Attention>(&step.op);
        return other && other->cache_of == index;
    });
    if (a.cache_of >= 0 || shared || a.sinks || a.softcap > 0 || a.k_norm || a.k_norm_all || m.context < 2) return {};
    std::vector<float> common(a.kv_features(), 0.0f);
    int64_t first = -a.q_features();
    for (const LinearPart& part : a.qkv.parts) {
        for (int64_t n = std::max<int64_t>(0, -first); part.bias && n < part.out_features && first + n < a.kv_features(); ++n)
            common[first + n] = part.bias[n];
        first += part.out_features;
    }
    if (std::all_of(common.begin(), common.end(), [](float bias) { return bias == 0; })) return {};
    if (a.rope < 0) return common;
    const Rope& rope = m.ropes[a.rope];
    const int64_t half = rope.rotary / 2;
    for (float* head = common.data(); head < common.data() + common.size(); head += a.head_dim)
        for (int64_t i = 0; i < half; ++i) {
            const double angle = std::atan2(rope.sin[0][half + i], rope.cos[0][half + i]);  // from one position to the next
            const double length = angle == 0 ? 1 : std::sin(kMean * angle / 2) / (kMean * std::sin(angle / 2));
            const double middle = angle * (kMean - 1) / 2, size = length * rope.cos[0][i];
            const double x = head[i], y = head[half + i];
            head[i] = static_cast<float>(size * (x * std::cos(middle) - y * std::sin(middle)));
            head[half + i] = static_cast<float>(size * (y * std::cos(middle) + x * std::sin(middle)));
        }
    return common;
}

CacheView DecoderPass::head_cache(const Attention& op, const Segment& segment, int64_t kv_head) const {
    return {pass_.cache + op.cache_offset + kv_head * op.head_bytes(), segment.pages, m_.page_bytes,
            key_bytes(op.kind(), op.head_dim)};
}

// Of a first page that is kept apart: keys in a page of their own, values where the page's keys and values would be.
CacheView DecoderPass::first_cache(const Attention& op, const Segment& segment, int64_t kv_head) const {
    const int64_t values = (segment.pages[0] - *segment.first) * m_.page_bytes;
    return {pass_.cache + op.cache_offset + kv_head * op.head_bytes(), segment.first, m_.page_bytes, values};
}

// Where pages are rounded: keys of the sequence's page number `page`, one that the segment writes to. Of the last one they are in
// its spare pages, for the passes to come.
FreshKeys DecoderPass::fresh_keys(const Attention& op, const Segment& segment, int64_t kv_head, int64_t page) const {
    if (!op.kind().rounds_pages()) return {};
    if (page == segment.last_page()) {
        uint8_t* const part = pass_.cache + op.cache_offset + kv_head * op.head_bytes();
        return {{part + segment.spare[0] * m_.page_bytes, part + segment.spare[1] * m_.page_bytes}};
    }
    const int64_t half = FreshKeys::half_bytes(op.head_dim), place = segment.fresh + page - segment.first_page();
    uint8_t* const keys = d_.fresh_.data() + place * m_.fresh_bytes + op.fresh_offset + kv_head * 2 * half;
    return {{keys, keys + half}};
}

// Makes room in the spare pages: a page that earlier passes began, and this one leaves behind.
void DecoderPass::move_begun(const Attention& op) {
    const int64_t total = static_cast<int64_t>(pass_.segments.size()) * op.n_kv_heads;
    for (int64_t item = team_.begin(total); item < team_.end(total); ++item) {
        const Segment& segment = pass_.segments[item / op.n_kv_heads];
        if (segment.position % kPage == 0 || segment.left_pages() == 0) continue;
        const FreshKeys from = fresh_keys(op, segment, item % op.n_kv_heads, segment.last_page());
        const FreshKeys to = fresh_keys(op, segment, item % op.n_kv_heads, segment.first_page());
        for (int half = 0; half < 2; ++half) std::copy_n(from.half[half], FreshKeys::half_bytes(op.head_dim), to.half[half]);
    }
}

// Codes of the pages that are full now, but for first ones, which have theirs; with a barrier behind that.
void DecoderPass::round_pages(const Attention& op) {
    int64_t total = 0, item = 0;
    const auto first = [](const Segment& segment) { return std::max<int64_t>(1, segment.first_page()); };
    const auto stop = [](const Segment& segment) { return segment.first_page() + segment.full_pages(); };
    for (const Segment& segment : pass_.segments) total += std::max<int64_t>(0, stop(segment) - first(segment)) * op.n_kv_heads;
    if (total == 0) return;
    for (const Segment& segment : pass_.segments)
        for (int64_t page = first(segment); page < stop(segment); ++page)
            for (int64_t kv_head = 0; kv_head < op.n_kv_heads; ++kv_head, ++item)
                if (item >= team_.begin(total) && item < team_.end(total))
                    vector_.round_page[op.cache](fresh_keys(op, segment, kv_head, page),
                                                 head_cache(op, segment, kv_head).page(page * kPage),
                                                 static_cast<int>(op.head_dim));
    team_.wait();
}

// Keys and values of a row's KV head into the cache; `key` and `value` [head_dim] are changed in place.
void DecoderPass::store_head(const Attention& op, const Segment& segment, int64_t position, int64_t kv_head, float* key,
                             float* value) {
    if (op.keys_are_values) std::copy_n(key, op.head_dim, value);
    if (op.v_norm) vector_.rms_norm(value, op.v_norm, m_.epsilon, op.head_dim, value);
    if (op.k_norm) vector_.rms_norm(key, op.k_norm, m_.epsilon, op.head_dim, key);
    rotate(op, segment, position, key);
    const bool first = op.kind().first_apart() && position < kPage;
    const int kind = first ? kFirstKind : op.cache;
    if (op.kind().codes_keys()) {
        if (!op.common_key.empty())
            for (int64_t k = 0; k < op.head_dim; ++k) key[k] -= op.common_key[kv_head * op.head_dim + k];
        if (kCaches[kind].spreads_keys()) spread(key, op.head_dim);
    }
    if (op.kind().spreads_values()) spread(value, op.head_dim);
    vector_.store[kind](first ? first_cache(op, segment, kv_head) : head_cache(op, segment, kv_head), position, key, value,
                        static_cast<int>(op.head_dim), fresh_keys(op, segment, kv_head, position / kPage));
}

void DecoderPass::rotate(const Attention& op, const Segment& segment, int64_t position, float* x) {
    if (op.rope < 0) return;
    const Rope& rope = m_.ropes[op.rope];
    const int64_t half = rope.rotary / 2;
    const bool is_long = segment.long_text && rope.cos[1];
    vector_.rotate(x, rope.cos[is_long] + position * half, rope.sin[is_long] + position * half, half);
}

void DecoderPass::rotate_and_store(const Attention& op) {
    if (op.q_norm_all) {
        for (int64_t row = team_.begin(pass_.rows); row < team_.end(pass_.rows); ++row) {
            float *q = wide(row), *k = q + op.q_features();
            vector_.rms_norm(q, op.q_norm_all, m_.epsilon, op.q_features(), q);
            vector_.rms_norm(k, op.k_norm_all, m_.epsilon, op.kv_features(), k);
        }
        team_.wait();
    }
    const int64_t own_heads = op.cache_of < 0 ? op.n_kv_heads : 0;
    const int64_t per_row = op.n_heads + own_heads, total = pass_.rows * per_row, end = team_.end(total);
    for (int64_t item = team_.begin(total); item < end; ++item) {
        const int64_t row = item / per_row, head = item % per_row;
        const Segment& segment = segment_of(row);
        const int64_t position = segment.position + row - segment.first_row;
        if (head >= op.n_heads) {
            const int64_t kv_head = head - op.n_heads;
            float* key = wide(row) + op.q_features() + kv_head * op.head_dim;
            alignas(64) float own[kMaxHeadDim];
            store_head(op, segment, position, kv_head, key, op.keys_are_values ? own : key + op.kv_features());
            continue;
        }
        float* q = wide(row) + head * op.q_stride();
        if (op.q_norm) vector_.rms_norm(q, op.q_norm, m_.epsilon, op.head_dim, q);
        rotate(op, segment, position, q);
        const float scale = op.scale * (op.position_scale ? op.position_scale[position] : 1.0f);
        for (int64_t k = 0; k < op.head_dim; ++k) q[k] *= scale;
        if (op.kind().spreads_keys()) spread(q, op.head_dim);
    }
}

void DecoderPass::apply(const Step& step, const Attention& op) {
    const bool rounds = op.kind().rounds_pages() && op.cache_of < 0;
    if (rounds) move_begun(op);
    project_stream(step, op.qkv);
    rotate_and_store(op);
    team_.wait();
    if (rounds) round_pages(op);
    attend(op);
    team_.wait();
    const LinearCall c = call(op.o, made_row(0), d_.input_stride_, output(0), m_.hidden, pass_.rows);
    LinearJob job(c, isa_);
    make_input(job, pass_.rows, [&](int64_t row) {
        if (split()) merge_row(op, row);
        if (!op.gated) return;
        for (int64_t head = 0; head < op.n_heads; ++head)
            vector_.gate_sigmoid(made_row(row) + head * op.head_dim, wide(row) + head * op.q_stride() + op.head_dim,
                                 op.head_dim);
    });
    run_and_add(step, job);
}

// Work of attention: for every segment, KV head and tile of query rows (token by token, the head's group within) all
// positions, or one span of them.
void DecoderPass::attend(const Attention& op) {
    const int64_t group = op.group();
    const auto each = [&](const auto& visit) {
        for (const Segment& segment : pass_.segments)
            for (int64_t kv_head = 0; kv_head < op.n_kv_heads; ++kv_head)
                for (Rows rows{0, 0}; rows.end < segment.rows * group;) {
                    rows = tile(op, segment, rows.end);
                    const int64_t end = segment.position + (rows.end - 1) / group + 1;
                    const int64_t step = split() ? static_cast<int64_t>(kSpan) : end;
                    for (int64_t begin = first_span(op, segment, rows.begin) / step * step; begin < end; begin += step)
                        visit(segment, kv_head, rows, begin, std::min(begin + step, end));
                }
    };
    int64_t total = 0;
    each([&](const Segment&, int64_t, Rows, int64_t begin, int64_t end) { total += end - begin; });
    team_.share(total, 1, [&](int64_t mine, int64_t not_mine) {
        int64_t before = 0;
        each([&](const Segment& segment, int64_t kv_head, Rows rows, int64_t begin, int64_t end) {
            if (before >= mine && before < not_mine) attend_item(op, segment, kv_head, rows, begin, end);
            before += end - begin;
        });
    });
}

// The tile of a segment's query row: query_rows of them, fewer where a page of positions ends, because rows of one page see the same
// keys in fp16.
DecoderPass::Rows DecoderPass::tile(const Attention& op, const Segment& segment, int64_t row) const {
    const int64_t page = (segment.position + row / op.group()) / kPage * kPage - segment.position;
    const int64_t first = std::max<int64_t>(0, page) * op.group(), end = std::min(page + kPage, segment.rows) * op.group();
    const int64_t begin = first + (row - first) / vector_.query_rows * vector_.query_rows;
    return {begin, std::min(begin + vector_.query_rows, end)};
}

// The first position of a span that the query row `first` of a KV head, or one after it, sees.
int64_t DecoderPass::first_span(const Attention& op, const Segment& segment, int64_t first) const {
    if (op.window == 0) return 0;
    const int64_t position = segment.position + first / op.group();
    return std::max<int64_t>(0, position - op.window + 1) / kSpan * kSpan;
}

void DecoderPass::attend_item(const Attention& op, const Segment& segment, int64_t kv_head, Rows tile, int64_t begin,
                              int64_t end) {
    const int64_t group = op.group(), first = tile.begin;
    const int head_dim = static_cast<int>(op.head_dim), n_rows = static_cast<int>(tile.end - tile.begin);
    alignas(64) float values[2][kMaxQueryRows][kMaxHeadDim];
    QueryRow rows[kMaxQueryRows];
    Partial sums[kMaxQueryRows], parts[kMaxQueryRows];
    for (int i = 0; i < n_rows; ++i) {
        const int64_t token = (first + i) / group, head = kv_head * group + (first + i) % group;
        const int64_t position = segment.position + token;
        rows[i] = {wide(segment.first_row + token) + head * op.q_stride(),
                   op.window ? std::max<int64_t>(0, position - op.window + 1) : 0, position};
        sums[i] = {-INFINITY, 0, values[0][i]};
        parts[i].values = values[1][i];
        std::fill(values[0][i], values[0][i] + head_dim, 0.0f);
    }
    const CacheView cache = head_cache(op, segment, kv_head);
    const FreshKeys fresh = fresh_keys(op, segment, kv_head, rows[0].last / kPage);
    int64_t p = std::max(begin, rows[0].first / kSpan * kSpan);
    const auto attend_to = [&](int kind, const CacheView& view, const QueryRow* with, int64_t stop) {
        vector_.attend[kind]({view, with, n_rows, head_dim, p, stop, op.softcap, fresh}, parts);
        for (int i = 0; i < n_rows; ++i) vector_.merge(sums[i], parts[i], head_dim);
        p = stop;
    };
    if (p == 0 && op.kind().first_apart()) {
        alignas(64) float turned[kMaxQueryRows][kMaxHeadDim];
        QueryRow with[kMaxQueryRows];
        for (int i = 0; i < n_rows; ++i) {
            std::copy_n(rows[i].q, head_dim, turned[i]);
            if (kCaches[kFirstKind].spreads_keys()) spread(turned[i], head_dim);
            with[i] = {turned[i], rows[i].first, rows[i].last};
        }
        attend_to(kFirstKind, first_cache(op, segment, kv_head), with, std::min<int64_t>(kPage, end));
    }
    while (p < end) attend_to(op.cache, cache, rows, std::min(p / kSpan * kSpan + kSpan, end));
    for (int i = 0; i < n_rows; ++i) {
        const int64_t row = segment.first_row + (first + i) / group, head = kv_head * group + (first + i) % group;
        if (split()) {
            float* out = partial(op, row, head, begin / kSpan);
            out[0] = sums[i].largest;
            out[1] = sums[i].sum;
            std::copy_n(sums[i].values, head_dim, out + 2);
        } else {
            finish_head(op, head, sums[i], input(row) + head * head_dim);
        }
    }
}

float* DecoderPass::partial(const Attention& op, int64_t row, int64_t head, int64_t span) const {
    const int64_t spans = ceil_div(m_.context, kSpan);
    return d_.partials_.data() + ((row * op.n_heads + head) * spans + span) * (op.head_dim + 2);
}

void DecoderPass::finish_head(const Attention& op, int64_t head, Partial& sum, float* out) const {
    const int head_dim = static_cast<int>(op.head_dim);
    if (op.sinks) {
        alignas(64) float nothing[kMaxHeadDim];
        std::fill_n(nothing, head_dim, 0.0f);
        vector_.merge(sum, {op.sinks[head], 1, nothing}, head_dim);
    }
    vector_.finish(sum, head_dim, out);
    if (op.kind().spreads_values()) spread(out, head_dim);
}

// The row of attention's output from what was computed span by span.
void DecoderPass::merge_row(const Attention& op, int64_t row) {
    const Segment& segment = segment_of(row);
    const int64_t token = row - segment.first_row, spans = (segment.position + token) / kSpan + 1;
    const int64_t group = op.group();
    for (int64_t head = 0; head < op.n_heads; ++head) {
        alignas(64) float values[kMaxHeadDim];
        Partial sum{-INFINITY, 0, values};
        std::fill_n(values, op.head_dim, 0.0f);
        const Rows rows = tile(op, segment, token * group + head % group);
        for (int64_t span = first_span(op, segment, rows.begin) / kSpan; span < spans; ++span) {
            float* part = partial(op, row, head, span);
            vector_.merge(sum, {part[0], part[1], part + 2}, static_cast<int>(op.head_dim));
        }
        finish_head(op, head, sum, made_row(row) + head * op.head_dim);
    }
}

}  // namespace amq
