// Steps of linears with an activation between: decoder.h's Mlp and PerLayerInput.

#include "decoder_pass.h"

namespace amq {

void DecoderPass::apply(const Step& step, const Mlp& op) {
    const int64_t w = op.wide(), parts = static_cast<int64_t>(op.in.parts.size());
    const auto kernel = vector_.activate[static_cast<int>(op.activation)];
    const auto activate = [&](int64_t begin, int64_t end) {  // features, where gate and up are there
        for (int64_t row = 0; row < pass_.rows; ++row)
            kernel(wide(row) + begin, wide(row) + (op.in.out_features() - w) + begin, op.limit, end - begin);
    };
    {
        const LinearCall c = call(op.in, made_row(0), d_.input_stride_, wide(0), d_.wide_stride_, pass_.rows);
        LinearJob job(c, isa_);
        make_input(job, pass_.rows, [&](int64_t row) { read_stream(step, row, made_row(row)); });
        if (op.in.parts[0].out_features == w) {
            team_.share(job.n_tiles(0), kTileUnit, [&](int64_t begin, int64_t end) {
                for (int64_t part = 0; part < parts; ++part) job.run_tiles(part, begin, end);
                activate(begin * kLanes, std::min(end * kLanes, w));
            });
        } else {  // both in one linear, whose tiles may hold rows of both
            team_.share(job.n_tiles(0), kTileUnit, [&](int64_t begin, int64_t end) { job.run_tiles(0, begin, end); });
            team_.wait();
            team_.share(w, kLanes, activate);
        }
        team_.wait();
    }
    const LinearCall c = call(op.down, wide(0), d_.wide_stride_, output(0), m_.hidden, pass_.rows);
    LinearJob job(c, isa_);
    make_input(job, pass_.rows, [](int64_t) {});
    run_and_add(step, job);
}

void DecoderPass::apply(const Step& step, const PerLayerInput& op) {
    const int64_t w = op.out.in_features, columns = m_.per_layer.table.columns;
    const auto kernel = vector_.activate[static_cast<int>(op.activation)];
    {
        const LinearCall c = call(op.in, made_row(0), d_.input_stride_, wide(0), d_.wide_stride_, pass_.rows);
        LinearJob job(c, isa_);
        make_input(job, pass_.rows, [&](int64_t row) { read_stream(step, row, made_row(row)); });
        team_.share(job.n_tiles(0), kTileUnit, [&](int64_t begin, int64_t end) {
            job.run_tiles(0, begin, end);
            const int64_t first = begin * kLanes, count = std::min(end * kLanes, w) - first;
            for (int64_t row = 0; row < pass_.rows; ++row) {
                const float* embedding = d_.per_layer_.data() + row * columns + op.index * w;
                kernel(wide(row) + first, embedding + first, 0, count);
            }
        });
        team_.wait();
    }
    const LinearCall c = call(op.out, wide(0), d_.wide_stride_, output(0), m_.hidden, pass_.rows);
    LinearJob job(c, isa_);
    make_input(job, pass_.rows, [](int64_t) {});
    run_and_add(step, job);
}

}  // namespace amq
