// Tiles of rows go to threads one slab at a time, as each is done with its last; rows come in from any of three elements,
// and codes leave packed.

#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "threads.h"
#include "unit.h"

namespace amq {
namespace {

// `count` rows of one weight from `first` on, in one format.
struct TileRows {
    const WeightRows* weight;
    size_t format;
    int64_t first, count;
};

// Formats of one weight's rows lie together, so that a slab reads them from its cache.
std::vector<TileRows> tiles_of(const std::vector<WeightRows>& weights, size_t formats) {
    std::vector<TileRows> tiles;
    for (const WeightRows& weight : weights)
        for (int64_t first = 0; first < weight.rows; first += kTile)
            for (size_t format = 0; format < formats; ++format)
                tiles.push_back({&weight, format, first, std::min<int64_t>(kTile, weight.rows - first)});
    return tiles;
}

struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// The memory of one thread.
class Workspace {
public:
    Workspace(const RoundingProblem& p, int tiles) {
        const int64_t features = p.in_features, groups = p.n_groups, lanes = static_cast<int64_t>(kTile) * tiles;
        slab_.tiles = tiles;
        slab_.values = take<float>(features * lanes);
        slab_.codes = take<uint8_t>(features * lanes);
        slab_.scale = take<float>(groups * lanes);
        slab_.zero = take<float>(groups * lanes);
        slab_.top = take<float>(lanes);
        row_ = take<float>(features);
        if (!p.hessian) return;
        slab_.errors = take<float>(features * lanes);
        slab_.off = take<float>(features * lanes);
        slab_.sums = take<float>(kColumns * lanes);
        slab_.panel = take<float>(kDepth * kColumns);
        slab_.inner = take<float>(groups * groups * lanes);
        slab_.mixed = take<float>(groups * groups * lanes);
        slab_.push = take<float>(2 * groups * lanes);
        slab_.normal = take<double>(groups * (2 * groups + 1) * 16);
        slab_.step = take<double>(4 * 2 * groups * 16);
    }
    Slab slab(int64_t tiles) const {
        Slab slab = slab_;
        slab.tiles = static_cast<int>(tiles);
        return slab;
    }
    float* row() const { return row_; }

private:
    template <class T>
    T* take(int64_t count) {
        blocks_.emplace_back(::operator new(sizeof(T) * std::max<int64_t>(count, 1), std::align_val_t(64)));
        return static_cast<T*>(blocks_.back().get());
    }
    std::vector<std::unique_ptr<void, Free>> blocks_;
    Slab slab_{};
    float* row_;
};

// Rows → lanes; lanes without a row hold zeros.
void load_tile(const VectorKernels& kernels, const RoundingProblem& p, const TileRows& tile, int largest, float* row,
               float* values, float* top) {
    std::fill_n(top, kTile, static_cast<float>(largest));
    const WeightRows& weight = *tile.weight;
    const int64_t row_bytes = p.in_features * (weight.element == Element::float32 ? 4 : 2);
    for (int64_t lane = 0; lane < kTile; ++lane) {
        if (lane < tile.count)
            kernels.widen[static_cast<int>(weight.element)](
                static_cast<const uint8_t*>(weight.weight) + (tile.first + lane) * row_bytes, p.in_features, row);
        else
            std::fill_n(row, p.in_features, 0.0f);
        for (int64_t k = 0; k < p.in_features; ++k) values[k * kTile + lane] = row[k];
    }
}

int bytes_for(int levels, int64_t codes) {
    uint64_t largest = 1;
    for (int64_t i = 0; i < codes; ++i) largest *= levels;
    int bytes = 0;
    for (--largest; largest; largest >>= 8) ++bytes;
    return bytes;
}

// codes [in_features][kTile] → packed rows, unit by unit.
void pack_tile(const CodeLayout& layout, const RoundingProblem& p, const uint8_t* codes, int64_t lanes, uint8_t* qweight) {
    const int64_t row_bytes = packed_bytes(layout, p.in_features);
    int64_t at = 0;
    for (int64_t first = 0; first < p.in_features; first += layout.unit_codes, at += layout.unit_bytes) {
        const int64_t count = std::min<int64_t>(layout.unit_codes, p.in_features - first);
        const int bytes = count == layout.unit_codes ? layout.unit_bytes : bytes_for(layout.levels, count);
        uint64_t units[kTile] = {};
        for (int64_t i = count; i-- > 0;)
            for (int lane = 0; lane < kTile; ++lane)
                units[lane] = units[lane] * layout.levels + codes[(first + i) * kTile + lane];
        for (int64_t lane = 0; lane < lanes; ++lane)
            for (int b = 0; b < bytes; ++b)
                qweight[lane * row_bytes + at + b] = static_cast<uint8_t>(units[lane] >> (8 * b));
    }
}

void store_tile(const RoundingProblem& p, const CodeLayout& layout, const Slab& slab, int64_t index, const TileRows& tile) {
    const PackedRows& to = tile.weight->results[tile.format];
    pack_tile(layout, p, slab.codes + index * p.in_features * kTile, tile.count,
              to.qweight + tile.first * packed_bytes(layout, p.in_features));
    const float *scale = slab.scale + index * p.n_groups * kTile, *zero = slab.zero + index * p.n_groups * kTile;
    for (int64_t lane = 0; lane < tile.count; ++lane)
        for (int64_t g = 0; g < p.n_groups; ++g) {
            const int64_t at = (tile.first + lane) * p.n_groups + g;
            to.scale[at] = float_to_half(scale[g * kTile + lane]);
            to.zero_point[at] = float_to_half(zero[g * kTile + lane]);
        }
}

// What one thread does: slabs until none is left.
void work(const Isa& isa, const RoundingProblem& p, const std::vector<TileRows>& tiles,
          const std::vector<CodeLayout>& formats, int64_t width, std::atomic<int64_t>& next) {
    const QuantizeKernels& kernels = *isa.quantize();
    const Workspace memory(p, static_cast<int>(width));
    const int64_t total = static_cast<int64_t>(tiles.size());
    for (int64_t first = width * next++; first < total; first = width * next++) {
        const Slab slab = memory.slab(std::min(width, total - first));
        for (int64_t t = 0; t < slab.tiles; ++t)
            load_tile(*isa.vector(), p, tiles[first + t], formats[tiles[first + t].format].levels - 1, memory.row(),
                      slab.values + t * p.in_features * kTile, slab.top + t * kTile);
        kernels.fit(p, slab);
        (p.hessian ? kernels.compensated : kernels.nearest)(p, slab);
        for (int64_t t = 0; t < slab.tiles; ++t)
            store_tile(p, formats[tiles[first + t].format], slab, t, tiles[first + t]);
    }
}

}  // namespace

int64_t packed_bytes(const CodeLayout& layout, int64_t in_features) {
    return in_features / layout.unit_codes * layout.unit_bytes + bytes_for(layout.levels, in_features % layout.unit_codes);
}

void quantize(const Isa& isa, const RoundingProblem& problem, const std::vector<WeightRows>& weights,
              const std::vector<CodeLayout>& formats, int threads) {
    const std::vector<TileRows> tiles = tiles_of(weights, formats.size());
    if (tiles.empty()) return;
    // Wide slabs read H less often; nearest rounding reads none, and few rows are better spread over all threads.
    const int64_t total = static_cast<int64_t>(tiles.size());
    const int64_t width = problem.hessian ? std::clamp<int64_t>(total / threads, 1, kMaxTiles) : 1;
    const int useful = static_cast<int>(std::min<int64_t>(threads, (total + width - 1) / width));
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    parallel_rows(useful, useful, [&](int64_t, int64_t) {
        try {
            work(isa, problem, tiles, formats, width, next);
        } catch (...) {  // must not leave the thread; what it had not begun, others do, or nobody needs to
            const std::lock_guard<std::mutex> lock(guard);
            failure = std::current_exception();
        }
    });
    if (failure) std::rethrow_exception(failure);
}

}  // namespace amq
