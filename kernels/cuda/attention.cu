// The C functions of attention: what they refuse, and how much of the grid each part of the work gets. See attention.cuh.

#include <numeric>
#include <type_traits>

#include "attention.cuh"
#include "checks.cuh"

namespace amq {

constexpr int kMaxHeadDim = 512;
constexpr int kFewRows = 8;  // up to so many, the spans of a row are blocks of their own

template <class Call>
auto with_cache(int kind, Call call) {
    return kind == 0 ? call(HalfCache{}) : call(Int8Cache{});
}

bool has_shape(const AttentionCall& c) {
    return c.head_dim >= 16 && c.head_dim <= kMaxHeadDim && c.head_dim % 16 == 0 && c.n_kv_heads >= 1 &&
           c.n_heads >= c.n_kv_heads && c.n_heads % c.n_kv_heads == 0;
}

int check(const AttentionCall& c) {
    if (c.rows < 0) return kBadRows;
    if (c.cache_kind != 0 && c.cache_kind != 1) return kBadDType;
    const bool has_angles = c.rotary == 0 || (c.cos[0] && c.sin[0] && !c.cos[1] == !c.sin[1]);
    if (!has_shape(c) || c.rotary < 0 || c.rotary > c.head_dim || c.rotary % 2 || !has_angles) return kBadSize;
    if (c.q_stride < c.head_dim * (c.gated ? 2 : 1) || c.window < 0) return kBadSize;
    if (!c.qkv || !c.positions || !c.slots || !c.tables || !c.cache) return kBadSize;
    const bool odd = !at_multiple(c.cache, 16) || c.page_bytes % 16 || c.cache_offset % 16;
    return odd ? kBadSize : kOk;
}

AttentionArguments share_out(const AttentionCall& call) {
    AttentionArguments a{call};
    const int heads = call.n_heads / call.n_kv_heads;
    if (call.rotary == 0) a.call.cos[0] = nullptr;
    a.stores = call.own_keys && !call.stored;
    a.walks = !a.stores && call.rows > kFewRows;
    a.tile_rows = a.walks ? kQueries / std::gcd(kQueries, heads) : 1;
    a.parts = a.walks ? a.tile_rows * heads / kQueries : call.splits;
    return a;
}

int64_t blocks_of(const AttentionArguments& a) {
    return static_cast<int64_t>((a.call.rows + a.tile_rows - 1) / a.tile_rows) * a.call.n_kv_heads * a.parts;
}

int check_attention(const AttentionCall& c) {
    if (const int status = check(c)) return status;
    if (!is_kind(c.out_kind)) return kBadDType;
    if (c.splits < 1 || !c.out) return kBadSize;
    const AttentionArguments a = share_out(c);
    if (blocks_of(a) > INT32_MAX) return kBadSize;
    return !a.walks && c.splits > 1 && (!c.partials || !c.counters) ? kBadSize : kOk;
}

template <class Cache, int kDims, int kSlices>
struct AttentionKernel {
    void (*entry)(AttentionArguments) = attention_kernel<Cache, kDims, kSlices>;
    int threads = Attention<Cache, kDims, kSlices>::kThreads;
};

template <class Cache>
cudaError_t launch_attention(const AttentionArguments& a, cudaStream_t stream) {
    const auto start = [&](auto kernel) {
        return launch(kernel.entry, static_cast<int>(blocks_of(a)), kernel.threads, stream, a);
    };
    if (a.call.head_dim <= 64) return start(AttentionKernel<Cache, 64, 1>{});
    if (a.call.head_dim <= 128) return start(AttentionKernel<Cache, 128, 1>{});
    if (a.call.head_dim <= 256) return start(AttentionKernel<Cache, 128, 2>{});
    return start(AttentionKernel<Cache, 64, 8>{});
}

template <class Cache>
cudaError_t launch_store(const AttentionCall& c, cudaStream_t stream) {
    const auto start = [&](auto kernel) { return launch(kernel, c.rows * c.n_kv_heads, 2 * kWarp, stream, c); };
    return c.head_dim <= 128 ? start(store_kernel<Cache, 4>) : start(store_kernel<Cache, 16>);
}

}  // namespace amq

extern "C" {

int amq_cuda_attention(const amq::AttentionCall* call, void* stream) {
    using namespace amq;
    if (call->rows == 0) return kOk;
    if (const int status = check_attention(*call)) return status;
    return with_cache(call->cache_kind, [&](auto cache) {
        return launch_attention<decltype(cache)>(share_out(*call), static_cast<cudaStream_t>(stream));
    });
}

int amq_cuda_store(const amq::AttentionCall* call, void* stream) {
    using namespace amq;
    if (call->rows == 0) return kOk;
    if (const int status = check(*call)) return status;
    if (!call->own_keys) return kBadSize;
    AttentionCall c = *call;
    if (c.rotary == 0) c.cos[0] = nullptr;
    return with_cache(c.cache_kind, [&](auto cache) {
        return launch_store<decltype(cache)>(c, static_cast<cudaStream_t>(stream));
    });
}

int64_t amq_cuda_cache_bytes(const amq::AttentionCall* call) {
    using namespace amq;
    if (!has_shape(*call)) return kBadSize;
    return call->n_kv_heads * with_cache(call->cache_kind, [&](auto cache) {
        return head_bytes<decltype(cache)>(call->head_dim);
    });
}

}  // extern "C"
