"""y = x · Wᵀ (+ bias) for a few rows of x: every weight is read once, and decoded without a shift or a conversion.

A code that stays where it is in its word is a float: the bits mask << pos of a word, read as float32, are the denormal
code · 2^(pos − 149), exactly, while pos + bits ≤ 23. So one AND and one fused multiply-add take a code, with x scaled
by 2^(64 − pos) beforehand, and 2^85 is left over for the group's scale. 64, rather than more, so that neither fp16 nor
bf16 below 2^64 overflows; products lose bits only where |x| < 2^-41.

The zero point stays in float32, y = Σ_groups scale · (dot − zero_point · Σx): in half precision, or folded into the
codes there, a fractional one would be lost.

Tensors are [slabs, lane rows, thread rows, columns]. Triton spreads the threads of a program over columns (four to a
thread), then slabs, then lane rows, and repeats over thread rows; with slabs · lane rows = 8 · warps, every thread
holds one slab, one lane row and all thread rows. x, loaded as [slabs, lane rows, 32 features], then lands in the thread
that wants it, in one 128-bit load, and serves all thread rows: no exchange through shared memory.
"""

import triton
import triton.language as tl

from .slabs import (
    COLUMNS,
    SLAB,
    STEP_FEATURES,
    denormals,
    field,
    find_weight,
    load_byte_words,
    load_scales,
    row_planes,
    slabs_of,
    tile_pointers,
    unpack_scales,
)

PRESCALE = tl.constexpr(64)
LEFT_OVER = tl.constexpr(149 - 64)


@triton.jit(
    do_not_specialize=["rows", "bits", "column", "has_bias", "y_stride"],
    do_not_specialize_on_alignment=["y", "bias"],
)
def gemv(
    x,  # fp16 or bf16 [M, K]
    y,  # [M, y_stride]; written: from `column` on, the columns of the weights, side by side
    bias,  # [y_stride], added where has_bias is 1, not 0
    data,  # a tuple of int32 pointers: prepared weights
    rows,  # a tuple: their output rows, 0 for those that are not there
    bits,  # a tuple: of their codes
    column,
    has_bias,
    y_stride,
    WIDTHS: tl.constexpr,  # a tuple: what bits may be
    M: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SLABS: tl.constexpr,
    LANE_ROWS: tl.constexpr,
    THREAD_ROWS: tl.constexpr,
):
    """One program for each LANE_ROWS · THREAD_ROWS rows of each weight; the order of summation is fixed."""
    BLOCK_N: tl.constexpr = LANE_ROWS * THREAD_ROWS
    at, count, width, block, before = find_weight(tl.program_id(0), data, rows, bits, column, BLOCK_N)
    row = tl.arange(0, LANE_ROWS)[:, None] + LANE_ROWS * tl.arange(0, THREAD_ROWS)[None, :]
    row += block * BLOCK_N
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            acc = _dot(x, at, count, row, WIDTHS[i], M, K, GROUP_SIZE, SLABS)
            for m in tl.static_range(M):
                added = tl.load(bias + before + row, mask=row < count * has_bias, other=0.0)
                out = tl.sum(tl.sum(acc[m], axis=3), axis=0) + added.to(tl.float32)
                to = y + tl.cast(m, tl.int64) * y_stride + before + row
                tl.store(to, out.to(y.dtype.element_ty), mask=row < count)


@triton.jit
def _dot(
    x,
    data,
    rows,
    row,
    BITS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SLABS: tl.constexpr,
):
    """A tuple of M accumulators [slabs, lane rows, thread rows, 4], whose sums over slabs and columns are y."""
    column = tl.arange(0, COLUMNS)[None, None, None, :]
    codes, scales = tile_pointers(
        data, rows, row[None, :, :, None], column, row_planes(K, BITS), slabs_of(K), GROUP_SIZE
    )
    acc = ()
    for _ in tl.static_range(M):
        acc = acc + (tl.zeros([SLABS, row.shape[0], row.shape[1], 4], tl.float32),)
    FULL: tl.constexpr = K // (SLAB * SLABS)
    for step in range(FULL):
        slab = step * SLABS + tl.arange(0, SLABS)
        acc = _add_slabs(acc, x, codes, scales, slab, BITS, K, GROUP_SIZE, False)
    if FULL * SLABS * SLAB < K:
        slab = FULL * SLABS + tl.arange(0, SLABS)
        acc = _add_slabs(acc, x, codes, scales, slab, BITS, K, GROUP_SIZE, True)
    return acc


@triton.jit
def _add_slabs(
    acc,
    x,
    codes,
    scales,
    slab,
    BITS: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`acc` plus the products of slabs `slab`, [slabs]. codes, scales: pointers to those of slab 0."""
    wide = slab[:, None, None, None]
    words = load_byte_words(codes, wide, row_planes(K, BITS), BITS, MASKED)
    for quad in tl.static_range(SLAB // GROUP_SIZE // 4):
        pairs = load_scales(scales, wide, slabs_of(K), quad, GROUP_SIZE, MASKED)
        for group in tl.static_range(4):
            acc = _add_group(acc, words, pairs[group], x, slab, quad * 4 + group, BITS, K, GROUP_SIZE, MASKED)
    return acc


@triton.jit
def _add_group(
    acc,
    words,
    pair,
    x,
    slab,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    shape: tl.constexpr = words[0].shape
    STEPS: tl.constexpr = GROUP_SIZE // STEP_FEATURES
    dots = ()
    sums = ()
    for _ in tl.static_range(len(acc)):
        dots = dots + (tl.zeros(shape, tl.float32),)
        sums = sums + (tl.zeros([shape[0], shape[1], COLUMNS], tl.float32),)
    for s in tl.static_range(STEPS):
        dots, sums = _add_step(dots, sums, words, x, slab, GROUP * STEPS + s, BITS, K, MASKED)
    scale, zero_point = unpack_scales(pair)
    scale *= 2.0**LEFT_OVER
    new_acc = ()
    for m in tl.static_range(len(acc)):
        total = tl.broadcast_to((_sum_columns(sums[m]) * 2.0**-LEFT_OVER)[:, :, None, :], scale.shape)
        dot = tl.fma(-zero_point, total, _sum_columns(dots[m]))
        new_acc = new_acc + (tl.fma(scale, dot, acc[m]),)
    return new_acc


@triton.jit
def _add_step(
    dots,
    sums,
    words,
    x,
    slab,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step more of the dot products, which are times 2^-LEFT_OVER, and of the sums of x."""
    even_code, odd_code = denormals(words, STEP, BITS)
    FACTOR: tl.constexpr = 2.0 ** (PRESCALE.value - field(STEP, BITS)[1])
    new_dots = ()
    new_sums = ()
    for m in tl.static_range(len(dots)):
        even, odd = _load_pairs(x + m * K, slab, STEP, even_code.shape[1], K, MASKED)
        new_sums = new_sums + (sums[m] + (even + odd),)
        even = tl.broadcast_to((even * FACTOR)[:, :, None, :], even_code.shape)
        odd = tl.broadcast_to((odd * FACTOR)[:, :, None, :], odd_code.shape)
        new_dots = new_dots + (tl.fma(odd_code, odd, tl.fma(even_code, even, dots[m])),)
    return new_dots, new_sums


@triton.jit
def _load_pairs(x, slab, STEP: tl.constexpr, LANE_ROWS: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):
    """float32 [slabs, lane rows, 16] twice: x at the even and at the odd features of a step, the same in every row."""
    feature = slab[:, None, None] * SLAB + STEP * STEP_FEATURES + tl.arange(0, STEP_FEATURES)[None, None, :]
    feature = tl.broadcast_to(feature, [slab.shape[0], LANE_ROWS, STEP_FEATURES])
    if MASKED:
        values = tl.load(x + feature, mask=feature < K, other=0.0)
    else:
        values = tl.load(x + feature)
    return tl.split(tl.reshape(values.to(tl.float32), [slab.shape[0], LANE_ROWS, COLUMNS, 2]))


@triton.jit
def _sum_columns(t):
    """[…, 16] → […, 4]: over the four columns of a thread."""
    return tl.sum(tl.reshape(t, t.shape[:-1] + [4, 4]), axis=len(t.shape))
