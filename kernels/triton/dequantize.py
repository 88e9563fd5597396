"""The whole weight as a matrix, bit for bit what plain torch makes of the packed bytes (`amq.packing.dequantize`)."""

import triton
import triton.language as tl

from .slabs import COLUMNS, SLAB, STEP_FEATURES, load_byte_words, load_scales, slabs_of, tile_pointers, weights


@triton.jit
def dequantize(
    out,  # [rows, K], contiguous; any float dtype, rounded once
    data,  # int32: a prepared weight
    rows,
    BITS: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for each slab of BLOCK_N rows."""
    slab = tl.full([1, 1], tl.program_id(0) % slabs_of(K), tl.int32)
    row = tl.program_id(0) // slabs_of(K) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    codes, scales = tile_pointers(data, rows, row, tl.arange(0, COLUMNS)[None, :], BITS, K, GROUP_SIZE)
    words = load_byte_words(codes, slab, BITS, K, K // SLAB * SLAB < K)
    STEPS: tl.constexpr = GROUP_SIZE // STEP_FEATURES
    for quad in tl.static_range(SLAB // GROUP_SIZE // 4):
        pairs = load_scales(scales, slab, quad, K, GROUP_SIZE, False)
        for s in tl.static_range(4 * STEPS):
            even, odd = weights(words, pairs[s // STEPS], quad * 4 * STEPS + s, BITS)
            w = tl.reshape(tl.join(even, odd), [BLOCK_N, STEP_FEATURES])
            feature = slab * SLAB + (quad * 4 * STEPS + s) * STEP_FEATURES + tl.arange(0, STEP_FEATURES)[None, :]
            to = out + row.to(tl.int64) * K + feature
            tl.store(to, w.to(out.dtype.element_ty), mask=(row < rows) & (feature < K))
