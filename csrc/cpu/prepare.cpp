// The loops of prepare.h.

#include "prepare.h"

#include <algorithm>
#include <cstring>

#include "amq_formats.h"
#include "threads.h"
#include "tiles.h"
#include "unit.h"

namespace amq {
namespace {

// The codes of one row from feature `first` on, as the 8 steps of a block: a word is 4 features. 0 beyond `count`.
template <int bits>
AMQ_INLINE void read_block(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t count, uint32_t* steps) {
    uint8_t bytes[kBlock + 8] = {}, codes[kBlock];
    const int64_t offset = first / kChunk * bits;  // a chunk of 8 codes fills `bits` bytes
    std::memcpy(bytes, row + offset, std::min<int64_t>(kBlock / kChunk * bits, row_bytes - offset));
    for (int chunk = 0; chunk < kBlock / kChunk; ++chunk) {
        uint64_t word;
        std::memcpy(&word, bytes + chunk * bits, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        for (int i = 0; i < kChunk; ++i) codes[chunk * kChunk + i] = word >> (i * bits) & ((1u << bits) - 1);
    }
    std::memset(codes + count, 0, kBlock - count);  // what the packed row's last unit holds there is not specified
    for (int step = 0; step < kSteps; ++step) steps[step] = load_le32(codes + kStep * step);
}

// Writes one lane of the `bits` lines of a block, `line_stride` bytes apart.
template <int bits>
AMQ_INLINE void write_lane(const uint32_t* steps, uint8_t* out, int64_t line_stride) {
    for (int index = 0; plane_of(bits, index).width; ++index) {
        const Plane plane = plane_of(bits, index);
        const int per_line = 8 / plane.width;
        const uint32_t mask = 0x01010101u * ((1u << plane.width) - 1);
        for (int line = 0; line < plane.width; ++line) {
            uint32_t word = 0;
            for (int s = 0; s < per_line; ++s)
                word |= (steps[line * per_line + s] >> plane.offset & mask) << (s * plane.width);
            std::memcpy(out + (plane.line + line) * line_stride, &word, sizeof word);
        }
    }
}

template <int bits>
AMQ_INLINE void prepare_tiles(const PrepareArgs& a, int64_t begin, int64_t end) {
    const int64_t row_bytes = ceil_div(a.in_features * bits, 8);
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t lanes = std::min<int64_t>(kLanes, a.rows - tile * kLanes), line = 4 * lanes;
        uint8_t* out = a.out + tile * tile_bytes(bits, a.in_features, a.group_size, kLanes);
        for (int64_t first = 0, g = 0; first < a.in_features; first += a.group_size, ++g) {
            const int64_t end_of_group = std::min(first + a.group_size, a.in_features);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t row = tile * kLanes + lane;
                std::memcpy(out + 2 * lane, a.scale + row * a.group_stride + g, 2);
                std::memcpy(out + 2 * (lanes + lane), a.zero_point + row * a.group_stride + g, 2);
            }
            out += line;
            for (int64_t k = first; k < end_of_group; k += kBlock, out += bits * line) {
                for (int64_t lane = 0; lane < lanes; ++lane) {
                    uint32_t steps[kSteps];
                    read_block<bits>(a.qweight + (tile * kLanes + lane) * a.qweight_stride, row_bytes, k,
                                     std::min<int64_t>(kBlock, end_of_group - k), steps);
                    write_lane<bits>(steps, out + 4 * lane, line);
                }
            }
        }
    }
}

using Kernel = void (*)(const PrepareArgs&, int64_t begin, int64_t end);

template <int bits>
void prepare_portable(const PrepareArgs& a, int64_t begin, int64_t end) {
    if constexpr (bits > 0) prepare_tiles<bits>(a, begin, end);
}

template <int bits>
AMQ_TARGET_AVX2 void prepare_avx2(const PrepareArgs& a, int64_t begin, int64_t end) {
    if constexpr (bits > 0) prepare_tiles<bits>(a, begin, end);
}

struct Entry {
    int bits;
    Kernel portable, avx2;
};

// Tiles hold formats whose packed rows are a dense bitstream.
template <class L>
constexpr Entry entry() {
    constexpr int bits = L::is_dense ? L::bits() : 0;
    return {bits, prepare_portable<bits>, prepare_avx2<bits>};
}

#define AMQ_ENTRY(name, levels, unit_codes, unit_bytes) entry<Layout<levels, unit_codes, unit_bytes>>(),
constexpr Entry kEntries[] = {AMQ_FORMATS(AMQ_ENTRY)};
#undef AMQ_ENTRY

}  // namespace

int tile_bits(int format) { return kEntries[format].bits; }

void prepare(int format, const Isa& isa, const PrepareArgs& args, int threads) {
    const Entry& entry = kEntries[format];
    const Kernel kernel = isa.avx2_loops ? entry.avx2 : entry.portable;
    parallel_rows(ceil_div(args.rows, kLanes), threads,
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace amq
