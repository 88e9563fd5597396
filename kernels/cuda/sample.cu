// SampleCall: arguments checked, scratch laid out, three launches. See sample.cuh.

#include "sample.cuh"

namespace amq {

struct RowScratch {
    int64_t totals, keys, tokens, masks, candidates;  // bytes of one row's
    int64_t all() const { return totals + keys + tokens + masks + candidates; }
};

constexpr int64_t kPlaceBytes = 16;

int regions_of(const SampleCall& call) { return (call.vocabulary + kRegion - 1) / kRegion; }

RowScratch scratch_of(const SampleCall& call) {
    const int64_t regions = regions_of(call);
    return {8 * regions, 4 * regions, 4 * regions, 4 * kRegionWords * regions,
            static_cast<int64_t>(sizeof(Candidate)) * kRegion * regions};
}

SampleArguments arguments_of(const SampleCall& call) {
    const RowScratch row = scratch_of(call);
    char* next = reinterpret_cast<char*>(call.scratch);
    const auto take = [&](int64_t bytes) {
        char* const taken = next;
        next += bytes;
        return taken;
    };
    SampleArguments arguments{};
    arguments.call = call;
    arguments.regions = regions_of(call);
    arguments.place = reinterpret_cast<int32_t*>(take(kPlaceBytes));
    arguments.totals = reinterpret_cast<uint64_t*>(take(call.rows * row.totals));
    arguments.candidates = reinterpret_cast<Candidate*>(take(call.rows * row.candidates));
    arguments.best_keys = reinterpret_cast<uint32_t*>(take(call.rows * row.keys));
    arguments.best_tokens = reinterpret_cast<int32_t*>(take(call.rows * row.tokens));
    arguments.masks = reinterpret_cast<uint32_t*>(take(call.rows * row.masks));
    return arguments;
}

bool is_bad(const SampleCall& call) {
    const void* needed[] = {call.logits, call.tokens, call.positions, call.temperature, call.top_p,   call.min_p,
                            call.top_k,  call.seed,   call.drawn,     call.out,         call.scratch, call.step};
    for (const void* address : needed)
        if (!address) return true;
    return call.vocabulary < 1 || call.vocabulary > kMostVocabulary || call.steps < 1 ||
           reinterpret_cast<uintptr_t>(call.scratch) % 16 != 0;
}

}  // namespace amq

extern "C" {

int64_t amq_cuda_sample_scratch(const amq::SampleCall* call) {
    if (call->rows < 1 || call->vocabulary < 1) return 0;
    return amq::kPlaceBytes + call->rows * amq::scratch_of(*call).all();
}

int amq_cuda_sample(const amq::SampleCall* call, void* stream) {
    using namespace amq;
    if (call->rows == 0) return kOk;
    if (call->rows < 0) return kBadRows;
    if (is_bad(*call)) return kBadSize;
    const SampleArguments arguments = arguments_of(*call);
    const auto on = static_cast<cudaStream_t>(stream);
    const int blocks = call->rows * ((arguments.regions + kScanRegions - 1) / kScanRegions);
    cudaError_t status = launch(sample_scan_kernel, blocks, kScanThreads, on, arguments);
    if (status == cudaSuccess) status = launch(sample_gather_kernel, blocks, kScanThreads, on, arguments);
    if (status == cudaSuccess) status = launch(sample_finish_kernel, call->rows, kFinishThreads, on, arguments);
    return status;
}

}  // extern "C"
