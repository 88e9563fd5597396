// The C functions of mixtures of experts: what calls.h says of ChooseCall and CombineCall.

#include "mixture.cuh"

extern "C" {

int amq_cuda_choose(const amq::ChooseCall* call, void* stream) {
    using namespace amq;
    using namespace amq::mixture;
    const ChooseCall& c = *call;
    if (c.rows < 0 || (c.groups_out && c.rows > kMixtureRows)) return kBadRows;
    if (c.rows == 0) return kOk;
    if (c.experts < 1 || c.experts > kMostExperts || c.score_stride < c.experts) return kBadSize;
    if (c.groups < 1 || c.experts % c.groups || (c.groups > 1 && c.experts / c.groups < 2)) return kBadSize;
    if (c.top_groups < 1 || c.top_groups > c.groups) return kBadSize;
    if (c.top_k < 1 || c.top_k > kMostChosen || c.top_k > c.experts / c.groups * c.top_groups) return kBadSize;
    if (!c.scores || !c.choice || !c.weights || !c.groups_out != !c.n_groups) return kBadSize;
    const int blocks = (c.rows + kMixtureRows - 1) / kMixtureRows;
    return launch(choose_kernel, blocks, kMixtureThreads, static_cast<cudaStream_t>(stream), c);
}

int amq_cuda_combine(const amq::CombineCall* call, void* stream) {
    using namespace amq;
    using namespace amq::mixture;
    const CombineCall& c = *call;
    if (c.rows < 0) return kBadRows;
    if (c.rows == 0) return kOk;
    if (c.features < 1 || c.top_k < 1 || !c.outputs || !c.weights || !c.y) return kBadSize;
    if (!c.shared && (c.shared_gate || c.shared_post_norm)) return kBadSize;
    const bool whole = c.routed_post_norm || c.shared_post_norm;  // a norm is of a block
    const int blocks = whole ? 1 : (c.features + kMixtureThreads - 1) / kMixtureThreads;
    const auto on = static_cast<cudaStream_t>(stream);
    return launch(combine_kernel, c.rows * blocks, kMixtureThreads, on, CombineArguments{c, blocks});
}

}  // extern "C"
