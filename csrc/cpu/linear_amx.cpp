// AMX: many rows at int8 by tiles of 16 × 16 sums; everything else as with VNNI.
//
// One instruction multiplies 16 rows of x, 64 features each (tile A: 64 bytes per row), with 64 features of 16 output rows
// (tile B: a line of codes per 4 features, exactly what `decode` makes). Panels of x are therefore 16 rows, 64 features
// at a time, and every group is padded to a multiple of 64.

#include "simd_avx512.h"

#include "linear_body.h"

namespace amq {

const LinearKernels* linear_kernels_avx512vnni();

namespace {

using S = Avx512<true>;

constexpr int kTileRows = 16, kTileFeatures = 64, kTileBytes = kTileRows * kTileFeatures;

// What ldtilecfg reads: tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 codes; all are 16 rows of 64 bytes, but where x
// has fewer rows.
struct TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

    explicit TileConfiguration(int64_t x_rows) {
        for (int tile = 0; tile < 6; ++tile) rows[tile] = static_cast<uint8_t>(x_rows);
    }
};
static_assert(sizeof(TileConfiguration) == 64, "as the processor reads it");

using TileSums = int32_t[kTileRows][kLanes];

// One or two panels of x times one or two tiles of codes → sum[2·panel + tile]. Numbers of tiles are literals because the
// compiler's intrinsics put them into the assembler's text.
template <int panels, int tiles, class Buffer>
AMQ_INLINE void multiply_panels(const uint8_t* const (&x)[2], const Buffer& buffer, int64_t steps, TileSums (&sum)[4]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(6, buffer[0] + step * kTileBytes, kLineBytes);
        if constexpr (tiles == 2) _tile_loadd(7, buffer[1] + step * kTileBytes, kLineBytes);
        _tile_loadd(4, x[0] + step * kTileBytes, kTileFeatures);
        _tile_dpbsud(0, 4, 6);
        if constexpr (tiles == 2) _tile_dpbsud(1, 4, 7);
        if constexpr (panels == 2) {
            _tile_loadd(5, x[1] + step * kTileBytes, kTileFeatures);
            _tile_dpbsud(2, 5, 6);
            if constexpr (tiles == 2) _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sum[0], sizeof sum[0][0]);
    if constexpr (tiles == 2) _tile_stored(1, sum[1], sizeof sum[0][0]);
    if constexpr (panels == 2) _tile_stored(2, sum[2], sizeof sum[0][0]);
    if constexpr (panels == 2 && tiles == 2) _tile_stored(3, sum[3], sizeof sum[0][0]);
}

// Adds what `multiply_panels` made of panels `panel` and, if `count` is 2, the next one.
template <int tiles, class SumsOfTiles>
AMQ_INLINE void add_panels(const PanelRange<uint8_t>& panels, int64_t panel, int64_t count, const TileSums (&sum)[4],
                           SumsOfTiles& sums) {
    for (int64_t p = 0; p < count; ++p) {
        const float *x_scale = panels.x_scale(panel + p), *x_sum = panels.x_sum(panel + p);
        const int64_t row = panels.row(panel + p);
        const int64_t left = panels.task.rows - (panel + p) * kTileRows;
        for (int m = 0; m < kTileRows && m < left; ++m)
            unroll<tiles>([&](auto t) __attribute__((always_inline)) {
                sums.add(t, row + m, S::load(sum[2 * p + t][m]), x_scale[m], x_sum[m]);
            });
    }
}

template <int bits, int tiles>
AMQ_INLINE void gemm_amx_tiles(const LinearTask& task, int64_t first) {
    gemm_tiles<S, bits, tiles, uint8_t>(task, first, [](auto& buffer, int64_t blocks, auto& sums, auto panels)
                                                         __attribute__((always_inline)) {
        if (blocks % 2)  // the group ends within a tile's 64 features
            for (auto& codes : buffer) std::memset(codes + blocks * kSteps * kLineBytes, 0, kSteps * kLineBytes);
        const int64_t steps = ceil_div(blocks * kBlock, kTileFeatures);
        // Sums of tiles reach the vector unit through memory. Those of the panels before are added while these are
        // multiplied.
        alignas(64) TileSums sum[2][4];
        int64_t pending = 0;
        for (int64_t panel = panels.begin; panel < panels.end; panel += 2) {
            const int64_t count = panel + 1 < panels.end ? 2 : 1;
            const uint8_t* const x[2] = {panels.x(panel), panels.x(panel + count - 1)};
            auto& into = sum[(panel - panels.begin) / 2 % 2];
            count == 2 ? multiply_panels<2, tiles>(x, buffer, steps, into) : multiply_panels<1, tiles>(x, buffer, steps, into);
            if (pending) add_panels<tiles>(panels, panel - 2, 2, sum[(panel - panels.begin) / 2 % 2 ^ 1], sums);
            pending = count;
        }
        const int64_t last = (panels.end - panels.begin - 1) / 2;
        add_panels<tiles>(panels, panels.begin + 2 * last, pending, sum[last % 2], sums);
    });
}

template <int bits>
void gemm_amx(const LinearTask& task, int64_t begin, int64_t end) {
    const TileConfiguration configuration(task.rows < kTileRows ? task.rows : kTileRows);
    // GCC 12 believes that the instruction reads 8 bytes, and would store the others after it.
    asm volatile("" : : "r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
    for (; begin + 2 <= end; begin += 2) gemm_amx_tiles<bits, 2>(task, begin);
    if (begin < end) gemm_amx_tiles<bits, 1>(task, begin);
    _tile_release();
}

template <int bits>
constexpr LinearKernel gemm_amx_or_none() {
    if constexpr (bits > 0) return gemm_amx<bits>;
    return nullptr;
}

#define AMQ_AMX_ENTRY(name, levels, unit_codes, unit_bytes) gemm_amx_or_none<bits_of(levels)>(),
constexpr LinearKernel kGemms[] = {AMQ_FORMATS(AMQ_AMX_ENTRY)};
constexpr int kFormats = sizeof kGemms / sizeof kGemms[0];

struct Kernels {
    LinearKernels of_format[kFormats];
};

}  // namespace

const LinearKernels* linear_kernels_amx() {
    static const Kernels kernels = [] {
        Kernels made;
        for (int i = 0; i < kFormats; ++i) {
            constexpr int int8 = static_cast<int>(Mode::int8);
            made.of_format[i] = linear_kernels_avx512vnni()[i];
            made.of_format[i].gemm[int8] = kGemms[i];
            made.of_format[i].gemm_rows[int8] = kTileRows;
            made.of_format[i].gemm_step[int8] = kTileFeatures;
        }
        return made;
    }();
    return kernels.of_format;
}

}  // namespace amq
