"""Weights as a matrix, whole or some rows of it, bit for bit what plain torch makes of the packed bytes
(`amq.packing.dequantize`): from a prepared weight, and from packed rows as they are stored (amq/formats.py).

The number of input features is an argument of the launch, not of the compiler: one kernel serves all shapes.
"""

import triton
import triton.language as tl

from .slabs import COLUMNS, SLAB, STEP_FEATURES, load_byte_words, load_scales, tile_pointers, weights


@triton.jit(do_not_specialize=["rows", "count", "planes", "slabs"], do_not_specialize_on_alignment=["ids"])
def dequantize(
    out,  # [count, K], contiguous; any float dtype, rounded once
    data,  # int32: a prepared weight
    ids,  # int64 [count]: the row of the weight for each row of out; None for the same. NaN where it has no such row
    rows,  # of the weight
    count,
    K,
    planes,  # of a row
    slabs,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for each slab of BLOCK_N rows of out."""
    slab = tl.full([1, 1], tl.program_id(0) % slabs, tl.int32)
    place = tl.program_id(0) // slabs * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    if ids is None:
        row = place
        known = place < rows
    else:
        row = tl.load(ids + place, mask=place < count, other=0)
        known = (row >= 0) & (row < rows)
        row = tl.where(known, row, 0).to(tl.int32)
    codes, scales = tile_pointers(data, rows, row, tl.arange(0, COLUMNS)[None, :], planes, slabs, GROUP_SIZE)
    words = load_byte_words(codes, slab, planes, BITS, True)
    STEPS: tl.constexpr = GROUP_SIZE // STEP_FEATURES
    for quad in tl.static_range(SLAB // GROUP_SIZE // 4):
        pairs = load_scales(scales, slab, slabs, quad, GROUP_SIZE, False)
        for s in tl.static_range(4 * STEPS):
            even, odd = weights(words, pairs[s // STEPS], quad * 4 * STEPS + s, BITS)
            w = tl.reshape(tl.join(even, odd), [BLOCK_N, STEP_FEATURES])
            if ids is not None:
                w = tl.where(known, w, float("nan"))
            feature = slab * SLAB + (quad * 4 * STEPS + s) * STEP_FEATURES + tl.arange(0, STEP_FEATURES)[None, :]
            to = out + place.to(tl.int64) * K + feature
            tl.store(to, w.to(out.dtype.element_ty), mask=(place < count) & (feature < K))


@triton.jit
def dequantize_rows(
    out,  # [rows, in_features], contiguous; any float dtype, rounded once
    qweight,  # uint8 [rows, row_bytes]: each row one little-endian bitstream of codes
    scale,  # fp16 [rows, groups]
    zero_point,  # fp16 [rows, groups]
    rows,
    in_features,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program for each BLOCK_N rows of BLOCK_K features. Neighbouring threads share bytes, which come from L1."""
    columns = tl.cdiv(in_features, BLOCK_K)
    row = (tl.program_id(0) // columns * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    first = tl.program_id(0) % columns * (BLOCK_K // GROUP_SIZE)
    group = (first + tl.arange(0, BLOCK_K // GROUP_SIZE))[None, :, None]
    feature = group * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, None, :]
    there = (row < rows) & (group < groups)
    inside = there & (feature < in_features)
    row = row.to(tl.int64)
    bit = feature * BITS
    at = qweight + row * row_bytes + bit // 8
    word = tl.load(at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may end in the next byte
        word |= tl.load(at + 1, mask=inside & (bit % 8 + BITS > 8), other=0).to(tl.int32) << 8
    code = (word >> bit % 8) & ((1 << BITS) - 1)
    step = tl.load(scale + row * groups + group, mask=there, other=0).to(tl.float32)
    zero = tl.load(zero_point + row * groups + group, mask=there, other=0).to(tl.float32)
    w = (code.to(tl.float32) - zero) * step
    tl.store(out + row * in_features + feature, w.to(out.dtype.element_ty), mask=inside)
