// Rows of x → the panels that a kernel reads (linear.h), rotated where the weights are, then rounded to int8 per group or copied.

#pragma once

#include <cstdint>

#include "isa.h"
#include "linear.h"

namespace amq {

constexpr int kMaxPanelRows = 64;

// Rows of x [.., x_stride]: x_rows [rows] of them, or the first `rows`. Rows of a panel beyond `rows`, and features of a
// group beyond the last one, become 0.
struct ActivationArgs {
    const float* x;
    int64_t x_stride;
    const int32_t* x_rows;
    int64_t rows, in_features, group_size, n_groups;
    Panels panels;
    void* out;                // int8 or float
    float *x_scale, *x_sum;   // int8 only
    bool rotated;             // x · H in the place of x (rotation.h); kRotation divides in_features

    const float* row(int64_t m) const { return x + (x_rows ? x_rows[m] : m) * x_stride; }
};

// Rows begin … end − 1 of the padded rows: a = max|x| / 127 over the group, q = x / a to the nearest integer, ties to
// even; `x_scale` gets a, `x_sum` Σ q.
// A group with a NaN or an infinity gets a = NaN, so that every output of its row is NaN; one whose magnitudes are all
// below 2^-100 counts as zero. Up to 2^-100 / 127 apart, |x − a·q| ≤ a/2.
void quantize_rows(const Isa& isa, const ActivationArgs& args, int64_t begin, int64_t end);

// Panels begin … end − 1.
void copy_panels(const Isa& isa, const ActivationArgs& args, int64_t begin, int64_t end);

}  // namespace amq
