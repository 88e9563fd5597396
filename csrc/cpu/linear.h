// y = x · Wᵀ (+ bias) for weights in tiles (tiles.h): one or several linears that share x, each in its own format.
//
// Two activation modes. fp32: products of float32 activations with (code − zero_point), scaled per group:
//
//     y[m, n] = Σ_g scale[n, g] · Σ_{k ∈ g} (code[n, k] − zero_point[n, g]) · x[m, k]
//
// int8: per row and group, x is rounded to q · a with a = max|x| / 127 and integers q (activations.h); dot products of
// integers are exact, and only the sum over groups is rounded:
//
//     y[m, n] = Σ_g scale[n, g] · a[m, g] · (Σ_{k ∈ g} code · q − zero_point[n, g] · Σ_{k ∈ g} q)
//
// so that |y − y_fp32| ≤ Σ_g a[m, g]/2 · Σ_{k ∈ g} |W[n, k]|, rounding of float32 aside.
//
// Up to kGemvRows rows of x, codes are decoded in registers on their way from memory (gemv). Above, a tile's group is
// decoded once into a buffer that stays in the first cache and is used for every row (gemm). Which rows lie together in
// x is the kernel's wish: `Panels` describes it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "element.h"
#include "isa.h"
#include "tiles.h"

namespace amq {

enum class Mode { fp32, int8 };

constexpr int kGemvRows = 4;
constexpr int kCallRows = 512;  // rows of x that are laid out at once

// How x is laid out for a kernel: group by group, panels of `rows` rows within a group; within a panel, `step` features of
// one row, then of the next. A group takes `group_stride` features, padded with zeros. Element (m, k of group g) is at
//
//     (g · n_panels + m / rows) · group_stride · rows + k / step · step · rows + m % rows · step + k % step
//
// in floats (fp32) or bytes (int8). Scales and sums of int8 groups are at (g · n_panels + m / rows) · rows + m % rows.
struct Panels {
    int rows, step;
    int64_t n_panels, group_stride;

    AMQ_INLINE int64_t index(int64_t g, int64_t panel) const { return g * n_panels + panel; }
    AMQ_INLINE int64_t size() const { return group_stride * rows; }  // elements of one panel of one group
};

// One linear of a call, and the rows of x, as kernels see them.
struct LinearTask {
    const uint8_t* data;  // tiles
    int64_t tile_bytes;   // of a full tile
    int64_t out_features, in_features, group_size;
    const float* bias;  // [out_features] or nullptr
    float* y;           // [rows, y_stride], at this linear's first column
    int64_t y_stride, rows;
    Panels panels;
    const void* x;
    const float *x_scale, *x_sum;  // int8 only

    AMQ_INLINE int64_t n_groups() const { return ceil_div(in_features, group_size); }
    AMQ_INLINE int64_t blocks(int64_t group) const {
        const int64_t features = in_features - group * group_size;
        return ceil_div(features < group_size ? features : group_size, kBlock);
    }
    AMQ_INLINE int lanes(int64_t tile) const {
        const int64_t left = out_features - tile * kLanes;
        return left < kLanes ? static_cast<int>(left) : kLanes;
    }
};

// Computes tiles begin … end − 1 for all rows.
using LinearKernel = void (*)(const LinearTask&, int64_t begin, int64_t end);

// The kernels of one format on one instruction set, by mode; an empty `gemv` where the layout does not hold the format.
struct LinearKernels {
    LinearKernel gemv[2][kGemvRows + 1];  // by the panel's rows: 1, 2 and 4
    LinearKernel gemm[2];
    int gemm_rows[2], gemm_step[2];  // the panels that gemm wants
};

struct LinearPart {
    int format = -1;  // its place in amq_formats.h; -1: not quantized, rows of `element`
    const uint8_t* data = nullptr;
    int64_t out_features = 0;
    const float* bias = nullptr;  // [out_features]
    Element element = Element::float32;
};

// One call: `parts` share x and write side by side into y.
struct LinearCall {
    std::vector<LinearPart> parts;
    const float* x;  // [rows, x_stride], the last dimension contiguous
    float* y;        // [rows, y_stride]; need not be initialised; must not overlap anything
    int64_t rows, in_features, group_size, x_stride, y_stride;
    Mode mode;
    const int32_t* x_rows = nullptr;  // [rows]: which row of x each one is; nullptr: in order
    bool rotated = false;  // quantized parts hold W · H and read x · H (rotation.h); others read x itself
};

// What a tile of a call's part costs beside those of other calls: its bytes, and its rows, of which some eight take as long as
// to read it from memory.
int64_t tile_cost(const LinearPart& part, const LinearCall& call);

// Ranges of tiles that begin at multiples of this one and have a multiple of it lose no speed by it.
constexpr int64_t kTileUnit = 6;

// A call cut into what threads of one parallel region do: first the input, then, when all of it is there, ranges of the
// output. Every thread may have a job of its own for the same call; the memory is shared.
class LinearJob {
public:
    // `call` must outlive the job, and have at most kCallRows rows.
    LinearJob(const LinearCall& call, const Isa& isa);

    size_t memory_bytes() const;
    void place(char* memory);  // aligned to a cache line; where x goes in the kernel's layout

    // Rows in whole panels, and the multiple of them that one thread must take at a time.
    int64_t padded_rows() const { return task_.panels.n_panels * task_.panels.rows; }
    int64_t row_unit() const { return call_.mode == Mode::int8 ? 1 : task_.panels.rows; }
    void make_input(int64_t begin, int64_t end) const;

    // All the output laid end to end: its parts' tiles, weighted by what limits them, bytes where few rows wait for
    // memory and tiles where many wait for multiplications. A tile belongs to the range that it begins in.
    int64_t cost() const;
    void run(int64_t begin, int64_t end) const;

    // One part alone, its tiles begin … end − 1; and tiles of all parts, one part after another.
    int64_t n_tiles(size_t part) const { return ceil_div(call_.parts[part].out_features, kLanes); }
    void run_tiles(size_t part, int64_t begin, int64_t end) const;
    int64_t n_tiles() const;
    void run_tiles(int64_t begin, int64_t end) const;

    // Starts to fetch what run_tiles reads first, so that it arrives while the input is made.
    void fetch(int64_t begin, int64_t end) const;

private:
    int64_t tile_cost(const LinearPart& part) const;
    // Rows begin … end − 1 of a weight that is not quantized.
    void run_dense(const LinearPart& weight, int64_t column, int64_t begin, int64_t end) const;

    const LinearCall& call_;
    const Isa& isa_;
    const LinearKernels* kernels_;
    bool packed_;  // whether a part is quantized
    LinearTask task_{};  // of all parts; data, out_features, y and bias differ
};

// Runs the call on at most `threads` threads. The result does not depend on their number.
void linear(const LinearCall& call, const Isa& isa, int threads);

// Several calls of one weight each at once, as of experts: every weight has rows of its own, of one x and one y, and all
// have one in_features, group size and mode. Few rows are read as fast as one call of all these bytes, by all threads.
void linear_grouped(const std::vector<LinearCall>& calls, const Isa& isa, int threads);

}  // namespace amq
