// The row loops of dequantize.h, compiled once per format and instruction set.

#include "dequantize.h"

#include <algorithm>
#include <cstring>

#include "amq_formats.h"
#include "rotation.h"
#include "threads.h"
#include "unit.h"

namespace amq {
namespace {

// One row of a dense bitstream, chunk by chunk; a chunk lies within one group.
template <class L>
AMQ_INLINE void dequantize_dense(const DequantizeArgs& a, const uint8_t* qweight, int64_t groups_begin, float* out) {
    const int64_t row_bytes = L::row_bytes(a.in_features);
    // Chunks before this code can be read and written whole without leaving the row.
    const int64_t readable = row_bytes < kReadAhead ? 0 : (row_bytes - kReadAhead) / L::bits() + 1;
    const int64_t whole_end = kChunk * std::min(readable, a.in_features / kChunk);
    for (int64_t begin = 0, group = groups_begin; begin < a.in_features; begin += a.group_size, ++group) {
        const float zero = half_to_float(a.zero_point[group]), scale = half_to_float(a.scale[group]);
        const int64_t end = std::min(begin + a.group_size, a.in_features);
        int64_t k = begin;
        for (; k < std::min(end, whole_end); k += kChunk)
            dequantize_chunk<L>(qweight + k / kChunk * L::bits(), zero, scale, out + k);
        for (; k < end; k += kChunk) {
            const int64_t offset = k / kChunk * L::bits();
            uint8_t bytes[kReadAhead] = {};
            float weights[kChunk];
            std::memcpy(bytes, qweight + offset, std::min<int64_t>(kReadAhead, row_bytes - offset));
            dequantize_chunk<L>(bytes, zero, scale, weights);
            std::memcpy(out + k, weights, sizeof(float) * std::min<int64_t>(kChunk, end - k));
        }
    }
}

// One row of any format, unit by unit; a unit may span groups.
template <class L>
AMQ_INLINE void dequantize_digits(const DequantizeArgs& a, const uint8_t* qweight, int64_t groups_begin, float* out) {
    const int64_t row_bytes = L::row_bytes(a.in_features);
    float zero = 0, scale = 0;
    for (int64_t k = 0, byte = 0; k < a.in_features; byte += L::unit_bytes) {
        uint8_t codes[L::unit_codes];
        const int64_t count = std::min<int64_t>(L::unit_codes, a.in_features - k);
        read_digits<L>(qweight + byte, std::min<int64_t>(L::unit_bytes, row_bytes - byte), count, codes);
        for (int64_t i = 0; i < count; ++i, ++k) {
            if (k % a.group_size == 0) {
                zero = half_to_float(a.zero_point[groups_begin + k / a.group_size]);
                scale = half_to_float(a.scale[groups_begin + k / a.group_size]);
            }
            out[k] = (static_cast<float>(codes[i]) - zero) * scale;
        }
    }
}

template <class L>
AMQ_INLINE void dequantize_range(const DequantizeArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* qweight = a.qweight + row * a.qweight_stride;
        if constexpr (L::is_dense)
            dequantize_dense<L>(a, qweight, row * a.group_stride, a.out + row * a.out_stride);
        else
            dequantize_digits<L>(a, qweight, row * a.group_stride, a.out + row * a.out_stride);
        for (int64_t k = 0; a.rotated && k < a.in_features; k += kRotation) {
            float* out = a.out + row * a.out_stride + k;
            rotate_block(out, out);
        }
    }
}

#define AMQ_DEFINE(name, levels, unit_codes, unit_bytes)                                                   \
    using Layout_##name = Layout<levels, unit_codes, unit_bytes>;                                          \
    void dequantize_portable_##name(const DequantizeArgs& a, int64_t begin, int64_t end) {                 \
        dequantize_range<Layout_##name>(a, begin, end);                                                    \
    }                                                                                                      \
    AMQ_TARGET_AVX2 void dequantize_avx2_##name(const DequantizeArgs& a, int64_t begin, int64_t end) {     \
        dequantize_range<Layout_##name>(a, begin, end);                                                    \
    }
AMQ_FORMATS(AMQ_DEFINE)
#undef AMQ_DEFINE

}  // namespace

const std::vector<FormatKernels>& compiled_formats() {
#define AMQ_ENTRY(name, levels, unit_codes, unit_bytes) \
    {#name,                                             \
     {levels, unit_codes, unit_bytes},                  \
     Layout_##name::row_bytes,                          \
     {dequantize_portable_##name, dequantize_avx2_##name}},
    static const std::vector<FormatKernels> formats = {AMQ_FORMATS(AMQ_ENTRY)};
#undef AMQ_ENTRY
    return formats;
}

void dequantize(const FormatKernels& format, const Isa& isa, const DequantizeArgs& args, int threads) {
    // Waking a thread costs a few µs, in which one thread writes about this many weights.
    constexpr int64_t kWeightsPerThread = 1 << 15;
    const int64_t useful = 1 + args.rows * args.in_features / kWeightsPerThread;
    const auto kernel = format.dequantize_rows[isa.avx2_loops];
    parallel_rows(args.rows, static_cast<int>(std::min<int64_t>(threads, useful)),
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace amq
