// One call of linear.h: x into panels, then tiles of all parts over threads, in one parallel region.

#include "linear.h"

#include <algorithm>
#include <memory>

#include "activations.h"
#include "amq_formats.h"
#include "threads.h"

namespace amq {
namespace {

#define AMQ_BITS(name, levels, unit_codes, unit_bytes) bits_of(levels),
constexpr int kBits[] = {AMQ_FORMATS(AMQ_BITS)};
#undef AMQ_BITS

const LinearKernels* kernels_for(Isa isa) {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::portable: break;
        case Isa::avx2: return linear_kernels_avx2();
        case Isa::avx512: return linear_kernels_avx512();
        case Isa::avx512vnni: return linear_kernels_avx512vnni();
        case Isa::amx: return linear_kernels_amx();
    }
#endif
    (void)isa;
    return linear_kernels_portable();
}

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

// The tiles of one part, and what they cost together: bytes where few rows wait for memory, tiles where many wait for
// the multiplications.
struct Work {
    LinearTask task;
    LinearKernel kernel;
    int64_t n_tiles, tile_cost;
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

// Puts task.rows rows of the call from `first` on into the workspace, and into the task where they are.
void make_panels(const LinearCall& call, int64_t first, Isa isa, int threads, LinearTask& task) {
    const Panels& panels = task.panels;
    const int64_t rows = task.rows;
    const bool int8 = call.mode == Mode::int8;
    const int64_t n_groups = task.n_groups(), padded_rows = panels.n_panels * panels.rows;
    const size_t x_bytes = padded_rows * n_groups * panels.group_stride * (int8 ? 1 : sizeof(float));
    const size_t scales = padded_rows * n_groups;
    char* memory = Workspace::get(x_bytes + 2 * scales * sizeof(float) + 64);
    float* x_scale = reinterpret_cast<float*>(memory + ceil_div(x_bytes, 64) * 64);
    const ActivationArgs args = {call.x + first * call.x_stride, call.x_stride, rows, call.in_features,
                                 call.group_size, n_groups, panels, memory, x_scale, x_scale + scales};
    constexpr int64_t kElementsPerThread = 1 << 15;  // what one thread handles while another one wakes up
    const int64_t useful = 1 + rows * call.in_features / kElementsPerThread;
    parallel_rows(panels.n_panels, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t begin, int64_t end) {
        int8 ? quantize_panels(isa, args, begin, end) : copy_panels(args, begin, end);
    });
    task.x = memory;
    task.x_scale = args.x_scale;
    task.x_sum = args.x_sum;
}

std::vector<Work> plan(const LinearCall& call, const LinearKernels* kernels, LinearTask task) {
    std::vector<Work> work;
    for (const LinearPart& part : call.parts) {
        task.data = part.data;
        task.tile_bytes = tile_bytes(kBits[part.format], call.in_features, call.group_size, kLanes);
        task.out_features = part.out_features;
        Panels same;
        const LinearKernel kernel = choose(kernels[part.format], call.mode, task.rows, same);
        work.push_back({task, kernel, ceil_div(part.out_features, kLanes), task.rows <= kGemvRows ? task.tile_bytes : 1});
        task.y += part.out_features;
        if (task.bias) task.bias += part.out_features;
    }
    return work;
}

// Runs what lies between the costs `begin` and `end` of all work laid end to end. A tile belongs to the range that it
// begins in.
void run_range(const std::vector<Work>& work, int64_t begin, int64_t end) {
    for (const Work& w : work) {
        const int64_t first = std::clamp<int64_t>(ceil_div(begin, w.tile_cost), 0, w.n_tiles);
        const int64_t last = std::clamp<int64_t>(ceil_div(end, w.tile_cost), 0, w.n_tiles);
        if (first < last) w.kernel(w.task, first, last);
        begin -= w.n_tiles * w.tile_cost;
        end -= w.n_tiles * w.tile_cost;
    }
}

// Up to kCallRows rows of a call, from row `first` on.
void run_rows(const LinearCall& call, int64_t first, int64_t rows, Isa isa, int threads) {
    const LinearKernels* kernels = kernels_for(isa);
    LinearTask task{};
    task.rows = rows;
    task.in_features = call.in_features;
    task.group_size = call.group_size;
    task.y = call.y + first * call.y_stride;
    task.y_stride = call.y_stride;
    task.bias = call.bias;
    choose(kernels[call.parts[0].format], call.mode, rows, task.panels);  // all formats want the same panels
    const int64_t multiple = std::max(kBlock, task.panels.step);
    task.panels.n_panels = ceil_div(rows, task.panels.rows);
    task.panels.group_stride = ceil_div(call.group_size, multiple) * multiple;
    make_panels(call, first, isa, threads, task);

    const std::vector<Work> work = plan(call, kernels, task);
    int64_t total = 0;
    for (const Work& w : work) total += w.n_tiles * w.tile_cost;
    constexpr int64_t kBytesPerThread = 1 << 14;  // what one thread reads while another one wakes up
    const int64_t useful = rows <= kGemvRows ? 1 + total / kBytesPerThread : total;
    parallel_rows(total, static_cast<int>(std::min<int64_t>(threads, useful)),
                  [&](int64_t begin, int64_t end) { run_range(work, begin, end); });
}

}  // namespace

void linear(const LinearCall& call, Isa isa, int threads) {
    for (int64_t first = 0; first < call.rows; first += kCallRows)
        run_rows(call, first, std::min<int64_t>(kCallRows, call.rows - first), isa, threads);
}

}  // namespace amq
