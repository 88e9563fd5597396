// The loop of bandwidth.h.

#include "bandwidth.h"

#include <atomic>
#include <cstring>

#include "threads.h"

namespace amq {
namespace {

using U64x4 = uint64_t __attribute__((vector_size(32)));

// One thread of an Intel Xeon with AMX, November 2026, GB/s on 4 KiB / 2 MiB pages: one stream 13 / 18, two 16 / 20, four
// 17 / 20.
constexpr int64_t kLine = 64, kAhead = 512, kStreams = 4;

AMQ_INLINE uint64_t checksum(const uint8_t* data, int64_t begin, int64_t end) {
    U64x4 sums[4] = {};  // several, so that no addition waits for the one before
    const int64_t length = (end - begin) / (2 * kLine * kStreams) * 2 * kLine;
    for (const uint8_t *p = data + begin, *stop = p + length; p < stop; p += 2 * kLine)
        for (int64_t stream = 0; stream < kStreams; ++stream)
            for (int i = 0; i < 4; ++i) {
                const uint8_t* half = p + stream * length + i * kLine / 2;
                U64x4 words;
                if (i % 2 == 0) __builtin_prefetch(half + kAhead);
                std::memcpy(&words, half, sizeof words);
                sums[i] += words;
                asm volatile("" ::: "memory");  // the compiler would gather the prefetches, which costs a tenth
            }
    uint64_t sum = 0;
    for (begin += kStreams * length; begin < end; ++begin) sum += data[begin];
    for (const U64x4& lanes : sums)
        for (int i = 0; i < 4; ++i) sum += lanes[i];
    return sum;
}

uint64_t checksum_portable(const uint8_t* data, int64_t begin, int64_t end) { return checksum(data, begin, end); }

AMQ_TARGET_AVX2 uint64_t checksum_avx2(const uint8_t* data, int64_t begin, int64_t end) {
    return checksum(data, begin, end);
}

}  // namespace

uint64_t read_bytes(const Isa& isa, const uint8_t* data, int64_t bytes, int threads) {
    const auto kernel = isa.avx2_loops ? checksum_avx2 : checksum_portable;
    std::atomic<uint64_t> sum{0};
    parallel_rows(bytes / kLine, threads, [&](int64_t begin, int64_t end) {
        sum += kernel(data, begin * kLine, end * kLine);
    });
    return sum;
}

}  // namespace amq
