// The loops of activations.h.

#include "activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rotation.h"

namespace amq {
namespace {

using Ints = int32_t __attribute__((vector_size(32), aligned(4), may_alias));
constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the lowest bits
constexpr int32_t kRoundBits = 0x4b400000;

struct Rounded {
    float scale;
    int32_t sum;
};

AMQ_INLINE int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// join(v, other) of eight lanes, by halves.
template <class Join>
AMQ_INLINE int32_t join_lanes(I32x8& v, const Join& join) {
    join(v, AMQ_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3));
    join(v, AMQ_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5));
    join(v, AMQ_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6));
    return v[0];
}

// Magnitudes compare as their bits do, NaN above infinity above all numbers; a comparison of floats would lose NaN.
AMQ_INLINE float largest_magnitude(const float* x, int64_t count) {
    const auto larger = [](I32x8& a, const I32x8& b) __attribute__((always_inline)) { a = a > b ? a : b; };
    I32x8 most = {};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) larger(most, *reinterpret_cast<const Ints*>(x + k) & 0x7fffffff);
    int32_t largest = join_lanes(most, larger);
    for (; k < count; ++k) largest = std::max(largest, bits_of(x[k]) & 0x7fffffff);
    float result;
    std::memcpy(&result, &largest, sizeof result);
    return result;
}

AMQ_INLINE Rounded round_group(const float* x, int64_t count, int8_t* q) {
    constexpr float kLeast = 0x1p-100f;  // 127 / kLeast is still a number
    const float largest = largest_magnitude(x, count);
    if (!(largest >= kLeast && largest <= std::numeric_limits<float>::max())) {
        std::memset(q, 0, count);
        return {largest < kLeast ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
    }
    const float inverse = 127.0f / largest;
    I32x8 sums = {};
    int64_t first = 0;
    alignas(32) int32_t value[kBlock];
    for (; first + kBlock <= count; first += kBlock) {
#pragma omp simd
        for (int k = 0; k < kBlock; ++k) value[k] = bits_of(x[first + k] * inverse + kRound) - kRoundBits;
        for (int k = 0; k < kBlock; k += 8) sums += *reinterpret_cast<const Ints*>(value + k);
#pragma omp simd
        for (int k = 0; k < kBlock; ++k) q[first + k] = static_cast<int8_t>(value[k]);
    }
    int32_t sum = join_lanes(sums, [](I32x8& a, const I32x8& b) __attribute__((always_inline)) { a += b; });
    for (; first < count; ++first) {
        const int32_t one = bits_of(x[first] * inverse + kRound) - kRoundBits;
        q[first] = static_cast<int8_t>(one);
        sum += one;
    }
    return {largest / 127.0f, sum};
}

// Group g of row m, `count` features at x, rounded into its panel; zeros where x is nullptr.
AMQ_INLINE void put_group(const ActivationArgs& a, int64_t m, int64_t g, const float* x, int64_t count) {
    const Panels& panels = a.panels;
    const int64_t index = panels.index(g, m / panels.rows), row = m % panels.rows;
    int8_t* const group = static_cast<int8_t*>(a.out) + index * panels.size() + row * panels.step;
    alignas(64) int8_t apart[kMaxGroup];
    int8_t* const q = panels.rows == 1 ? group : apart;
    if (x == nullptr) count = 0;
    if (count < panels.group_stride) std::memset(q + count, 0, panels.group_stride - count);
    const Rounded rounded = count > 0 ? round_group(x, count, q) : Rounded{0, 0};
    a.x_scale[index * panels.rows + row] = rounded.scale;
    a.x_sum[index * panels.rows + row] = static_cast<float>(rounded.sum);
    if (panels.rows == 1) return;
    if (panels.step == kStep) {
        for (int64_t k = 0; k < panels.group_stride; k += kStep)
            std::memcpy(group + k * panels.rows, q + k, kStep);
    } else {
        for (int64_t k = 0; k < panels.group_stride; k += panels.step)
            std::memcpy(group + k * panels.rows, q + k, panels.step);
    }
}

AMQ_INLINE void quantize(const ActivationArgs& a, int64_t begin, int64_t end) {
    // A block of the rotation may span groups; two groups are whole blocks.
    static_assert(2 * kBlock % kRotation == 0, "groups are multiples of kBlock");
    const int64_t span = 2 * a.group_size;
    alignas(64) float rotated[2 * kMaxGroup];
    for (int64_t m = begin; m < end; ++m) {
        for (int64_t g = 0; g < a.n_groups; ++g) {
            const int64_t first = g * a.group_size, count = std::min(a.group_size, a.in_features - first);
            const float* x = m < a.rows ? a.row(m) + first : nullptr;
            if (a.rotated && x) {
                if (g % 2 == 0)
                    for (int64_t k = 0; k < std::min(span, a.in_features - first); k += kRotation) rotate_block(x + k, rotated + k);
                x = rotated + g % 2 * a.group_size;
            }
            put_group(a, m, g, x, count);
        }
    }
}

void quantize_portable(const ActivationArgs& a, int64_t begin, int64_t end) { quantize(a, begin, end); }
void rotate_portable(const float* in, float* out) { rotate_block(in, out); }

AMQ_TARGET_AVX2 void quantize_avx2(const ActivationArgs& a, int64_t begin, int64_t end) { quantize(a, begin, end); }
AMQ_TARGET_AVX2 void rotate_avx2(const float* in, float* out) { rotate_block(in, out); }

// `count` features of a panel's rows into it, in its order: whole lines of `out`, though `rows` streams of x.
AMQ_INLINE void put_columns(const float* const* x, int64_t rows, int64_t count, int64_t panel_rows, float* out) {
    if (panel_rows == 1) return static_cast<void>(std::memcpy(out, x[0], count * sizeof(float)));
    for (int64_t k = 0; k < count; ++k)
        for (int64_t m = 0; m < rows; ++m) out[k * panel_rows + m] = x[m][k];
}

}  // namespace

void quantize_rows(const Isa& isa, const ActivationArgs& args, int64_t begin, int64_t end) {
    (isa.avx2_loops ? quantize_avx2 : quantize_portable)(args, begin, end);
}

void copy_panels(const Isa& isa, const ActivationArgs& a, int64_t begin, int64_t end) {
    const Panels& panels = a.panels;
    const auto rotate = isa.avx2_loops ? rotate_avx2 : rotate_portable;
    const auto out = [&](int64_t g, int64_t panel) { return static_cast<float*>(a.out) + panels.index(g, panel) * panels.size(); };
    const float* x[kMaxPanelRows];
    alignas(64) float rotated[kMaxPanelRows][kRotation];
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first_row = panel * panels.rows, rows = std::min<int64_t>(panels.rows, a.rows - first_row);
        for (int64_t g = 0; g < a.n_groups; ++g) {
            const int64_t first = g * a.group_size, count = std::min(a.group_size, a.in_features - first);
            float* const group = out(g, panel);
            if (rows < panels.rows || count < panels.group_stride) std::fill(group, group + panels.size(), 0.0f);
            if (a.rotated) continue;
            for (int64_t m = 0; m < rows; ++m) x[m] = a.row(first_row + m) + first;
            put_columns(x, rows, count, panels.rows, group);
        }
        for (int64_t first = 0; a.rotated && first < a.in_features; first += kRotation) {
            for (int64_t m = 0; m < rows; ++m) {
                rotate(a.row(first_row + m) + first, rotated[m]);
                x[m] = rotated[m];
            }
            for (int64_t k = first; k < first + kRotation; k += kBlock) {  // which lies in one group
                put_columns(x, rows, kBlock, panels.rows, out(k / a.group_size, panel) + k % a.group_size * panels.rows);
                for (int64_t m = 0; m < rows; ++m) x[m] += kBlock;
            }
        }
    }
}

}  // namespace amq
