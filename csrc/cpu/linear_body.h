// The kernels of linear.h, once for all formats and instruction sets. Included by one file per instruction set, which
// gives `S`: a vector of 16 lanes and its operations (simd_*.h). Everything here is in an unnamed namespace: the same
// template compiled with other flags must not be taken for this one by the linker.
//
// A format is its bits: `decode` derives shifts and masks from the planes of tiles.h at compile time.

#pragma once

#include <cstring>

#include "amq_formats.h"
#include "linear.h"
#include "unroll.h"

namespace amq {
namespace {

// A stream is fetched this far ahead of its use, and a thread reads this many streams side by side, because a core keeps
// more of memory in flight that way. Share of the best plain read of the same memory at int2, int3, int4, one thread of
// an Intel Xeon with AMX, November 2026, 4 KiB pages / 2 MiB pages:
//
//     1 stream, 1024 bytes    57 54 72 % / 74 72 83 %          3 streams, 1024 bytes    92 92 94 % / 88 90 87 %
//     1 stream, 2048 bytes    62 59 65 % / 77 75 83 %          3 streams, 2048 bytes    93 92 94 % / 90 94 90 %
//     2 streams, 2048 bytes   86 86 89 % / 91 91 87 %          4 streams, 2048 bytes    93 92 94 % / 87 88 89 %
constexpr int kPrefetchBytes = 2048, kStreams = 3;

// Whether codes are a plane of two bits and then one of `high`; 0: and no more.
AMQ_INLINE constexpr bool are_two_and(int high, int bits) {
    return plane_of(bits, 0).width == 2 && plane_of(bits, 1).width == high;
}

// 3-bit codes of two steps in the halves of a byte: the low bits lie there already, the high ones of four steps come from a
// table. Four steps take 14 operations instead of 18; the compiler computes once what two steps share.
//
//     low bits   | step 0 | step 1 | step 2 | step 3 |        pairs of steps 0 and 2, and of 1 and 3 from two bits on
//     high bits  | 0 1 2 3 | 4 5 6 7 |                        tables: bits 0, 2 → 2, 6 and bits 1, 3 → 2, 6
constexpr uint8_t kHighBits[2][16] = {{0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68},
                                      {0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68}};

template <class S, int step>
AMQ_INLINE typename S::I32 look_up(const typename S::I32 (&lines)[3]) {
    constexpr uint32_t kHalves = 0x0f0f0f0f;
    constexpr int four = step / 4, odd = step % 2, second = step % 4 / 2;
    const auto high = S::look_up(kHighBits[odd], S::mask(S::template shift<4 * four>(lines[2]), kHalves));
    const auto pair = S::mask_or(S::template shift<2 * odd>(lines[four]), 0x33333333, high);
    return S::mask(S::template shift<4 * second>(pair), kHalves);
}

// One step of a block: the codes of 16 rows × 4 features, a byte each. Scalar form, for the code of byte j of a lane:
//
//     code = Σ_planes ((line[plane.line + step·w/8] >> (8j + w·(step % (8/w)))) & (2^w − 1)) << plane.offset
template <class S, int bits, int step>
AMQ_INLINE typename S::I32 decode(const typename S::I32 (&lines)[bits]) {
    if constexpr (are_two_and(1, bits) && S::kLooksUp) return look_up<S, step>(lines);
    typename S::I32 codes{};
    unroll<4>([&](auto index) __attribute__((always_inline)) {
        constexpr Plane plane = plane_of(bits, index);
        if constexpr (plane.width == 8) {
            codes = lines[step];
        } else if constexpr (plane.width > 0) {
            constexpr int per_line = 8 / plane.width;
            constexpr uint32_t mask = ((1u << plane.width) - 1) << plane.offset;
            const auto line = S::template shift<step % per_line * plane.width - plane.offset>(
                lines[plane.line + step / per_line]);
            codes = index == 0 ? S::mask(line, 0x01010101u * mask) : S::mask_or(line, 0x01010101u * mask, codes);
        }
    });
    return codes;
}

template <class S, int bits>
AMQ_INLINE void load_block(const uint8_t* block, typename S::I32 (&lines)[bits]) {
    unroll<bits>([&](auto i) __attribute__((always_inline)) {
        S::prefetch(block + i * kLineBytes + kPrefetchBytes);
        lines[i] = S::load(block + i * kLineBytes);
    });
}

// The group of `bytes` bytes at `p`, whose lines have `lanes` lanes, with full lines in `buffer`; lanes beyond are 0.
AMQ_INLINE const uint8_t* widen(const uint8_t* p, int lanes, int64_t lines, uint8_t* buffer) {
    std::memset(buffer, 0, lines * kLineBytes);
    std::memcpy(buffer, p, 2 * lanes);                                 // scales
    std::memcpy(buffer + kLineBytes / 2, p + 2 * lanes, 2 * lanes);  // zero points
    for (int64_t line = 1; line < lines; ++line)
        std::memcpy(buffer + line * kLineBytes, p + line * 4 * lanes, 4 * lanes);
    return buffer;
}

// One group of a tile, in full lines wherever the tile's rows end.
template <class S, int bits>
struct Group {
    const uint8_t* lines;
    alignas(64) uint8_t widened[kMaxGroupBytes];  // touched for the last tile only

    Group() = default;
    Group(const Group&) = delete;  // `lines` may point into it
    AMQ_INLINE void find(const LinearTask& task, int64_t tile, int64_t index) {
        const int lanes = task.lanes(tile);
        const int64_t before = 1 + task.group_size / kBlock * bits;  // lines of each group before this one
        lines = task.data + tile * task.tile_bytes + 4 * lanes * before * index;
        if (lanes < kLanes) lines = widen(lines, lanes, 1 + task.blocks(index) * bits, widened);
    }
    AMQ_INLINE typename S::F32 scale() const { return S::load_half(lines); }
    AMQ_INLINE typename S::F32 zero_point() const { return S::load_half(lines + kLineBytes / 2); }
    AMQ_INLINE const uint8_t* block(int64_t b) const { return lines + kLineBytes * (1 + b * bits); }
};

template <class S>
AMQ_INLINE void store_row(const LinearTask& task, int64_t row, int64_t tile, typename S::F32 sum) {
    float* y = task.y + row * task.y_stride + tile * kLanes;
    const float* bias = task.bias ? task.bias + tile * kLanes : nullptr;
    if (const int lanes = task.lanes(tile); lanes == kLanes) {
        S::store(y, bias ? S::add(sum, S::load_float(bias)) : sum);
    } else {
        alignas(64) float all[kLanes];
        S::store(all, sum);
        for (int lane = 0; lane < lanes; ++lane) y[lane] = bias ? all[lane] + bias[lane] : all[lane];
    }
}

// One group's integer sums of one row onto the row's result; the same operations in gemv and gemm, so that a row's
// result does not depend on the rows beside it.
template <class S>
AMQ_INLINE typename S::F32 add_group(typename S::F32 y, typename S::I32 dot, typename S::F32 scale,
                                     typename S::F32 zero_point, float x_scale, float x_sum) {
    const auto centered = S::fnma(zero_point, S::splat(x_sum), S::to_float(dot));
    return S::fma(S::mul(scale, S::splat(x_scale)), centered, y);
}

// Without an instruction that multiplies and adds four bytes, products are added in pairs to 16 bits first, and sums of
// pairs are widened after as many steps as fit: `run` is that, or all of a block. 8-bit codes go in two halves.
template <int bits>
struct Pairs {
    static constexpr int kHalves = plane_of(bits, 0).width == 8 ? 2 : 1, kBits = bits / kHalves;
    static constexpr int kFit = INT16_MAX / (2 * 127 * ((1 << kBits) - 1)), kRun = kFit < kSteps ? kFit : kSteps;
    static_assert(kSteps % kRun == 0, "a block is whole runs");
};

template <class S, int bits, int rows>
AMQ_INLINE void add_pairs(const typename S::I32 (&lines)[bits], const uint8_t* x, typename S::I32 (&sum)[rows]) {
    using P = Pairs<bits>;
    unroll<P::kHalves * kSteps / P::kRun>([&](auto part) __attribute__((always_inline)) {
        constexpr int half = part % P::kHalves, first = part / P::kHalves * P::kRun;
        typename S::I32 pairs[rows] = {};
        unroll<P::kRun>([&](auto i) __attribute__((always_inline)) {
            constexpr int step = first + i;
            auto codes = decode<S, bits, step>(lines);
            if constexpr (P::kHalves == 2) codes = S::mask(S::template shift<4 * half>(codes), 0x0f0f0f0f);
            unroll<rows>([&](auto m) __attribute__((always_inline)) {
                pairs[m] = S::add_pairs(pairs[m], codes, x + kStep * (step * rows + m));
            });
        });
        unroll<rows>([&](auto m) __attribute__((always_inline)) {
            sum[m] = S::template add_widened<half == 1 ? 16 : 1>(sum[m], pairs[m]);
        });
    });
}

// 2-bit codes of odd steps stay where they lie beside those of even ones, four times as much: one shift for four steps.
template <class S, int rows>
AMQ_INLINE void add_pairs_in_place(const typename S::I32 (&lines)[2], const uint8_t* x, typename S::I32 (&sum)[rows]) {
    static_assert(kSteps / 2 * 2 * 127 * (3 << 2) <= INT16_MAX, "a block's sums of pairs fit");
    typename S::I32 pairs[2][rows] = {};
    unroll<kSteps>([&](auto step) __attribute__((always_inline)) {
        constexpr int odd = step % 2;
        const auto codes = S::mask(S::template shift<step % 4 / 2 * 4>(lines[step / 4]), 0x03030303u << 2 * odd);
        unroll<rows>([&](auto m) __attribute__((always_inline)) {
            pairs[odd][m] = S::add_pairs(pairs[odd][m], codes, x + kStep * (step * rows + m));
        });
    });
    unroll<rows>([&](auto m) __attribute__((always_inline)) {
        sum[m] = S::template add_widened<1>(S::template add_widened<1, 2>(sum[m], pairs[1][m]), pairs[0][m]);
    });
}

// Adds one block of a tile to the sums of `rows` rows: [rows] integers (int8) …
template <class S, int bits, int rows>
AMQ_INLINE void add_block(const uint8_t* block, const uint8_t* x, typename S::F32, typename S::I32 (&sum)[rows]) {
    typename S::I32 lines[bits];
    load_block<S, bits>(block, lines);
    // (Twice as many sums in work: of four rows they would not fit AVX2's registers.)
    if constexpr (S::kPairs && are_two_and(0, bits) && rows <= 2) return add_pairs_in_place<S, rows>(lines, x, sum);
    if constexpr (S::kPairs) return add_pairs<S, bits, rows>(lines, x, sum);
    unroll<kSteps>([&](auto step) __attribute__((always_inline)) {
        const auto codes = decode<S, bits, step>(lines);
        unroll<rows>([&](auto m) __attribute__((always_inline)) {
            sum[m] = S::template dot<bits>(sum[m], codes, x + kStep * (step * rows + m));
        });
    });
}

// … or floats (fp32), of which the zero point is taken off here.
template <class S, int bits, int rows>
AMQ_INLINE void add_block(const uint8_t* block, const float* x, typename S::F32 zero_point,
                          typename S::F32 (&sum)[rows]) {
    typename S::I32 lines[bits];
    load_block<S, bits>(block, lines);
    unroll<kSteps>([&](auto step) __attribute__((always_inline)) {
        const auto codes = decode<S, bits, step>(lines);
        unroll<kStep>([&](auto j) __attribute__((always_inline)) {
            const auto weight = S::sub(S::template byte_to_float<j>(codes), zero_point);
            unroll<rows>([&](auto m) __attribute__((always_inline)) {
                sum[m] = S::fma(weight, S::splat(x[(kStep * step + j) * rows + m]), sum[m]);
            });
        });
    });
}

// What a group is summed in.
template <class S, class Element>
struct GroupSum {
    using type = typename S::F32;
};
template <class S>
struct GroupSum<S, uint8_t> {
    using type = typename S::I32;
};

// Up to 4 rows for tiles `first`, `first` + `stride`, …: codes are decoded on their way from memory. `Element` is that of
// x: uint8_t (int8) or float (fp32).
template <class S, int bits, int rows, int streams, class Element>
AMQ_INLINE void gemv_tiles(const LinearTask& task, int64_t first, int64_t stride) {
    constexpr bool int8 = sizeof(Element) == 1;
    Group<S, bits> group[streams];
    typename S::F32 y[streams][rows] = {};
    for (int64_t g = 0; g < task.n_groups(); ++g) {
        typename S::F32 zero_point[streams];
        typename GroupSum<S, Element>::type sum[streams][rows] = {};
        unroll<streams>([&](auto t) __attribute__((always_inline)) {
            group[t].find(task, first + t * stride, g);
            S::prefetch(group[t].lines + kPrefetchBytes);
            zero_point[t] = group[t].zero_point();
        });
        const Element* x = static_cast<const Element*>(task.x) + g * task.panels.size();
        const int64_t blocks = task.blocks(g);
        for (int64_t b = 0; b < blocks; ++b, x += kBlock * rows)
            unroll<streams>([&](auto t) __attribute__((always_inline)) {
                add_block<S, bits, rows>(group[t].block(b), x, zero_point[t], sum[t]);
            });
        unroll<streams>([&](auto t) __attribute__((always_inline)) {
            const auto scale = group[t].scale();
            unroll<rows>([&](auto m) __attribute__((always_inline)) {
                if constexpr (int8)
                    y[t][m] = add_group<S>(y[t][m], sum[t][m], scale, zero_point[t], task.x_scale[g * rows + m],
                                           task.x_sum[g * rows + m]);
                else
                    y[t][m] = S::fma(scale, sum[t][m], y[t][m]);
            });
        });
    }
    for (int m = 0; m < rows && m < task.rows; ++m)
        for (int t = 0; t < streams; ++t) store_row<S>(task, m, first + t * stride, y[t][m]);
}

// A thread's tiles as contiguous streams side by side.
template <class S, int bits, int rows, class Element>
void gemv(const LinearTask& task, int64_t begin, int64_t end) {
    constexpr int streams = rows <= 2 ? kStreams : 2;
    const int64_t length = (end - begin) / streams;
    for (int64_t i = 0; i < length; ++i) gemv_tiles<S, bits, rows, streams, Element>(task, begin + i, length);
    for (begin += length * streams; begin < end; ++begin) gemv_tiles<S, bits, rows, 1, Element>(task, begin, 0);
}

// A group of a tile → its steps as bytes [blocks · 8][64].
template <class S, int bits>
AMQ_INLINE void decode_group(const Group<S, bits>& group, int64_t blocks, uint8_t* codes) {
    for (int64_t b = 0; b < blocks; ++b, codes += kSteps * kLineBytes) {
        typename S::I32 lines[bits];
        load_block<S, bits>(group.block(b), lines);
        unroll<kSteps>([&](auto step) __attribute__((always_inline)) {
            S::store_int(codes + step * kLineBytes, decode<S, bits, step>(lines));
        });
    }
}

// A group of a tile → code − zero_point as float32 [blocks · 32][16].
template <class S, int bits>
AMQ_INLINE void decode_group(const Group<S, bits>& group, int64_t blocks, float* weights) {
    const auto zero_point = group.zero_point();
    for (int64_t b = 0; b < blocks; ++b, weights += kBlock * kLanes) {
        typename S::I32 lines[bits];
        load_block<S, bits>(group.block(b), lines);
        unroll<kSteps>([&](auto step) __attribute__((always_inline)) {
            const auto codes = decode<S, bits, step>(lines);
            unroll<kStep>([&](auto j) __attribute__((always_inline)) {
                S::store(weights + (kStep * step + j) * kLanes, S::sub(S::template byte_to_float<j>(codes), zero_point));
            });
        });
    }
}

// What gemm keeps of the tiles in work: their sums over groups for a chunk of rows, so many that they stay in the first
// cache, and scale and zero point of the group.
template <class S, int tiles>
struct Sums {
    static constexpr int kRows = 512 / tiles;  // 32 KiB
    alignas(64) float values[kRows][tiles][kLanes];
    typename S::F32 scale[tiles], zero_point[tiles];

    AMQ_INLINE void clear(int64_t rows) {
        std::memset(values, 0, rows * sizeof values[0]);
    }
    AMQ_INLINE void add(int t, int64_t row, typename S::I32 dot, float x_scale, float x_sum) {
        float* sum = values[row][t];
        S::store(sum, add_group<S>(S::load_float(sum), dot, scale[t], zero_point[t], x_scale, x_sum));
    }
    AMQ_INLINE void add(int t, int64_t row, typename S::F32 dot) {
        float* sum = values[row][t];
        S::store(sum, S::fma(scale[t], dot, S::load_float(sum)));
    }
};

// Panels begin … end − 1 of a group, for which a kernel multiplies.
template <class Element>
struct PanelRange {
    const LinearTask& task;
    int64_t g, begin, end;

    AMQ_INLINE const Element* x(int64_t panel) const {
        return static_cast<const Element*>(task.x) + task.panels.index(g, panel) * task.panels.size();
    }
    AMQ_INLINE const float* x_scale(int64_t panel) const {
        return task.x_scale + task.panels.index(g, panel) * task.panels.rows;
    }
    AMQ_INLINE const float* x_sum(int64_t panel) const {
        return task.x_sum + task.panels.index(g, panel) * task.panels.rows;
    }
    AMQ_INLINE int64_t row(int64_t panel) const { return (panel - begin) * task.panels.rows; }  // in Sums
};

// Many rows for `tiles` tiles from `first` on, a chunk of rows after another: each group is decoded once per chunk, then
// multiply(buffer, blocks, sums, panels) adds it to the sums of the chunk's rows. What a tile's codes take of the buffer
// is kMaxGroup · 16 elements.
template <class S, int bits, int tiles, class Element, class Multiply>
AMQ_INLINE void gemm_tiles(const LinearTask& task, int64_t first, const Multiply& multiply) {
    alignas(64) Element buffer[tiles][kMaxGroup * kLanes];
    Sums<S, tiles> sums;
    Group<S, bits> group;
    const int64_t n_groups = task.n_groups(), n_panels = task.panels.n_panels;
    const int64_t chunk = Sums<S, tiles>::kRows / task.panels.rows;
    for (int64_t begin = 0; begin < n_panels; begin += chunk) {
        const int64_t end = begin + chunk < n_panels ? begin + chunk : n_panels;
        sums.clear((end - begin) * task.panels.rows);
        for (int64_t g = 0; g < n_groups; ++g) {
            for (int t = 0; t < tiles; ++t) {
                group.find(task, first + t, g);
                sums.scale[t] = group.scale();
                sums.zero_point[t] = group.zero_point();
                decode_group<S, bits>(group, task.blocks(g), buffer[t]);
            }
            multiply(buffer, task.blocks(g), sums, PanelRange<Element>{task, g, begin, end});
        }
        for (int64_t row = begin * task.panels.rows; row < end * task.panels.rows && row < task.rows; ++row)
            for (int t = 0; t < tiles; ++t)
                store_row<S>(task, row, first + t, S::load_float(sums.values[row - begin * task.panels.rows][t]));
    }
}

// As many rows and tiles as the registers of S hold sums for.
template <class S, int bits, int tiles>
AMQ_INLINE void gemm_int8_tiles(const LinearTask& task, int64_t first) {
    constexpr int rows = S::kGemmRows;
    gemm_tiles<S, bits, tiles, uint8_t>(task, first, [](auto& buffer, int64_t blocks, auto& sums, auto panels)
                                                         __attribute__((always_inline)) {
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            typename S::I32 sum[tiles][rows] = {};
            const uint8_t* x = panels.x(panel);
            // add(sum, codes, x) for every sum.
            const auto step = [&](int64_t i, auto& into, const auto& add) __attribute__((always_inline)) {
                typename S::I32 codes[tiles];
                unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                    codes[t] = S::load(buffer[t] + i * kLineBytes);
                });
                unroll<rows>([&](auto m) __attribute__((always_inline)) {
                    unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                        add(into[t][m], codes[t], x + kStep * (i * rows + m));
                    });
                });
            };
            if constexpr (S::kPairs && Pairs<bits>::kHalves == 1) {
                for (int64_t first = 0; first < blocks * kSteps; first += Pairs<bits>::kRun) {
                    typename S::I32 pairs[tiles][rows] = {};
                    unroll<Pairs<bits>::kRun>([&](auto i) __attribute__((always_inline)) {
                        step(first + i, pairs, [](auto& into, auto codes, const uint8_t* at) __attribute__((always_inline)) {
                            into = S::add_pairs(into, codes, at);
                        });
                    });
                    unroll<rows>([&](auto m) __attribute__((always_inline)) {
                        unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                            sum[t][m] = S::template add_widened<1>(sum[t][m], pairs[t][m]);
                        });
                    });
                }
            } else {
                for (int64_t i = 0; i < blocks * kSteps; ++i)
                    step(i, sum, [](auto& into, auto codes, const uint8_t* at) __attribute__((always_inline)) {
                        into = S::template dot<bits>(into, codes, at);
                    });
            }
            unroll<rows>([&](auto m) __attribute__((always_inline)) {
                unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                    sums.add(t, panels.row(panel) + m, sum[t][m], panels.x_scale(panel)[m], panels.x_sum(panel)[m]);
                });
            });
        }
    });
}

template <class S, int bits, int tiles>
AMQ_INLINE void gemm_fp32_tiles(const LinearTask& task, int64_t first) {
    constexpr int rows = S::kGemmRows;
    gemm_tiles<S, bits, tiles, float>(task, first, [](auto& buffer, int64_t blocks, auto& sums, auto panels)
                                                       __attribute__((always_inline)) {
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            typename S::F32 sum[tiles][rows] = {};
            const float* x = panels.x(panel);
            for (int64_t k = 0; k < blocks * kBlock; ++k, x += rows) {
                typename S::F32 weights[tiles];
                unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                    weights[t] = S::load_float(buffer[t] + k * kLanes);
                });
                unroll<rows>([&](auto m) __attribute__((always_inline)) {
                    const auto value = S::splat(x[m]);
                    unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                        sum[t][m] = S::fma(weights[t], value, sum[t][m]);
                    });
                });
            }
            unroll<rows>([&](auto m) __attribute__((always_inline)) {
                unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                    sums.add(t, panels.row(panel) + m, sum[t][m]);
                });
            });
        }
    });
}

template <class S, int bits>
void gemm_int8(const LinearTask& task, int64_t begin, int64_t end) {
    for (; begin + S::kGemmTiles <= end; begin += S::kGemmTiles) gemm_int8_tiles<S, bits, S::kGemmTiles>(task, begin);
    for (; begin < end; ++begin) gemm_int8_tiles<S, bits, 1>(task, begin);
}

template <class S, int bits>
void gemm_fp32(const LinearTask& task, int64_t begin, int64_t end) {
    for (; begin + S::kGemmTiles <= end; begin += S::kGemmTiles) gemm_fp32_tiles<S, bits, S::kGemmTiles>(task, begin);
    for (; begin < end; ++begin) gemm_fp32_tiles<S, bits, 1>(task, begin);
}

template <class S, int bits>
constexpr LinearKernels linear_kernels() {
    if constexpr (!bits) {
        return {};
    } else {
        return {{{nullptr, gemv<S, bits, 1, float>, gemv<S, bits, 2, float>, nullptr, gemv<S, bits, 4, float>},
                 {nullptr, gemv<S, bits, 1, uint8_t>, gemv<S, bits, 2, uint8_t>, nullptr, gemv<S, bits, 4, uint8_t>}},
                {gemm_fp32<S, bits>, gemm_int8<S, bits>},
                {S::kGemmRows, S::kGemmRows},
                {1, kStep}};
    }
}

}  // namespace
}  // namespace amq

// Defines linear_kernels_<isa>() from the vector type S.
#define AMQ_LINEAR_ENTRY(name, levels, unit_codes, unit_bytes) linear_kernels<S, bits_of(levels)>(),
#define AMQ_DEFINE_LINEAR_KERNELS(isa)                                                    \
    namespace amq {                                                                       \
    const LinearKernels* linear_kernels_##isa() {                                         \
        static constexpr LinearKernels kernels[] = {AMQ_FORMATS(AMQ_LINEAR_ENTRY)};       \
        return kernels;                                                                   \
    }                                                                                     \
    }
