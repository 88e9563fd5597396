// The job of linear.h, and calls as two parallel loops over it: x into panels, then tiles of all parts.

#include "linear.h"

#include <algorithm>
#include <memory>

#include "activations.h"
#include "amq_formats.h"
#include "threads.h"
#include "vector.h"

namespace amq {
namespace {

#define AMQ_BITS(name, levels, unit_codes, unit_bytes) bits_of(levels),
constexpr int kBits[] = {AMQ_FORMATS(AMQ_BITS)};
#undef AMQ_BITS

// Memory of the calling thread that grows to what the largest call needed, so that a call does not fault in new pages.
class Workspace {
public:
    // `bytes` bytes, aligned to a cache line, kept until the next call on this thread.
    static char* get(size_t bytes) {
        static thread_local Workspace workspace;
        if (bytes > workspace.size_) {
            workspace.memory_.reset(new char[bytes + kAlignment]);
            workspace.size_ = bytes;
        }
        const uintptr_t address = reinterpret_cast<uintptr_t>(workspace.memory_.get());
        return workspace.memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
    }

private:
    static constexpr size_t kAlignment = 64;
    std::unique_ptr<char[]> memory_;
    size_t size_ = 0;  // what can be used wherever the aligned part begins
};

// The kernel for `rows` rows, and the panels that it wants.
LinearKernel choose(const LinearKernels& kernels, Mode activations, int64_t rows, Panels& panels) {
    const int mode = static_cast<int>(activations);
    if (rows <= kGemvRows) {
        panels.rows = rows == 3 ? 4 : static_cast<int>(rows);
        panels.step = activations == Mode::int8 ? kStep : 1;
        return kernels.gemv[mode][panels.rows];
    }
    panels.rows = kernels.gemm_rows[mode];
    panels.step = kernels.gemm_step[mode];
    return kernels.gemm[mode];
}

constexpr size_t kCacheLine = 64;

constexpr int any_tiled() {
    for (int format = 0;; ++format)
        if (kBits[format] > 0) return format;
}
constexpr int kAnyTiled = any_tiled();

int64_t part_tile_bytes(const LinearPart& part, int64_t in_features, int64_t group_size) {
    if (part.format < 0) return kLanes * in_features * element_bytes(part.element);
    return tile_bytes(kBits[part.format], in_features, group_size, kLanes);
}

}  // namespace

int64_t tile_cost(const LinearPart& part, const LinearCall& call) {
    return part_tile_bytes(part, call.in_features, call.group_size) * (8 + call.rows) / 8;
}

LinearJob::LinearJob(const LinearCall& call, const Isa& isa) : call_(call), isa_(isa), kernels_(isa.linear()) {
    task_.rows = call.rows;
    task_.in_features = call.in_features;
    task_.group_size = call.group_size;
    task_.y_stride = call.y_stride;
    Panels& panels = task_.panels;
    choose(kernels_[kAnyTiled], call.mode, call.rows, panels);  // all formats want the same panels
    packed_ = std::any_of(call.parts.begin(), call.parts.end(), [](const LinearPart& part) { return part.format >= 0; });
    const int64_t multiple = std::max(kBlock, panels.step);
    panels.n_panels = ceil_div(call.rows, panels.rows);
    panels.group_stride = ceil_div(call.group_size, multiple) * multiple;
}

size_t LinearJob::memory_bytes() const {
    const size_t element = call_.mode == Mode::int8 ? 1 : sizeof(float), groups = padded_rows() * task_.n_groups();
    return ceil_div(groups * task_.panels.group_stride * element, kCacheLine) * kCacheLine + 2 * groups * sizeof(float);
}

void LinearJob::place(char* memory) {
    const int64_t scales = padded_rows() * task_.n_groups();
    task_.x = memory;
    task_.x_scale = reinterpret_cast<float*>(memory + memory_bytes()) - 2 * scales;
    task_.x_sum = task_.x_scale + scales;
}

void LinearJob::make_input(int64_t begin, int64_t end) const {
    if (!packed_) return;  // the rest reads x itself
    const ActivationArgs args = {call_.x, call_.x_stride, call_.x_rows, call_.rows, call_.in_features,
                                 call_.group_size, task_.n_groups(), task_.panels, const_cast<void*>(task_.x),
                                 const_cast<float*>(task_.x_scale), const_cast<float*>(task_.x_sum), call_.rotated};
    if (call_.mode == Mode::int8) return quantize_rows(isa_, args, begin, end);
    copy_panels(isa_, args, begin / task_.panels.rows, end / task_.panels.rows);
}

int64_t LinearJob::tile_cost(const LinearPart& part) const {
    if (call_.rows > kGemvRows) return 1;
    return part_tile_bytes(part, call_.in_features, call_.group_size);
}

int64_t LinearJob::cost() const {
    int64_t total = 0;
    for (size_t part = 0; part < call_.parts.size(); ++part) total += n_tiles(part) * tile_cost(call_.parts[part]);
    return total;
}

void LinearJob::run(int64_t begin, int64_t end) const {
    for (size_t part = 0; part < call_.parts.size(); ++part) {
        const int64_t cost = tile_cost(call_.parts[part]), tiles = n_tiles(part);
        const int64_t first = std::clamp<int64_t>(ceil_div(begin, cost), 0, tiles);
        const int64_t last = std::clamp<int64_t>(ceil_div(end, cost), 0, tiles);
        if (first < last) run_tiles(part, first, last);
        begin -= tiles * cost;
        end -= tiles * cost;
    }
}

void LinearJob::run_tiles(size_t part, int64_t begin, int64_t end) const {
    int64_t column = 0;
    for (size_t before = 0; before < part; ++before) column += call_.parts[before].out_features;
    const LinearPart& weight = call_.parts[part];
    if (weight.format < 0) return run_dense(weight, column, begin * kLanes, std::min(end * kLanes, weight.out_features));
    LinearTask task = task_;
    task.data = weight.data;
    task.tile_bytes = tile_bytes(kBits[weight.format], call_.in_features, call_.group_size, kLanes);
    task.out_features = weight.out_features;
    task.y = call_.y + column;
    task.bias = weight.bias;
    Panels same;
    choose(kernels_[weight.format], call_.mode, call_.rows, same)(task, begin, end);
}

void LinearJob::run_dense(const LinearPart& weight, int64_t column, int64_t begin, int64_t end) const {
    const DenseKernel kernel = isa_.vector()->dense[static_cast<int>(weight.element)];
    float* y = call_.y + column;
    if (call_.x_rows == nullptr) {
        kernel(weight.data, call_.in_features, begin, end, call_.x, call_.x_stride, call_.rows, y, call_.y_stride);
    } else {
        for (int64_t row = 0; row < call_.rows; ++row)
            kernel(weight.data, call_.in_features, begin, end, call_.x + call_.x_rows[row] * call_.x_stride, 0, 1,
                   y + row * call_.y_stride, 0);
    }
    if (weight.bias == nullptr) return;
    for (int64_t row = 0; row < call_.rows; ++row)
        for (int64_t n = begin; n < end; ++n) y[row * call_.y_stride + n] += weight.bias[n];
}

int64_t LinearJob::n_tiles() const {
    int64_t total = 0;
    for (size_t part = 0; part < call_.parts.size(); ++part) total += n_tiles(part);
    return total;
}

void LinearJob::run_tiles(int64_t begin, int64_t end) const {
    for (size_t part = 0; part < call_.parts.size(); ++part) {
        const int64_t tiles = n_tiles(part), first = std::max<int64_t>(begin, 0), last = std::min(end, tiles);
        if (first < last) run_tiles(part, first, last);
        begin -= tiles;
        end -= tiles;
    }
}

void LinearJob::fetch(int64_t begin, int64_t end) const {
    constexpr int64_t kStreams = 3, kBytes = 2048;  // as the kernels read and fetch ahead (linear_body.h)
    for (size_t part = 0; part < call_.parts.size(); ++part) {
        const LinearPart& weight = call_.parts[part];
        const int64_t tiles = n_tiles(part), first = std::max<int64_t>(begin, 0), last = std::min(end, tiles);
        const int64_t bytes = part_tile_bytes(weight, call_.in_features, call_.group_size);
        for (int64_t stream = 0; stream < kStreams && first < last; ++stream) {
            const uint8_t* p = weight.data + (first + stream * ((last - first) / kStreams)) * bytes;
            for (int64_t line = 0; line < std::min(kBytes, bytes); line += kLineBytes) __builtin_prefetch(p + line);
        }
        begin -= tiles;
        end -= tiles;
    }
}

namespace {

// What one thread handles, and reads, while another one wakes up.
constexpr int64_t kElementsPerThread = 1 << 15, kBytesPerThread = 1 << 14;

// Up to kCallRows rows.
void run_rows(const LinearCall& call, const Isa& isa, int threads) {
    LinearJob job(call, isa);
    job.place(Workspace::get(job.memory_bytes()));
    const int64_t unit = job.row_unit(), units = job.padded_rows() / unit;
    parallel_rows(units, static_cast<int>(std::min<int64_t>(threads, 1 + call.rows * call.in_features / kElementsPerThread)),
                  [&](int64_t begin, int64_t end) { job.make_input(begin * unit, end * unit); });
    const int64_t total = job.cost(), useful = call.rows <= kGemvRows ? 1 + total / kBytesPerThread : total;
    parallel_rows(total, static_cast<int>(std::min<int64_t>(threads, useful)),
                  [&](int64_t begin, int64_t end) { job.run(begin, end); });
}

// `call` in parts of at most kCallRows rows.
template <class Visit>
void each_chunk(const LinearCall& call, const Visit& visit) {
    LinearCall some = call;
    for (int64_t first = 0; first < call.rows; first += kCallRows) {
        if (call.x_rows) some.x_rows = call.x_rows + first;
        else some.x = call.x + first * call.x_stride;
        some.y = call.y + first * call.y_stride;
        some.rows = std::min<int64_t>(kCallRows, call.rows - first);
        visit(some);
    }
}

// Places begin … end − 1 of lists of `sizes[i]` places that lie end to end, list by list: visit(i, first, last).
template <class Visit>
void each_list(const std::vector<int64_t>& sizes, int64_t begin, int64_t end, const Visit& visit) {
    for (size_t i = 0; i < sizes.size() && end > 0; ++i) {
        const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, sizes[i]);
        if (first < last) visit(i, first, last);
        begin -= sizes[i];
        end -= sizes[i];
    }
}

// Calls of one part each, of at most kCallRows rows.
void run_group(const std::vector<LinearCall>& calls, const Isa& isa, int threads) {
    std::vector<LinearJob> jobs;
    std::vector<size_t> places;
    std::vector<int64_t> units, costs;
    size_t bytes = 0;
    int64_t elements = 0, all_units = 0, total = 0;
    for (const LinearCall& call : calls) {
        const LinearJob& job = jobs.emplace_back(call, isa);
        places.push_back(bytes);
        bytes += ceil_div(job.memory_bytes(), kCacheLine) * kCacheLine;
        elements += call.rows * call.in_features;
        all_units += units.emplace_back(job.padded_rows() / job.row_unit());
        total += costs.emplace_back(job.n_tiles(0) * tile_cost(call.parts[0], call));
    }
    char* memory = Workspace::get(bytes);
    for (size_t i = 0; i < jobs.size(); ++i) jobs[i].place(memory + places[i]);
    const auto useful = [&](int64_t work, int64_t per_thread) {
        return static_cast<int>(std::min<int64_t>(threads, 1 + work / per_thread));
    };
    parallel_rows(all_units, useful(elements, kElementsPerThread), [&](int64_t begin, int64_t end) {
        each_list(units, begin, end, [&](size_t i, int64_t first, int64_t last) {
            jobs[i].make_input(first * jobs[i].row_unit(), last * jobs[i].row_unit());
        });
    });
    parallel_rows(total, useful(total, kBytesPerThread), [&](int64_t begin, int64_t end) {
        each_list(costs, begin, end, [&](size_t i, int64_t first, int64_t last) {
            const int64_t cost = tile_cost(calls[i].parts[0], calls[i]);  // a tile belongs to the range that it begins in
            jobs[i].run_tiles(0, ceil_div(first, cost), ceil_div(last, cost));
        });
    });
}

}  // namespace

void linear(const LinearCall& call, const Isa& isa, int threads) {
    each_chunk(call, [&](const LinearCall& some) { run_rows(some, isa, threads); });
}

void linear_grouped(const std::vector<LinearCall>& calls, const Isa& isa, int threads) {
    constexpr int64_t kGroupRows = 2048;  // of x, laid out at once
    std::vector<LinearCall> some;
    int64_t rows = 0;
    const auto run = [&] {
        if (!some.empty()) run_group(some, isa, threads);
        some.clear();
        rows = 0;
    };
    for (const LinearCall& call : calls)
        each_chunk(call, [&](const LinearCall& chunk) {
            if (rows + chunk.rows > kGroupRows) run();
            some.push_back(chunk);
            rows += chunk.rows;
        });
    run();
}

}  // namespace amq
