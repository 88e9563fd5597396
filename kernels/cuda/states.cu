// The C functions of operators that carry a state on: what calls.h says of DeltaCall and ShortConvCall.

#include "checks.cuh"
#include "states_delta.cuh"

namespace amq::states {
namespace {

bool has_all(const Segments& segments) { return segments.first && segments.count && segments.state && segments.begins; }

// 16, 32 … features of a key or a value.
bool is_head(int features) { return features >= 16 && features <= kMostStateHead && features % 16 == 0; }

// Whether S of every sequence begins at a multiple of 16 bytes, and so does a row of mixed.
bool has_whole_vectors(const DeltaCall& call) {
    return at_multiple(call.states, 16) && call.state_floats % 4 == 0 && call.state_offset % 4 == 0 &&
           at_multiple(call.mixed, 16) && call.mixed_stride % 4 == 0;
}

}  // namespace
}  // namespace amq::states

extern "C" {

int amq_cuda_delta(const amq::DeltaCall* call, void* stream) {
    using namespace amq;
    using namespace amq::states;
    const DeltaCall& c = *call;
    if (c.segments.n < 0 || c.segments.longest < 0) return kBadRows;
    if (c.segments.n == 0 || c.segments.longest == 0) return kOk;
    if (!is_kind(c.out_kind)) return kBadDType;
    if (c.n_key_heads < 1 || c.n_value_heads < 1 || c.n_value_heads % c.n_key_heads) return kBadSize;
    if (!is_head(c.key_dim) || !is_head(c.value_dim) || c.kernel < 1) return kBadSize;
    if (!has_all(c.segments) || !c.in || !c.convolution || !c.rate || !c.dt_bias || !c.norm) return kBadSize;
    if (!c.mixed || !c.states || !c.out || !has_whole_vectors(c)) return kBadSize;
    const auto on = static_cast<cudaStream_t>(stream);
    const int heads = 2 * c.n_key_heads + c.n_value_heads, blocks = c.segments.n * c.n_value_heads;
    const cudaError_t status = launch(delta_mix_kernel, c.segments.n * heads, kStateThreads, on, c);
    if (status) return status;
    constexpr int kQuads = 4;
    if (c.key_dim <= kQuads * kQuadRows) return launch(delta_kernel<kQuads>, blocks, kStateThreads, on, c);
    return launch(delta_kernel<0>, blocks, kStateThreads, on, c);
}

int amq_cuda_short_conv(const amq::ShortConvCall* call, void* stream) {
    using namespace amq;
    using namespace amq::states;
    const ShortConvCall& c = *call;
    if (c.segments.n < 0 || c.segments.longest < 0) return kBadRows;
    if (c.segments.n == 0 || c.segments.longest == 0) return kOk;
    if (!is_kind(c.out_kind)) return kBadDType;
    if (c.channels < 1 || c.kernel < 1) return kBadSize;
    if (!has_all(c.segments) || !c.in || !c.convolution || !c.states || !c.out) return kBadSize;
    const int pieces = (c.channels + kStateLanes - 1) / kStateLanes;
    return launch(short_conv_kernel, c.segments.n * pieces, kStateThreads, static_cast<cudaStream_t>(stream), c);
}

}  // extern "C"
