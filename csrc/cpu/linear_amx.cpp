// AMX: many rows at int8 by tiles of 16 × 16 sums; everything else as with VNNI.
//
// One instruction multiplies 16 rows of x, 64 features each (tile A: 64 bytes per row), with 64 features of 16 output rows
// (tile B: a line of codes per 4 features, exactly what `decode` makes). Panels of x are therefore 16 rows, 64 features
// at a time, and every group is padded to a multiple of 64.

#include "simd_avx512.h"

#include "linear_body.h"

namespace amq {
namespace {

using S = Avx512<true>;

constexpr int kTileRows = 16, kTileFeatures = 64, kTileBytes = kTileRows * kTileFeatures;

// What ldtilecfg reads: tiles 0, 1 hold sums, 2, 3 rows of x, 6, 7 codes; all are 16 rows of 64 bytes.
struct TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64, "as the processor reads it");

// Sums of one panel of x and the group in tiles 6 and 7 → sum[16][16]. A macro, since the compiler's intrinsics put the
// numbers of tiles into the assembler's text.
#define AMQ_MULTIPLY_PANEL(name, sum_tile, x_tile)                                           \
    AMQ_INLINE void name(const uint8_t* x, bool whole, int32_t (&sum)[kTileRows][kLanes]) { \
        _tile_zero(sum_tile);                                                                \
        _tile_loadd(x_tile, x, kTileFeatures);                                               \
        _tile_dpbsud(sum_tile, x_tile, 6);                                                   \
        if (whole) {                                                                         \
            _tile_loadd(x_tile, x + kTileBytes, kTileFeatures);                              \
            _tile_dpbsud(sum_tile, x_tile, 7);                                               \
        }                                                                                    \
        _tile_stored(sum_tile, sum, sizeof sum[0]);                                          \
    }
AMQ_MULTIPLY_PANEL(multiply_even_panel, 0, 2)
AMQ_MULTIPLY_PANEL(multiply_odd_panel, 1, 3)
#undef AMQ_MULTIPLY_PANEL

template <int bits>
AMQ_INLINE void gemm_amx_tile(const LinearTask& task, int64_t tile) {
    gemm_tiles<S, bits, 1, uint8_t>(task, tile, [&](auto& buffer, int64_t blocks, auto& sums, int64_t panel,
                                                    int64_t g) __attribute__((always_inline)) {
        const uint8_t* x = static_cast<const uint8_t*>(task.x) + panel * task.panels.panel_size() +
                           g * task.panels.group_size();
        const bool whole = blocks > kTileFeatures / kBlock;
        if (panel == 0) {
            std::memset(buffer[0] + blocks * kSteps * kLineBytes, 0, (blocks % 2) * kSteps * kLineBytes);
            _tile_loadd(6, buffer[0], kLineBytes);
            if (whole) _tile_loadd(7, buffer[0] + kTileBytes, kLineBytes);
        }
        alignas(64) int32_t sum[kTileRows][kLanes];
        if (panel % 2 == 0)  // two sets of registers, so that a panel need not wait for the one before
            multiply_even_panel(x, whole, sum);
        else
            multiply_odd_panel(x, whole, sum);
        const int64_t at = (panel * task.panels.n_groups + g) * kTileRows;
        for (int m = 0; m < kTileRows; ++m)
            sums.add(0, panel * kTileRows + m, S::load(sum[m]), task.x_scale[at + m], task.x_sum[at + m]);
    });
}

template <int bits>
void gemm_amx(const LinearTask& task, int64_t begin, int64_t end) {
    const TileConfiguration configuration;
    _tile_loadconfig(&configuration);
    for (int64_t tile = begin; tile < end; ++tile) gemm_amx_tile<bits>(task, tile);
    _tile_release();
}

template <int bits>
constexpr LinearKernels amx_kernels() {
    LinearKernels kernels = linear_kernels<S, bits>();
    if constexpr (bits > 0) {
        kernels.gemm[static_cast<int>(Mode::int8)] = gemm_amx<bits>;
        kernels.gemm_rows[static_cast<int>(Mode::int8)] = kTileRows;
        kernels.gemm_step[static_cast<int>(Mode::int8)] = kTileFeatures;
    }
    return kernels;
}

}  // namespace

#define AMQ_AMX_ENTRY(name, levels, unit_codes, unit_bytes) amx_kernels<bits_of(levels)>(),
const LinearKernels* linear_kernels_amx() {
    static constexpr LinearKernels kernels[] = {AMQ_FORMATS(AMQ_AMX_ENTRY)};
    return kernels;
}

}  // namespace amq
