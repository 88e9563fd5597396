"""y = x · Wᵀ (+ bias) for many rows of x: weights are decoded to x's dtype and multiplied by tensor cores.

Weights become (code − zero_point) · scale in float32, rounded once to x's dtype; sums are float32. The product is
computed as Wᵀ's transpose, W · xᵀ → [BLOCK_N, BLOCK_M], with the weights as first operand, which tensor cores take from
registers: decoded weights never go through shared memory.

Two permutations make that free with `mma.sync` (the compile tests look for exchanges). A thread loads the words of row
lane // 4, columns 4·(lane % 4) on, so it decodes the 8 neighbouring features 8·(lane % 4) on of a step. An mma operand
wants row lane // 4 and, with the operand width that Triton takes here, features 4·(lane % 4) on of 16: so both operands
take the 32 features of a step in the order half, lane, rest. And its rows come in pairs of 8, then over warps: so the
row dimensions of a tile are [8 in a tile, warps, rest], reordered to rest, warp, pair, 8.

For few rows of x the warps of a program divide K, SLABS of them a slab each, as a batched product whose batch is summed
at the end: x too then goes from memory to the registers of the one warp that wants it, and the loop has no exchange and
no barrier. Otherwise they divide the output rows and share x through shared memory.

What limits it: one trip of the loop is a whole slab, 512 features, because a format's spare bits span all planes of
one, so that pipelining x (more stages) takes 1 KiB of shared memory per row of x and stage. The large form has two
barriers a step on `mma.sync`, and on sm_90, where Triton makes it `wgmma`, x is rearranged first. Weights are decoded
again for every BLOCK_M rows of x, 5 instructions each, hidden behind the tensor cores only from BLOCK_M = 64 on. For
thousands of rows, dequantizing once and calling cuBLAS is the better plan.
"""

import triton
import triton.language as tl

from .slabs import (
    COLUMNS,
    SLAB,
    STEP_FEATURES,
    TILE_ROWS,
    find_weight,
    load_byte_words,
    load_scales,
    row_planes,
    slabs_of,
    tile_pointers,
    weights,
)

GROUP_BLOCKS = tl.constexpr(8)


@triton.jit(
    do_not_specialize=["rows", "bits", "column", "has_bias", "y_stride", "M"],
    do_not_specialize_on_alignment=["y", "bias"],
)
def gemm(
    x,  # fp16 or bf16 [M, K]
    y,  # [M, y_stride]; written: from `column` on, the columns of the weights, side by side
    bias,  # [y_stride], added where has_bias is 1, not 0
    data,  # a tuple of int32 pointers: prepared weights
    rows,  # a tuple: their output rows, 0 for those that are not there
    bits,  # a tuple: of their codes
    column,
    has_bias,
    y_stride,
    M,
    WIDTHS: tl.constexpr,  # a tuple: what bits may be
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    SLABS: tl.constexpr,  # 1: warps divide the rows of W; WARPS: they divide K
):
    """One program for each BLOCK_M rows of x and BLOCK_N rows of a weight; the order of summation is fixed."""
    blocks_n = 0
    for s in tl.static_range(len(rows)):
        blocks_n += tl.cdiv(rows[s], BLOCK_N)
    block_n, block_m = _order(tl.program_id(0), blocks_n, tl.cdiv(M, BLOCK_M))
    at, count, width, block, before = find_weight(block_n, data, rows, bits, column, BLOCK_N)
    first = block_m * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            acc = _dot(
                x,
                first,
                M,
                at,
                count,
                block,
                WIDTHS[i],
                K,
                GROUP_SIZE,
                BLOCK_M,
                BLOCK_N,
                WARPS,
                SLABS,
            )
            added = tl.load(bias + before + n, mask=n < count * has_bias, other=0.0)
            acc += added.to(tl.float32)[:, None]
            to = y + tl.cast(first, tl.int64) * y_stride + before  # from here on 32 bits are enough
            to += m[None, :] * y_stride + n[:, None]
            tl.store(to, acc.to(y.dtype.element_ty), mask=(n < count)[:, None] & (first + m < M)[None, :])


@triton.jit
def _order(program, blocks_n, blocks_m):
    """(block of weights, block of x): GROUP_BLOCKS blocks of weights take all blocks of x before the next ones start,
    so that the programs running at one time share both through the L2 cache."""
    first = program // (GROUP_BLOCKS * blocks_m) * GROUP_BLOCKS
    width = tl.minimum(blocks_n - first, GROUP_BLOCKS)
    rest = program - first * blocks_m
    return first + rest % width, rest // width


@triton.jit
def _dot(
    x,
    first,
    M,
    data,
    rows,
    block,
    BITS: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    SLABS: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_M]: W · xᵀ."""
    ROW_WARPS: tl.constexpr = WARPS // SLABS
    rest = tl.arange(0, BLOCK_N // (TILE_ROWS * ROW_WARPS))[None, None, :, None]
    warp = tl.arange(0, WARPS)[None, :, None, None] % ROW_WARPS
    row = tl.arange(0, TILE_ROWS)[:, None, None, None] + rest % 2 * TILE_ROWS
    row += (warp + rest // 2 * ROW_WARPS) * (2 * TILE_ROWS)
    column = tl.arange(0, COLUMNS)[None, None, None, :]
    codes, scales = tile_pointers(
        data, rows, row + block * BLOCK_N, column, row_planes(K, BITS), slabs_of(K), GROUP_SIZE
    )
    if SLABS == 1:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([SLABS, BLOCK_N, BLOCK_M], tl.float32)
    FULL: tl.constexpr = K // (SLAB * SLABS)
    for step in range(FULL):
        acc = _add_slabs(acc, x, first, M, codes, scales, step, BITS, K, GROUP_SIZE, WARPS, SLABS, False)
    if FULL * SLABS * SLAB < K:
        acc = _add_slabs(acc, x, first, M, codes, scales, FULL, BITS, K, GROUP_SIZE, WARPS, SLABS, True)
    return acc if SLABS == 1 else tl.sum(acc, axis=0)


@triton.jit
def _add_slabs(
    acc,
    x,
    first,
    M,
    codes,
    scales,
    step,
    BITS: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WARPS: tl.constexpr,
    SLABS: tl.constexpr,
    MASKED: tl.constexpr,
):
    slab = step * SLABS + (tl.arange(0, WARPS) % SLABS)[None, :, None, None]
    words = load_byte_words(codes, slab, row_planes(K, BITS), BITS, MASKED)
    STEPS: tl.constexpr = GROUP_SIZE // STEP_FEATURES
    for quad in tl.static_range(SLAB // GROUP_SIZE // 4):
        pairs = load_scales(scales, slab, slabs_of(K), quad, GROUP_SIZE, MASKED)
        for s in tl.static_range(4 * STEPS):
            values = _x_operand(x, first, M, step, quad * 4 * STEPS + s, K, acc.shape[-1], SLABS, MASKED)
            w = _weight_operand(words, pairs[s // STEPS], quad * 4 * STEPS + s, BITS, x.dtype.element_ty, SLABS)
            acc = tl.dot(w, values, acc)
    return acc


@triton.jit
def _weight_operand(words, pair, STEP: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, SLABS: tl.constexpr):
    """[BLOCK_N, 32] of a step, or [SLABS, BLOCK_N, 32] of SLABS of them, from [8, warps, rest, 16] words."""
    even, odd = weights(words, pair, STEP, BITS)
    shape: tl.constexpr = even.shape
    w = tl.join(even.to(DTYPE), odd.to(DTYPE))
    w = tl.reshape(w, [shape[0], shape[1], shape[2] // 2, 2, 4, 2, 4])  # 8, warp, rest, pair; lane, half, 4 features
    if SLABS == 1:
        w = tl.permute(w, [2, 1, 3, 0, 5, 4, 6])
        w = tl.reshape(w, [shape[0] * shape[1] * shape[2], STEP_FEATURES])
    else:
        w = tl.permute(w, [1, 2, 3, 0, 5, 4, 6])
        w = tl.reshape(w, [shape[1], shape[0] * shape[2], STEP_FEATURES])
    return w


@triton.jit
def _x_operand(
    x,
    first,
    M,
    step,
    STEP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLABS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[32, BLOCK_M] of a step, or [SLABS, 32, BLOCK_M], its features in the order of `_weight_operand`."""
    m = tl.arange(0, 8)[:, None, None, None] + 8 * tl.arange(0, BLOCK_M // 8)[None, None, :, None] + first
    slab = tl.arange(0, SLABS)[None, :, None, None] + step * SLABS
    feature = slab * SLAB + (tl.arange(0, STEP_FEATURES)[None, None, None, :] + STEP * STEP_FEATURES)
    there = m < M
    if MASKED:
        there = there & (feature < K)
    at = x + m.to(tl.int64) * K + feature
    values = tl.load(at, mask=tl.broadcast_to(there, at.shape), other=0.0)
    values = tl.reshape(values, [8, SLABS, BLOCK_M // 8, 4, 2, 4])  # 8, slab, rest; lane, half, 4 features
    values = tl.permute(values, [1, 4, 3, 5, 2, 0])
    if SLABS == 1:
        values = tl.reshape(values, [STEP_FEATURES, BLOCK_M])
    else:
        values = tl.reshape(values, [SLABS, STEP_FEATURES, BLOCK_M])
    return values
