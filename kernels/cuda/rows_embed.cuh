// A row of an embedding table, whose weights are elements, or packed as a checkpoint has them (amq/packing.py), or prepared for
// products (layout.cuh): a thread takes one number. What is quantized gives (code − zero point) · scale in float32, to the bit
// as amq.packing.dequantize does.

#pragma once

#include "layout.cuh"
#include "rows.cuh"

namespace amq::rows {

enum EmbedKind : int32_t { kPackedRows = 3, kPrepared = 4 };

// Of the lowest `bits` bits of a word.
AMQ_DEVICE float dequantized(uint32_t word, int bits, float scale, float zero_point) {
    return (static_cast<float>(word & ((1u << bits) - 1)) - zero_point) * scale;
}

// Of a row that is one stream of bits, in which a code may lie in two bytes.
AMQ_DEVICE float packed_element(const EmbedCall& call, int row, int column) {
    const int64_t bit = static_cast<int64_t>(column) * call.bits;
    const uint8_t* codes = static_cast<const uint8_t*>(call.data) + (row * call.row_bytes + bit / 8);
    const int shift = bit % 8;
    uint32_t word = codes[0];
    if (shift + call.bits > 8) word |= static_cast<uint32_t>(codes[1]) << 8;
    const int groups = (call.columns + call.group_size - 1) / call.group_size;
    const int64_t group = static_cast<int64_t>(row) * groups + column / call.group_size;
    return dequantized(word >> shift, call.bits, load_element(call.scales, kHalf, group),
                       load_element(call.zero_points, kHalf, group));
}

constexpr int kPlaneWords = kTileRows * kColumns;

// Byte `byte` of byte word `word` of a row and column, as byte_word in layout.cuh finds all four; `bits` is known at run time
// only. words: of the slab's planes, kPlaneWords apart.
AMQ_DEVICE uint32_t code_byte(const uint32_t* words, int bits, int word, int byte) {
    if (word < bits) return words[word * kPlaneWords] >> 8 * byte & 0xff;
    const int used = 8 / bits * bits, spare = 8 - used, begin = (word - bits) * used;
    uint32_t found = 0;
    for (int plane = begin / spare; plane * spare < begin + used; ++plane) {
        const uint32_t top = (words[plane * kPlaneWords] >> 8 * byte & 0xff) >> used;
        const int to = plane * spare - begin;
        found |= to < 0 ? top >> -to : top << to;
    }
    return found;
}

AMQ_DEVICE float prepared_element(const EmbedCall& call, int row, int column) {
    const int fields = 8 / call.bits, slab = column / kSlab, unit = column % kSlab / kUnit;
    const int slabs = (call.columns + kSlab - 1) / kSlab, tile = row / kTileRows;
    const int64_t tiles = (call.table_rows + kTileRows - 1) / kTileRows;
    // Planes of a tile, as amq/kernels/gpu_layout.py counts them.
    const int full = call.columns / kSlab * call.bits, per_word = kUnit * fields;
    const int planes = full + min(call.bits, (call.columns % kSlab + per_word - 1) / per_word);
    const uint32_t* data = static_cast<const uint32_t*>(call.data);
    const uint32_t* words = data + (static_cast<int64_t>(tile) * planes + slab * call.bits) * kPlaneWords +
                            row % kTileRows * kColumns + column % (kUnit / 2) / 2;
    const int byte = column % kUnit / (kUnit / 2) + 2 * (column % 2);
    const uint32_t found = code_byte(words, call.bits, unit / fields, byte);
    const int groups = kSlab / call.group_size;
    const int64_t of_row = (static_cast<int64_t>(tile) * slabs + slab) * kTileRows + row % kTileRows;
    const uint32_t* scales = data + tiles * planes * kPlaneWords + of_row * groups + column % kSlab / call.group_size;
    const float2 v = unpack_halves(*scales);  // scale, zero point
    return dequantized(found >> unit % fields * call.bits, call.bits, v.x, v.y);
}

__global__ void __launch_bounds__(kThreads) embed_kernel(EmbedCall call) {
    int64_t at;
    const int64_t k = column_of(call.columns, &at);
    if (k >= call.columns) return;
    const int row = max(0, min(call.tokens[at], call.table_rows - 1)), column = static_cast<int>(k);
    const float v = call.kind == kPackedRows ? packed_element(call, row, column)
                    : call.kind == kPrepared ? prepared_element(call, row, column)
                                             : load_element(call.data, call.kind, row * static_cast<int64_t>(call.columns) + k);
    call.y[at * call.y_stride + k] = call.scale * v;
}

}  // namespace amq::rows
