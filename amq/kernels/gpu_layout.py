"""The layout of prepared weights on a GPU, shared by the Triton and the CUDA kernels.

A weight is cut into *tiles* of 8 output rows and *slabs* of 512 input features. One slab of one tile in a format of b
bits is b *planes*; a plane is 8 rows × 16 columns of 32-bit words, 512 bytes. So one warp reads a plane with one
128-bit load per lane, lane 4·row + column/4, as tensor-core fragments want it, and every byte of a cache line is used.

Each (row, column) of a slab owns 32 codes, in *byte words*: 32-bit words whose four bytes hold the same bit fields.
With F = 8 // b fields of b bits in a byte, code (i, h, c, p), 0 ≤ i < 8, h and p in {0, 1}, 0 ≤ c < 16, is

    input feature   512·slab + 64·i + 32·h + 2·c + p
    where           byte word i // F of column c, byte h + 2·p, bits from (i % F)·b on

so that one shift and one mask give a pair of neighbouring features in the two halves of a word (fp16 fragments), or
four codes in its bytes (int8 fragments); and 32 neighbouring features, never more than a group, share (i, h). Byte
word w < b is plane w. Where F·b < 8, the spare top bits of the bytes, plane 0's lowest, are a stream that holds the
other 32/(4·F) − b byte words, F·b bits of each byte at a time.

A last slab of fewer features keeps only the planes that hold some. Missing rows, and features past the end of a row,
have code 0, scale 0 and zero point 0.

    data = codes        uint32 [tiles, planes of a row, 8, 16]
         ‖ scales       uint32 [tiles, slabs, 8, 512 / group_size]: scale (fp16) below, zero_point (fp16) above
         ‖ slack        the planes that the last slab lacks, so that a kernel may read them and ignore what it finds
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat, n_groups
from amq.packing import PackedWeight, PreparedWeight, unpack_codes

TILE_ROWS = 8
COLUMNS = 16
SLAB = 512
PLANE_WORDS = TILE_ROWS * COLUMNS
CODES_PER_WORD = 32
"""Codes that one (row, column) of a slab owns."""


@dataclass(frozen=True)
class Layout:
    """The sizes of one prepared weight. bits: of a code; fields: codes in a byte of a byte word."""

    bits: int
    out_features: int
    in_features: int
    group_size: int

    @property
    def fields(self) -> int:
        return 8 // self.bits

    @property
    def byte_words(self) -> int:
        """Byte words of one (row, column) of a slab."""
        return CODES_PER_WORD // (4 * self.fields)

    @property
    def tiles(self) -> int:
        return -(-self.out_features // TILE_ROWS)

    @property
    def slabs(self) -> int:
        return -(-self.in_features // SLAB)

    @property
    def planes(self) -> int:
        """Planes of one tile: `bits` for each full slab, and those of the last one that hold a code."""
        full, rest = divmod(self.in_features, SLAB)
        features_per_word = SLAB // self.byte_words
        return full * self.bits + min(self.bits, -(-rest // features_per_word))

    @property
    def slab_groups(self) -> int:
        return SLAB // self.group_size

    @property
    def code_bytes(self) -> int:
        return 4 * PLANE_WORDS * self.tiles * self.planes

    @property
    def scale_bytes(self) -> int:
        return 4 * TILE_ROWS * self.tiles * self.slabs * self.slab_groups

    @property
    def nbytes(self) -> int:
        return self.code_bytes + self.scale_bytes + 4 * PLANE_WORDS * (self.slabs * self.bits - self.planes)


def layout_of(fmt: BitFormat, out_features: int, in_features: int, group_size: int) -> Layout:
    """The sizes for a dense format (`unsupported_reason` says which are)."""
    return Layout(fmt.bits, out_features, in_features, group_size)


def unsupported_reason(fmt: BitFormat) -> str | None:
    """None if the layout can hold `fmt`, else the reason."""
    if not fmt.is_dense:
        return f"planes hold dense bitstreams only, not {fmt.levels} levels in {fmt.unit_bytes} B"
    return None


def check_data(weight: PreparedWeight, name: str) -> None:
    """That `weight` of the linear `name` holds what its shape says: kernels read that much, whatever is there."""
    shape = (weight.out_features, weight.in_features)
    expected, data = _data_bytes(weight.format, *shape, weight.group_size), weight.data
    if data.dtype != torch.uint8 or tuple(data.shape) != (expected,) or not data.is_contiguous():
        raise AmqError(
            f"{name}: the data of an {weight.format.name} weight {list(shape)} at group {weight.group_size} must be "
            f"uint8 [{expected}], got {data.dtype} {list(data.shape)}; make it with amq.kernels.gpu_layout.prepare"
        )


@lru_cache
def _data_bytes(fmt: BitFormat, out_features: int, in_features: int, group_size: int) -> int:
    return layout_of(fmt, out_features, in_features, group_size).nbytes


def rows(weight: PreparedWeight, ids: Tensor) -> Tensor:
    """Rows `ids` (integers [n]) of a prepared weight, float32 [n, in_features]: bit-equal to those of
    `amq.packing.dequantize`. In plain torch, where no kernel runs: on a CPU, and while torch.compile traces."""
    size = layout_of(weight.format, weight.out_features, weight.in_features, weight.group_size)
    words = weight.data[: size.code_bytes + size.scale_bytes].view(torch.int32)
    planes, scales = words.split([size.code_bytes // 4, size.scale_bytes // 4])
    tile, row = ids // TILE_ROWS, ids % TILE_ROWS
    planes = planes.view(size.tiles, size.planes, TILE_ROWS, COLUMNS)[tile, :, row]
    pairs = scales.view(size.tiles, size.slabs, TILE_ROWS, size.slab_groups)[tile, :, row].contiguous()
    scale, zero_point = (
        part.flatten(1).repeat_interleave(size.group_size, dim=1)
        for part in pairs.view(torch.float16).unflatten(-1, (-1, 2)).float().unbind(-1)
    )
    return ((_codes(planes, size) - zero_point) * scale)[:, : size.in_features]


def _codes(planes: Tensor, size: Layout) -> Tensor:
    """int32 [n, planes, 16] of some rows → codes, float32 [n, slabs · 512]: the inverse of `_planes`."""
    missing = size.slabs * size.bits - size.planes
    words = torch.nn.functional.pad(planes, (0, 0, 0, missing)).unflatten(1, (size.slabs, size.bits))
    words = _unfold_spare(words, size)
    field, half, pair = (torch.arange(n, device=planes.device) for n in (size.fields, 2, 2))
    shifts = size.bits * field.view(-1, 1, 1, 1) + 8 * half.view(-1, 1, 1) + 16 * pair  # f, h, c, p
    codes = words[..., None, None, :, None] >> shifts & (1 << size.bits) - 1  # [n, slabs, w, f, h, c, p]
    return codes.flatten(1).float()


def _unfold_spare(planes: Tensor, size: Layout) -> Tensor:
    """[…, planes, 16] → […, byte words, 16]: the inverse of `_fold_spare`."""
    used = size.fields * size.bits
    found = torch.zeros_like(planes[..., : size.byte_words - size.bits, :])
    for bit in range((size.byte_words - size.bits) * used):
        plane, top = divmod(bit, 8 - used)
        found[..., bit // used, :] |= (planes[..., plane, :] >> (used + top) & 0x01010101) << bit % used
    return torch.cat([planes, found], -2)


PREPARE_ROWS = 512
"""Rows repacked at once: bounds the temporaries (16 bytes per code)."""


def prepare(packed: PackedWeight) -> Tensor:
    """`packed` in this layout: uint8, one dimension, on the device of `packed`."""
    if reason := unsupported_reason(packed.format):
        raise AmqError(f"prepare {packed.format.name} for a GPU: {reason}")
    layout = layout_of(packed.format, packed.out_features, packed.in_features, packed.group_size)
    data = torch.zeros(layout.nbytes, dtype=torch.uint8, device=packed.qweight.device)
    codes = data[: layout.code_bytes].view(torch.int32).view(layout.tiles, layout.planes, TILE_ROWS, COLUMNS)
    scales = data[layout.code_bytes : layout.code_bytes + layout.scale_bytes].view(torch.int32)
    scales = scales.view(layout.tiles, layout.slabs, TILE_ROWS, layout.slab_groups)
    for start in range(0, packed.out_features, PREPARE_ROWS):
        part = packed.rows(start, start + PREPARE_ROWS)
        tiles = slice(start // TILE_ROWS, start // TILE_ROWS + -(-part.out_features // TILE_ROWS))
        codes[tiles] = _planes(part, layout)
        scales[tiles] = _scales(part, layout)
    return data


def _planes(part: PackedWeight, layout: Layout) -> Tensor:
    """int32 [tiles, planes, 8, 16] of some rows."""
    codes = unpack_codes(part.qweight, part.format, part.in_features)
    padding = (0, layout.slabs * SLAB - part.in_features, 0, -part.out_features % TILE_ROWS)
    codes = torch.nn.functional.pad(codes, padding).to(torch.int64)
    words, fields = layout.byte_words, layout.fields
    codes = codes.view(-1, TILE_ROWS, layout.slabs, words, fields, 2, COLUMNS, 2)  # … w, f, h, c, p
    field, half, pair = (torch.arange(n, device=codes.device) for n in (fields, 2, 2))
    shifts = layout.bits * field.view(-1, 1, 1, 1) + 8 * half.view(-1, 1, 1) + 16 * pair
    byte_words = (codes << shifts).sum((4, 5, 7))  # [tiles, 8, slabs, words, 16]
    planes = _fold_spare(byte_words, layout)
    planes = planes.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : layout.planes]  # [tiles, planes, 8, 16]
    return torch.where(planes >= 1 << 31, planes - (1 << 32), planes).to(torch.int32)


def _fold_spare(byte_words: Tensor, layout: Layout) -> Tensor:
    """[…, byte words, 16] → […, planes, 16]: the byte words past the last plane go into the planes' spare bits."""
    used = layout.fields * layout.bits
    planes = byte_words[..., : layout.bits, :].clone()
    for bit in range((layout.byte_words - layout.bits) * used):  # bit of the stream of each byte
        source = byte_words[..., layout.bits + bit // used, :]
        plane, top = divmod(bit, 8 - used)
        planes[..., plane, :] |= (source >> bit % used & 0x01010101) << (used + top)
    return planes


def _scales(part: PackedWeight, layout: Layout) -> Tensor:
    """int32 [tiles, slabs, 8, groups of a slab] of some rows."""
    pairs = torch.stack((part.scale, part.zero_point), -1).contiguous().view(torch.int32).squeeze(-1)
    groups = layout.slabs * layout.slab_groups
    padding = (0, groups - n_groups(part.in_features, part.group_size), 0, -part.out_features % TILE_ROWS)
    pairs = torch.nn.functional.pad(pairs, padding)
    return pairs.view(-1, TILE_ROWS, layout.slabs, layout.slab_groups).transpose(1, 2)
