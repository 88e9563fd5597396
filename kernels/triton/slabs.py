"""What every kernel shares: which weight a program works on, and how it reads planes, codes, scales and activations.

The layout of a weight is described in `amq/kernels/gpu_layout.py`; in short, a slab of 512 features of 8 rows is
`bits` planes of [8 rows, 16 columns] 32-bit words, the 32 features 512·slab + 32·step + 2·column + p of one *step* (0
≤ step < 16, p in {0, 1}) lie at one bit position of one byte word, and p = 1 is 16 bits above p = 0.

The last dimension of a tile of words is the 16 columns, four neighbours to a thread; the others are up to the kernel.
Loads clamp the tile instead of masking it: rows past the last tile repeat it, and their results are not stored.
"""

import triton
import triton.language as tl

SLAB = tl.constexpr(512)
STEP_FEATURES = tl.constexpr(32)
TILE_ROWS = tl.constexpr(8)
COLUMNS = tl.constexpr(16)
PLANE_WORDS = tl.constexpr(128)


@triton.constexpr_function
def slabs_of(features):
    """Slabs that hold `features` features, the last one perhaps in part."""
    return -(-features // SLAB.value)


@triton.constexpr_function
def row_planes(features, bits):
    """Planes of one tile: a last slab of fewer features keeps only those that hold some."""
    full, rest = divmod(features, SLAB.value)
    features_per_word = 16 * (8 // bits) * 4
    return full * bits + min(bits, -(-rest // features_per_word))


@triton.constexpr_function
def byte_words_of(bits):
    """Byte words of a row and column: 32 codes, 8 // bits of them in each of four bytes."""
    return 8 // (8 // bits)


@triton.constexpr_function
def spare_field(word, plane, bits):
    """(how far right, mask of a word) to bring spare bits of `plane` to their place in byte word `word`, which is not
    itself a plane; mask 0 where none of them belong there."""
    used = 8 // bits * bits
    to = plane * (8 - used) - (word - bits) * used
    return used - to, sum(0x01010101 << bit for bit in range(used) if to <= bit < to + 8 - used)


@triton.constexpr_function
def field(step, bits):
    """Where the codes of `step` with p = 0 are: (byte word, lowest bit)."""
    word, place = divmod(step // 2, 8 // bits)
    return word, place * bits + step % 2 * 8


@triton.jit
def find_weight(block, data, rows, bits, column, BLOCK_N: tl.constexpr):
    """The weight that row block `block` of the whole launch lies in; those of no rows are never found.

    Returns its data, rows, bits, the block's number in it, and its first column of y.
    """
    at = data[0]
    count = rows[0]
    width = bits[0]
    before = column
    first = 0
    next_block = tl.cdiv(rows[0], BLOCK_N)
    next_column = column + rows[0]
    for s in tl.static_range(1, len(rows)):
        here = block >= next_block
        at = tl.where(here, data[s], at)
        count = tl.where(here, rows[s], count)
        width = tl.where(here, bits[s], width)
        before = tl.where(here, next_column, before)
        first = tl.where(here, next_block, first)
        next_block += tl.cdiv(rows[s], BLOCK_N)
        next_column += rows[s]
    return at, count, width, block - first, before


@triton.jit
def load_byte_words(at, slab, planes_of_row, BITS: tl.constexpr, MASKED: tl.constexpr):
    """The byte words of a tile, a tuple of uint32.

    at: pointers to plane 0 of slab 0; slab: the numbers of those to load, of a shape that broadcasts with that of `at`.
    planes_of_row: `row_planes`.
    MASKED: whether planes of these slabs may be missing; they are then zero.
    """
    at += slab * (BITS * PLANE_WORDS)
    planes = ()
    for plane in tl.static_range(BITS):
        if MASKED:
            there = tl.broadcast_to(slab * BITS + plane < planes_of_row, at.shape)
            word = tl.load(at + plane * PLANE_WORDS, mask=there, other=0)
        else:
            word = tl.load(at + plane * PLANE_WORDS)
        planes = planes + (word.to(tl.uint32, bitcast=True),)
    return _byte_words(planes, BITS)


@triton.jit
def _byte_words(planes, BITS: tl.constexpr):
    """The planes, and the byte words that their spare bits hold."""
    words = planes
    for w in tl.static_range(BITS, byte_words_of(BITS)):
        word = 0
        for plane in tl.static_range(BITS):
            word = _with_spare_bits(word, planes[plane], w, plane, BITS)
        words = words + (word,)
    return words


@triton.jit
def _with_spare_bits(word, bits, WORD: tl.constexpr, PLANE: tl.constexpr, BITS: tl.constexpr):
    SPARE: tl.constexpr = spare_field(WORD, PLANE, BITS)
    if SPARE[1] != 0:
        word |= (bits >> SPARE[0]) & SPARE[1]
    return word


@triton.jit
def tile_pointers(data, rows, row, column, planes, slabs, GROUP_SIZE: tl.constexpr):
    """Pointers to the codes (plane 0) and to the scales (groups 0 to 3, four times) of slab 0 at `row` and `column`.

    row: int […, 1], past the last tile too: that one is then repeated; column: 0 to 15, [1, …, 16].
    planes, slabs: of a row; see `row_planes` and `slabs_of`.
    """
    GROUPS: tl.constexpr = SLAB // GROUP_SIZE
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    tile = tl.minimum(row // TILE_ROWS, tiles - 1).to(tl.int64)
    row = row % TILE_ROWS
    codes = data + tile * (planes * PLANE_WORDS) + (row * COLUMNS + column)
    scales = data + tiles.to(tl.int64) * (planes * PLANE_WORDS)
    return codes, scales + tile * (slabs * TILE_ROWS * GROUPS) + (row * GROUPS + column % 4)


@triton.jit
def load_scales(at, slab, slabs, QUAD: tl.constexpr, GROUP_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """(scale, zero point) of four groups of a slab: a tuple of four int32 […, 4] that repeat them.

    at: pointers to the scales of slab 0. One 128-bit load a thread, and no exchange with the threads of other columns:
    each has loaded what it needs.
    """
    GROUPS: tl.constexpr = SLAB // GROUP_SIZE
    at += slab * (TILE_ROWS * GROUPS) + QUAD * 4
    if MASKED:
        pairs = tl.load(at, mask=tl.broadcast_to(slab < slabs, at.shape), other=0)
    else:
        pairs = tl.load(at)
    even, odd = tl.split(tl.reshape(pairs, pairs.shape[:-1] + [4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def unpack_scales(pair):
    """scale and zero point, float32, of an int32 tensor that holds both as fp16."""
    scale = pair.to(tl.int16).to(tl.float16, bitcast=True)
    zero_point = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero_point.to(tl.float32)


@triton.jit
def denormals(words, STEP: tl.constexpr, BITS: tl.constexpr):
    """The codes of `STEP` with p = 0 and with p = 1 as float32, code · 2^(pos − 149); pos is field(STEP, BITS)[1]."""
    AT: tl.constexpr = field(STEP, BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT[1]
    word = words[AT[0]]
    even = (word & MASK).to(tl.float32, bitcast=True)
    odd = ((word >> 16) & MASK).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def weights(words, pair, STEP: tl.constexpr, BITS: tl.constexpr):
    """(code − zero point) · scale in float32 […, 16] for p = 0 and for p = 1 of `STEP`, bit for bit as in plain torch.

    pair: int32 […, 4], as `load_scales` returns it. Powers of two move between the factors, which changes no rounding:
    the code is made normal by the multiply-add that subtracts the zero point.
    """
    even, odd = denormals(words, STEP, BITS)
    UP: tl.constexpr = 2.0**127
    LEFT_OVER: tl.constexpr = 2.0 ** (field(STEP, BITS)[1] - 149 + 127)
    scale, zero_point = unpack_scales(pair)
    scale = _each_column(scale * (1 / LEFT_OVER))
    zero_point = _each_column(-zero_point * LEFT_OVER)
    up = tl.full(even.shape, UP, tl.float32)
    return tl.fma(even, up, zero_point) * scale, tl.fma(odd, up, zero_point) * scale


@triton.jit
def _each_column(t):
    """[…, 4] → […, 16]: every value for the four columns that it stands for."""
    wide = tl.broadcast_to(tl.expand_dims(t, len(t.shape)), t.shape + [4])
    return tl.reshape(wide, t.shape[:-1] + [COLUMNS])
