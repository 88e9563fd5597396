// The loops of activations.h.

#include "activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace amq {
namespace {

struct Rounded {
    float scale;
    int32_t sum;
};

// Magnitudes compare as their bits do, NaN above infinity above all numbers; a comparison of floats would lose NaN.
AMQ_INLINE float largest_magnitude(const float* x, int64_t count) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t k = 0; k < count; ++k) {
        uint32_t bits;
        std::memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffffu;
        largest = largest > bits ? largest : bits;
    }
    float result;
    std::memcpy(&result, &largest, sizeof result);
    return result;
}

AMQ_INLINE Rounded round_group(const float* x, int64_t count, int8_t* q) {
    constexpr float kLeast = 0x1p-100f;      // 127 / kLeast is still a number
    constexpr float kRound = 0x1.8p23f;      // adding it leaves the nearest integer in the lowest bits
    const float largest = largest_magnitude(x, count);
    if (!(largest >= kLeast && largest <= std::numeric_limits<float>::max())) {
        std::memset(q, 0, count);
        return {largest < kLeast ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
    }
    const float inverse = 127.0f / largest;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < count; ++k) {
        const float rounded = x[k] * inverse + kRound;
        int32_t bits;
        std::memcpy(&bits, &rounded, sizeof bits);
        const int8_t value = static_cast<int8_t>(bits);
        q[k] = value;
        sum += value;
    }
    return {largest / 127.0f, sum};
}

AMQ_INLINE void quantize(const ActivationArgs& a, int64_t begin, int64_t end) {
    const Panels& panels = a.panels;
    alignas(64) int8_t q[kMaxGroup];
    for (int64_t m = begin; m < end; ++m) {
        for (int64_t g = 0; g < a.n_groups; ++g) {
            const int64_t index = panels.index(g, m / panels.rows), row = m % panels.rows;
            const int64_t first = g * a.group_size, count = std::min(a.group_size, a.in_features - first);
            std::memset(q + count, 0, panels.group_stride - count);
            const Rounded rounded = m < a.rows ? round_group(a.row(m) + first, count, q)
                                               : (std::memset(q, 0, count), Rounded{0, 0});
            a.x_scale[index * panels.rows + row] = rounded.scale;
            a.x_sum[index * panels.rows + row] = static_cast<float>(rounded.sum);
            int8_t* group = static_cast<int8_t*>(a.out) + index * panels.size() + row * panels.step;
            if (panels.rows == 1) {
                std::memcpy(group, q, panels.group_stride);
            } else if (panels.step == kStep) {
                for (int64_t k = 0; k < panels.group_stride; k += kStep)
                    std::memcpy(group + k * panels.rows, q + k, kStep);
            } else {
                for (int64_t k = 0; k < panels.group_stride; k += panels.step)
                    std::memcpy(group + k * panels.rows, q + k, panels.step);
            }
        }
    }
}

void quantize_portable(const ActivationArgs& a, int64_t begin, int64_t end) { quantize(a, begin, end); }

AMQ_TARGET_AVX2 void quantize_avx2(const ActivationArgs& a, int64_t begin, int64_t end) { quantize(a, begin, end); }

}  // namespace

void quantize_rows(const Isa& isa, const ActivationArgs& args, int64_t begin, int64_t end) {
    (isa.avx2_loops ? quantize_avx2 : quantize_portable)(args, begin, end);
}

void copy_panels(const ActivationArgs& a, int64_t begin, int64_t end) {
    const Panels& panels = a.panels;
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first_row = panel * panels.rows, rows = std::min<int64_t>(panels.rows, a.rows - first_row);
        for (int64_t g = 0; g < a.n_groups; ++g) {
            const int64_t first = g * a.group_size, count = std::min(a.group_size, a.in_features - first);
            float* out = static_cast<float*>(a.out) + panels.index(g, panel) * panels.size();
            if (rows < panels.rows || count < panels.group_stride) std::fill(out, out + panels.size(), 0.0f);
            const float* x[kMaxPanelRows];
            for (int64_t m = 0; m < rows; ++m) x[m] = a.row(first_row + m) + first;
            for (int64_t k = 0; k < count; ++k)  // whole lines of `out`, though `rows` streams of x
                for (int64_t m = 0; m < rows; ++m) out[k * panels.rows + m] = x[m][k];
        }
    }
}

}  // namespace amq
