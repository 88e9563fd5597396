// Who computes what: rectangles of kColumns columns by kTile · kMaxTiles lanes, on and above the diagonal.

#include "symmetric.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "quantize.h"
#include "threads.h"

namespace amq {
namespace {

constexpr int64_t kLanesAtOnce = static_cast<int64_t>(kTile) * kMaxTiles;

struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// The memory of one thread.
struct Memory {
    static constexpr int64_t kSums = kLanesAtOnce * kColumns, kLanes = kLanesAtOnce * kDepth;
    std::unique_ptr<float, Free> block{static_cast<float*>(
        ::operator new(sizeof(float) * (kLanes + kSums + kDepth * kColumns), std::align_val_t(64)))};

    ProductMemory parts() const { return {block.get(), block.get() + kLanes, block.get() + kLanes + kDepth * kColumns}; }
};

int64_t blocks(int64_t count, int64_t width) { return (count + width - 1) / width; }

// to[c, i] ← to[c, i] ± the product.
void put_sums(const ColumnProduct& p, const float* sums, float* to, int64_t stride, float sign) {
    for (int64_t tile = 0; tile * kTile < p.lanes; ++tile) {
        const int64_t width = std::min<int64_t>(kTile, p.lanes - tile * kTile);
        for (int64_t c = 0; c < p.columns; ++c) {
            const float* sum = sums + (tile * kColumns + c) * kTile;
            float* place = to + (p.first + c) * stride + p.lane + tile * kTile;
            for (int64_t i = 0; i < width; ++i) place[i] += sign * sum[i];
        }
    }
}

// The square on the diagonal, once what stands above it is subtracted.
bool factorize_square(float* matrix, int64_t size, int64_t first, int64_t rows) {
    for (int64_t r = first; r < first + rows; ++r) {
        float* row = matrix + r * size;
        if (!(row[r] > 0) || !std::isfinite(row[r])) return false;
        const float pivot = std::sqrt(row[r]), inverse = 1 / pivot;
        row[r] = pivot;
        for (int64_t i = r + 1; i < first + rows; ++i) row[i] *= inverse;
        for (int64_t below = r + 1; below < first + rows; ++below)
            for (int64_t i = below; i < first + rows; ++i) matrix[below * size + i] -= row[below] * row[i];
    }
    return true;
}

}  // namespace

void add_gram(const Isa& isa, const float* x, int64_t tokens, int64_t features, float* gram, int threads) {
    std::vector<ColumnProduct> tasks;
    for (int64_t lane = 0; lane < features; lane += kLanesAtOnce)
        for (int64_t first = 0; first < std::min(features, lane + kLanesAtOnce); first += kColumns)
            tasks.push_back({x, features, 0, tokens, first, std::min<int64_t>(kColumns, features - first), lane,
                             std::min(kLanesAtOnce, features - lane)});
    const int64_t total = static_cast<int64_t>(tasks.size());
    const int count = static_cast<int>(std::min<int64_t>(threads, total));
    std::vector<Memory> memories(count);
    std::atomic<int64_t> next{0}, thread{0};
    parallel_rows(count, count, [&](int64_t, int64_t) {
        const ProductMemory memory = memories[thread++].parts();
        for (int64_t i = next++; i < total; i = next++) {
            isa.quantize()->multiply(tasks[i], memory);
            put_sums(tasks[i], memory.sums, gram, features, 1.0f);
        }
    });
}

bool cholesky(const Isa& isa, float* matrix, int64_t size, int threads) {
    std::vector<Memory> memories(threads);
    for (int64_t first = 0; first < size; first += kColumns) {
        const int64_t rows = std::min<int64_t>(kColumns, size - first);
        const int64_t total = blocks(size - first, kLanesAtOnce);
        const int count = static_cast<int>(std::min<int64_t>(threads, total));
        const auto each = [&](const auto& work) {
            std::atomic<int64_t> next{0}, thread{0};
            parallel_rows(count, count, [&](int64_t, int64_t) {
                const ProductMemory memory = memories[thread++].parts();
                for (int64_t i = next++; i < total; i = next++) {
                    const int64_t lane = first + i * kLanesAtOnce;
                    work(lane, std::min(kLanesAtOnce, size - lane), memory);
                }
            });
        };
        if (first > 0)
            each([&](int64_t lane, int64_t lanes, const ProductMemory& memory) {
                const ColumnProduct product = {matrix, size, 0, first, first, rows, lane, lanes};
                isa.quantize()->multiply(product, memory);
                put_sums(product, memory.sums, matrix, size, -1.0f);
            });
        if (!factorize_square(matrix, size, first, rows)) return false;
        each([&](int64_t lane, int64_t lanes, const ProductMemory&) {
            const int64_t begin = std::max(lane, first + rows), end = lane + lanes;
            if (begin < end) isa.quantize()->finish(matrix, size, first, rows, begin, end - begin);
        });
    }
    return true;
}

void mirror(float* matrix, int64_t size, int threads) {
    constexpr int64_t kSide = 64;  // of a square whose rows and columns stay in the first cache
    const int64_t total = blocks(size, kSide);
    const int count = static_cast<int>(std::min<int64_t>(threads, total));
    std::atomic<int64_t> next{0};
    parallel_rows(count, count, [&](int64_t, int64_t) {
        for (int64_t block = next++; block < total; block = next++)
            for (int64_t left = 0; left <= block; ++left)
                for (int64_t r = block * kSide; r < std::min(size, (block + 1) * kSide); ++r)
                    for (int64_t c = left * kSide; c < std::min(r, (left + 1) * kSide); ++c)
                        matrix[r * size + c] = matrix[c * size + r];
    });
}

}  // namespace amq
