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
            workspace.size_ = bytes + kAlignment;
            workspace.memory_.reset(new char[workspace.size_]);
        }
        const uintptr_t address = reinterpret_cast<uintptr_t>(workspace.memory_.get());
        return workspace.memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
    }

private:
    static constexpr size_t kAlignment = 64;
    std::unique_ptr<char[]> memory_;
    size_t size_ = 0;
};

struct Plan {
    std::vector<LinearTask> tasks;
    std::vector<LinearKernel> kernels;
    std::vector<int64_t> ends;  // running sums of what the tiles of the parts cost
    std::vector<int64_t> tile_costs;
};

// The kernel for `rows` rows, and the panels that it wants.
LinearKernel choose(const LinearKernels& kernels, int mode, int64_t rows, Panels& panels) {
    if (rows <= kGemvRows) {
        panels.rows = rows == 3 ? 4 : static_cast<int>(rows);
        panels.step = mode == static_cast<int>(Mode::int8) ? kStep : 1;
        return kernels.gemv[mode][panels.rows];
    }
    panels.rows = kernels.gemm_rows[mode];
    panels.step = kernels.gemm_step[mode];
    return kernels.gemm[mode];
}

// Activations of rows of the call from `first` on into the workspace; fills what tasks need to find them.
void make_panels(const LinearCall& call, int64_t first, int64_t rows, Isa isa, int threads, LinearTask& task) {
    Panels& panels = task.panels;
    const bool int8 = call.mode == Mode::int8;
    const int64_t padded_rows = ceil_div(rows, panels.rows) * panels.rows;
    const size_t x_bytes = padded_rows * panels.n_groups * panels.group_stride * (int8 ? 1 : sizeof(float));
    const size_t scales = padded_rows * panels.n_groups;
    char* memory = Workspace::get(x_bytes + 2 * scales * sizeof(float) + 64);
    float* x_scale = reinterpret_cast<float*>(memory + ceil_div(x_bytes, 64) * 64);
    const ActivationArgs args = {call.x + first * call.x_stride, call.x_stride, rows, call.in_features,
                                 call.group_size, panels, memory, x_scale, x_scale + scales};
    constexpr int64_t kElementsPerThread = 1 << 15;  // what one thread handles while another one wakes up
    const int64_t useful = 1 + rows * call.in_features / kElementsPerThread;
    parallel_rows(padded_rows, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t begin, int64_t end) {
        int8 ? quantize_rows(isa, args, begin, end) : copy_rows(args, begin, end);
    });
    task.x = memory;
    task.x_scale = args.x_scale;
    task.x_sum = args.x_sum;
}

// Up to kGemmRows rows of a call.
void run_rows(const LinearCall& call, int64_t first, int64_t rows, Isa isa, int threads) {
    const LinearKernels* kernels = kernels_for(isa);
    const int mode = static_cast<int>(call.mode);
    LinearTask shared{};
    shared.rows = rows;
    shared.in_features = call.in_features;
    shared.group_size = call.group_size;
    shared.y_stride = call.y_stride;
    LinearKernel kernel = choose(kernels[call.parts[0].format], mode, rows, shared.panels);
    shared.panels.n_groups = ceil_div(call.in_features, call.group_size);
    shared.panels.group_stride = ceil_div(call.group_size, std::max(kBlock, shared.panels.step)) *
                                 std::max(kBlock, shared.panels.step);
    make_panels(call, first, rows, isa, threads, shared);

    std::vector<LinearTask> tasks;
    std::vector<LinearKernel> chosen;
    std::vector<int64_t> ends;
    int64_t total = 0, column = 0;
    for (const LinearPart& part : call.parts) {
        const int bits = kBits[part.format];
        LinearTask task = shared;
        task.data = part.data;
        task.tile_bytes = tile_bytes(bits, call.in_features, call.group_size, kLanes);
        task.out_features = part.out_features;
        task.bias = call.bias ? call.bias + column : nullptr;
        task.y = call.y + first * call.y_stride + column;
        tasks.push_back(task);
        Panels same = shared.panels;
        kernel = choose(kernels[part.format], mode, rows, same);
        chosen.push_back(kernel);
        column += part.out_features;
        // Few rows wait for memory, many for the multiplications.
        total += ceil_div(part.out_features, kLanes) * (rows <= kGemvRows ? task.tile_bytes : 1);
        ends.push_back(total);
    }
    constexpr int64_t kBytesPerThread = 1 << 14, kTilesPerThread = 1;
    const int64_t useful = 1 + total / (rows <= kGemvRows ? kBytesPerThread : kTilesPerThread);
    parallel_rows(total, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t begin, int64_t end) {
        int64_t base = 0;
        for (size_t i = 0; i < tasks.size(); base = ends[i++]) {
            const int64_t cost = rows <= kGemvRows ? tasks[i].tile_bytes : 1;
            const int64_t n_tiles = (ends[i] - base) / cost;
            // A tile belongs to the thread in whose range it begins.
            const int64_t from = std::clamp<int64_t>(ceil_div(begin - base, cost), 0, n_tiles);
            const int64_t to = std::clamp<int64_t>(ceil_div(end - base, cost), 0, n_tiles);
            if (from < to) chosen[i](tasks[i], from, to);
        }
    });
}

}  // namespace

void linear(const LinearCall& call, Isa isa, int threads) {
    for (int64_t first = 0; first < call.rows; first += kGemmRows)
        run_rows(call, first, std::min<int64_t>(kGemmRows, call.rows - first), isa, threads);
}

}  // namespace amq
